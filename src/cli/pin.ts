import { Command, InvalidArgumentError } from 'commander'
import type { SocketAddress } from '../config/schema.ts'
import { mirrorEndpoint } from '../mirror/certs-dir.ts'
import { addConfigOptions, loadGiven } from './config.ts'

/** The image may have to come first. */
const DEADLINE = 3_600_000

/** The daemon could not do it, or was not there. */
class PinError extends Error {
  override readonly name = 'PinError'
  readonly code = 'ERR_PIN'
}

/** `shoal pin`. */
export function pinCommand(): Command {
  const pin = new Command('pin')
    .description(
      'get an image into the store of this node if it is not there, and keep it on so many nodes',
    )
    .argument('<IMAGE>', 'with its registry, e.g. docker.io/library/alpine:3.20')
    .option('--replicas <N>', 'nodes that are to have it', parseReplicas, 2)
    .action(async (image: string) => {
      const { config } = await loadGiven(pin)
      const { replicas } = pin.opts<{ replicas: number }>()
      const { digest, warning } = await ask(config.listen.local, 'POST', { image, replicas })
      process.stdout.write(`${digest} is kept${warning === undefined ? '' : `: ${warning}`}\n`)
    })
  return addConfigOptions(pin, ['listen.local'])
}

/** `shoal unpin`. */
export function unpinCommand(): Command {
  const unpin = new Command('unpin')
    .description('let an image go on this node when room is needed, as any other that was pulled')
    .argument('<IMAGE>', 'as it was pinned')
    .action(async (image: string) => {
      const { config } = await loadGiven(unpin)
      const { digest } = await ask(config.listen.local, 'DELETE', { image })
      process.stdout.write(`${digest} is kept no longer\n`)
    })
  return addConfigOptions(unpin, ['listen.local'])
}

function parseReplicas(text: string): number {
  const replicas = Number(text)
  if (!/^\d{1,3}$/.test(text) || replicas < 1 || replicas > 100)
    throw new InvalidArgumentError('expected a number from 1 to 100')
  return replicas
}

/** @throws {PinError} */
async function ask(
  listen: SocketAddress,
  method: 'POST' | 'DELETE',
  request: object,
): Promise<{ digest: string; warning?: string }> {
  let answer: unknown
  try {
    const response = await fetch(`${mirrorEndpoint(listen)}/shoal/pins`, {
      method,
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(request),
      signal: AbortSignal.timeout(DEADLINE),
    })
    answer = await response.json()
  } catch (cause) {
    throw new PinError('the daemon on this node does not answer', { cause })
  }
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- either is what the daemon says
  const { errors, ...said } = answer as { errors?: { message: string }[]; digest: string }
  if (errors !== undefined) throw new PinError(errors[0]?.message ?? 'it could not be done')
  return said
}
