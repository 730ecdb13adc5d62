import { readFileSync } from 'node:fs'
import { networkInterfaces, type NetworkInterfaceInfo } from 'node:os'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { isPlausible } from './addresses.ts'

const POLL_MS = 1500

/** What the kernel says of this machine's network. */
export interface NetworkFacts {
  readonly interfaces: NodeJS.Dict<NetworkInterfaceInfo[]>
  /** Text of `/proc/net/route`, empty where there is none */
  readonly routes: string
  /** Text of `/proc/net/ipv6_route`, empty where there is none */
  readonly routes6: string
  /** Text of `/proc/net/if_inet6`, empty where there is none */
  readonly flags6: string
}

interface OwnAddressesInit {
  /** Not looked for but given */
  readonly fixed?: readonly string[] | undefined
  /** Moves this node to its new addresses; if it fails it is called again. */
  readonly apply: (addresses: readonly string[]) => Promise<void>
  /** Reads {@link NetworkFacts}; this machine's by default */
  readonly facts?: () => NetworkFacts
  readonly pollMs?: number
}

/**
 * The addresses of this node, most useful first: those of the default routes, followed while they change. Where there are
 * none any more the last ones stay: a cable that comes back brings them back.
 */
export class OwnAddresses implements Startable {
  readonly #log: Logger
  readonly #init: OwnAddressesInit
  readonly #facts: () => NetworkFacts
  #current: readonly string[]
  #failure: string | undefined
  #timer: NodeJS.Timeout | undefined
  #moving: Promise<void> | undefined

  constructor({ log }: { readonly log: Logger }, init: OwnAddressesInit) {
    this.#log = log
    this.#init = init
    this.#facts = init.facts ?? networkFacts
    this.#current = init.fixed ?? chooseAddresses(this.#facts())
  }

  /** Those that count now. */
  get current(): readonly string[] {
    return this.#current
  }

  async start(): Promise<void> {
    if (this.#init.fixed !== undefined) return
    if (this.#current.length === 0) {
      this.#log.warn('no default route, so no address for other nodes yet; waiting for one')
    }
    this.#timer ??= setInterval(() => {
      this.#moving ??= this.#look().finally(() => (this.#moving = undefined))
    }, this.#init.pollMs ?? POLL_MS).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#timer)
    this.#timer = undefined
    await this.#moving
  }

  async #look(): Promise<void> {
    const before = this.#current
    const addresses = chooseAddresses(this.#facts(), before)
    if (addresses.length === 0 || addresses.join() === before.join()) return
    try {
      await this.#init.apply(addresses)
      this.#current = addresses
      this.#failure = undefined
      this.#log.info({ addresses, before }, 'node addresses changed')
    } catch (error) {
      const failure = String(error)
      if (failure !== this.#failure) {
        this.#log.warn({ addresses, before, err: error }, 'node addresses cannot be changed yet')
      }
      this.#failure = failure
    }
  }
}

/**
 * The addresses other nodes may reach this one at: of each family the one of the interface that the default route leaves
 * by, IPv4 first. Bridges of containers have no default route, so theirs is none. One in `before` that is still there
 * stays.
 */
export function chooseAddresses(facts: NetworkFacts, before: readonly string[] = []): string[] {
  const { interfaces, routes, routes6, flags6 } = facts
  const flags = addressFlags(flags6)
  const choose = (names: readonly string[], family: 'IPv4' | 'IPv6'): string[] => {
    for (const name of names) {
      const usable = (interfaces[name] ?? [])
        .filter((entry) => entry.family === family && !entry.internal)
        .map(({ address }) => address)
        .filter((address) => isPlausible(address, { loopback: false }))
        .filter((address) => ((flags.get(expand(address)) ?? 0) & UNUSABLE) === 0)
      const kept = usable.find((address) => before.includes(address))
      const lasting = usable.find((address) => ((flags.get(expand(address)) ?? 0) & PASSING) === 0)
      const found = kept ?? lasting ?? usable[0]
      if (found !== undefined) return [found]
    }
    return []
  }
  return [
    ...choose(defaultInterfaces(routes), 'IPv4'),
    ...choose(defaultInterfaces6(routes6), 'IPv6'),
  ]
}

function networkFacts(): NetworkFacts {
  return {
    interfaces: networkInterfaces(),
    routes: readOptional('/proc/net/route'),
    routes6: readOptional('/proc/net/ipv6_route'),
    flags6: readOptional('/proc/net/if_inet6'),
  }
}

function readOptional(path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    // No such file where there is no such protocol
    return ''
  }
}

// linux/if_addr.h
const TEMPORARY = 0x01
const DADFAILED = 0x08
const DEPRECATED = 0x20
const TENTATIVE = 0x40
/** Nobody can listen there, or not yet. */
const UNUSABLE = DADFAILED | TENTATIVE
/** It will be gone in some hours. */
const PASSING = TEMPORARY | DEPRECATED

/** Columns: address in 32 digits, index, prefix length, scope, flags, interface. */
function addressFlags(text: string): Map<string, number> {
  const rows = text.split('\n').map((line) => line.trim().split(/\s+/))
  return new Map(
    rows.map(([address = '', , , , flags = '']) => [address, Number.parseInt(flags, 16)]),
  )
}

/** An IPv6 address in 32 digits, as the kernel lists them. */
function expand(address: string): string {
  const [head = '', tail] = address.toLowerCase().split('::')
  const digits = (part: string): string =>
    part === ''
      ? ''
      : part
          .split(':')
          .map((group) => group.padStart(4, '0'))
          .join('')
  const left = digits(head)
  const right = digits(tail ?? '')
  return left + right.padStart(32 - left.length, '0')
}

interface Route {
  name: string
  metric: number
}

function byMetric(routes: Route[]): string[] {
  return routes.toSorted((a, b) => a.metric - b.metric).map((route) => route.name)
}

/** @see https://man7.org/linux/man-pages/man5/proc_pid_net.5.html */
function defaultInterfaces(routes: string): string[] {
  const columns = routes.split('\n').map((line) => line.trim().split(/\s+/))
  return byMetric(
    columns
      .filter(
        ([, destination, , , , , , mask]) => destination === '00000000' && mask === '00000000',
      )
      .map(([name = '', , , , , , metric]) => ({ name, metric: Number(metric) })),
  )
}

/** Columns: destination, its prefix length, source, its prefix length, next hop, metric, …, interface. */
function defaultInterfaces6(routes: string): string[] {
  const columns = routes.split('\n').map((line) => line.trim().split(/\s+/))
  return byMetric(
    columns
      .filter(([destination, length]) => /^0{32}$/.test(destination ?? '') && length === '00')
      .map((fields) => ({
        name: fields.at(-1) ?? '',
        metric: Number.parseInt(fields[5] ?? '', 16),
      }))
      // The kernel's own "unreachable" entry stands for having no route
      .filter((route) => route.name !== 'lo'),
  )
}
