import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { ApiServer, ApiServerError, type FindApiAccess } from './api-server.ts'

/** How often it is looked whether the node is ready, in ms. */
const INTERVAL = 1000
/** Said again after so long, in ms, in case somebody took the label away. */
const REPEAT = 60_000
/** What an end may still take, in ms. */
const LAST = 2000

/**
 * Puts a label on this node's own Node while the daemon is ready, and takes it away when it is not and when it ends, so that pods can be
 * kept (`nodeSelector`) from nodes whose pulls would all go to the upstream.
 * @see https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/
 */
export class ReadyLabel implements Startable {
  readonly #log: Logger
  readonly #notReady: () => string | undefined
  readonly #api: ApiServer
  readonly #path: string
  readonly #label: string
  readonly #interval: number
  #stop: AbortController | undefined
  #loop = Promise.resolve()
  #complaint = ''

  constructor(
    { log, notReady }: { readonly log: Logger; readonly notReady: () => string | undefined },
    init: {
      readonly access: FindApiAccess
      readonly nodeName: string
      /** Its key; the value is `true` */
      readonly label: string
      /** In ms */
      readonly interval?: number
    },
  ) {
    this.#log = log
    this.#notReady = notReady
    this.#api = new ApiServer(init.access)
    this.#path = `/api/v1/nodes/${encodeURIComponent(init.nodeName)}`
    this.#label = init.label
    this.#interval = init.interval ?? INTERVAL
  }

  async start(): Promise<void> {
    if (this.#stop !== undefined) return
    this.#stop = new AbortController()
    this.#loop = this.#run(this.#stop.signal)
  }

  async stop(): Promise<void> {
    if (this.#stop === undefined) return
    this.#stop.abort()
    this.#stop = undefined
    await this.#loop
    await this.#say(false, AbortSignal.timeout(LAST))
  }

  async #run(signal: AbortSignal): Promise<void> {
    let said: { ready: boolean; at: number } | undefined
    while (!signal.aborted) {
      const ready = this.#notReady() === undefined
      const now = performance.now()
      if (ready !== said?.ready || now - said.at >= REPEAT)
        said = (await this.#say(ready, signal)) ? { ready, at: now } : undefined
      await delay(this.#interval, undefined, { signal, ref: false }).catch(() => {})
    }
  }

  /** @returns whether the API server took it */
  async #say(ready: boolean, signal: AbortSignal): Promise<boolean> {
    try {
      await this.#api.merge(
        this.#path,
        { metadata: { labels: { [this.#label]: ready ? 'true' : null } } },
        signal,
      )
      this.#complaint = ''
      return true
    } catch (error) {
      if (signal.aborted) return false
      const complaint = String(error)
      const refused = error instanceof ApiServerError && error.status === 403
      const needs = refused ? 'a ClusterRole with patch on nodes' : undefined
      if (complaint !== this.#complaint)
        this.#log.warn({ err: error, label: this.#label, needs }, 'label of the Node not set')
      this.#complaint = complaint
      return false
    }
  }
}
