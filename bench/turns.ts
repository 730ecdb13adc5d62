import type { Progress } from '../src/cli/progress.ts'
import { formatSeconds } from '../src/cli/text.ts'
import type { ClusterNode } from '../test/harness/cluster.ts'
import { until } from '../test/wait.ts'
import { load, mirror, type Contender } from './contender.ts'
import type { Image } from './images.ts'
import type { Figure } from './report.ts'

/** Collects the values of figures by name. */
export class Sheet {
  readonly #figures = new Map<string, Figure & { values: Map<string, number[]> }>()

  add(contender: Contender, name: string, better: Figure['better'], value: number, digits = 1) {
    const figure = this.#figures.get(name) ?? { name, better, digits, values: new Map() }
    this.#figures.set(name, figure)
    const values = figure.values.get(contender.name) ?? []
    figure.values.set(contender.name, [...values, value])
  }

  figures(): Figure[] {
    return [...this.#figures.values()]
  }
}

/** Who is compared, and how often. */
export interface Turns {
  readonly contenders: readonly Contender[]
  readonly runs: number
  readonly progress: Progress
}

/** Each contender once per run, in turns; `measure` finds all its daemons fresh and ready. */
export async function inTurns(
  { contenders, runs, progress }: Turns,
  what: string,
  nodes: readonly ClusterNode[],
  measure: (contender: Contender, run: number) => Promise<void>,
): Promise<void> {
  const began = performance.now()
  let done = 0
  for (let run = 0; run < runs; run += 1) {
    const turn = run % 2 === 0 ? contenders : contenders.toReversed()
    for (const contender of turn) {
      const each = (performance.now() - began) / 1000 / done
      const left = each * (runs * contenders.length - done)
      const about = done === 0 ? '' : `, ${what} takes about ${formatSeconds(left)} more`
      progress.step(`${what}: run ${run + 1} of ${runs}, ${contender.name}${about}`)
      await Promise.all(nodes.map((node) => mirror(node, contender)))
      await contender.start(nodes)
      try {
        await measure(contender, run)
      } finally {
        await contender.stop()
      }
      done += 1
    }
  }
}

/** Resolves when a node's registry answers for content that another has. */
export async function reachable(
  node: ClusterNode,
  contender: Contender,
  path: string,
): Promise<void> {
  await until(async () => (await load(node, contender, path)).statuses['200'] === 1, {
    timeoutMs: 60_000,
    what: `${contender.name} of ${node.name} answers ${path}`,
  })
}

/** Where a registry answers for it. */
export function manifestPath({ manifest }: Image): string {
  return `/v2/bench/image/manifests/${manifest.digest}`
}
