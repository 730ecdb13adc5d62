import type { FrameHeader, FrameType, yamux } from '@chainsafe/libp2p-yamux'

type Yamux = ReturnType<ReturnType<typeof yamux>>

/** A quarter of the window that streams begin with: whoever sends never waits for room that is there. */
const WORTH_TELLING = 64 * 1024
/** https://github.com/hashicorp/yamux/blob/master/spec.md#type-field */
const WINDOW_UPDATE: FrameType = 1

/**
 * Muxers as `create` makes, which tell how much more may be sent on a stream when that is a good part of its window. Yamux leaves it to the
 * receiver; this one tells it after each message, however short: one packet back, encrypted, for every packet that comes.
 */
export function tellingWindowsRarely(create: () => Yamux): () => Yamux {
  return () => {
    const yamux = create()
    const createStreamMuxer = yamux.createStreamMuxer.bind(yamux)
    yamux.createStreamMuxer = (connection) => {
      const muxer = createStreamMuxer(connection)
      const send: (header: FrameHeader, data?: unknown) => boolean = muxer['sendFrame'].bind(muxer)
      /** By stream, in bytes */
      const untold = new Map<number, number>()
      muxer['sendFrame'] = (header: FrameHeader, data?: unknown): boolean => {
        const { type, flag, streamID } = header
        if (type !== WINDOW_UPDATE) return send(header, data)
        const length = header.length + (untold.get(streamID) ?? 0)
        // Flags begin and end streams.
        if (flag === 0 && length < WORTH_TELLING) {
          untold.set(streamID, length)
          return true
        }
        untold.delete(streamID)
        return send({ ...header, length }, data)
      }
      return muxer
    }
    return yamux
  }
}
