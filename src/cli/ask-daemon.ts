/** How long the daemon may take to answer, in ms. */
const ANSWER = 10_000

/** No daemon answered, or nothing that a daemon says. */
export class DaemonSilentError extends Error {
  override readonly name = 'DaemonSilentError'
  readonly code = 'ERR_DAEMON_SILENT'
  readonly remedy = 'start it with shoal serve, or name where it is with --listen-admin'
}

/** The daemon will not answer that, and says why. */
export class DaemonRefusedError extends Error {
  override readonly name = 'DaemonRefusedError'
  readonly code = 'ERR_DAEMON_REFUSED'
}

/**
 * What the daemon whose admin listener is at `origin` answers, told by the keys that it has: the daemon is trusted, but not that
 * it is what answers.
 * @throws {DaemonSilentError}
 * @throws {DaemonRefusedError}
 */
export async function askDaemon<T extends object>(
  origin: string,
  path: string,
  keys: readonly (keyof T & string)[],
): Promise<T> {
  let said: unknown
  try {
    const response = await fetch(`${origin}${path}`, { signal: AbortSignal.timeout(ANSWER) })
    said = await response.json()
  } catch (error) {
    throw new DaemonSilentError(`no daemon of Shoal answers at ${origin}`, { cause: error })
  }
  if (has<T>(said, keys)) return said
  if (has<{ error: unknown }>(said, ['error']) && typeof said.error === 'string')
    throw new DaemonRefusedError(said.error)
  throw new DaemonSilentError(`what answers at ${origin} is no daemon of Shoal of this version`)
}

function has<T extends object>(value: unknown, keys: readonly (keyof T & string)[]): value is T {
  return typeof value === 'object' && value !== null && keys.every((key) => key in value)
}
