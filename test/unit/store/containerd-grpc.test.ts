import { create, fromBinary, toBinary, type MessageInitShape } from '@bufbuild/protobuf'
import {
  Server,
  ServerCredentials,
  status,
  type ServerUnaryCall,
  type ServerWritableStream,
} from '@grpc/grpc-js'
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { promisify } from 'node:util'
import { digestOf } from '../../../src/oci/digest.ts'
import { ContainerdClient } from '../../../src/store/containerd/client.ts'
import {
  Content,
  InfoRequestSchema,
  InfoResponseSchema,
  ReadContentRequestSchema,
  ReadContentResponseSchema,
  type ReadContentRequest,
} from '../../../src/store/containerd/gen/content_pb.ts'
import { GrpcClient, GrpcError, GrpcStatus } from '../../../src/store/containerd/grpc.ts'
import { NotHeldError, StoreUnavailableError } from '../../../src/store/store.ts'

const digest = digestOf('a blob')

/** A content service that says no in all ways, and sends without end. */
class AwkwardServer {
  readonly #server = new Server()
  readonly namespaces: unknown[] = []
  read: ServerWritableStream<ReadContentRequest, Uint8Array> | undefined
  answer: 'size' | 'missing' | 'broken' | 'silent' = 'size'

  async start(socket: string): Promise<void> {
    const { info, read } = Content.method
    this.#server.addService(
      {
        info: {
          path: `/${info.parent.typeName}/${info.name}`,
          requestStream: false,
          responseStream: false,
          requestSerialize: raw,
          requestDeserialize: (bytes: Buffer) => fromBinary(InfoRequestSchema, bytes),
          responseSerialize: raw,
          responseDeserialize: raw,
        },
        read: {
          path: `/${read.parent.typeName}/${read.name}`,
          requestStream: false,
          responseStream: true,
          requestSerialize: raw,
          requestDeserialize: (bytes: Buffer) => fromBinary(ReadContentRequestSchema, bytes),
          responseSerialize: raw,
          responseDeserialize: raw,
        },
      },
      {
        info: (
          call: ServerUnaryCall<unknown, Uint8Array>,
          reply: (error: object | null, value?: Uint8Array) => void,
        ) => {
          this.namespaces.push(...call.metadata.get('containerd-namespace'))
          switch (this.answer) {
            case 'size':
              return reply(null, infoOf({ info: { size: 7n } }))
            case 'missing':
              return reply({ code: status.NOT_FOUND, details: 'no such content' })
            case 'broken':
              return reply({ code: status.INTERNAL, details: 'disk is on fire' })
            case 'silent':
          }
        },
        read: (call: ServerWritableStream<ReadContentRequest, Uint8Array>) => {
          this.read = call
          const message = create(ReadContentResponseSchema, { data: new Uint8Array(1000) })
          const bytes = toBinary(ReadContentResponseSchema, message)
          const send = (): void => {
            while (!call.cancelled && call.write(bytes));
            if (!call.cancelled) call.once('drain', send)
          }
          send()
        },
      },
    )
    await promisify(this.#server.bindAsync.bind(this.#server))(
      `unix:${socket}`,
      ServerCredentials.createInsecure(),
    )
  }

  stop(): void {
    this.#server.forceShutdown()
  }
}

function raw(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes)
}

function infoOf(init: MessageInitShape<typeof InfoResponseSchema>): Uint8Array {
  return toBinary(InfoResponseSchema, create(InfoResponseSchema, init))
}

suite('calls over a unix socket', () => {
  const server = new AwkwardServer()
  let directory: string
  let grpc: GrpcClient
  let client: ContainerdClient

  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'grpc-'))
    const socket = join(directory, 'socket')
    await server.start(socket)
    grpc = new GrpcClient({ socket })
    client = new ContainerdClient({ address: socket, containerdNamespace: 'k8s.io' })
  })
  after(async () => {
    grpc.close()
    client.close()
    server.stop()
    await rm(directory, { recursive: true })
  })

  test('name the containerd namespace', async () => {
    server.answer = 'size'
    assert.equal(await client.size(digest), 7)
    assert.deepEqual(server.namespaces, ['k8s.io'])
  })

  test('that find nothing are an ordinary answer', async () => {
    server.answer = 'missing'
    await assert.rejects(client.size(digest), (error) => {
      assert(error instanceof NotHeldError)
      assert(error.cause instanceof GrpcError)
      assert.equal(error.cause.status, GrpcStatus.NOT_FOUND)
      return true
    })
  })

  test('that fail say what containerd said', async () => {
    server.answer = 'broken'
    await assert.rejects(client.size(digest), (error) => {
      assert(error instanceof StoreUnavailableError)
      assert.match(error.message, /disk is on fire/)
      return true
    })
  })

  test('that get no answer end by their deadline or their signal', async () => {
    server.answer = 'silent'
    await assert.rejects(grpc.call(Content.method.info, { digest }, { deadlineMs: 50 }), {
      status: GrpcStatus.DEADLINE_EXCEEDED,
    })
    const reason = new Error('enough')
    const aborter = new AbortController()
    const call = grpc.call(Content.method.info, { digest }, { signal: aborter.signal })
    setImmediate(() => aborter.abort(reason))
    await assert.rejects(call, reason)
  })

  test('that get no answer in the time that a signal gives mean that containerd is not there', async () => {
    server.answer = 'silent'
    await assert.rejects(client.info(digest, { signal: AbortSignal.timeout(50) }), (error) => {
      assert(error instanceof StoreUnavailableError)
      assert.match(error.message, /does not answer in time/)
      return true
    })
  })

  test('with many messages end on both sides when the loop is left', async () => {
    const aborter = new AbortController()
    let bytes = 0
    for await (const { data } of grpc.stream(Content.method.read, {}, aborter)) {
      bytes += data.length
      if (bytes >= 3000) break
    }
    assert(server.read !== undefined)
    if (!server.read.cancelled) await once(server.read, 'cancelled')
  })

  test('with many messages end with the reason of the signal', async () => {
    const reason = new Error('enough')
    const aborter = new AbortController()
    const read = async (): Promise<void> => {
      for await (const _ of grpc.stream(Content.method.read, {}, aborter)) aborter.abort(reason)
    }
    await assert.rejects(read(), reason)
    assert(server.read !== undefined)
    if (!server.read.cancelled) await once(server.read, 'cancelled')
  })

  test('at which nobody listens say what to do', async () => {
    const missing = new ContainerdClient({
      address: join(directory, 'nothing'),
      containerdNamespace: 'k8s.io',
    })
    await assert.rejects(missing.size(digest), (error) => {
      assert(error instanceof StoreUnavailableError)
      assert.match(error.message, /nothing does not exist: containerd is down/)
      return true
    })
    missing.close()
  })
})
