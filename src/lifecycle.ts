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

/** Why an address cannot be listened on, by the system's code, and what to do. */
const LISTEN_ADVICE: Readonly<Record<string, (key: string) => readonly [string, string]>> = {
  EADDRINUSE: (key) => ['another process listens there', `stop it, or set ${key} to another`],
  EACCES: (key) => [
    'no permission',
    `set ${key} to a port from 1024 on or a directory of this user, or run it as root`,
  ],
  EADDRNOTAVAIL: (key) => ['this node has no such address', `set ${key} to one that it has`],
}

/** An address that cannot be listened on. The message names the configuration key. */
export class ListenError extends Error {
  override readonly name = 'ListenError'
  readonly code = 'ERR_LISTEN'
  readonly remedy: string
  /** `listen` is what cannot be listened on, as text or as a host and a port. */
  constructor(key: string, listen: string | { host: string; port: number }, cause: unknown) {
    const reason = cause instanceof Error ? cause : new Error(String(cause))
    const advice = 'code' in reason ? LISTEN_ADVICE[String(reason.code)] : undefined
    const [why, remedy] = advice?.(key) ?? [reason.message, `set ${key} to another`]
    const where = typeof listen === 'string' ? listen : `${listen.host}:${listen.port}`
    super(`${key}: cannot listen on ${where}: ${why}`, { cause })
    this.remedy = remedy
  }
}
