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

/**
 * Makes an attempt anew until it goes undisturbed, for what depends on the time that a process needs: on a machine that is busy with
 * something else the product may be right to find somebody slow who is not. What is wrong in itself is wrong each time, and fails at the
 * deadline. What an attempt puts on the stack goes away with it.
 */
export async function inPeace(
  attempt: (stack: AsyncDisposableStack) => Promise<void>,
  { timeoutMs = 60_000 }: { timeoutMs?: number } = {},
): Promise<void> {
  await until(
    async () => {
      await using stack = new AsyncDisposableStack()
      await attempt(stack)
      return true
    },
    { timeoutMs },
  )
}
