import { readFile, stat } from 'node:fs/promises'
import { get } from 'node:http'
import { get as getSecurely } from 'node:https'
import { setTimeout as delay } from 'node:timers/promises'
import type { Registries } from '../config/registries.ts'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { hasCode } from '../system-error.ts'
import { readApplied, type Applied } from './applied.ts'
import {
  perform,
  planApply,
  planRestore,
  selectRoutes,
  type Change,
  type MirrorInit,
} from './certs-dir.ts'

/** How often the files and the registry itself are looked at, in ms. */
const INTERVAL = 2000
/** What was written so short a time ago, in ms, may not be all there yet: K3s does not write its files at once. */
const SETTLED = 250
/** How long the registry may take to answer the simplest request, in ms. */
const ANSWER = 2000

export interface MirrorKeeperComponents {
  readonly log: Logger
  /** Where containerd reaches us; asked for only while the keeper runs */
  readonly endpoint: () => string
  /** Why the node cannot do its work, if it knows that itself */
  readonly notReady: () => string | undefined
}

export interface MirrorKeeperInit {
  /** Where `mirror apply` leaves what it was told */
  readonly dataDir: string
  readonly homeRegistry: string
  /** The certificate that answers at our endpoint, if it is an https URL */
  readonly certificate?: string | undefined
  readonly reader: MirrorInit['reader']
  /** How long the registry may be out of order before containerd is no longer sent to it, in ms */
  readonly withdrawAfter: number
  /** In ms */
  readonly interval?: number
}

/** What may change while the keeper runs. */
export interface MirrorRules {
  readonly disableDefaultEndpoint: boolean
  /** Containerd is not to be sent here at all, but to the other endpoints */
  readonly aside: boolean
}

/**
 * Keeps containerd's hosts.toml files as `mirror apply` made them, until `mirror restore`: what is changed or deleted is put
 * back, registries.yaml is followed, and while the registry does not answer it is taken out. Without `mirror apply` nothing
 * is ever written.
 */
export class MirrorKeeper implements Startable {
  readonly #components: MirrorKeeperComponents
  readonly #init: MirrorKeeperInit
  #registries: Registries | undefined
  /** In the last round something went away while it was looked at. */
  #vanished = false
  #rules: MirrorRules = { disableDefaultEndpoint: false, aside: false }
  #kept: Applied | undefined
  #outOfOrderSince: number | undefined
  #withdrawn = false
  /** What was complained of last: it is said once, not every two seconds */
  #complaint = ''
  #stop: AbortController | undefined
  #wake = new AbortController()
  #loop = Promise.resolve()

  constructor(components: MirrorKeeperComponents, init: MirrorKeeperInit) {
    this.#components = components
    this.#init = init
  }

  /** True while containerd is not sent here. */
  get withdrawn(): boolean {
    return this.#withdrawn
  }

  /** Where `mirror apply` wrote, if it did. */
  get certsDir(): string | undefined {
    return this.#kept?.certsDir
  }

  /** Why the files are not as they should be, empty when they are. */
  get complaint(): string {
    return this.#complaint
  }

  /** What registries.yaml says from now on, and how it is meant; before it was read once, no file is touched. */
  update(registries: Registries, rules: MirrorRules): void {
    this.#registries = registries
    this.#rules = rules
    this.#wake.abort()
  }

  async start(): Promise<void> {
    if (this.#stop !== undefined) return
    this.#stop = new AbortController()
    this.#loop = this.#run(this.#stop.signal)
  }

  /** The files stay as they are: a registry that does not run refuses connections, and containerd goes on at once. */
  async stop(): Promise<void> {
    this.#stop?.abort()
    this.#stop = undefined
    await this.#loop
  }

  async #run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      this.#wake = new AbortController()
      try {
        await this.#keep(signal)
        this.#vanished = false
      } catch (error) {
        // Somebody took a file or its directory away this moment, as K3s does: the next round finds what is there then.
        const first = hasCode(error, 'ENOENT') && !this.#vanished
        this.#vanished = first
        if (!first) this.#complain(String(error), { err: error })
      }
      const woken = AbortSignal.any([signal, this.#wake.signal])
      await delay(this.#init.interval ?? INTERVAL, undefined, { signal: woken, ref: false }).catch(
        () => {},
      )
    }
  }

  async #keep(signal: AbortSignal): Promise<void> {
    const { log } = this.#components
    const kept = this.#kept
    const applied = await readApplied(this.#init.dataDir)
    this.#kept = applied
    if (applied === undefined) {
      // It may have come while we were writing: what it took away must not be back.
      if (kept !== undefined) await perform(await planRestore(kept.certsDir))
      this.#withdrawn = false
      return
    }
    if (this.#registries === undefined) return
    const reason = await this.#outOfOrder(signal)
    if (signal.aborted) return
    const now = performance.now()
    this.#outOfOrderSince = reason === undefined ? undefined : (this.#outOfOrderSince ?? now)
    const withdrawn =
      this.#outOfOrderSince !== undefined && now - this.#outOfOrderSince >= this.#init.withdrawAfter
    // Too early to take anything out, and no time to put anything in: it may have been taken out before a restart.
    if (reason !== undefined && !withdrawn) return

    const changes = await this.#plan(applied, this.#registries, withdrawn || this.#rules.aside)
    const wrong = changes.filter(({ before, after, refused }) => before !== after || refused)
    const settled = await Promise.all(wrong.map(({ path }) => isSettled(path)))
    const due = wrong.filter(({ before, after }, index) => before !== after && settled[index])
    await perform(due)
    for (const { path } of due) log.info({ path, withdrawn }, 'hosts.toml put right')
    if (settled.includes(false)) return
    if (withdrawn !== this.#withdrawn) {
      this.#withdrawn = withdrawn
      if (withdrawn) log.error({ reason }, 'out of order, containerd is no longer sent here')
      else log.info('in order again, containerd is sent here')
    }
    const refused = changes.flatMap(({ path, refused: why }) => (why ? `${path} ${why}` : []))
    this.#complain(refused.join(), { refused })
  }

  #plan(applied: Applied, registries: Registries, withdrawn: boolean): Promise<Change[]> {
    const { homeRegistry, reader } = this.#init
    const { disableDefaultEndpoint } = this.#rules
    return planApply(applied.certsDir, {
      endpoint: this.#components.endpoint(),
      certificate: this.#init.certificate,
      homeRegistry,
      routes: selectRoutes(applied.registries, registries, { reader, disableDefaultEndpoint }),
      reader,
      withdrawn,
    })
  }

  /** Why containerd had better not be sent here, undefined if it may. */
  async #outOfOrder(signal: AbortSignal): Promise<string | undefined> {
    const { endpoint, notReady } = this.#components
    return notReady() ?? (await silence(endpoint(), this.#init.certificate, signal))
  }

  #complain(complaint: string, fields: object): void {
    if (complaint !== '' && complaint !== this.#complaint)
      this.#components.log.warn(fields, 'hosts.toml cannot be kept as mirror apply made it')
    this.#complaint = complaint
  }
}

/** Nobody is writing the file this moment; or there is none. */
async function isSettled(path: string): Promise<boolean> {
  const found = await stat(path).catch(() => undefined)
  return found === undefined || Math.abs(Date.now() - found.mtimeMs) > SETTLED
}

/**
 * Why there was no answer, asked as containerd asks: on a connection of its own. Any answer will do: a registry that says
 * it is busy keeps nobody waiting.
 */
async function silence(
  endpoint: string,
  certificate: string | undefined,
  signal: AbortSignal,
): Promise<string | undefined> {
  const { promise, resolve } = Promise.withResolvers<string | undefined>()
  const timeout = AbortSignal.timeout(ANSWER)
  const options = { agent: false, signal: AbortSignal.any([signal, timeout]) }
  const request =
    certificate === undefined
      ? get(`${endpoint}/v2/`, options)
      : getSecurely(`${endpoint}/v2/`, { ...options, ca: await readFile(certificate) })
  request.on('response', (response) => {
    response.destroy()
    resolve(undefined)
  })
  request.on('error', (error) =>
    resolve(timeout.aborted ? `no answer within ${ANSWER} ms` : error.message),
  )
  return promise
}
