import { Command } from 'commander'
import type { ServiceAccount } from '../config/kubernetes.ts'
import { takeHeldSocket } from '../held-socket.ts'
import { createLogger } from '../observe/log.ts'
import { addConfigOptions, loadFromCommand } from './config.ts'

/** Where the kubelet puts a pod's credentials, and renews them. */
const SERVICE_ACCOUNT = '/var/run/secrets/kubernetes.io/serviceaccount'

/** `shoal serve`: the daemon, until a signal ends it. */
export function serveCommand(): Command {
  return addConfigOptions(new Command('serve').description('run a node: the daemon')).action(
    async (_options: unknown, command: Command) => {
      const { config, reconsider, written } = await loadFromCommand(command)
      const log = createLogger({ level: config.log.level, maxLines: config.limits.logLines })
      // Not before it is needed: other commands do without the daemon's half second and 60 MB.
      const { createDaemon } = await import('../daemon.ts')
      const ended = Promise.withResolvers<number>()
      let draining = false
      const daemon = createDaemon(config, {
        log,
        serviceAccount: serviceAccount(),
        heldSocket: takeHeldSocket(process, config.listen.local.address),
        reconsider,
        written,
        onTwin: (twin) => {
          process.stderr.write(`shoal: ${twin.message}\n`)
          drain(1)
        },
      })
      const drain = (exitCode: number): void => {
        // The first signal lets pulls finish; whoever sends a second one does not want to wait.
        if (draining) process.exit(exitCode)
        draining = true
        daemon.stop().then(
          () => ended.resolve(exitCode),
          (error: unknown) => {
            log.error({ err: error }, 'stopped with errors')
            ended.resolve(1)
          },
        )
      }
      // Before it starts: it ends in good order at any moment.
      for (const signal of ['SIGINT', 'SIGTERM'] as const) {
        process.on(signal, () => {
          log.info({ signal }, 'stopping')
          drain(0)
        })
      }
      // Node would open its inspector, at which whoever is on this machine runs what he likes.
      process.on('SIGUSR1', () => {})
      process.on('uncaughtException', (error) => {
        log.fatal({ err: error }, 'internal error')
        drain(1)
      })
      await daemon.start()
      process.exitCode = await ended.promise
    },
  )
}

/** The API server that a pod is told of. */
function serviceAccount(): ServiceAccount | undefined {
  const { KUBERNETES_SERVICE_HOST: host, KUBERNETES_SERVICE_PORT: port } = process.env
  return host ? { host, port: Number(port) || 443, directory: SERVICE_ACCOUNT } : undefined
}
