import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import type { Connection, Libp2p } from '@libp2p/interface'
import { tcp } from '@libp2p/tcp'
import { multiaddr, type Multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import type { Libp2pRouter } from '../../src/routing/libp2p.ts'

const DHT_PROTOCOL = '/shoal/kad/1.0.0'
/** So long the node may take for one message, in ms. */
const ANSWER = 5000
const TRIES = 5

/** Somebody who sends bytes to a node's DHT, whatever becomes of them. */
export class DhtStranger implements AsyncDisposable {
  readonly #node: Libp2p
  readonly #target: readonly Multiaddr[]
  #connection: Connection | undefined

  private constructor(node: Libp2p, target: readonly Multiaddr[]) {
    this.#node = node
    this.#target = target
  }

  static async connect(router: Libp2pRouter): Promise<DhtStranger> {
    const node = await createLibp2p({
      transports: [tcp()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
    })
    return new DhtStranger(
      node,
      router.self().addresses.map((each) => multiaddr(each)),
    )
  }

  /** Sends it on a stream of its own, and waits until the node has read it: it answers, closes, or resets the stream. */
  async send(bytes: Uint8Array): Promise<void> {
    for (let tries = 1; ; tries += 1) {
      try {
        await this.#send(bytes)
        return
      } catch (error) {
        // Whoever says nothing of use for 10 s is cut off, which may be this moment.
        if (tries === TRIES) throw error
        this.#connection?.abort(new Error('begin anew'))
      }
    }
  }

  async #send(bytes: Uint8Array): Promise<void> {
    const signal = AbortSignal.timeout(ANSWER)
    if (this.#connection?.status !== 'open')
      this.#connection = await this.#node.dial([...this.#target], { signal, force: true })
    const stream = await this.#connection.newStream(DHT_PROTOCOL, { signal })
    const { promise, resolve } = Promise.withResolvers<void>()
    for (const event of ['message', 'close', 'remoteCloseWrite'] as const)
      stream.addEventListener(event, () => resolve())
    stream.send(bytes)
    stream.close({ signal }).catch(() => {})
    await promise
    stream.abort(new Error('it has been read'))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#node.stop()
  }
}
