import { open, readFile, type FileHandle } from 'node:fs/promises'
import { join } from 'node:path'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { replaceFile } from '../replace-file.ts'
import { hasCode } from '../../system-error.ts'
import type { ClaimBook } from './claim-book.ts'
import type { WrittenClaim } from './signed-claim.ts'

/** It is written anew when it has so many lines more than there are claims. */
const MAX_SURPLUS = 10_000
/** Some 30 MB: more than ever is in it */
const MAX_BYTES = 64 * 1024 * 1024
/**
 * So often what was deleted long ago is forgotten, in ms, and not sooner after a start: nodes that were all switched off for months tell
 * each other first.
 */
const FORGET_EVERY_MS = 3_600_000
/** The first line: since when deletions are known, and whether all that was pushed is. No line of a claim looks like it. */
const HEAD = /^!forgotten (\d+) (complete|incomplete)$/

/**
 * What was pushed and deleted, as nodes have claimed it, in a file of this node: what somebody was told is done must be so after a
 * crash too, and nodes that are started all at once would not know any more which of two tags is the newer one.
 */
export class ClaimJournal implements Startable {
  readonly #book: ClaimBook
  readonly #log: Logger
  readonly #path: string
  readonly #waiting: string[] = []
  #file: FileHandle | undefined
  #surplus = 0
  /** Lines are gone, so that adding to the file is not enough */
  #replace = false
  #forgetting: NodeJS.Timeout | undefined
  #writing: Promise<void> | undefined

  constructor(components: { book: ClaimBook; log: Logger }, { dataDir }: { dataDir: string }) {
    this.#book = components.book
    this.#log = components.log
    this.#path = join(dataDir, 'claims.log')
  }

  /** Tells the book what is in the file, and from then on keeps what the book is told. */
  async start(): Promise<void> {
    let broken = 0
    const lines = (await this.#read()).split('\n')
    const [, forgotten, complete = 'complete'] = HEAD.exec(lines[0] ?? '') ?? []
    const claims = lines.slice(forgotten === undefined ? 0 : 1).flatMap((line) => {
      const [statement, signature] = line.split(' ').map((text) => Buffer.from(text, 'base64'))
      if (statement !== undefined && signature !== undefined) return [{ statement, signature }]
      broken += Number(line !== '')
      return []
    })
    this.#book.recall(claims, {
      forgotten: Number(forgotten ?? 0),
      complete: complete === 'complete',
    })
    // A crash may leave half a line, the last one.
    if (broken > 1) this.#log.warn({ broken }, 'lines in claims.log are no claims')
    await this.#rewrite()
    this.#book.keep({
      add: (claim) => {
        this.#waiting.push(lineOf(claim))
        this.#flushSoon()
      },
      replace: () => {
        this.#replace = true
        this.#flushSoon()
      },
    })
    this.#forgetting = setInterval(() => this.#book.forgetDeleted(), FORGET_EVERY_MS).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#forgetting)
    this.#book.keep(undefined)
    await this.flush().catch(() => {})
    await this.#file?.close()
    this.#file = undefined
  }

  /**
   * Resolves when everything that the book was told before is on the disk.
   * @throws when it cannot be written
   */
  async flush(): Promise<void> {
    while (this.#writing !== undefined) await this.#writing.catch(() => {})
    if (this.#waiting.length === 0 && !this.#replace) return
    this.#writing = this.#write().finally(() => (this.#writing = undefined))
    await this.#writing
  }

  #flushSoon(): void {
    this.flush().catch((err: unknown) =>
      this.#log.error({ err }, 'claims cannot be written, and are lost when this node stops'),
    )
  }

  async #write(): Promise<void> {
    if (this.#replace || this.#surplus > MAX_SURPLUS) {
      this.#replace = false
      try {
        await this.#rewrite()
      } catch (error) {
        this.#replace = true
        throw error
      }
    }
    const lines = this.#waiting.splice(0)
    try {
      await this.#file?.appendFile(lines.join(''))
      await this.#file?.datasync()
      this.#surplus += lines.length
    } catch (error) {
      this.#waiting.unshift(...lines)
      throw error
    }
  }

  async #rewrite(): Promise<void> {
    await this.#file?.close()
    this.#file = undefined
    const { forgotten, complete } = this.#book
    const head = `!forgotten ${forgotten} ${complete ? 'complete' : 'incomplete'}\n`
    await replaceFile(this.#path, head + [...this.#book.kept()].map(lineOf).join(''))
    this.#file = await open(this.#path, 'a', 0o600)
    this.#surplus = 0
  }

  async #read(): Promise<string> {
    try {
      const text = await readFile(this.#path, 'latin1')
      return text.length > MAX_BYTES ? '' : text
    } catch (error) {
      if (hasCode(error, 'ENOENT')) return ''
      throw error
    }
  }
}

function lineOf({ signed }: WrittenClaim): string {
  const [statement, signature] = [signed.statement, signed.signature].map((bytes) =>
    Buffer.from(bytes).toString('base64'),
  )
  return `${statement} ${signature}\n`
}
