import { pino, type Logger } from 'pino'

export type { Logger } from 'pino'

export type LogLevel = 'error' | 'warn' | 'info' | 'debug' | 'trace' | 'silent'

/** Lines that wait for a slow reader, in bytes; what comes on top is dropped. A node must not stand still for its log. */
const MAX_WAITING_BYTES = 1024 * 1024
/**
 * The first line is written at once. Those of the next so many ms go together, or when there are so many bytes of them: each write is
 * a turn of another thread, and a busy node has a thousand lines a second.
 */
const GATHER = { ms: 10, bytes: 16 * 1024 - 1 }
/** Lines that may come at once, in seconds of what may come on average. */
const AT_ONCE = 5

export interface LoggerInit {
  readonly level: LogLevel
  /** A file descriptor; standard output by default */
  readonly destination?: number
  /** Lines a second, on average; without it nothing bounds them */
  readonly maxLines?: number
}

/**
 * JSON lines on `destination`, secrets never among them. They are written in the background, several at a time when there are
 * many, and the last of them when the process exits. Of those that were too many the next line tells how many they were.
 */
export function createLogger({ level, destination: dest = 1, maxLines }: LoggerInit): Logger {
  const destination = pino.destination({
    dest,
    sync: false,
    minLength: GATHER.bytes,
    maxLength: MAX_WAITING_BYTES,
  })
  const budget = maxLines === undefined ? undefined : new LineBudget(maxLines)
  return pino(
    {
      level,
      base: null,
      timestamp: pino.stdTimeFunctions.isoTime,
      redact: ['authorization', '*.authorization', 'headers'],
      ...(budget && {
        hooks: {
          logMethod(args, method) {
            const leftOut = budget.take()
            if (leftOut === undefined) return
            if (leftOut > 0)
              method.apply(this, [{ lines: leftOut }, 'lines of the log were left out'])
            method.apply(this, args)
          },
        },
      }),
    },
    gathered(destination),
  )
}

/** Writes into `destination` so that nothing waits for longer than {@link GATHER}. A timer runs while something waits only. */
function gathered(destination: ReturnType<typeof pino.destination>): pino.DestinationStream & {
  flushSync(): void
} {
  /** Bytes that are not with the kernel */
  let waiting = 0
  let timer: NodeJS.Timeout | undefined
  const flush = (): void => {
    destination.flush()
    timer = setTimeout(() => {
      timer = undefined
      if (waiting > 0) flush()
    }, GATHER.ms).unref()
  }
  const written = (bytes: number): void => {
    waiting = Math.max(0, waiting - bytes)
  }
  destination.on('write', written)
  destination.on('drop', (line: string) => written(Buffer.byteLength(line)))
  // A full disk under the log is nothing to end for. The next line tries again.
  destination.on('error', () => written(waiting))
  return {
    write(line) {
      waiting += Buffer.byteLength(line)
      destination.write(line)
      if (timer === undefined) flush()
    },
    flushSync() {
      destination.flushSync()
      written(waiting)
    },
  }
}

/** How many lines may be written now. */
class LineBudget {
  readonly #perSecond: number
  #left: number
  #at = performance.now()
  #leftOut = 0

  constructor(perSecond: number) {
    this.#perSecond = perSecond
    this.#left = perSecond * AT_ONCE
  }

  /** How many lines were left out before this one; undefined when it is left out itself. */
  take(): number | undefined {
    const now = performance.now()
    const earned = ((now - this.#at) / 1000) * this.#perSecond
    this.#at = now
    this.#left = Math.min(this.#perSecond * AT_ONCE, this.#left + earned)
    if (this.#left < 1) {
      this.#leftOut += 1
      return undefined
    }
    this.#left -= 1
    const before = this.#leftOut
    this.#leftOut = 0
    return before
  }
}
