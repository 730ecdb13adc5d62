import { generateKeyPairSync } from 'node:crypto'
import { base58btc } from 'multiformats/bases/base58'
import { createLogger } from '../../src/observe/log.ts'
import type { TagName } from '../../src/oci/reference.ts'
import {
  ClaimBook,
  type ClaimBookComponents,
  type ClaimBookInit,
} from '../../src/routing/claims/claim-book.ts'
import type { WrittenClaim } from '../../src/routing/claims/signed-claim.ts'

const silent = createLogger({ level: 'silent' })

/** Every part of what is known. */
export const EVERYTHING = 0xffff_ffff_ffff_ffffn

/** What a node without a network claims, signed with a key of its own. */
export class TestBook extends ClaimBook {
  readonly node: string
  /** What it would have told its peers */
  readonly told: WrittenClaim[] = []

  constructor({
    shares = () => true,
    trusted = false,
    log = silent,
    ...rest
  }: Partial<ClaimBookComponents & ClaimBookInit> = {}) {
    super({ log, shares, ...rest }, { trusted, ...rest })
    const { publicKey, privateKey } = generateKeyPairSync('ed25519')
    const raw = publicKey.export({ type: 'spki', format: 'der' }).subarray(-32)
    const id = Buffer.concat([Buffer.from('002408011220', 'hex'), raw])
    this.node = base58btc.encode(id).slice(1)
    this.sign({ node: this.node, key: privateKey }, (claim) => this.told.push(claim))
  }

  /** Takes all that another knows. */
  hear(other: ClaimBook): void {
    for (const { signed } of other.inParts(EVERYTHING)) this.take(signed)
  }

  /** The newest claim in short. */
  said(tag: TagName): string[] {
    const [newest] = this.of(tag)
    if (newest === undefined) return []
    return newest.kind === 'deleted' ? ['deleted'] : [newest.kind, newest.descriptor.digest]
  }
}
