import { constants, X509Certificate, type KeyObject } from 'node:crypto'
import { createServer, type Server, type ServerOptions } from 'node:https'
import type { RequestListener } from 'node:http'
import type { Socket } from 'node:net'
import {
  checkServerIdentity,
  type ConnectionOptions,
  type PeerCertificate,
  type SecureContextOptions,
} from 'node:tls'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { authorityOf, issueCertificate, peerIdOf, RENEW_AFTER } from './certificates.ts'
import { OwnCertificates, type OwnCertificatesInit } from './own-certificates.ts'

/** AES of 128 bits first: a third faster than the others where the processor has it (DESIGN 4.2). */
const CIPHERS = 'TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256'
/** A connection that has not shown who it is within this is none, in ms. */
const HANDSHAKE_TIMEOUT = 5000
/** How often it is looked whether the certificate is to be renewed, in ms: also a clock that jumps is noticed. */
const RENEW_CHECK = 60_000

/** A node does not show the identity that it was asked for. */
export class PeerIdentityError extends Error {
  override readonly name = 'PeerIdentityError'
  readonly code = 'ERR_PEER_IDENTITY'
}

export interface PeerTlsComponents {
  readonly log: Logger
  /** The private key that is this node's identity, asked for at the start */
  readonly identity: () => Promise<KeyObject>
  /** Told of everybody who was refused: where from, and why in a word of OpenSSL or of ours */
  readonly onRefused?: (refused: { address: string; reason: string }) => void
}

export interface PeerTlsInit {
  /** Certificates of an authority elsewhere, in place of those that the token makes */
  readonly own?: OwnCertificatesInit | undefined
  /** Peer ids of nodes that are not given anything */
  readonly banned?: readonly string[]
}

/** Whom a connection is meant to reach. */
export interface ExpectedPeer {
  readonly id: string
  readonly name: string
}

/**
 * TLS between nodes: both sides show a certificate, and that of a node has the key of its libp2p identity. Sessions are
 * not resumed, because who resumes one shows nothing.
 */
export class PeerTls implements Startable {
  readonly #log: Logger
  readonly #identity: PeerTlsComponents['identity']
  readonly #onRefused: NonNullable<PeerTlsComponents['onRefused']>
  readonly #own: OwnCertificates | undefined
  readonly #banned: ReadonlySet<string>
  readonly #servers = new Set<Server>()
  #tokens: readonly string[] = []
  #key: KeyObject | undefined
  #issued = 0
  #context: SecureContextOptions | undefined
  /** Connections that were made under what was trusted then */
  #trusted = new WeakSet<Socket>()
  #renewing: NodeJS.Timeout | undefined

  constructor(components: PeerTlsComponents, init: PeerTlsInit = {}) {
    this.#log = components.log
    this.#identity = components.identity
    this.#onRefused = components.onRefused ?? (() => {})
    this.#banned = new Set(init.banned)
    this.#own =
      init.own &&
      new OwnCertificates({ log: components.log, changed: () => this.#apply(true) }, init.own)
  }

  /** Signs with the first of the tokens, and accepts what was signed with any of them. */
  useTokens(tokens: readonly string[]): void {
    this.#tokens = tokens
    if (this.#key !== undefined) this.#apply(true)
  }

  /** @throws {CertificateError} */
  async start(): Promise<void> {
    this.#key = await this.#identity()
    await this.#own?.start()
    this.#apply(false)
    this.#renewing = setInterval(() => {
      if (Math.abs(Date.now() - this.#issued) > RENEW_AFTER) this.#apply(false)
    }, RENEW_CHECK).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#renewing)
    await this.#own?.stop()
  }

  /** A server for nodes that can show who they are. */
  createServer(options: ServerOptions, handler: RequestListener): Server {
    const server = createServer(
      {
        ...options,
        ...this.#started(),
        requestCert: true,
        rejectUnauthorized: true,
        handshakeTimeout: HANDSHAKE_TIMEOUT,
      },
      handler,
    )
    server.on('secureConnection', (socket) => {
      const id = idOf(socket.getPeerX509Certificate())
      if (id !== undefined && this.#banned.has(id)) {
        this.#onRefused({ address: socket.remoteAddress ?? '', reason: 'banned' })
        socket.destroy()
      } else this.#trusted.add(socket)
    })
    server.on('tlsClientError', (error: NodeJS.ErrnoException, socket) => {
      this.#onRefused({ address: socket.remoteAddress ?? '', reason: error.code ?? error.name })
    })
    server.on('close', () => this.#servers.delete(server))
    this.#servers.add(server)
    return server
  }

  /** False for a connection of somebody who was a member when it was made and need not be one any more. */
  isTrusted(socket: Socket): boolean {
    return this.#trusted.has(socket)
  }

  /** For a connection to `peer` and to nobody else. */
  connectTo(peer: ExpectedPeer): ConnectionOptions {
    return {
      ...this.#started(),
      rejectUnauthorized: true,
      checkServerIdentity: (host, certificate) =>
        this.#own === undefined ? checkKey(peer, certificate) : checkName(peer, host, certificate),
    }
  }

  #started(): SecureContextOptions {
    if (this.#context === undefined) throw new PeerIdentityError('this node has no certificate yet')
    return this.#context
  }

  /** `anew`: who is trusted has changed, so that everybody has to show himself again. Transfers go on to their end. */
  #apply(anew: boolean): void {
    this.#context = {
      ...(this.#own?.files() ?? this.#derived()),
      minVersion: 'TLSv1.3',
      ciphers: CIPHERS,
      secureOptions: constants.SSL_OP_NO_TICKET,
    }
    if (anew) this.#trusted = new WeakSet()
    for (const server of this.#servers) {
      server.setSecureContext(this.#context)
      if (anew) server.closeIdleConnections()
    }
  }

  #derived(): SecureContextOptions {
    const authorities = this.#tokens.map(authorityOf)
    const [first] = authorities
    if (first === undefined || this.#key === undefined)
      throw new PeerIdentityError('this node has no token yet')
    this.#issued = Date.now()
    this.#log.debug('certificate was made')
    return {
      key: this.#key.export({ type: 'pkcs8', format: 'pem' }),
      cert: issueCertificate(first, this.#key, this.#issued),
      ca: authorities.map(({ certificate }) => certificate),
    }
  }
}

/** Whoever has the key has the identity: no other member of the mesh can show it. */
function checkKey({ id, name }: ExpectedPeer, { raw }: PeerCertificate): Error | undefined {
  const shown = idOf(new X509Certificate(raw))
  return shown === id
    ? undefined
    : new PeerIdentityError(`${name} was to be ${id}, and ${shown ?? 'somebody else'} answers`)
}

/** Certificates from elsewhere know nothing of peer ids: they have the node's address, or the name that its card has. */
function checkName(
  { name }: ExpectedPeer,
  host: string,
  certificate: PeerCertificate,
): Error | undefined {
  if (checkServerIdentity(host, certificate) === undefined) return undefined
  return checkServerIdentity(name, certificate) === undefined
    ? undefined
    : new PeerIdentityError(`the certificate of ${name} at ${host} is for somebody else`)
}

function idOf(certificate: X509Certificate | undefined): string | undefined {
  return certificate && peerIdOf(certificate.publicKey)
}

/** True for what an error of a handshake says of who was there, and not of the way there. */
export function isIdentityError(error: unknown): boolean {
  if (!(error instanceof Error) || !('code' in error)) return false
  const code = String(error.code)
  return code === 'ERR_PEER_IDENTITY' || /CERT|SELF_SIGNED|ISSUER|SIGNATURE|UNKNOWN_CA/.test(code)
}
