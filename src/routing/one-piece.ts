import type { ConnectionEncrypter, MessageStream } from '@libp2p/interface'

/**
 * Makes handshakes as `create` does, on connections that get each message in one piece. Noise gives it in two, its length and
 * what is encrypted, and libp2p's TCP writes every piece by itself: two system calls and two packets, for the other side, too.
 */
export function inOnePiece<Components, Extension>(
  create: (components: Components) => ConnectionEncrypter<Extension>,
): (components: Components) => ConnectionEncrypter<Extension> {
  return (components) => {
    const encrypter = create(components)
    return {
      protocol: encrypter.protocol,
      secureInbound: (connection, options) => encrypter.secureInbound(joining(connection), options),
      secureOutbound: (connection, options) =>
        encrypter.secureOutbound(joining(connection), options),
    }
  }
}

function joining(connection: MessageStream): MessageStream {
  const send = connection.send.bind(connection)
  connection.send = (data) => send(data instanceof Uint8Array ? data : data.subarray())
  return connection
}
