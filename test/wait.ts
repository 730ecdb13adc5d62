import { setTimeout as delay } from 'node:timers/promises'

/**
 * Asks `probe` again and again until it answers with something, and returns that. A probe that throws is asked again;
 * what it threw last is the cause of the error at the deadline. That is far off by default: a machine that is busy with
 * something else is slow, and a test that waits for a state costs no more for it.
 */
export async function until<T>(
  probe: () => Promise<T | undefined | false> | T | undefined | false,
  options: { timeoutMs?: number; what?: string } = {},
): Promise<T> {
  const timeoutMs = options.timeoutMs ?? 30_000
  const deadline = performance.now() + timeoutMs
  let cause: unknown
  for (;;) {
    try {
      const answer = await probe()
      if (answer !== undefined && answer !== false) return answer
      cause = undefined
    } catch (error) {
      cause = error
    }
    if (performance.now() > deadline) {
      throw new Error(`not within ${timeoutMs} ms: ${options.what ?? probe.toString()}`, { cause })
    }
    await delay(25)
  }
}
