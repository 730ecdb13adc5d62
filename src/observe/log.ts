import { pino, type Logger } from 'pino'

export type { Logger } from 'pino'

export type LogLevel = 'error' | 'warn' | 'info' | 'debug' | 'trace' | 'silent'

/** Lines that wait for a slow reader, in bytes; what comes on top is dropped. A node must not stand still for its log. */
const MAX_WAITING_BYTES = 1024 * 1024

/**
 * JSON lines on `destination` (file descriptor; default standard output), secrets never among them. They are written
 * in the background, several at a time when there are many, and the last of them when the process exits.
 */
export function createLogger(options: { level: LogLevel; destination?: number }): Logger {
  const destination = pino.destination({
    dest: options.destination ?? 1,
    sync: false,
    maxLength: MAX_WAITING_BYTES,
  })
  // A full disk under the log is nothing to end for.
  destination.on('error', () => {})
  return pino(
    {
      level: options.level,
      base: null,
      timestamp: pino.stdTimeFunctions.isoTime,
      redact: ['authorization', '*.authorization', 'headers'],
    },
    destination,
  )
}
