import { mkdir, writeFile } from 'node:fs/promises'
import { parseArgs } from 'node:util'
import { toSvg } from './plot.ts'
import { simulate, type Conditions, type Outcome } from './simulated-swarm.ts'

/**
 * Many nodes that want the same at once, more than one machine could run ({@link simulate}). Prints Markdown and draws
 * `docs/plots/swarm-*.svg`. Where something is left to chance beside the order in which nodes start, several seeds are tried.
 *
 *     npm run bench:swarm -- [--sizes 100,1000,5000] [--seeds N]
 */
const { values: flags } = parseArgs({
  options: {
    sizes: { type: 'string', default: '100,1000,5000' },
    seeds: { type: 'string', default: '5' },
  },
})
const MB = 1e6
const sizes = flags.sizes.split(',').map(Number)
const usual = {
  blobs: [1000 * MB],
  atOnce: 3,
  uplink: 125_000,
  link: 1_250_000,
  spread: 300,
  churn: 0,
  loss: 0,
}
const rows: (readonly [Conditions, Outcome])[] = []
const run = (conditions: Conditions): void => {
  const isChance =
    conditions.churn > 0 || conditions.still !== undefined || conditions.blobs.length > 1
  const seeds = isChance ? Number(flags.seeds) : 1
  const outcomes = Array.from({ length: seeds }, (_, index) => simulate(conditions, index + 1))
  const sorted = (of: (outcome: Outcome) => number): number[] =>
    outcomes.map(of).toSorted((a, b) => a - b)
  const median = (of: (outcome: Outcome) => number): number =>
    sorted(of)[Math.floor((seeds - 1) / 2)] ?? Number.NaN
  const spread = (of: (outcome: Outcome) => number, digits: number): string => {
    const values = sorted(of).map((value) => value.toFixed(digits))
    const [least, most] = [values[0], values.at(-1)]
    return `${median(of).toFixed(digits)}${least === most ? '' : ` (${least} to ${most})`}`
  }
  const middle: Outcome = {
    egress: median(({ egress }) => egress),
    p50: median(({ p50 }) => p50),
    p99: median(({ p99 }) => p99),
    last: median(({ last }) => last),
    bound: median(({ bound }) => bound),
    messages: median(({ messages }) => messages),
    busiest: median(({ busiest }) => busiest),
  }
  rows.push([conditions, middle])
  const numbers = [
    spread(({ egress }) => egress, 3),
    middle.bound.toFixed(1),
    spread(({ p50 }) => p50, 1),
    spread(({ p99 }) => p99, 1),
    spread(({ last }) => last, 1),
    middle.messages.toFixed(0),
    spread(({ busiest }) => busiest, 0),
  ]
  process.stdout.write(`| ${conditions.name} | ${conditions.nodes} | ${numbers.join(' | ')} |\n`)
}
process.stdout.write(
  '| conditions | nodes | egress | bound, s | p50, s | p99, s | last, s | messages a node | busiest node, messages in a second |\n|---|---|---|---|---|---|---|---|---|\n',
)
for (const nodes of sizes) {
  run({ ...usual, name: '1 GB, uplink 1 Gbit/s, links 10 Gbit/s', nodes })
  run({
    ...usual,
    name: 'the same, 1 % of nodes come and go a second, 5 % of messages lost',
    nodes,
    churn: 0.01,
    loss: 0.05,
  })
  // With 5,000 that had not ended after seven minutes.
  if (nodes > 1000) continue
  run({
    ...usual,
    name: 'the same as the first, each node stands still for 0.4 s on average, once a second or so',
    nodes,
    still: { every: 1000, lasts: 400 },
  })
}
// Kraken's published test is of two layers: https://github.com/uber/kraken#performance
for (const [layers, name] of [
  [2, "3 GB in 2 layers, 300 MB/s each way, as in Kraken's published test"],
  [1, 'the same in one layer'],
  [3, 'the same in 3 layers'],
  [5, 'the same in 5 layers, of which each node gets 3 at a time'],
] as const)
  run({
    ...usual,
    name,
    nodes: 2600,
    blobs: Array.from({ length: layers }, () => (3000 * MB) / layers),
    uplink: 300_000,
    link: 300_000,
  })
// Up to 16 are a chain, and more a tree, until that proves narrow.
for (const layers of [1, 5])
  for (const nodes of [8, 16, 17, 100])
    run({
      ...usual,
      name: `100 MB in ${layers === 1 ? 'one layer' : `${layers} layers`}, 200 Mbit/s each way`,
      nodes,
      blobs: Array.from({ length: layers }, () => (100 * MB) / layers),
      uplink: 25_000,
      link: 25_000,
    })
for (const nodes of [30, 100])
  run({
    ...usual,
    name: '5 GB in one layer, 1 Gbit/s each way',
    nodes,
    blobs: [5000 * MB],
    link: 125_000,
  })
for (const nodes of [100, 1000])
  run({
    ...usual,
    name: '300 MB in 3 layers that one of the nodes has, 1 Gbit/s each way',
    nodes,
    holders: 1,
    blobs: [100 * MB, 100 * MB, 100 * MB],
    link: 125_000,
  })
for (const nodes of [6, 100])
  run({
    ...usual,
    name: '100 MB in 5 layers, uplink 200 Mbit/s, one node on a 5 Mbit/s link: the others',
    nodes,
    blobs: [30, 25, 20, 15, 10].map((mb) => mb * MB),
    uplink: 25_000,
    link: 125_000,
    slow: 625,
  })

const plots = new URL('../docs/plots/', import.meta.url)
await mkdir(plots, { recursive: true })
const quiet = rows.filter(
  ([{ churn, link, still }]) => churn === 0 && still === undefined && link === usual.link,
)
const busy = rows.filter(([{ churn }]) => churn > 0)
const series = (name: string, of: typeof rows, value: (outcome: Outcome) => number) => ({
  name,
  points: of.map(([{ nodes }, outcome]) => [nodes, value(outcome)] as const),
})
await writeFile(
  new URL('swarm-time.svg', plots),
  toSvg({
    title: 'Until the last of many nodes has 1 GB, uplink 1 Gbit/s',
    x: 'nodes that start at once',
    y: 'seconds',
    series: [
      series('bound: the uplink', quiet, ({ bound }) => bound),
      series('last node', quiet, ({ last }) => last),
      series('p99, with churn and loss', busy, ({ p99 }) => p99),
      {
        name: 'each by itself',
        points: quiet.map(([{ nodes }, { bound }]) => [nodes, bound * nodes] as const),
      },
    ],
  }),
)
await writeFile(
  new URL('swarm-messages.svg', plots),
  toSvg({
    title: 'Messages to agree on who gets 1 GB from where',
    x: 'nodes that start at once',
    y: 'messages',
    series: [
      series('of a node, in all', quiet, ({ messages }) => messages),
      series('the same, with churn and loss', busy, ({ messages }) => messages),
      series('busiest node, in a second', quiet, ({ busiest }) => busiest),
    ],
  }),
)
