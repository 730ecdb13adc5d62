import { noise } from '@chainsafe/libp2p-noise'
import type { ConnectionEncrypter, Upgrader } from '@libp2p/interface'
import { deriveKey } from '../trust/token.ts'
import { NOISE_CRYPTO } from './noise-crypto.ts'
import { inOnePiece } from './one-piece.ts'

/** What libp2p gives to whoever makes handshakes, and the handshakes it makes. */
export type HandshakeComponents = Parameters<ReturnType<typeof noise>>[0] & {
  readonly upgrader: Pick<Upgrader, 'getConnectionEncrypters'>
}

/** The handshakes of a libp2p node that is open to those who hold one of some tokens; which, may change while it runs. */
export class Handshakes {
  readonly #components: HandshakeComponents

  constructor(components: HandshakeComponents) {
    this.#components = components
  }

  /** From now on a handshake is made with the first token that the other side has too, and with no other. */
  use(tokens: readonly string[]): void {
    const encrypters = this.#components.upgrader.getConnectionEncrypters()
    encrypters.clear()
    for (const token of tokens) {
      const encrypter = this.#withToken(token)
      encrypters.set(encrypter.protocol, encrypter)
    }
  }

  /** Whether a connection was made with a handshake that would still be made. */
  accepts(protocol: string | undefined): boolean {
    return this.#components.upgrader.getConnectionEncrypters().has(protocol ?? '')
  }

  /**
   * Noise for those who hold `token`. Who does not fails in the handshake: it does not know the prologue, without which no
   * side can read the other's first encrypted message. The protocol's name says which token is meant; it tells a stranger
   * nothing about the token itself.
   * @see https://noiseprotocol.org/noise.html#prologue
   */
  #withToken(token: string): ConnectionEncrypter {
    const create = inOnePiece(
      noise({ prologueBytes: deriveKey(token, 'prologue'), crypto: NOISE_CRYPTO }),
    )
    const protocol = `/noise/${deriveKey(token, 'name').toString('hex')}`
    return Object.assign(create(this.#components), { protocol })
  }
}
