import { setTimeout as delay } from 'node:timers/promises'
import type { MessageInitShape } from '@bufbuild/protobuf'
import { isDigest, type Digest } from '../../oci/digest.ts'
import { StoreUnavailableError } from '../store.ts'
import {
  WriteAction,
  type WriteContentRequestSchema,
  type WriteContentResponseSchema,
} from './gen/content_pb.ts'
import { GrpcError, GrpcStatus, type Conversation } from './grpc.ts'
import { IngestFile } from './ingest-file.ts'

/** What goes into one message: containerd takes 16 MiB, and each is copied three times on its way. */
const MESSAGE_BYTES = 512 * 1024
/** Messages that may be on their way without an answer. */
const WINDOW = 4

/** After so many bytes the rest goes into containerd's file, where it can be written: the socket is dear. */
const FILE_FROM_BYTES = 4 * 1024 * 1024
/** containerd needs a moment to let go of an ingest that nobody speaks of any more. */
const REOPEN_EVERY_MS = 20
const REOPEN_DEADLINE_MS = 10_000

/** A message may wait for a slow disk. */
const WRITE_DEADLINE_MS = 60_000
/** At the commit all bytes are synced to it. */
const COMMIT_DEADLINE_MS = 300_000

/** What containerd says of content with another digest, by its status only that something was not as expected. */
const OTHER_DIGEST = /unexpected commit digest (sha\d+:[0-9a-f]+)/

type WriteConversation = Conversation<
  typeof WriteContentRequestSchema,
  typeof WriteContentResponseSchema
>

/** Content on its way into containerd, which has a copy of every byte that was given. */
export class ContentWriter {
  readonly #converse: () => WriteConversation
  readonly #directory: () => Promise<string | undefined>
  readonly #abort: () => Promise<void>
  readonly #translate: (error: unknown) => Promise<unknown>
  readonly #ref: string
  readonly #buffer = Buffer.allocUnsafeSlow(MESSAGE_BYTES)
  #buffered = 0
  #sent = 0
  #unanswered = 0
  #conversation: WriteConversation
  /** Where bytes go after the first ones; null where that cannot be */
  #file: IngestFile | null | undefined

  /** It takes one message to begin. */
  constructor(
    components: {
      converse: () => WriteConversation
      /** containerd's content directory, if it is there */
      directory: () => Promise<string | undefined>
      /** Throws away what containerd has of it */
      abort: () => Promise<void>
      translate: (error: unknown) => Promise<unknown>
    },
    { ref }: { ref: string },
  ) {
    this.#converse = components.converse
    this.#directory = components.directory
    this.#conversation = this.#converse()
    this.#abort = components.abort
    this.#translate = components.translate
    this.#ref = ref
    this.#send({ action: WriteAction.STAT })
  }

  /**
   * To be called first, or not at all: goes on with what containerd has by this name.
   * @returns how many bytes that are
   * @throws {StoreFullError | StoreUnavailableError}
   */
  async resume(): Promise<number> {
    // What was asked for with the first message: a call that is cancelled before it has begun is sent nevertheless, and keeps the ingest.
    const { offset } = await this.#granted()
    this.#sent = Number(offset)
    return this.#sent
  }

  /** Ends it; containerd keeps what it has until its lease ends. */
  async suspend(): Promise<void> {
    try {
      if (this.#buffered > 0) this.#flush()
      while (this.#unanswered > 0) await this.#answer(WRITE_DEADLINE_MS)
    } catch {
      // Then it has less of it.
    }
    this.#conversation.close()
    await this.#file?.close().catch(() => {})
  }

  /**
   * Takes a copy; resolves when there is room for more.
   * @throws {StoreFullError | StoreUnavailableError}
   */
  async write(chunk: Uint8Array): Promise<void> {
    if (this.#file === undefined && this.#sent >= FILE_FROM_BYTES) await this.#goOnInFile()
    if (this.#file) {
      await this.#file.write(chunk)
      this.#sent += chunk.length
      return
    }
    for (let offset = 0; offset < chunk.length;) {
      const part = chunk.subarray(offset, offset + MESSAGE_BYTES - this.#buffered)
      this.#buffer.set(part, this.#buffered)
      this.#buffered += part.length
      offset += part.length
      if (this.#buffered === MESSAGE_BYTES) this.#flush()
      while (this.#unanswered > WINDOW) await this.#answer(WRITE_DEADLINE_MS)
    }
  }

  /**
   * The sha256 of all that was given, as containerd has received it.
   * @throws {StoreFullError | StoreUnavailableError}
   */
  async digest(): Promise<string> {
    if (this.#file) return this.#reopen()
    if (this.#buffered > 0) this.#flush()
    this.#send({ action: WriteAction.STAT })
    let digest = ''
    while (this.#unanswered > 0) ({ digest } = await this.#answer(WRITE_DEADLINE_MS))
    return digest
  }

  /**
   * Makes content of it, synced to disk; only after {@link digest}.
   * @returns `exists` when there is content with this digest already, which stays as it is, whatever was written; the
   * digest that was found when it is another
   * @throws {StoreFullError | StoreUnavailableError}
   */
  async commit(
    digest: Digest,
    labels: Readonly<Record<string, string>>,
  ): Promise<'committed' | 'exists' | Digest> {
    const offset = BigInt(this.#sent)
    this.#send({ action: WriteAction.COMMIT, offset, total: offset, expected: digest, labels })
    try {
      await this.#conversation.answer({ deadlineMs: COMMIT_DEADLINE_MS })
      return 'committed'
    } catch (error) {
      if (error instanceof GrpcError) {
        if (error.status === GrpcStatus.ALREADY_EXISTS) return 'exists'
        const found = OTHER_DIGEST.exec(error.message)?.[1] ?? ''
        if (isDigest(found)) return found
      }
      throw await this.#translate(error)
    } finally {
      this.#conversation.close()
    }
  }

  /** Ends it, and throws away what containerd has of it. */
  async abort(): Promise<void> {
    this.#conversation.close()
    await this.#file?.close().catch(() => {})
    await this.#abort()
  }

  /** Lets go of the ingest and writes into its file from now on; where that cannot be, goes on as before. */
  async #goOnInFile(): Promise<void> {
    const directory = await this.#directory()
    if (directory === undefined) {
      this.#file = null
      return
    }
    if (this.#buffered > 0) this.#flush()
    while (this.#unanswered > 0) await this.#answer(WRITE_DEADLINE_MS)
    this.#conversation.close()
    this.#file = (await IngestFile.open(directory, this.#ref, this.#sent)) ?? null
    if (this.#file === null) await this.#reopen()
  }

  /**
   * Has containerd go on with the ingest, which it reads and hashes for that.
   * @returns its sha256 digest
   */
  async #reopen(): Promise<string> {
    await this.#file?.close()
    this.#file = null
    const { offset, digest } = await this.#granted({ anew: true })
    if (offset === BigInt(this.#sent)) return digest
    throw new StoreUnavailableError('containerd has not all of what was written')
  }

  /** Waits for the ingest that was asked for, or asks for it `anew`, until whoever had it before has let go of it. */
  async #granted({ anew = false } = {}): Promise<{ offset: bigint; digest: string }> {
    const deadline = performance.now() + REOPEN_DEADLINE_MS
    for (let again = anew; ; again = true) {
      if (again) {
        this.#conversation = this.#converse()
        this.#unanswered = 0
        this.#send({ action: WriteAction.STAT })
      }
      try {
        const answer = await this.#conversation.answer({ deadlineMs: COMMIT_DEADLINE_MS })
        this.#unanswered = 0
        return answer
      } catch (error) {
        const isHeld = error instanceof GrpcError && error.status === GrpcStatus.UNAVAILABLE
        if (!isHeld || performance.now() > deadline) throw await this.#translate(error)
        this.#conversation.close()
        await delay(REOPEN_EVERY_MS)
      }
    }
  }

  #flush(): void {
    const data = this.#buffer.subarray(0, this.#buffered)
    this.#send({ action: WriteAction.WRITE, offset: BigInt(this.#sent), data })
    this.#sent += this.#buffered
    this.#buffered = 0
  }

  #send(request: MessageInitShape<typeof WriteContentRequestSchema>): void {
    this.#conversation.send({ ...request, ref: this.#ref })
    this.#unanswered += 1
  }

  async #answer(deadlineMs: number): Promise<{ digest: string }> {
    try {
      const answer = await this.#conversation.answer({ deadlineMs })
      this.#unanswered -= 1
      return answer
    } catch (error) {
      throw await this.#translate(error)
    }
  }
}
