import { Command } from 'commander'
import manifest from '../../package.json' with { type: 'json' }
import { configCommand } from './config.ts'
import { demoCommand } from './demo.ts'
import { doctorCommand } from './doctor.ts'
import { explainCommand } from './explain.ts'
import { installCommand, uninstallCommand } from './install.ts'
import { mirrorCommand } from './mirror.ts'
import { rolloutCommand } from './rollout.ts'
import { serveCommand } from './serve.ts'
import { pinCommand, unpinCommand } from './pin.ts'
import { statusCommand } from './status.ts'
import { tokenCommand } from './token.ts'

// Whoever reads our output may stop reading (`| head`): that ends the output, not the command.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error
})

const program = new Command('shoal')
  .description(
    'Every node of a cluster a small OCI registry: pulls come from this node, from peers, then the upstream',
  )
  .version(manifest.version)
  .option('--verbose', 'print the stack of an error')
  .showHelpAfterError('(run with --help for what there is)')
  .addCommand(serveCommand())
  .addCommand(statusCommand())
  .addCommand(explainCommand())
  .addCommand(pinCommand())
  .addCommand(unpinCommand())
  .addCommand(doctorCommand())
  .addCommand(demoCommand())
  .addCommand(installCommand())
  .addCommand(uninstallCommand())
  .addCommand(mirrorCommand())
  .addCommand(rolloutCommand())
  .addCommand(tokenCommand())
  .addCommand(configCommand())

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
