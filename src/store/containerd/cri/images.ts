import { GrpcClient } from '../grpc.ts'
import { ImageService, type Image } from './gen/image_service_pb.ts'

/** How long containerd may take for one call, in ms. */
const DEADLINE = { deadlineMs: 60_000 }

/** What a pod shows to registries: its pull secret, as kubelet passes it on. */
export type PodLogin =
  | { readonly username: string; readonly password: string }
  | { readonly identityToken: string }

/** containerd's CRI plugin as kubelet and crictl use it for images. */
export class CriImages implements Disposable {
  readonly #client: GrpcClient

  /** `socket`: containerd's; it need not exist yet. */
  constructor(socket: string) {
    this.#client = new GrpcClient({ socket })
  }

  /**
   * Pulls an image as for a pod, with its login if it has one.
   * @returns the reference of what was pulled: the image's id
   * @throws {GrpcError}
   */
  async pull(image: string, auth?: PodLogin, deadline = DEADLINE): Promise<string> {
    const request = { image: { image }, ...(auth && { auth }) }
    return (await this.#client.call(ImageService.method.pullImage, request, deadline)).imageRef
  }

  /** The image as CRI sees it, undefined if there is none. */
  async status(image: string): Promise<Image | undefined> {
    const request = { image: { image } }
    return (await this.#client.call(ImageService.method.imageStatus, request, DEADLINE)).image
  }

  async remove(image: string): Promise<void> {
    await this.#client.call(ImageService.method.removeImage, { image: { image } }, DEADLINE)
  }

  [Symbol.dispose](): void {
    this.#client.close()
  }
}
