import { ContentNotFoundError, type ContentSource, type MissReason } from './source.ts'
import { hasCode } from '../system-error.ts'

/** Opens what a request asks for; the one thing the HTTP room knows of all sources. */
export type OpenContent = ContentSource['open']

/**
 * Asks sources in order; the first that has the content answers. Only "not found" moves on, and a store that cannot be
 * reached: it must not keep a pull from the peers, but when nobody has the content it is what the client has to hear.
 */
export function chain(sources: readonly ContentSource[]): OpenContent {
  return async (request, options) => {
    let unavailable: Error | undefined
    let missed: MissReason | undefined
    let said: ContentNotFoundError | undefined
    for (const source of sources) {
      options.signal.throwIfAborted()
      try {
        const content = await source.open(request, options)
        return missed === undefined ? content : { missed, ...content }
      } catch (error) {
        if (error instanceof ContentNotFoundError) {
          missed = error.reason ?? missed
          // What registries say is what people can do something about.
          if (source.name === 'upstream') said = error
        }
        if (hasCode(error, 'ERR_STORE_UNAVAILABLE')) unavailable ??= error
        else if (!hasCode(error, 'ERR_CONTENT_NOT_FOUND')) throw error
      }
    }
    throw unavailable ?? new ContentNotFoundError('no source has it', { cause: said })
  }
}
