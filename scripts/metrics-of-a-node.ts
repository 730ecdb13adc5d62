import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { hostFacts } from '../src/cli/config.ts'
import { effectiveConfig } from '../src/config/effective.ts'
import { loadConfig } from '../src/config/load.ts'
import { createDaemon } from '../src/daemon.ts'
import { createLogger } from '../src/observe/log.ts'
import { createMetrics } from '../src/observe/metrics.ts'

/** A metric of ours, as a running node tells it. */
export interface MetricDoc {
  readonly name: string
  readonly type: string
  readonly help: string
  readonly labels: readonly string[]
}

/** Starts a node on loopback, reads its metrics, and stops it. */
export async function metricsOfANode(): Promise<MetricDoc[]> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-metrics-'))
  const any = '127.0.0.1:0'
  const listen = ['local', 'peer', 'p2p', 'admin'].map((name) => [`listen.${name}`, any] as const)
  const { config } = await loadConfig({
    file: undefined,
    env: {},
    flags: new Map([
      ...listen,
      ['store', 'layout'],
      ['dataDir', directory],
      ['nodeAddress', '127.0.0.1'],
      ['upstream', 'off'],
    ]),
  })
  const daemon = createDaemon(effectiveConfig(config, hostFacts()), {
    log: createLogger({ level: 'silent' }),
  })
  try {
    await daemon.start()
    const answer = await fetch(`http://${daemon.addresses().admin}/metrics`)
    return read(await answer.text())
  } finally {
    await daemon.stop()
    await rm(directory, { recursive: true, force: true })
  }
}

function read(text: string): MetricDoc[] {
  const labels = new Map(
    Object.values(createMetrics()).flatMap((metric): [string, string[]][] =>
      typeof metric === 'object' && 'name' in metric && 'labelNames' in metric
        ? [[String(metric.name), [...(metric.labelNames as string[])]]]
        : [],
    ),
  )
  return [...text.matchAll(/^# HELP (shoal_\w+) (.*)\n# TYPE \S+ (\w+)$/gm)]
    .map(([, name = '', help = '', type = '']) => ({
      name,
      type,
      help,
      labels: labels.get(name) ?? [],
    }))
    .toSorted((a, b) => (a.name < b.name ? -1 : 1))
}
