/** Something that runs for a while. Both methods may be called again without harm. */
export interface Startable {
  /** Resolves when it does its work; after a failure nothing of it runs. */
  start(): Promise<void>
  /** Resolves when nothing of it runs any more. Never rejects for what was already broken. */
  stop(): Promise<void>
}

/** Starts in order. If one fails, those before it are stopped, last first, and the failure is thrown. */
export async function startAll(parts: readonly Startable[]): Promise<void> {
  const running: Startable[] = []
  try {
    for (const part of parts) {
      await part.start()
      running.push(part)
    }
  } catch (error) {
    await stopAll(running)
    throw error
  }
}

/** Stops in reverse order; one that fails does not keep the others running. */
export async function stopAll(parts: readonly Startable[]): Promise<void> {
  const failures: unknown[] = []
  for (const part of parts.toReversed()) {
    await part.stop().catch((error: unknown) => failures.push(error))
  }
  if (failures.length > 0) throw new AggregateError(failures, 'some parts did not stop cleanly')
}
