import type { Cluster } from './cluster.ts'
import type { Machine } from './machine.ts'

/** Where a node is. */
export interface Place {
  readonly zone: string
  /** Without one the zone is a site by itself. */
  readonly region?: string
}

/** What passes, in Mbit/s and in each direction. */
export interface PlaceLinks {
  /** Between a site, which is a region or a zone without one, and the upstream and all other sites */
  readonly wan: number
  /** Between a zone and the others of its region */
  readonly zones?: number
}

/** Of who sends: what goes to other sites, to other zones of the own one, and all else. */
const [ABROAD, AROUND, ELSE] = ['1:1', '1:2', '1:99']

/** The nodes of a cluster in zones and regions, with narrow links between those, on which bytes are counted. */
export class Places {
  readonly #upstream: Machine
  readonly #nodes: readonly Machine[]

  private constructor(upstream: Machine, nodes: readonly Machine[]) {
    this.#upstream = upstream
    this.#nodes = nodes
  }

  /** Tells each node its place (its daemon must not run yet) and shapes what it and the upstream send. */
  static async lay(
    { nodes, upstream }: Cluster,
    places: readonly Place[],
    { wan, zones = wan }: PlaceLinks,
  ): Promise<Places> {
    const all = nodes.map((node, index) => {
      const { zone = '', region } = places[index] ?? {}
      return { node, region, site: region ?? zone, name: `${region ?? ''} ${zone}`, zone }
    })
    const sites = Object.values(Object.groupBy(all, ({ site }) => site)).map((each = []) => each)
    await classify(
      upstream.machine,
      sites.map((site, index) => ({
        id: `1:${index + 1}`,
        rate: wan,
        to: site.map(({ node }) => node.address),
      })),
    )
    for (const { node, region, site, name, zone } of all) {
      const here = all.filter((other) => other.site === site)
      const near = here.filter((other) => other.name === name)
      const addresses = (those: typeof all): string[] => those.map((other) => other.node.address)
      // Each has its share of what all who are there may send.
      await classify(node.machine, [
        {
          id: ABROAD,
          rate: wan / here.length,
          to: addresses(all.filter((other) => other.site !== site)),
        },
        {
          id: AROUND,
          rate: zones / near.length,
          to: addresses(here.filter((other) => other.name !== name)),
        },
      ])
      const topology =
        region === undefined ? `{zone: ${zone}}` : `{zone: ${zone}, region: ${region}}`
      const append = `printf '\\ntopology: ${topology}\\n' >> /etc/shoal/config.yaml`
      await node.exec(['sh', '-c', append])
    }
    return new Places(
      upstream.machine,
      nodes.map(({ machine }) => machine),
    )
  }

  /** Bytes that have come into a site from outside, and into a zone from others of its region, headers included. */
  async crossed(): Promise<{ wan: number; zones: number }> {
    const given = await counts(this.#upstream)
    let wan = given.entries().reduce((sum, [id, bytes]) => (id === ELSE ? sum : sum + bytes), 0)
    let zones = 0
    for (const machine of this.#nodes) {
      const sent = await counts(machine)
      wan += sent.get(ABROAD) ?? 0
      zones += sent.get(AROUND) ?? 0
    }
    return { wan, zones }
  }
}

/** Shapes what a machine sends by whom it goes to. `rate` in Mbit/s */
async function classify(
  machine: Machine,
  classes: readonly { id: string; rate: number; to: readonly string[] }[],
): Promise<void> {
  const commands = [
    'qdisc replace dev eth0 root handle 1: htb default 99',
    `class add dev eth0 parent 1: classid ${ELSE} htb rate 10gbit`,
  ]
  for (const { id, rate, to } of classes) {
    commands.push(
      `class add dev eth0 parent 1: classid ${id} htb rate ${Math.round(rate * 1e6)}bit`,
    )
    for (const address of to)
      commands.push(
        `filter add dev eth0 parent 1: protocol ip u32 match ip dst ${address}/32 flowid ${id}`,
      )
  }
  await machine.exec(['sh', '-c', `printf '%s\\n' "$@" | tc -batch -`, 'sh', ...commands])
}

/** Bytes that a machine has sent, by class. */
async function counts(machine: Machine): Promise<Map<string, number>> {
  const shown = await machine.exec(['tc', '-s', 'class', 'show', 'dev', 'eth0'])
  const found = shown.matchAll(/class htb (\S+) .*\n Sent (\d+) bytes/g)
  return new Map(Array.from(found, ([, id = '', bytes]) => [id, Number(bytes)]))
}
