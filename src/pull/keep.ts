import type { Logger } from '../observe/log.ts'
import type { ByteSink, ContentBody } from '../oci/body.ts'
import type { Descriptor } from '../oci/manifest.ts'
import { tagName } from '../oci/reference.ts'
import type { ContentIngest, WritableStore } from '../store/store.ts'
import type { OpenContent } from './chain.ts'

/**
 * Keeps what passes by: content that came from elsewhere is written into `store` on its way to the client, and a
 * manifest that was asked for by tag gets that tag. For the embedded store; containerd keeps what it pulls by itself.
 *
 * A store that cannot take it (full, broken) costs the copy, never the pull.
 */
export function keep(
  open: OpenContent,
  components: { store: WritableStore; log: Logger; homeRegistry: string },
): OpenContent {
  return async (request, options) => {
    const content = await open(request, options)
    if (content.source === 'local' || content.body === undefined || content.range !== undefined) {
      return content
    }
    const { target } = request
    const tag =
      'tag' in target ? tagName(request.registry, request.repository, target.tag) : undefined
    const kept = async (): Promise<void> => {
      // Content of the home registry is given only where it belongs.
      if (request.registry === components.homeRegistry)
        await components.store.link(content.descriptor.digest, request)
      if (tag !== undefined) await components.store.tag(tag, content.descriptor, { pulled: true })
    }
    const { body, descriptor, verified = false } = content
    return { ...content, body: keepBody(body, { descriptor, verified }, kept, components) }
  }
}

function keepBody(
  body: ContentBody,
  { descriptor, verified }: { descriptor: Descriptor; verified: boolean },
  kept: () => Promise<void>,
  { store, log }: { store: WritableStore; log: Logger },
): ContentBody {
  const giveUp = async (ingest: ContentIngest | undefined, error: unknown): Promise<undefined> => {
    log.warn({ digest: descriptor.digest, err: error }, 'content was not kept')
    await ingest?.abort()
    return undefined
  }
  return {
    length: body.length,
    async writeTo(sink, options) {
      let ingest: ContentIngest | undefined = await store
        .ingest(descriptor, { verified })
        .catch((error: unknown) => giveUp(undefined, error))
      /** What is done with an ingest; should it fail, the pull goes on without one. */
      const storing = async <T>(
        act: (current: ContentIngest) => Promise<T> | undefined,
      ): Promise<T | undefined> => {
        const current = ingest
        try {
          return current && (await act(current))
        } catch (error) {
          ingest = await giveUp(current, error)
          return undefined
        }
      }
      const both: ByteSink = {
        async write(chunk) {
          // Both hold the chunk until they are done with it: the slower of the two sets the pace.
          await Promise.all([sink.write(chunk), storing((current) => current.write(chunk))])
        },
        async lend(use) {
          // What was not verified on its way is hashed by the store, which must see it.
          const copy = await storing(async (current) => (verified ? current.lend?.() : undefined))
          if (ingest !== undefined && copy === undefined) return undefined
          return sink.lend?.((reader) => use(copy === undefined ? reader : { ...reader, copy }))
        },
      }
      try {
        await body.writeTo(both, options)
      } catch (error) {
        await ingest?.abort()
        throw error
      }
      const complete = ingest
      await complete
        ?.commit()
        .then(kept)
        .catch((error: unknown) => giveUp(complete, error))
    },
    discard: () => body.discard(),
  }
}
