import { pino, type Logger } from 'pino'

export type { Logger } from 'pino'

export type LogLevel = 'error' | 'warn' | 'info' | 'debug' | 'trace' | 'silent'

/** JSON lines on `destination` (file descriptor; default standard output), secrets never among them. */
export function createLogger(options: { level: LogLevel; destination?: number }): Logger {
  return pino(
    {
      level: options.level,
      base: null,
      timestamp: pino.stdTimeFunctions.isoTime,
      redact: ['authorization', '*.authorization', 'headers'],
    },
    pino.destination({ dest: options.destination ?? 1, sync: true }),
  )
}
