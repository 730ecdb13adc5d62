import { create } from '@bufbuild/protobuf'
import { isDigest } from '../../oci/digest.ts'
import { fullName, parseReference, repositoryOf, tagName } from '../../oci/reference.ts'
import {
  KeepRequestSchema,
  type KeepRequest as RequestMessage,
  type PeerMessage,
} from '../gen/peer/v1/peer_pb.ts'
import type { KeepRequest, NamedImage } from '../router.ts'
import { PeerProtocolError } from './frames.ts'

/** Among a card's features: the node keeps images that others ask it to, if they have the cluster's token. */
export const KEEPS = 'keeps'

const MAX_TAGS = 100
const MAX_COPIES = 100

/** @throws {PeerProtocolError} */
export function readKeepRequest(message: RequestMessage): KeepRequest {
  const copies = Math.min(message.copies, MAX_COPIES)
  return { ...readImage(message), ...(copies > 0 && { copies }) }
}

/**
 * A manifest in its repository, and the tags that mean it.
 * @throws {PeerProtocolError}
 */
export function readImage({
  repository,
  digest,
  tags,
}: Pick<RequestMessage, 'repository' | 'digest' | 'tags'>): NamedImage {
  if (!isDigest(digest)) throw new PeerProtocolError('not a digest')
  if (tags.length > MAX_TAGS) throw new PeerProtocolError('too many tags')
  try {
    const named = parseReference(`${repository}@${digest}`)
    const name = { registry: named.registry, repository: named.repository }
    if (fullName(name) !== repository) throw new PeerProtocolError('not a repository')
    const all = tags.map((text) => {
      const parsed = parseReference(text)
      return tagName(parsed.registry, parsed.repository, parsed.tag ?? '')
    })
    if (all.some((tag) => repositoryOf(tag) !== fullName(name)))
      throw new PeerProtocolError('tag of another repository')
    return { repository: name, digest, tags: all }
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
