import { Command } from 'commander'
import { newToken } from '../trust/token.ts'

/** `shoal token`. */
export function tokenCommand(): Command {
  return new Command('token')
    .description("the cluster's token, which lets nodes in and keeps everybody else out")
    .addCommand(
      new Command('new')
        .description('print a new token, for the file that tokenFile names on all nodes')
        .action(() => {
          process.stdout.write(`${newToken()}\n`)
        }),
    )
}
