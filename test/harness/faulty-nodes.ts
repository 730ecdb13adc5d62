import { createHash } from 'node:crypto'
import { mkdir, rename, writeFile } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import type { FaultName } from '../fakes/faulty-node.ts'
import { until } from '../wait.ts'
import type { Reading, ReadResult } from './blob-reader.ts'
import type { ClusterNode } from './cluster.ts'
import type { Machine, Program } from './machine.ts'

const CONTROL = 'http://127.0.0.1:7070'
const CONTENT = '/run/content'

/** Content with a name. */
export interface NamedBytes {
  readonly digest: string
  readonly bytes: Uint8Array
}

/** A node that does wrong, and counts how often it did. */
export interface FaultyNode extends AsyncDisposable {
  readonly id: string
  /** Gives it more content, without a fault. Resolves when `seenBy` would ask for it. */
  hold(content: NamedBytes): Promise<void>
  uses(): Promise<number>
}

let markers = 0

/** The process on a machine in which nodes that do wrong live. */
export class FaultyNodes {
  readonly #machine: Machine
  readonly #program: Program

  private constructor(machine: Machine, program: Program) {
    this.#machine = machine
    this.#program = program
  }

  /** `host` lends its machine and its address, and must not run a daemon; the nodes join the mesh at `others`. */
  static async start(host: ClusterNode, others: readonly ClusterNode[]): Promise<FaultyNodes> {
    const script = fileURLToPath(new URL('../fakes/faulty-node.ts', import.meta.url))
    const argv = [script, host.address, ...others.map(({ address }) => address)]
    const program = host.machine.run([process.execPath, ...argv])
    await until(() => program.log().includes('ready'), { what: 'faulty nodes can be made' })
    await mkdir(host.machine.path(CONTENT))
    return new FaultyNodes(host.machine, program)
  }

  /**
   * Lets a new node join that has `content`, with a fault in the part named `faulty` or all of it, and resolves when
   * `seenBy` would ask it.
   */
  async join(init: {
    readonly fault: FaultName
    readonly content: readonly NamedBytes[]
    readonly faulty?: string
    /** Its last content is the manifest with this tag */
    readonly tag?: string
    readonly zone: string
    readonly seenBy: readonly ClusterNode[]
  }): Promise<FaultyNode> {
    const marker = await this.#put(...init.content)
    const content = [...init.content, marker]
    const { id } = await this.#tell<{ id: string }>('join', {
      zone: init.zone,
      fault: init.fault,
      hold: content.map(({ digest }) => digest).join(),
      ...(init.faulty !== undefined && { faulty: init.faulty }),
      ...(init.tag !== undefined && { tag: init.tag }),
    })
    await seen(init.seenBy, marker)
    return {
      id,
      hold: async (more) => {
        const behind = await this.#put(more)
        await this.#tell('hold', { id, hold: `${more.digest},${behind.digest}` })
        await seen(init.seenBy, behind)
      },
      uses: async () => (await this.#tell<{ uses: number }>('uses', { id })).uses,
      [Symbol.asyncDispose]: async () => {
        await this.#tell('leave', { id })
      },
    }
  }

  /** Lays content where the nodes find it, and something small beside it that is never faulty. */
  async #put(...content: readonly NamedBytes[]): Promise<NamedBytes> {
    const bytes = Buffer.from(`marker ${++markers}`)
    const marker = { digest: digestOf(bytes), bytes }
    for (const each of [...content, marker])
      await putFile(this.#machine, `${CONTENT}/${each.digest}`, each.bytes)
    return marker
  }

  async #tell<T>(what: string, query: Readonly<Record<string, string>>): Promise<T> {
    const { status, body } = await this.#machine.get(
      `${CONTROL}/${what}?${new URLSearchParams(query).toString()}`,
    )
    if (status !== 200) throw new Error(`${what}: ${body}\n${this.#program.tail()}`)
    return JSON.parse(body) as T
  }
}

/** Resolves when `nodes` find `marker`, and so what was announced with it. */
async function seen(nodes: readonly ClusterNode[], { digest }: NamedBytes): Promise<void> {
  for (const node of nodes) {
    await until(async () => (await node.machine.get(blobUrl(digest))).status === 200, {
      what: `${node.name} finds what another one has got`,
    })
  }
}

/** Resolves with the line in the log of a node's daemon about the pull of this blob that broke. */
export function lineOfBroken({ daemon }: ClusterNode, digest: string): Promise<string> {
  return until(
    () =>
      daemon
        .log()
        .split('\n')
        .find((line) => line.includes(`"digest":"${digest}"`) && line.includes('"failed"')),
    { what: 'the log says what broke' },
  )
}

/** Where the daemon of a node answers for a blob to that node's own clients. */
export function blobUrl(digest: string): string {
  return `http://127.0.0.1:5001/v2/ksd.test.com/faults/blobs/${digest}`
}

export function digestOf(bytes: Uint8Array): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`
}

/** Starts reading from inside of `machine`. `at` resolves when so many bytes have come, as `reportEvery` permits. */
export function startReading(
  machine: Machine,
  reading: Reading,
): { at(bytes: number): Promise<void>; result(): Promise<ReadResult>; program: Program } {
  const script = fileURLToPath(new URL('blob-reader.ts', import.meta.url))
  const program = machine.run([process.execPath, script, JSON.stringify(reading)])
  const options = { timeoutMs: 60_000, what: `${reading.url} is read` }
  return {
    program,
    async at(bytes) {
      await until(() => program.log().includes(`at ${bytes}\n`) || !program.running(), options)
    },
    async result() {
      const line = await until(() => /^\{.*\}$/m.exec(program.log())?.[0], options)
      return JSON.parse(line) as ReadResult
    },
  }
}

async function putFile(machine: Machine, path: string, bytes: Uint8Array): Promise<void> {
  const file = machine.path(path)
  await writeFile(`${file}.part`, bytes)
  await rename(`${file}.part`, file)
}
