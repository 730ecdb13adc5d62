import { create } from '@bufbuild/protobuf'
import { isDigest } from '../../oci/digest.ts'
import { fullName, parseReference, repositoryOf, tagName } from '../../oci/reference.ts'
import {
  KeepRequestSchema,
  type KeepRequest as RequestMessage,
  type PeerMessage,
} from '../gen/peer/v1/peer_pb.ts'
import type { KeepRequest } from '../router.ts'
import { PeerProtocolError } from './frames.ts'

/** Among a card's features: the node keeps images that others ask it to, if they have the cluster's token. */
export const KEEPS = 'keeps'

const MAX_TAGS = 100
const MAX_COPIES = 100

/** @throws {PeerProtocolError} */
export function readKeepRequest({ repository, digest, tags, copies }: RequestMessage): KeepRequest {
  if (tags.length > MAX_TAGS) throw new PeerProtocolError('too many tags')
  if (!isDigest(digest)) throw new PeerProtocolError('not a digest')
  try {
    const named = parseReference(`${repository}@${digest}`)
    const name = { registry: named.registry, repository: named.repository }
    const all = tags.map((text) => {
      const parsed = parseReference(text)
      return tagName(parsed.registry, parsed.repository, parsed.tag ?? '')
    })
    if (all.some((tag) => repositoryOf(tag) !== fullName(name)))
      throw new PeerProtocolError('tag of another repository')
    const wanted = Math.min(copies, MAX_COPIES)
    return { repository: name, digest, tags: all, ...(wanted > 0 && { copies: wanted }) }
  } catch (cause) {
    if (cause instanceof PeerProtocolError) throw cause
    throw new PeerProtocolError('not a name', { cause })
  }
}

export function keepMessage({
  repository,
  digest,
  tags,
  copies = 0,
}: KeepRequest): PeerMessage['message'] {
  const value = create(KeepRequestSchema, {
    repository: fullName(repository),
    digest,
    tags: tags.slice(0, MAX_TAGS),
    copies,
  })
  return { case: 'keepRequest', value }
}
