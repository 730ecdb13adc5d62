import { createProgram } from './program.ts'

// Whoever reads our output may stop reading (`| head`): that ends the output, not the command.
for (const stream of [process.stdout, process.stderr])
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error
  })

const program = createProgram()

try {
  await program.parseAsync()
} catch (error) {
  process.stderr.write(
    `${explain(error, program.opts<{ verbose?: boolean }>().verbose === true)}\n`,
  )
  process.exitCode ??= 1
}

/** What went wrong, in words for the user: errors with a code were written for them, others are our own mistakes. */
function explain(error: unknown, verbose: boolean): string {
  if (!(error instanceof Error)) return `shoal: ${String(error)}`
  if (verbose) return `shoal: ${error.stack ?? error.message}`
  return 'code' in error
    ? `shoal: ${error.message}`
    : `shoal: internal error: ${error.message} (run with --verbose before the command for the stack)`
}
