import type { FastifyInstance } from 'fastify'
import { DistributionError } from '../oci/errors.ts'
import { readRequest } from './request-body.ts'

/** What a local client asks for an image by its name. */
export interface PinRequest {
  readonly image: string
  /** Nodes that are to have it */
  readonly replicas: number
}

/** What became of it. */
export interface PinAnswer {
  readonly digest: string
  /** What whoever asked should know */
  readonly warning?: string
}

export interface PinComponents {
  pin(request: PinRequest, options: { signal: AbortSignal }): Promise<PinAnswer>
  unpin(request: Pick<PinRequest, 'image'>): Promise<PinAnswer>
}

const MAX_BYTES = 4096
const MAX_REPLICAS = 100
/** An image may be large, and its source slow. */
const DEADLINE = 3_600_000

/** `POST /shoal/pins` and `DELETE /shoal/pins`, for the commands of the same names; on the local listener alone. */
export function servePins(
  server: FastifyInstance,
  pins: PinComponents,
  limits: { readonly stallTimeout: number },
): void {
  server.route({
    method: ['POST', 'DELETE'],
    url: '/shoal/pins',
    async handler(request, reply) {
      // A page in a browser cannot send this without being asked whether it may.
      if (request.headers['content-type'] !== 'application/json')
        throw new DistributionError('UNSUPPORTED', 'a pin is JSON', { status: 415 })
      const { image, replicas } = parse(
        await readRequest(request.raw, { ...limits, maxBytes: MAX_BYTES }),
      )
      const signal = AbortSignal.timeout(DEADLINE)
      const answer =
        request.method === 'POST'
          ? await pins.pin({ image, replicas }, { signal })
          : await pins.unpin({ image })
      return reply.type('application/json').send(Buffer.from(JSON.stringify(answer)))
    },
  })
}

function parse(bytes: Uint8Array | undefined): PinRequest {
  let json: unknown
  try {
    json = JSON.parse(Buffer.from(bytes ?? []).toString())
  } catch {
    json = undefined
  }
  if (typeof json !== 'object' || json === null || !('image' in json))
    throw new DistributionError('UNSUPPORTED', 'a pin names an image', { status: 400 })
  const { image } = json
  const replicas = 'replicas' in json ? json.replicas : 1
  if (typeof image !== 'string' || typeof replicas !== 'number' || !Number.isInteger(replicas))
    throw new DistributionError('UNSUPPORTED', 'a pin names an image', { status: 400 })
  if (replicas < 1 || replicas > MAX_REPLICAS)
    throw new DistributionError('UNSUPPORTED', `replicas are 1 to ${MAX_REPLICAS}`, { status: 400 })
  return { image, replicas }
}
