import { setImmediate as breathe } from 'node:timers/promises'
import { BaseDatastore } from 'datastore-core'
import { Key, type Pair, type Query } from 'interface-datastore'

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
/** An estimate, as are most figures of memory in JavaScript. */
const RECORD_BYTES = 200
/** So many are dropped before others get a turn: well below a millisecond. */
const CHUNK = 1000

/** kad-dht's names: the sha2-256 multihash of a key in base32, and who provides it. */
const NAME = /^\/dht\/provider\/(ciq[a-z2-7]{52})(?:\/(\w{1,128}))?$/
/** A record's time, which kad-dht looks at in its search for expired ones only; here that finds none. */
const VALUE = Uint8Array.of(0)

interface Provider {
  readonly id: string
  records: number
}

/** One node is said to have one key. */
interface Entry {
  readonly key: string
  readonly provider: Provider
  /** In the process' seconds: the clock may jump */
  at: number
  /** Of the same key */
  next: Entry | undefined
  older: Entry | undefined
  newer: Entry | undefined
}

interface RecordStoreInit {
  /** {@link RECORD_LIFE_MS} by default */
  readonly lifeMs?: number | undefined
  readonly maxRecords?: number | undefined
  readonly maxRecordsOfProvider?: number
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
  readonly #byKey = new Map<string, Entry>()
  readonly #providers = new Map<string, Provider>()
  #oldest: Entry | undefined
  #newest: Entry | undefined
  #size = 0
  #refused = 0

  constructor(init: RecordStoreInit = {}) {
    super()
    this.#life = (init.lifeMs ?? RECORD_LIFE_MS) / SECOND
    this.#max = init.maxRecords ?? MAX_RECORDS
    this.#maxOfProvider = init.maxRecordsOfProvider ?? MAX_RECORDS_OF_PROVIDER
  }

  /** How many records there are, the memory they take, and how many were not kept since the start. */
  stats(): { records: number; bytes: number; refused: number } {
    return { records: this.#size, bytes: this.#size * RECORD_BYTES, refused: this.#refused }
  }

  /** What cannot be kept is passed over: an error would make kad-dht drop the sender's other records as well. */
  override put(name: Key): Key {
    const [, key, provider] = NAME.exec(name.toString()) ?? []
    if (key === undefined || provider === undefined) this.#refused += 1
    else this.#put(key, provider)
    return name
  }

  override get(name: Key): Uint8Array {
    const [, key = '', provider = ''] = NAME.exec(name.toString()) ?? []
    if (this.#find(key, provider) === undefined) throw new RecordNotFoundError('no such record')
    return VALUE
  }

  override delete(name: Key): void {
    const [, key = '', provider = ''] = NAME.exec(name.toString()) ?? []
    const entry = this.#find(key, provider)
    if (entry !== undefined) this.#drop(entry)
  }

  /** Records of the key that the prefix names. Any other prefix is kad-dht's search for expired ones: they are dropped. */
  override async *query({ prefix }: Query): AsyncGenerator<Pair> {
    const [, key] = NAME.exec(prefix ?? '') ?? []
    if (key === undefined) {
      while (this.#expire(CHUNK)) await breathe()
      return
    }
    const names: Key[] = []
    for (let entry = this.#byKey.get(key); entry !== undefined; entry = entry.next) {
      if (!this.#isExpired(entry))
        names.push(new Key(`${prefix ?? ''}/${entry.provider.id}`, false))
    }
    for (const name of names) yield { key: name, value: VALUE }
  }

  #put(key: string, providerId: string): void {
    this.#expire(2)
    let others = 0
    for (let entry = this.#byKey.get(key); entry !== undefined; entry = entry.next) {
      if (entry.provider.id === providerId) {
        this.#unlinkAge(entry)
        this.#append(entry)
        return
      }
      others += 1
    }
    const records = this.#providers.get(providerId)?.records ?? 0
    if (others >= MAX_PROVIDERS_OF_KEY || !this.#hasRoom(records)) {
      this.#refused += 1
      return
    }
    let provider = this.#providers.get(providerId)
    if (provider === undefined) {
      provider = { id: copyOf(providerId), records: 0 }
      this.#providers.set(provider.id, provider)
    }
    provider.records += 1
    const next = this.#byKey.get(key)
    const own = next?.key ?? copyOf(key)
    const entry: Entry = { key: own, provider, at: 0, next, older: undefined, newer: undefined }
    this.#byKey.set(own, entry)
    this.#size += 1
    this.#append(entry)
  }

  /** When it is full, who has less than an even share gets the room of the oldest record. */
  #hasRoom(records: number): boolean {
    if (records >= this.#maxOfProvider) return false
    if (this.#size < this.#max) return true
    if (records >= this.#max / (this.#providers.size + 1)) return false
    if (this.#oldest !== undefined) this.#drop(this.#oldest)
    return true
  }

  #find(key: string, provider: string): Entry | undefined {
    let entry = this.#byKey.get(key)
    while (entry !== undefined && entry.provider.id !== provider) entry = entry.next
    return entry
  }

  /** True when there may be more than the `count` it has dropped. */
  #expire(count: number): boolean {
    for (let dropped = 0; dropped < count; dropped += 1) {
      if (this.#oldest === undefined || !this.#isExpired(this.#oldest)) return false
      this.#drop(this.#oldest)
    }
    return true
  }

  #drop(entry: Entry): void {
    this.#unlinkAge(entry)
    this.#size -= 1
    const { provider, key, next } = entry
    provider.records -= 1
    if (provider.records === 0) this.#providers.delete(provider.id)
    let before = this.#byKey.get(key)
    if (before === entry) {
      if (next === undefined) this.#byKey.delete(key)
      else this.#byKey.set(key, next)
      return
    }
    while (before !== undefined && before.next !== entry) before = before.next
    if (before !== undefined) before.next = next
  }

  #append(entry: Entry): void {
    entry.at = now()
    entry.older = this.#newest
    if (this.#newest === undefined) this.#oldest = entry
    else this.#newest.newer = entry
    this.#newest = entry
  }

  #unlinkAge(entry: Entry): void {
    const { older, newer } = entry
    if (older === undefined) this.#oldest = newer
    else older.newer = newer
    if (newer === undefined) this.#newest = older
    else newer.older = older
    entry.older = undefined
    entry.newer = undefined
  }

  #isExpired({ at }: Entry): boolean {
    return now() - at > this.#life
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

/** A part of a string holds on to the whole of it. */
function copyOf(text: string): string {
  return Buffer.from(text, 'latin1').toString('latin1')
}
