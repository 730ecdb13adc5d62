import {
  create,
  fromBinary,
  toBinary,
  type DescMessage,
  type DescMethod,
  type MessageInitShape,
  type MessageShape,
} from '@bufbuild/protobuf'
import { Client, credentials } from '@grpc/grpc-js'
import { ImageService, type Image } from './gen/image_service_pb.ts'

/** How long containerd may take for one call; a pull that hangs is a failed test. */
const DEADLINE_MS = 60_000

/** containerd's CRI plugin as kubelet and crictl use it for images. */
export class CriImages implements Disposable {
  readonly #client: Client

  /** `socket`: containerd's; it need not exist yet. */
  constructor(socket: string) {
    this.#client = new Client(`unix://${socket}`, credentials.createInsecure(), {
      // The name of a socket is no host name, and containerd refuses it as one.
      'grpc.default_authority': 'localhost',
      'grpc.max_reconnect_backoff_ms': 500,
    })
  }

  /** Pulls an image as for a pod. @returns the reference of what was pulled: the image's id */
  async pull(image: string): Promise<string> {
    const { imageRef } = await this.#call(ImageService.method.pullImage, { image: { image } })
    return imageRef
  }

  /** The image as CRI sees it, undefined if there is none. */
  async status(image: string): Promise<Image | undefined> {
    return (await this.#call(ImageService.method.imageStatus, { image: { image } })).image
  }

  async remove(image: string): Promise<void> {
    await this.#call(ImageService.method.removeImage, { image: { image } })
  }

  [Symbol.dispose](): void {
    this.#client.close()
  }

  #call<I extends DescMessage, O extends DescMessage>(
    method: DescMethod & { input: I; output: O },
    request: MessageInitShape<I>,
  ): Promise<MessageShape<O>> {
    const { promise, resolve, reject } = Promise.withResolvers<MessageShape<O>>()
    this.#client.makeUnaryRequest(
      `/${method.parent.typeName}/${method.name}`,
      (message: MessageShape<I>) => Buffer.from(toBinary(method.input, message)),
      (bytes) => fromBinary(method.output, bytes),
      create(method.input, request),
      { deadline: Date.now() + DEADLINE_MS },
      (error, response) => {
        if (response === undefined) reject(error ?? new Error('no response'))
        else resolve(response)
      },
    )
    return promise
  }
}
