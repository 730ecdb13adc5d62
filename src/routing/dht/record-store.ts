import { setImmediate as breathe } from 'node:timers/promises'
import { BaseDatastore } from 'datastore-core'
import { Key, type Pair, type Query } from 'interface-datastore'
import { base32 } from 'multiformats/bases/base32'
import { KEY_BYTES } from '../mesh/inventory.ts'
import { RecordTable } from './record-table.ts'

const SECOND = 1000
/** So long a record lives in a mesh with Spegel nodes, who say theirs again in time for that, … */
export const RECORD_LIFE_MS = 19 * 60 * SECOND
/** … and among nodes of ours: whoever is gone is told of, and to say everything anew is most of what a node at rest costs. */
export const LONG_RECORD_LIFE_MS = 10 * RECORD_LIFE_MS

/** 5,000 nodes of 20,000 digests each, every one of them kept by 20 of them, come to 400,000 a node. */
const MAX_RECORDS = 500_000
const MAX_RECORDS_OF_PROVIDER = 50_000
/** A lookup's answer names all of them. */
const MAX_PROVIDERS_OF_KEY = 1000
/** So many are dropped before others get a turn: well below a millisecond. */
const CHUNK = 1000

/** kad-dht's names: the sha2-256 multihash of a key in base32, and who provides it. */
const NAME = /^\/dht\/provider\/(ciq[a-z2-7]{52})(?:\/(\w{1,128}))?$/
/** A record's time, which kad-dht looks at in its search for expired ones only; here that finds none. */
const VALUE = Uint8Array.of(0)

/** The sha2-256 multihash begins with its code and its length. */
const SHA2_256 = [0x12, 0x20] as const

/** Who is said to have something. */
interface Provider {
  readonly id: string
  /** What {@link RecordTable} knows it by */
  readonly number: number
  records: number
  /** It said goodbye: its records name nobody, and go when they expire */
  gone: boolean
}

interface RecordStoreInit {
  /** {@link RECORD_LIFE_MS} by default */
  readonly lifeMs?: number | undefined
  readonly maxRecords?: number | undefined
  readonly maxRecordsOfProvider?: number | undefined
}

/**
 * Where kad-dht keeps what other nodes say they have, in memory. Its own way, a list that is searched from end to end,
 * takes 30 ms a question with 100,000 records. Here those of a key are at hand, the oldest go as new ones come, nobody
 * can fill it, and what is no record of content is not kept.
 */
export class RecordStore extends BaseDatastore {
  readonly #max: number
  readonly #maxOfProvider: number
  /** In s */
  readonly #life: number
  /** Times in it are the process' seconds: the clock may jump. */
  readonly #table = new RecordTable()
  readonly #providers = new Map<string, Provider>()
  /** By their numbers; of one that is gone the number is used again */
  readonly #numbered: (Provider | undefined)[] = []
  readonly #freeNumbers: number[] = []
  /** Records of providers that are gone */
  #void = 0
  #refused = 0

  constructor(init: RecordStoreInit = {}) {
    super()
    this.#life = (init.lifeMs ?? RECORD_LIFE_MS) / SECOND
    this.#max = init.maxRecords ?? MAX_RECORDS
    this.#maxOfProvider = init.maxRecordsOfProvider ?? MAX_RECORDS_OF_PROVIDER
  }

  /** How many records there are, the memory their table takes in bytes, and how many were not kept since the start. */
  stats(): { records: number; bytes: number; refused: number } {
    const { size, bytes } = this.#table
    return { records: size - this.#void, bytes, refused: this.#refused }
  }

  /** A node says that it holds these no more: keys as inventories carry them, with which the names of records begin. */
  withdraw(id: string, packed: Uint8Array): void {
    const number = this.#providers.get(id)?.number
    if (number === undefined) return
    for (let offset = 0; offset + KEY_BYTES <= packed.length; offset += KEY_BYTES) {
      // A copy, whose bytes begin where a number may
      const bytes = Uint8Array.from(packed.subarray(offset, offset + KEY_BYTES))
      const key = new Uint32Array(bytes.buffer)
      const row = this.#rowOf(key, number)
      if (row !== undefined) this.#drop(row)
    }
  }

  /** A node says goodbye: what it said is not told any more, until it says it anew. */
  forget(id: string): void {
    const provider = this.#providers.get(id)
    if (provider === undefined) return
    this.#providers.delete(id)
    provider.gone = true
    this.#void += provider.records
  }

  /** What cannot be kept is passed over: an error would make kad-dht drop the sender's other records as well. */
  override put(name: Key): Key {
    const { key, provider } = parse(name.toString())
    if (key === undefined || provider === undefined) this.#refused += 1
    else this.#put(key, provider)
    return name
  }

  override get(name: Key): Uint8Array {
    if (this.#find(name) === undefined) throw new RecordNotFoundError('no such record')
    return VALUE
  }

  override delete(name: Key): void {
    const row = this.#find(name)
    if (row !== undefined) this.#drop(row)
  }

  /** Records of the key that the prefix names. Any other prefix is kad-dht's search for expired ones: they are dropped. */
  override async *query({ prefix = '' }: Query): AsyncGenerator<Pair> {
    const { key } = parse(prefix)
    if (key === undefined) {
      while (this.#expire(CHUNK)) await breathe()
      return
    }
    const names: Key[] = []
    for (const row of this.#table.rowsOf(key)) {
      const provider = this.#numbered[this.#table.provider(row)]
      if (provider?.gone === false && !this.#isExpired(row))
        names.push(new Key(`${prefix}/${provider.id}`, false))
    }
    for (const name of names) yield { key: name, value: VALUE }
  }

  #put(key: Uint32Array, id: string): void {
    this.#expire(2)
    const known = this.#providers.get(id)
    let others = 0
    for (const row of this.#table.rowsOf(key)) {
      if (this.#table.provider(row) === known?.number) {
        this.#table.renew(row, now())
        return
      }
      others += 1
    }
    if (others >= MAX_PROVIDERS_OF_KEY || !this.#hasRoom(known?.records ?? 0)) {
      this.#refused += 1
      return
    }
    // Room may have been made by dropping the last record of this very provider
    const provider = this.#providers.get(id) ?? this.#enter(id)
    provider.records += 1
    this.#table.add(key, provider.number, now())
  }

  /** When it is full, who has less than an even share gets the room of the oldest record. */
  #hasRoom(records: number): boolean {
    if (records >= this.#maxOfProvider) return false
    if (this.#table.size < this.#max) return true
    if (records >= this.#max / (this.#providers.size + 1)) return false
    this.#drop(this.#table.oldest)
    return true
  }

  #enter(id: string): Provider {
    const number = this.#freeNumbers.pop() ?? this.#numbered.length
    const provider = { id: copyOf(id), number, records: 0, gone: false }
    this.#providers.set(provider.id, provider)
    this.#numbered[number] = provider
    return provider
  }

  #find(name: Key): number | undefined {
    const { key, provider = '' } = parse(name.toString())
    const number = this.#providers.get(provider)?.number
    if (key === undefined || number === undefined) return undefined
    return this.#rowOf(key, number)
  }

  #rowOf(key: Uint32Array, provider: number): number | undefined {
    return this.#table.rowsOf(key).find((row) => this.#table.provider(row) === provider)
  }

  /** True when there may be more than the `count` it has dropped. */
  #expire(count: number): boolean {
    for (let dropped = 0; dropped < count; dropped += 1) {
      const { oldest } = this.#table
      if (oldest === 0 || !this.#isExpired(oldest)) return false
      this.#drop(oldest)
    }
    return true
  }

  #drop(row: number): void {
    const provider = this.#numbered[this.#table.provider(row)]
    this.#table.remove(row)
    if (provider === undefined) return
    provider.records -= 1
    if (provider.gone) this.#void -= 1
    if (provider.records > 0) return
    // After a goodbye another one may be there by this id
    if (!provider.gone) this.#providers.delete(provider.id)
    this.#numbered[provider.number] = undefined
    this.#freeNumbers.push(provider.number)
  }

  #isExpired(row: number): boolean {
    return now() - this.#table.at(row) > this.#life
  }
}

/** The store has no such record. */
export class RecordNotFoundError extends Error {
  /** kad-dht knows it by this name. */
  override readonly name = 'NotFoundError'
  readonly code = 'ERR_RECORD_NOT_FOUND'
}

function now(): number {
  return Math.floor(performance.now() / SECOND)
}

/** What kad-dht's name of a record, or of all records of a key, means; nothing if it is not about content. */
function parse(name: string): { key?: Uint32Array; provider?: string | undefined } {
  const [, text, provider] = NAME.exec(name) ?? []
  if (text === undefined) return {}
  let multihash: Uint8Array
  try {
    multihash = base32.baseDecode(text)
  } catch {
    return {}
  }
  if (SHA2_256.some((byte, index) => multihash[index] !== byte)) return {}
  const digest = multihash.slice(SHA2_256.length)
  return { key: new Uint32Array(digest.buffer), provider }
}

/** A part of a string holds on to the whole of it. */
function copyOf(text: string): string {
  return Buffer.from(text, 'latin1').toString('latin1')
}
