/** What wakes one who rests until there is something to do. A ring while nobody rests is not kept. */
export class Alarm {
  #wake = (): void => {}

  ring(): void {
    this.#wake()
  }

  /** Resolves when it rings, or after so many ms, which may be infinitely many. */
  async rest(ms: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#wake = resolve
    const timer = Number.isFinite(ms) ? setTimeout(resolve, ms).unref() : undefined
    await promise
    clearTimeout(timer)
  }
}
