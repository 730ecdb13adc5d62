/** One that has not connected by then is no longer waited for alone, in ms. @see https://www.rfc-editor.org/rfc/rfc8305#section-5 */
export const HEAD_START = 250

/** One candidate's attempt; undefined if it has failed, so that the next is asked. */
export type Attempt<C, T> = (
  candidate: C,
  turn: { readonly connected: () => void; readonly signal: AbortSignal },
) => Promise<T | undefined>

/**
 * The first result, asking one candidate after the other: the next when the one before has failed, or has not even
 * connected within {@link HEAD_START}. One that is connected is waited for: a mirror may have to fetch what it is asked
 * for. Who has lost is aborted, and a result that comes too late is given to `discard`.
 */
export async function inTurn<C, T>(
  candidates: Iterable<C>,
  attempt: Attempt<C, T>,
  { discard, signal }: { discard: (result: T) => void; signal: AbortSignal },
): Promise<T | undefined> {
  const won = Promise.withResolvers<T>()
  const running = new Map<AbortController, Promise<void>>()
  let over = false
  const run = (candidate: C, goOn: () => void): void => {
    const own = new AbortController()
    const timer = setTimeout(goOn, HEAD_START)
    const turn = {
      connected: () => clearTimeout(timer),
      signal: AbortSignal.any([signal, own.signal]),
    }
    const ended = attempt(candidate, turn)
      .then(
        (result) => {
          if (result === undefined) return
          if (over) return discard(result)
          over = true
          running.delete(own)
          won.resolve(result)
        },
        (error: unknown) => {
          over = true
          won.reject(error)
        },
      )
      .finally(() => {
        clearTimeout(timer)
        goOn()
      })
    running.set(own, ended)
  }
  try {
    for (const candidate of candidates) {
      const next = Promise.withResolvers<void>()
      run(candidate, next.resolve)
      await Promise.race([next.promise, won.promise])
      if (over) return await won.promise
    }
    await Promise.race([won.promise, Promise.all(running.values())])
    return over ? await won.promise : undefined
  } finally {
    over = true
    for (const own of running.keys()) own.abort()
  }
}
