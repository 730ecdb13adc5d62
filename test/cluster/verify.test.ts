import assert from 'node:assert/strict'
import { appendFile } from 'node:fs/promises'
import { after, before, suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import type { Finding } from '../../src/doctor/finding.ts'
import type { PodLogin } from '../../src/store/containerd/cri/images.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import type { Program } from '../harness/machine.ts'
import { containerdBinaries, skipWithout, tools } from '../harness/tools.ts'
import { until } from '../wait.ts'

const REGISTRY = 'upstream.test:5445'
const REFERENCE = `${REGISTRY}/org/private:1`
const TOKEN_FILE = '/etc/shoal/token'
const skip = skipWithout('namespaces', 'registry', 'skopeo', 'containerd 1.x', 'containerd 2.x')
const OTHER = `${REGISTRY}/org/other:1`
const LARGE = `${REGISTRY}/org/large:1`
const WARM = `${REGISTRY}/org/warm:1`
/** What the nodes themselves log in with, one each. */
const LOGINS = [
  { username: 'node-one', password: 'secret-one' },
  { username: 'node-two', password: 'secret-two' },
]
const alice = (password: string) => ({ username: 'alice', password })

/** The policy `verify`: pulls by CRI, as kubelet makes them for pods with and without a pull secret. */
suite('private images', { skip }, () => {
  let cluster: Cluster
  let nodes: readonly ClusterNode[]
  let registry: Program | undefined
  let tokenServer: Program | undefined
  let image: DemoImage
  let other: DemoImage

  before(async () => {
    const [one, two] = ['1.', '2.'].map((start) =>
      containerdBinaries().find(({ version }) => version.startsWith(start)),
    )
    assert.ok(one && two)
    cluster = await Cluster.create({ nodes: [two, one] })
    ;({ nodes } = cluster)
    const { machine } = cluster.upstream
    const certificate = `cd /run
      openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=upstream.test \\
        -addext subjectAltName=DNS:upstream.test -keyout tls.key -out tls.crt`
    await machine.exec(['sh', '-ec', certificate])
    image = await buildImage({ layers: [200_000, 10], seed: 'private' })
    await cluster.upstream.push(image, 'org/private:1')
    other = await buildImage({ layers: [1000], seed: 'another private image' })
    await cluster.upstream.push(other, 'org/other:1')
    const large = await buildImage({ layers: [4_000_000, 4_000_000], seed: 'a large one' })
    await cluster.upstream.push(large, 'org/large:1')
    await startUpstream('first')
    const ca = await machine.exec(['cat', '/run/tls.crt'])
    const token = await nodes[0]!.exec(['shoal', 'token', 'new'])
    for (const node of nodes) {
      await node.writeFile('/etc/shoal/ca.crt', ca)
      await node.writeFile(TOKEN_FILE, token)
      await node.exec(['chmod', '600', TOKEN_FILE])
      const keys = [
        '',
        `tokenFile: ${TOKEN_FILE}`,
        'private:',
        `  - {registry: "${REGISTRY}", policy: verify}`,
        'uplink: {dial: 1s}',
        'log: {level: trace}',
        '',
      ]
      await appendFile(node.machine.path('/etc/shoal/config.yaml'), keys.join('\n'))
      await writeRegistries(node)
      await Promise.all([node.startContainerd(), node.startDaemon()])
      await node.exec(['shoal', 'mirror', 'apply'])
    }
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  /** With or without a login of the node itself. */
  async function writeRegistries(node: ClusterNode, auth?: PodLogin): Promise<void> {
    const access = { tls: { ca_file: '/etc/shoal/ca.crt' }, ...(auth && { auth }) }
    const registries = {
      mirrors: { [REGISTRY]: null, 'open.test': null },
      configs: { [REGISTRY]: access },
    }
    await node.writeFile('/etc/rancher/k3s/registries.yaml', JSON.stringify(registries))
  }

  async function startUpstream(password: string): Promise<void> {
    const { machine } = cluster.upstream
    const tls = { certificate: '/run/tls.crt', key: '/run/tls.key' }
    const config = {
      version: 0.1,
      log: { level: 'warn', accesslog: { disabled: true } },
      storage: { filesystem: { rootdirectory: '/var/lib/registry' } },
      http: { addr: ':5445', tls },
      auth: {
        token: {
          realm: 'https://upstream.test:5446/token',
          service: 'upstream',
          issuer: 'token-server',
          rootcertbundle: tls.certificate,
        },
      },
    }
    const path = '/run/private.json'
    await machine.exec(['sh', '-c', `cat > ${path} <<'END'\n${JSON.stringify(config)}\nEND`])
    const script = fileURLToPath(new URL('../harness/token-server.ts', import.meta.url))
    const logins = [`alice:${password}`, ...LOGINS.map((each) => Object.values(each).join(':'))]
    const argv = [script, '5446', tls.certificate, tls.key, ...logins]
    tokenServer = machine.run([process.execPath, ...argv])
    registry = machine.run([tools.registry ?? '', 'serve', path])
    await until(() => tokenServer?.log().includes('ready'), { what: 'the token server listens' })
    await until(() =>
      machine.exec(['sh', '-c', 'ss -tln | grep -q :5445']).then(
        () => true,
        () => false,
      ),
    )
  }

  async function stopUpstream(): Promise<void> {
    await Promise.all([registry?.kill(), tokenServer?.kill()])
  }

  /** Pulls anew: the image is not in CRI any more, whatever of its content still is. */
  async function pullOnce(node: ClusterNode, auth?: PodLogin, reference = REFERENCE) {
    await node.cri.remove(reference)
    await node.cri.pull(reference, auth).catch((error: unknown) => {
      throw new Error(`${node.name}: ${String(error)}\n${node.daemon.tail()}`, { cause: error })
    })
  }

  /** The same, until it succeeds: what the other node has pulled a moment ago is heard of a moment later. */
  async function pull(node: ClusterNode, auth?: PodLogin, reference = REFERENCE): Promise<void> {
    let failure: unknown
    await until(() =>
      pullOnce(node, auth, reference).then(
        () => true,
        (error: unknown) => {
          failure = error
          return false
        },
      ),
    ).catch(() => {
      throw failure
    })
  }

  async function refused(node: ClusterNode, auth?: PodLogin) {
    await node.cri.remove(REFERENCE)
    await assert.rejects(node.cri.pull(REFERENCE, auth), `${node.name} ${JSON.stringify(auth)}`)
    assert.equal(await node.cri.status(REFERENCE), undefined)
  }

  test('go to who has a login that the registry lets in, from the nodes, and to nobody else', async () => {
    const [first, second] = nodes
    assert.ok(first && second)
    for (const node of nodes) {
      await refused(node, alice('wrong'))
      await refused(node)
    }
    await pull(first, alice('first'))
    // Now a node has it; who may not pull it there does not get it either.
    const url = `https://127.0.0.1:5001/v2/org/private/manifests/1?ns=${REGISTRY}`
    await until(async () => (await status(second, url)) === 401, { what: 'a challenge' })
    await refused(second, alice('wrong'))
    await refused(second)
    // Manifest, config, two layers and the tag
    await until(async () => (await held(second)) >= 5, { what: 'the second hears of all of it' })
    await pull(second, alice('first'))
    await until(async () => (await second.bytesFrom('peer')) > 0).catch((error: unknown) => {
      throw new Error(`${String(error)}\n${second.daemon.tail()}`, { cause: error })
    })
    // Also where it lies: another namespace without a secret is refused, one with it is served by the node itself.
    for (const node of nodes) {
      await node.cri.remove(REFERENCE)
      await assert.rejects(node.cri.pull(REFERENCE))
      await pull(node, alice('first'))
    }
  })

  test('are not given by their digests under the name of another registry', async () => {
    const { digest } = image.manifest.descriptor
    const blobs = image.blobs().map(({ descriptor }) => `blobs/${descriptor.digest}`)
    for (const node of nodes) {
      await pull(node, alice('first'))
      for (const path of [`manifests/${digest}`, ...blobs]) {
        const url = (ns: string) => `https://127.0.0.1:5001/v2/org/private/${path}?ns=${ns}`
        assert.deepEqual(
          [await status(node, url('open.test')), await status(node, url(REGISTRY))],
          [404, 401],
          path,
        )
      }
    }
  })

  test('are not given by their digests to who may pull another image of that registry', async () => {
    for (const node of nodes) {
      await pull(node, alice('first'), OTHER)
      await pull(node, alice('first'))
      const [layer] = other.layers
      assert.ok(layer !== undefined)
      const { digest } = layer.descriptor
      const token = await tokenFor(node, 'org/private', 'alice:first')
      const ask = (repository: string, path: string, bearer = token) =>
        status(node, `https://127.0.0.1:5001/v2/${repository}/${path}?ns=${REGISTRY}`, bearer)
      const own = `manifests/${image.manifest.descriptor.digest}`
      assert.equal(await ask('org/private', own), 200)
      for (const path of [`blobs/${digest}`, `manifests/${other.manifest.descriptor.digest}`])
        assert.equal(await ask('org/private', path), 404, path)
      // Nor is the token good for the other repository; with its own it is there.
      assert.equal(await ask('org/other', `blobs/${digest}`), 401)
      const its = await tokenFor(node, 'org/other', 'alice:first')
      assert.equal(await ask('org/other', `blobs/${digest}`, its), 200)
    }
  })

  test('go to who shows an identity token, and to nobody with another', async () => {
    for (const node of nodes) {
      const before = await node.bytesFrom('local')
      await pull(node, { identityToken: 'identity-first' })
      await refused(node, { identityToken: 'identity-wrong' })
      assert.ok((await node.bytesFrom('local')) >= before)
    }
  })

  test('come whole although the token is lost in the middle of a pull', async () => {
    const { machine } = cluster.upstream
    await machine.exec(
      'tc qdisc replace dev eth0 root tbf rate 30mbit burst 64kb latency 100ms'.split(' '),
    )
    for (const node of nodes) {
      const pulled = pullOnce(node, alice('first'), LARGE)
      pulled.catch(() => {})
      await until(
        () => /"repository":"org\/large".*"kind":"manifest".*"msg":"pull"/.test(node.daemon.log()),
        {
          what: 'the manifest has been given',
        },
      )
      await node.daemon.kill()
      await node.startDaemon()
      await pulled
      assert.ok(await node.cri.status(LARGE))
    }
    await machine.exec('tc qdisc delete dev eth0 root'.split(' '))
    // Whatever token is shown that this node does not know: containerd is told to get another one at once.
    for (const node of nodes) {
      const url = `https://127.0.0.1:5001/v2/org/private/manifests/1?ns=${REGISTRY}`
      assert.equal(await status(node, url, 'a'.repeat(43)), 401)
    }
  })

  test('are the reason why shoal doctor has containerd show a login', async () => {
    const examine = async (node: ClusterNode): Promise<void> => {
      const logins = async () => {
        // With its exit status it says what it thinks of all the rest.
        const said = await node.exec(['sh', '-c', 'shoal doctor --json || true'])
        const found = (JSON.parse(said) as Finding[]).filter(({ check }) => check === 'logins')
        assert.equal(found.length, 1, said)
        return found[0]!
      }
      const works = await logins()
      assert.equal(works.verdict, 'pass', works.said)
      const probe = 'registry.localhost/shoal-doctor/login:1'
      assert.equal(await node.cri.status(probe), undefined, 'it is taken away again')
      // A containerd that shows nothing to mirrors is let in as little as one that shows something else.
      for (const auth of [undefined, alice('first')])
        await assert.rejects(node.cri.pull(probe, auth), `${node.name}`)
      // One that does not trust this node any more shows it nothing.
      const trusted = '/var/lib/shoal/local.crt'
      const kept = await node.exec(['cat', trusted])
      await node.exec([
        'sh',
        '-ec',
        `openssl req -x509 -newkey ed25519 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1 -keyout /run/x -out ${trusted}`,
      ])
      const broken = await logins()
      await node.writeFile(trusted, kept)
      assert.equal(broken.verdict, 'fail', broken.said)
      assert.match(broken.said, /did not show this node the login/)
      const mended = await logins()
      assert.equal(mended.verdict, 'pass', mended.said)
    }
    await Promise.all(nodes.map(examine))
  })

  test('are brought to each node with its own login in registries.yaml; where there is none, one line says what to do', async () => {
    const [first, second] = nodes
    assert.ok(first && second)
    const warm = await buildImage({ layers: [300_000], seed: 'warm and private' })
    await cluster.upstream.push(warm, 'org/warm:1')
    const everywhere = () => first.exec(['sh', '-c', `shoal pull --everywhere ${WARM} || true`])
    const need = 'give one in registries.yaml under configs, auth'
    assert.match(await everywhere(), new RegExp(`^node1 \\S+: .*wants a login.*${need}`, 'm'))

    await writeRegistries(first, LOGINS[0])
    let said = ''
    await until(
      async () => {
        said = await everywhere()
        return said.includes('1 not there')
      },
      { what: 'one of them has it' },
    )
    assert.match(said, new RegExp(`^node2 \\S+: .*\\(private: verify\\).*${need}`, 'm'))
    assert.doesNotMatch(said, /^node1/m)

    await writeRegistries(second, LOGINS[1])
    await until(async () => /^1 image on 2 nodes: all there$/m.test(await everywhere()), {
      what: 'both of them have it',
    })
    const held = await second.ctr('content', 'ls', '-q')
    for (const { descriptor } of warm.blobs()) assert.ok(held.includes(descriptor.digest))
    for (const { username, password } of LOGINS) {
      const asked = new RegExp(`^${username} repository:org/warm:pull$`, 'm')
      await until(() => asked.test(tokenServer?.log() ?? ''), { what: `${username} has logged in` })
      for (const node of nodes) assert.doesNotMatch(node.daemon.log(), new RegExp(password))
    }
    // Who asks before the file was read is let in, and remembered for when the registry is gone.
    const read = (node: ClusterNode): string | undefined =>
      node.daemon
        .log()
        .split('\n')
        .findLast((line) => line.includes('registries.yaml read'))
    for (const node of nodes) {
      const before = read(node)
      await writeRegistries(node)
      await until(() => read(node) !== undefined && read(node) !== before, {
        what: 'the file is read',
      })
      await until(
        () =>
          refused(node).then(
            () => true,
            () => false,
          ),
        {
          what: 'the node has no login any more',
        },
      )
    }
  })

  test('with the registry gone go to who was let in before, and to nobody else', async () => {
    for (const node of nodes) await pull(node, alice('first'))
    await stopUpstream()
    for (const node of nodes) {
      await refused(node, alice('wrong'))
      await refused(node)
      const before = await node.bytesFrom('local')
      await pull(node, alice('first'))
      assert.ok((await node.bytesFrom('local')) >= before)
    }
    await startUpstream('first')
  })

  test('go no more to who has lost his rights', async () => {
    for (const node of nodes) await pull(node, alice('first'))
    await stopUpstream()
    await startUpstream('second')
    for (const node of nodes) {
      await until(
        async () => {
          await node.cri.remove(REFERENCE)
          return node.cri.pull(REFERENCE, alice('first')).then(
            () => false,
            () => true,
          )
        },
        { what: 'the old login is refused' },
      )
      await pull(node, alice('second'))
    }
    // It is not remembered either.
    await stopUpstream()
    for (const node of nodes) {
      await refused(node, alice('first'))
      await pull(node, alice('second'))
    }
    await startUpstream('second')
  })

  test('and no secret of a pod is said by a node, or shown to who takes its place', async () => {
    for (const node of nodes) {
      for (const secret of ['first', 'second', 'wrong'])
        assert.doesNotMatch(node.daemon.log(), new RegExp(`alice|${secret}\\b`))
      await node.daemon.stop()
      const squatter = node.machine.run([
        process.execPath,
        '-e',
        `require('net').createServer((socket) => {
          socket.on('error', () => {}).on('data', (data) => process.stdout.write(data.toString('latin1')))
          socket.write('HTTP/1.1 401 Unauthorized\\r\\nWWW-Authenticate: Basic realm="x"\\r\\nContent-Length: 0\\r\\n\\r\\n')
        }).listen(5001, '127.0.0.1', () => console.log('ready'))`,
      ])
      await until(() => squatter.log().includes('ready'))
      await pull(node, alice('second'))
      assert.doesNotMatch(squatter.log(), /HTTP|Basic|YWxpY2U|alice|second/)
      await squatter.kill()
      await node.startDaemon()
    }
  })

  /** What a client on the node is answered that shows no credentials. */
  async function status(node: ClusterNode, url: string, bearer?: string): Promise<number> {
    const said = await fetchFrom(node, url, bearer === undefined ? '' : `Bearer ${bearer}`)
    return said.status
  }

  /** A token of the node itself, for who shows a login. */
  async function tokenFor(node: ClusterNode, repository: string, login: string): Promise<string> {
    const query = new URLSearchParams({
      asked: 'manifests/1',
      service: REGISTRY,
      scope: `repository:${repository}:pull`,
    })
    const url = `https://127.0.0.1:5001/_shoal/token?${query.toString()}`
    const { text } = await fetchFrom(node, url, `Basic ${btoa(login)}`)
    const { token } = JSON.parse(text) as { token: string }
    return token
  }

  async function fetchFrom(
    node: ClusterNode,
    url: string,
    authorization: string,
  ): Promise<{ status: number; text: string }> {
    const headers = authorization === '' ? {} : { authorization }
    const script = `process.env.NODE_TLS_REJECT_UNAUTHORIZED = '0'
      fetch(${JSON.stringify(url)}, { headers: ${JSON.stringify(headers)} }).then(async (answer) =>
        console.log(JSON.stringify({ status: answer.status, text: await answer.text() })))`
    const env = { NODE_NO_WARNINGS: '1' }
    const said = await node.exec([process.execPath, '-e', script], { env })
    return JSON.parse(said) as { status: number; text: string }
  }

  async function held(node: ClusterNode): Promise<number> {
    const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
    return Number(/^shoal_peer_keys (\d+)$/m.exec(body)?.[1] ?? 0)
  }
})
