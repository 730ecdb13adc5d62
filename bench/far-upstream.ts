import { fileURLToPath } from 'node:url'
import type { Cluster } from '../test/harness/cluster.ts'
import { until } from '../test/wait.ts'

const PORT = 5010

/** The upstream, as it is where each answer is `ms` longer on the way. @returns host and port under which it is that */
export async function moveAway({ upstream }: Cluster, ms: number): Promise<string> {
  const script = fileURLToPath(new URL('far-link.ts', import.meta.url))
  const link = ['--listen', `${PORT}`, '--to', '5000', '--delay', `${ms}`]
  const relay = upstream.machine.run([process.execPath, script, ...link])
  await until(() => relay.log().includes('ready'), { what: 'the upstream can be reached' })
  return `upstream.test:${PORT}`
}
