/** What a page that is open costs a node: CPU of the process for a minute, with 500 peers, 5,000 images and pulls that run. */
import { spawn } from 'node:child_process'
import { parseArgs } from 'node:util'
import { setTimeout as delay } from 'node:timers/promises'
import { createAdminServer } from '../src/http/admin.ts'
import { createMetrics } from '../src/observe/metrics.ts'
import { dashboardNode } from '../test/fakes/dashboard-node.ts'

const { values } = parseArgs({
  options: {
    seconds: { type: 'string', default: '60' },
    pages: { type: 'string', default: '0,1,4' },
  },
})
const seconds = Number(values.seconds)

const node = dashboardNode({ peers: 499, images: 5000 })
for (let index = 0; index < 1000; index += 1) node.pull(`docker.io/app/${index}:1`, 1e6)
const running = Array.from({ length: 20 }, () => new Map([['peer', 0]]))
for (const [index, sent] of running.entries())
  node.begin(`docker.io/running/${index}:1`, `sha256:${String(index).padStart(64, '0')}`, 1e9, sent)
const server = createAdminServer({ ...node, metrics: createMetrics(), config: {} })
const origin = await server.listen({ host: '127.0.0.1', port: 0 })

async function measure(pages: number): Promise<number> {
  const reader = `fetch('${origin}/events').then(async ({ body }) => { for await (const chunk of body) chunk.length })`
  const readers = Array.from({ length: pages }, () =>
    spawn(process.execPath, ['-e', reader], { stdio: 'ignore' }),
  )
  await delay(2000)
  const begin = process.cpuUsage()
  for (let round = 0; round < seconds * 4; round += 1) {
    for (const sent of running) sent.set('peer', (sent.get('peer') ?? 0) + 2e6)
    // A node comes or goes now and then, and all of the list is told anew.
    if (round % 20 === 0) node.grow(499 + (round % 3))
    await delay(250)
  }
  const { user, system } = process.cpuUsage(begin)
  for (const each of readers) each.kill('SIGKILL')
  return (user + system) / 1e4 / seconds
}

for (const pages of values.pages.split(',').map(Number)) {
  const percent = await measure(pages)
  console.log(`${pages} pages open: ${percent.toFixed(2)} % of a core`)
}
await server.close()
process.exit()
