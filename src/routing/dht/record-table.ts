import { randomFillSync } from 'node:crypto'

/** Of a key, as 32-bit words: a SHA-256. */
const KEY_WORDS = 8
/** Of them, those by which it is found; they are what an inventory has of a key. */
const NAME_WORDS = 4
/** The other numbers of a record; each is a column. */
const COLUMNS = 5
const PROVIDER = 0
const AT = 1
/** The next record in the same bucket; of a row that is free, the next free one */
const NEXT = 2
const OLDER = 3
const NEWER = 4
const MIN_ROWS = 1024
/**
 * One random factor a word. The sum of the products says which bucket a key is in; with a fixed function, a peer could
 * send keys that are all in one of them, and each record would be compared with all others.
 */
const FACTORS = randomFillSync(new Uint32Array(NAME_WORDS))

/**
 * Who is said to have which keys, and since when, in order of age: a hash table with chains, in arrays of numbers, 56
 * bytes a row. As objects, records take 200 bytes, and the garbage collection goes through all of them again and again.
 * A row is named by a number that is its own until it is removed; 0 names none.
 */
export class RecordTable {
  /** The first row is not used */
  #rows = MIN_ROWS
  #keys = new Uint32Array(MIN_ROWS * KEY_WORDS)
  #cells = new Uint32Array(MIN_ROWS * COLUMNS)
  #buckets = new Uint32Array(MIN_ROWS)
  /** Rows that were never used begin here */
  #unused = 1
  #free = 0
  #size = 0
  #oldest = 0
  #newest = 0

  get size(): number {
    return this.#size
  }

  /** Of memory that the table takes; it does not shrink. */
  get bytes(): number {
    return this.#keys.byteLength + this.#cells.byteLength + this.#buckets.byteLength
  }

  /** The row that was added or renewed longest ago. */
  get oldest(): number {
    return this.#oldest
  }

  provider(row: number): number {
    return this.#cell(row, PROVIDER)
  }

  /** As it was given when the row was added or renewed. */
  at(row: number): number {
    return this.#cell(row, AT)
  }

  /** Rows of a key, or of those that begin with its first 16 bytes; the newest first. None of them may be removed meanwhile. */
  *rowsOf(key: Uint32Array): Generator<number> {
    for (let row = this.#first(key); row !== 0; row = this.#cell(row, NEXT)) {
      if (this.#isKey(row, key)) yield row
    }
  }

  /** The key is not known to be there with this provider. */
  add(key: Uint32Array, provider: number, at: number): void {
    if (this.#free === 0 && this.#unused === this.#rows) this.#grow()
    let row = this.#free
    if (row === 0) {
      row = this.#unused
      this.#unused += 1
    } else {
      this.#free = this.#cell(row, NEXT)
    }
    this.#keys.set(key, row * KEY_WORDS)
    this.#set(row, PROVIDER, provider)
    this.#enter(row)
    this.#size += 1
    this.#append(row, at)
  }

  /** From now on it is the newest. */
  renew(row: number, at: number): void {
    this.#takeOut(row)
    this.#append(row, at)
  }

  remove(row: number): void {
    this.#takeOut(row)
    const bucket = this.#bucketOf(row * KEY_WORDS, this.#keys)
    const next = this.#cell(row, NEXT)
    let before = this.#buckets[bucket] ?? 0
    if (before === row) {
      this.#buckets[bucket] = next
    } else {
      while (this.#cell(before, NEXT) !== row) before = this.#cell(before, NEXT)
      this.#set(before, NEXT, next)
    }
    this.#set(row, NEXT, this.#free)
    this.#free = row
    this.#size -= 1
  }

  #grow(): void {
    const before = { keys: this.#keys, cells: this.#cells }
    this.#rows *= 2
    this.#keys = new Uint32Array(this.#rows * KEY_WORDS)
    this.#keys.set(before.keys)
    this.#cells = new Uint32Array(this.#rows * COLUMNS)
    this.#cells.set(before.cells)
    this.#buckets = new Uint32Array(this.#rows)
    for (let row = 1; row < this.#unused; row += 1) this.#enter(row)
  }

  /** Puts a row into the bucket of its key. */
  #enter(row: number): void {
    const bucket = this.#bucketOf(row * KEY_WORDS, this.#keys)
    this.#set(row, NEXT, this.#buckets[bucket] ?? 0)
    this.#buckets[bucket] = row
  }

  #append(row: number, at: number): void {
    this.#set(row, AT, at)
    this.#set(row, OLDER, this.#newest)
    this.#set(row, NEWER, 0)
    if (this.#newest === 0) this.#oldest = row
    else this.#set(this.#newest, NEWER, row)
    this.#newest = row
  }

  #takeOut(row: number): void {
    const older = this.#cell(row, OLDER)
    const newer = this.#cell(row, NEWER)
    if (older === 0) this.#oldest = newer
    else this.#set(older, NEWER, newer)
    if (newer === 0) this.#newest = older
    else this.#set(newer, OLDER, older)
  }

  #first(key: Uint32Array): number {
    return this.#buckets[this.#bucketOf(0, key)] ?? 0
  }

  #bucketOf(offset: number, words: Uint32Array): number {
    let sum = 0
    for (let word = 0; word < NAME_WORDS; word += 1) {
      sum += Math.imul(words[offset + word] ?? 0, FACTORS[word] ?? 0) >>> 0
    }
    // The upper bits of a product depend on all bits of its factors, the lower ones do not.
    return Math.floor(((sum >>> 0) / 2 ** 32) * this.#buckets.length)
  }

  #isKey(row: number, key: Uint32Array): boolean {
    for (let word = 0; word < key.length; word += 1) {
      if (this.#keys[row * KEY_WORDS + word] !== key[word]) return false
    }
    return true
  }

  #cell(row: number, column: number): number {
    return this.#cells[row * COLUMNS + column] ?? 0
  }

  #set(row: number, column: number, value: number): void {
    this.#cells[row * COLUMNS + column] = value
  }
}
