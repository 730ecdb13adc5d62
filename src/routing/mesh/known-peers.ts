import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { BoundedMap } from '../../bounded-map.ts'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { isPlausible, parseMultiaddr, toMultiaddr, type SocketAddress } from '../addresses.ts'
import { replaceFile } from '../replace-file.ts'
import { hasCode } from '../../system-error.ts'

/** Where the nodes this one was connected with live in its data directory. */
export const KNOWN_PEERS_FILE = 'peers.json'

const MAX_PEERS = 64
const MAX_ADDRESSES = 4
/** Twice what the bounds above allow to be written */
const MAX_FILE_BYTES = 64 * 1024
/** A peer id of any kind is shorter, and base58 or base32 */
const PEER_ID = /^[a-zA-Z0-9]{1,100}$/
const WRITE_DELAY_MS = 5000

interface KnownPeersInit {
  readonly dataDir: string
  /** Loopback is an address of other nodes */
  readonly loopback: boolean
  /** Changes within this are written at once */
  readonly writeDelayMs?: number
}

/**
 * The nodes this one was connected with, the {@link MAX_PEERS} of late, kept on disk as multiaddrs: ways back into the
 * mesh when no other leads there.
 */
export class KnownPeers implements Startable {
  readonly #log: Logger
  readonly #path: string
  readonly #loopback: boolean
  readonly #writeDelayMs: number
  /** By id, in the order they were last seen */
  readonly #peers = new BoundedMap<string, readonly SocketAddress[]>(MAX_PEERS)
  #written = ''
  #timer: NodeJS.Timeout | undefined
  #writing = Promise.resolve()
  #warned = false
  #stopped = false

  constructor({ log }: { readonly log: Logger }, init: KnownPeersInit) {
    this.#log = log
    this.#path = join(init.dataDir, KNOWN_PEERS_FILE)
    this.#loopback = init.loopback
    this.#writeDelayMs = init.writeDelayMs ?? WRITE_DELAY_MS
  }

  /** Reads the file. One that cannot be read is worth no more than none. */
  async start(): Promise<void> {
    try {
      const file = await stat(this.#path)
      if (!file.isFile()) throw new TypeError('not a file')
      if (file.size > MAX_FILE_BYTES) throw new RangeError(`larger than ${MAX_FILE_BYTES} bytes`)
      const text = await readFile(this.#path, 'utf8')
      for (const [id, addresses] of parse(text)) this.saw(id, addresses)
      this.#written = text
    } catch (error) {
      if (hasCode(error, 'ENOENT')) return
      this.#log.warn({ path: this.#path, err: error }, 'known peers cannot be read and are ignored')
    }
  }

  /** Writes what was not written yet. */
  async stop(): Promise<void> {
    this.#stopped = true
    clearTimeout(this.#timer)
    await this.#write()
  }

  /** This node is, or was until now, connected with `id`, which says that it is at `addresses` (multiaddrs without the id). */
  saw(id: string, addresses: readonly string[]): void {
    const plausible = addresses
      .map((address) => parseMultiaddr(address))
      .filter((address) => address !== undefined)
      .filter(({ host }) => isPlausible(host, { loopback: this.#loopback }))
      .slice(0, MAX_ADDRESSES)
    if (plausible.length === 0 || !PEER_ID.test(id)) return
    this.#peers.set(id, plausible)
    if (this.#stopped) return
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined
      void this.#write()
    }, this.#writeDelayMs).unref()
  }

  /** Where they were. */
  *targets(): Generator<SocketAddress & { id: string }> {
    for (const [id, addresses] of this.#peers) {
      for (const { host, port } of addresses) yield { host, port, id }
    }
  }

  /** One write follows the other; it never rejects. */
  async #write(): Promise<void> {
    this.#writing = this.#writing.then(() => this.#replace())
    await this.#writing
  }

  async #replace(): Promise<void> {
    const peers = Array.from(this.targets(), (target) => toMultiaddr(target, target.id))
    const text = `${JSON.stringify({ peers }, undefined, 2)}\n`
    if (peers.length === 0 || text === this.#written) return
    try {
      await replaceFile(this.#path, text)
      this.#written = text
    } catch (error) {
      if (!this.#warned) {
        this.#warned = true
        this.#log.warn({ path: this.#path, err: error }, 'known peers cannot be written')
      }
    }
  }
}

/** Multiaddrs by the id that each of them names; what is no such thing is left out. */
function parse(text: string): Map<string, string[]> {
  const json: unknown = JSON.parse(text)
  if (typeof json !== 'object' || json === null || !('peers' in json) || !Array.isArray(json.peers))
    throw new TypeError('no list of peers')
  const found = new Map<string, string[]>()
  for (const entry of json.peers) {
    const target = typeof entry === 'string' ? parseMultiaddr(entry) : undefined
    if (target?.id === undefined) continue
    found.set(target.id, [...(found.get(target.id) ?? []), toMultiaddr(target)])
  }
  return found
}
