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
  const program = new Command('shoal')
    .description(
      'Every node of a cluster a small OCI registry: pulls come from this node, from peers, then the upstream',
    )
    .version(manifest.version)
    .option('--verbose', 'when something fails, print where, and what caused it')
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
  speakAlike(program, program.name())
  return program
}

/** What is wrong with a command line is said as everything else that goes wrong: in one line what, in the next what to do. */
function speakAlike(command: Command, name: string): void {
  command
    .configureOutput({ outputError: (text, write) => write(text.replace(/^error: /, 'shoal: ')) })
    .showHelpAfterError(`  => ${name} --help says what there is`)
  for (const below of command.commands) speakAlike(below, `${name} ${below.name()}`)
}
