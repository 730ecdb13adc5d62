import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { request as overHttp, type IncomingMessage } from 'node:http'
import { request as overHttps } from 'node:https'
import { text } from 'node:stream/consumers'
import { Command, InvalidArgumentError } from 'commander'
import type { EffectiveConfig } from '../config/effective.ts'
import { mirrorEndpoint } from '../mirror/certs-dir.ts'
import { imageInFull } from '../oci/reference.ts'
import { addConfigOptions, loadFromCommand } from './config.ts'

/** The image may have to come first. */
const DEADLINE = 3_600_000

/** The daemon could not do it, or was not there. */
class PinError extends Error {
  override readonly name = 'PinError'
  readonly code = 'ERR_PIN'
}

const KEYS = ['listen.local', 'dataDir']

/** `shoal pin`. */
export function pinCommand(): Command {
  const pin = new Command('pin')
    .description(
      'get an image into the store of this node if it is not there, and keep it on so many nodes',
    )
    .argument('<IMAGE>', 'as in docker.io/library/alpine:3.20, or alpine')
    .option('--replicas <N>', 'nodes that are to have it', parseReplicas, 2)
    .action(async (image: string) => {
      const { config } = await loadFromCommand(pin)
      const { replicas } = pin.opts<{ replicas: number }>()
      const name = imageInFull(image)
      const { digest, warning } = await ask(config, 'POST', { image: name, replicas })
      process.stdout.write(`${digest} is kept${warning === undefined ? '' : `: ${warning}`}\n`)
    })
  return addConfigOptions(pin, KEYS)
}

/** `shoal unpin`. */
export function unpinCommand(): Command {
  const unpin = new Command('unpin')
    .description('let an image go on this node when room is needed, as any other that was pulled')
    .argument('<IMAGE>', 'as it was pinned')
    .action(async (image: string) => {
      const { config } = await loadFromCommand(unpin)
      const { digest } = await ask(config, 'DELETE', { image: imageInFull(image) })
      process.stdout.write(`${digest} is kept no longer\n`)
    })
  return addConfigOptions(unpin, KEYS)
}

function parseReplicas(text: string): number {
  const replicas = Number(text)
  if (!/^\d{1,3}$/.test(text) || replicas < 1 || replicas > 100)
    throw new InvalidArgumentError('expected a number from 1 to 100')
  return replicas
}

/**
 * Asks the local listener, at its socket if it has one; where it speaks TLS, nobody but it has its certificate.
 * @throws {PinError}
 */
async function ask(
  { listen, localCertificate }: EffectiveConfig,
  method: 'POST' | 'DELETE',
  question: object,
): Promise<{ digest: string; warning?: string }> {
  let answer: unknown
  try {
    const { address, socket } = listen.local
    const body = Buffer.from(JSON.stringify(question))
    const options = {
      method,
      path: '/shoal/pins',
      // Of a DELETE Node says by itself neither that there is a body nor how long it is.
      headers: { 'content-type': 'application/json', 'content-length': body.length },
      signal: AbortSignal.timeout(DEADLINE),
    }
    const request =
      socket !== undefined
        ? overHttp({ ...options, socketPath: socket })
        : localCertificate === undefined
          ? overHttp(mirrorEndpoint(address), options)
          : overHttps(mirrorEndpoint(address, 'https'), {
              ...options,
              ca: await readFile(localCertificate),
            })
    request.end(body)
    const [response]: IncomingMessage[] = await once(request, 'response')
    answer = JSON.parse(response === undefined ? '' : await text(response))
  } catch (cause) {
    throw new PinError('the daemon on this node does not answer', { cause })
  }
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- either is what the daemon says
  const { errors, ...said } = answer as { errors?: { message: string }[]; digest: string }
  if (errors !== undefined) throw new PinError(errors[0]?.message ?? 'it could not be done')
  return said
}
