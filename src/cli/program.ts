import { Command } from 'commander'
import manifest from '../../package.json' with { type: 'json' }
import { configCommand } from './config.ts'
import { demoCommand } from './demo.ts'
import { doctorCommand } from './doctor.ts'
import { installCommand, uninstallCommand } from './install.ts'
import { mirrorCommand } from './mirror.ts'
import { pinCommand, unpinCommand } from './pin.ts'
import { explainCommand } from './explain.ts'
import { pullCommand } from './pull.ts'
import { rolloutCommand } from './rollout.ts'
import { serveCommand } from './serve.ts'
import { statusCommand } from './status.ts'
import { tokenCommand } from './token.ts'

/** The command line: all commands with their flags and help texts. */
export function createProgram(): Command {
  return new Command('shoal')
    .description(
      'Every node of a cluster a small OCI registry: pulls come from this node, from peers, then the upstream',
    )
    .version(manifest.version)
    .option('--verbose', 'when something fails, print where, and what caused it')
    .showHelpAfterError('(run with --help for what there is)')
    .addCommand(serveCommand())
    .addCommand(statusCommand())
    .addCommand(doctorCommand())
    .addCommand(demoCommand())
    .addCommand(installCommand())
    .addCommand(uninstallCommand())
    .addCommand(mirrorCommand())
    .addCommand(pullCommand())
    .addCommand(pinCommand())
    .addCommand(unpinCommand())
    .addCommand(explainCommand())
    .addCommand(rolloutCommand())
    .addCommand(tokenCommand())
    .addCommand(configCommand())
}
