import { hkdfSync } from 'node:crypto'
import { noise } from '@chainsafe/libp2p-noise'

/**
 * Noise for those who hold `token`. Who does not fails in the handshake: it does not know the prologue, without which no
 * side can read the other's first encrypted message. The protocol's name says which token is meant, so that several are
 * good while one replaces the other; it tells a stranger nothing about the token itself.
 * @see https://noiseprotocol.org/noise.html#prologue
 */
export function noiseWithToken(token: string): ReturnType<typeof noise> {
  const derive = (purpose: string, bytes: number) =>
    Buffer.from(hkdfSync('sha256', token, 'shoal', purpose, bytes))
  const name = `/noise/${derive('noise name', 6).toString('hex')}`
  const create = noise({ prologueBytes: derive('noise prologue', 32) })
  return (components) => Object.assign(create(components), { protocol: name })
}
