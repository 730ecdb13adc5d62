import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdir, readFile, readlink, stat } from 'node:fs/promises'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'containerd 1.x', 'containerd 2.x')

function pair(): Promise<Cluster> {
  const [binaries] = containerdBinaries()
  assert.ok(binaries)
  return Cluster.create({ nodes: [binaries, binaries] })
}

/** Serves `bytes` zero bytes on port 80 of `node`. */
async function serve(node: ClusterNode, bytes: number): Promise<void> {
  const script = `require('node:http')
    .createServer((_, response) => response.end(Buffer.alloc(${bytes})))
    .listen(80, () => console.log('ready'))`
  const server = node.machine.run([process.execPath, '-e', script])
  await until(() => server.log().includes('ready'))
}

function reach(from: ClusterNode, to: ClusterNode): Promise<boolean> {
  const script = `require('node:net').connect(80, '${to.address}')
    .on('connect', () => process.exit(0)).on('error', () => process.exit(1)).setTimeout(500, () => process.exit(1))`
  return from.exec([process.execPath, '-e', script]).then(
    () => true,
    () => false,
  )
}

test(
  'a cut link is cut, also for a connection that is open, and a restored one works',
  { skip },
  async () => {
    await using cluster = await pair()
    const [near, far] = cluster.nodes
    assert.ok(near && far)
    await serve(far, 1)
    await until(() => reach(near, far), { what: 'the far one is reached' })
    // Says what it hears from the server: one character every 50 ms.
    const drip = `require('node:http').createServer((_, response) => { setInterval(() => response.write('x'), 50) })
    .listen(81, () => console.log('ready'))`
    const server = far.machine.run([process.execPath, '-e', drip])
    await until(() => server.log().includes('ready'))
    const listen = `require('node:http').get('http://${far.address}:81', (r) => r.pipe(process.stdout)).on('error', () => {})`
    const client = near.machine.run([process.execPath, '-e', listen])
    await until(() => client.log().length > 3)

    await far.link.cut()
    assert.equal(await reach(near, far), false)
    // What was on its way has come at last, and then for half a second there is no more.
    const heard = await until(async () => {
      const length = client.log().length
      assert.equal(await reach(near, far), false)
      return client.log().length === length && length
    })

    await far.link.restore()
    await until(() => reach(near, far), { what: 'the link is back' })
    await until(() => client.log().length > heard, { what: 'the open connection goes on' })
  },
)

test('a shaped link is slow, in both directions', { skip }, async () => {
  await using cluster = await pair()
  const [shaped, other] = cluster.nodes
  assert.ok(shaped && other)
  const bytes = 2_500_000
  await serve(shaped, bytes)
  await serve(other, bytes)
  const seconds = async (from: ClusterNode, to: ClusterNode): Promise<number> => {
    const script = `const start = performance.now()
      const response = await fetch('http://${to.address}')
      const { byteLength } = await response.arrayBuffer()
      if (byteLength !== ${bytes}) throw new Error(\`\${byteLength} bytes\`)
      console.log((performance.now() - start) / 1000)`
    return Number(await from.exec([process.execPath, '--input-type=module', '-e', script]))
  }
  const fast = await seconds(shaped, other)
  await shaped.link.shape(20)
  for (const [from, to] of [
    [shaped, other],
    [other, shaped],
  ] as const) {
    // 20 Mbit at 20 Mbit/s: one second, less what the bucket lets pass at once, more on a loaded machine.
    const slow = await seconds(from, to)
    assert.ok(slow > 0.8, `${from.name} from ${to.name}: ${slow} s, unshaped ${fast} s`)
  }
})

test(
  'a stopped process answers nobody until it goes on, a killed one is gone',
  { skip },
  async () => {
    await using cluster = await pair()
    const [node] = cluster.nodes
    assert.ok(node)
    await node.startContainerd()
    node.containerd.signal('SIGSTOP')
    await assert.rejects(node.exec(['ctr', '--timeout', '300ms', 'version'], { timeoutMs: 2000 }))
    node.containerd.signal('SIGCONT')
    await node.ctr('version')
    await node.containerd.kill()
    assert.equal(node.containerd.running(), false)
    await assert.rejects(node.exec(['ctr', '--connect-timeout', '300ms', 'version']))
    await node.startContainerd()
    assert.equal(await node.containerd.stop(), 0)
  },
)

test(
  'each containerd runs under its default paths, with CRI, unseen by the others',
  { skip },
  async () => {
    await using cluster = await Cluster.create({ nodes: containerdBinaries() })
    for (const node of cluster.nodes) {
      await node.startContainerd()
      assert.equal(await node.cri.status('registry.test/none:1'), undefined)
      await node.writeFile('/etc/containerd/certs.d/only.test/hosts.toml', `# ${node.name}`)
    }
    const versions = await Promise.all(cluster.nodes.map((node) => node.ctr('version')))
    assert.match(versions[0] ?? '', /Server:\s+Version: +1\./)
    assert.match(versions[1] ?? '', /Server:\s+Version: +2\./)
    for (const node of cluster.nodes) {
      const file = '/etc/containerd/certs.d/only.test/hosts.toml'
      assert.equal(await node.exec(['cat', file]), `# ${node.name}`)
      await assert.rejects(stat(file), { code: 'ENOENT' })
      assert.equal((await node.exec(['hostname'])).trim(), node.name)
    }
  },
)

test('the upstream registry serves by its name, and can be stopped', { skip }, async () => {
  await using cluster = await pair()
  const [node] = cluster.nodes
  assert.ok(node)
  const url = `http://${Upstream.host}/v2/`
  assert.equal((await node.machine.get(url)).status, 200)
  await node.machine.get(`${url}some/thing/manifests/latest`)
  await until(() => cluster.upstream.requests().length === 1)
  assert.deepEqual(cluster.upstream.requests(), ['GET /v2/some/thing/manifests/latest'])
  await cluster.upstream.stop()
  await assert.rejects(node.machine.get(url))
  await cluster.upstream.start()
  assert.equal((await node.machine.get(url)).status, 200)
  assert.deepEqual(cluster.namesAsked(), [])
})

test('the name server hears questions and answers none', { skip }, async () => {
  await using cluster = await pair()
  const [node] = cluster.nodes
  assert.ok(node)
  const script = `require('node:dns').lookup('nowhere.test', () => {})`
  const asking = node.machine.run([process.execPath, '-e', script])
  await until(() => cluster.namesAsked().includes('nowhere.test'))
  assert.equal(asking.running(), true)
})

/** Processes that live in the machines of these nodes. */
async function processesOf(nodes: readonly ClusterNode[]): Promise<string[]> {
  const namespaceOf = (pid: string) => readlink(`/proc/${pid}/ns/mnt`).catch(() => '')
  const namespaces = await Promise.all(nodes.map(({ machine }) => namespaceOf(`${machine.pid}`)))
  const pids: string[] = []
  for (const pid of await readdir('/proc')) {
    if (/^\d+$/.test(pid) && namespaces.includes(await namespaceOf(pid))) pids.push(pid)
  }
  return pids
}

function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  )
}

test(
  'nothing is left after a cluster: not when it ends, not when its test is killed',
  { skip },
  async () => {
    let pids: string[] = []
    {
      await using cluster = await pair()
      for (const node of cluster.nodes) await node.startContainerd()
      // What a client leaves behind, without a parent.
      await cluster.nodes[0]?.exec(['sh', '-c', 'setsid sleep 1000 >/dev/null 2>&1 &'])
      pids = await until(
        async () => {
          const found = await processesOf(cluster.nodes)
          return found.length === 5 && found
        },
        { what: 'two machines, two containerds, one orphan' },
      )
      const mounts = await readFile('/proc/self/mounts', 'utf8')
      assert.doesNotMatch(mounts, /\/run\/\.upper/, 'its mounts are not seen outside')
    }
    for (const pid of pids) {
      await until(async () => !(await exists(`/proc/${pid}`)), { what: `process ${pid} is gone` })
    }

    const program = `import { Cluster } from '${new URL('../harness/cluster.ts', import.meta.url).href}'
    import { containerdBinaries } from '${new URL('../harness/tools.ts', import.meta.url).href}'
    const cluster = await Cluster.create({ nodes: containerdBinaries() })
    for (const node of cluster.nodes) await node.startContainerd()
    console.log(cluster.nodes.map((node) => node.machine.pid + ' ' + node.containerd.pid).join(' '))`
    const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
      cwd: fileURLToPath(new URL('../..', import.meta.url)),
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const [line] = await once(child.stdout, 'data')
    const processes = String(line).trim().split(' ')
    assert.equal(processes.length, 4)
    child.kill('SIGKILL')
    for (const pid of processes) {
      await until(async () => !(await exists(`/proc/${pid}`)), { what: `process ${pid} is gone` })
    }
  },
)
