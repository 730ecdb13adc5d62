import { describeFailure } from './failure.ts'
import { createProgram } from './program.ts'

// Whoever reads our output may stop reading (`| head`): that ends the output, not the command.
for (const stream of [process.stdout, process.stderr])
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error
  })

const program = createProgram()

program.parseAsync().catch((error: unknown) => {
  const verbose = program.opts<{ verbose?: boolean }>().verbose === true
  const { isTTY, columns } = process.stderr
  process.stderr.write(describeFailure(error, { verbose, ...(isTTY && { columns }) }))
  process.exitCode ??= 1
})
