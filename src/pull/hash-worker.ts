import { createHash, type Hash } from 'node:crypto'
import { parentPort } from 'node:worker_threads'

/** What the thread is told: a hash begins over a ring of buffers, a buffer of it is full, it ends, or it is not wanted any more. */
export type HashOrder =
  | {
      readonly id: number
      readonly do: 'begin'
      readonly algorithm: string
      readonly ring: SharedArrayBuffer
    }
  | { readonly id: number; readonly do: 'update'; readonly offset: number; readonly length: number }
  | { readonly id: number; readonly do: 'finish' | 'drop' }

/** What it answers: a buffer may be used again, or this is the hash. */
export interface HashAnswer {
  readonly id: number
  /** In hexadecimal; absent after an update */
  readonly hex?: string
}

const hashes = new Map<number, { hash: Hash; ring: SharedArrayBuffer }>()

parentPort?.on('message', (order: HashOrder) => {
  const { id } = order
  const known = hashes.get(id)
  switch (order.do) {
    case 'begin':
      hashes.set(id, { hash: createHash(order.algorithm), ring: order.ring })
      break
    case 'update':
      known?.hash.update(new Uint8Array(known.ring, order.offset, order.length))
      parentPort?.postMessage({ id } satisfies HashAnswer)
      break
    case 'finish':
      hashes.delete(id)
      parentPort?.postMessage({ id, hex: known?.hash.digest('hex') ?? '' } satisfies HashAnswer)
      break
    case 'drop':
      hashes.delete(id)
      break
  }
})
