import assert from 'node:assert/strict'
import { appendFile } from 'node:fs/promises'
import { after, before, suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import type { HttpAnswer, Program } from '../harness/machine.ts'
import { containerdBinaries, skipWithout, tools } from '../harness/tools.ts'
import { until } from '../wait.ts'

const CERTS = '/etc/containerd/certs.d'
const REGISTRIES = '/etc/rancher/k3s/registries.yaml'
const PASSWORD = 'correct-horse'
/** Of {@link PASSWORD}, as htpasswd writes it. */
const HTPASSWD = 'alice:$2y$04$po1PgeA9/G7y5mLfVi2TeuZ5ImYiTmwAZfSPMZZDWaGWnYJtm2TCW\n'

const LOGIN = Buffer.from(`alice:${PASSWORD}`).toString('base64')
/** As `docker login` writes it. */
const DOCKER_JSON = JSON.stringify({ auths: { 'https://upstream.test:5445/v2/': { auth: LOGIN } } })

/**
 * Upstreams that hold the same repositories in different ways: plain and by another name, behind a login and a private CA,
 * behind a token server whose login is in a file of Docker's, for those who show a certificate, and under a path.
 * The nodes' containerds know none of them, only their own daemon.
 */
const REGISTRIES_YAML = `
mirrors:
  plain.test:
    endpoint: [http://${Upstream.host}]
    rewrite: {"^(.*)$": "org/$1"}
  login.test: {endpoint: ["https://upstream.test:5443"]}
  certificate.test: {endpoint: ["https://missing.test", "https://upstream.test:5444"]}
  token.test: {endpoint: ["https://upstream.test:5445"]}
  pod.test: {endpoint: ["https://upstream.test:5443"]}
  path.test:
    endpoint: [http://upstream.test:5447/hub/v2]
    rewrite: {"^team/(.*)$": "org/$1"}
configs:
  upstream.test:5443:
    auth: {username: alice, password: ${PASSWORD}}
    tls: {ca_file: /etc/shoal/ca.crt}
  upstream.test:5445:
    tls: {ca_file: /etc/shoal/ca.crt}
  upstream.test:5444:
    tls: {ca_file: /etc/shoal/ca.crt, cert_file: /etc/shoal/node.crt, key_file: /etc/shoal/node.key}
`

const CONFIG = {
  version: 0.1,
  log: { level: 'warn', accesslog: { disabled: true } },
  storage: { filesystem: { rootdirectory: '/var/lib/registry' } },
}

for (const [index, version] of (['1.x', '2.x'] as const).entries()) {
  const skip = skipWithout('namespaces', 'registry', 'skopeo', `containerd ${version}`)
  const binaries = containerdBinaries().find((each) => each.version.startsWith(`${index + 1}.`))

  suite(`upstreams of two nodes with containerd ${binaries?.version ?? version}`, { skip }, () => {
    let cluster: Cluster
    let nodes: [ClusterNode, ClusterNode]
    let tokenServer: Program
    let nodeKey: string

    before(async () => {
      assert.ok(binaries && tools.registry !== undefined)
      cluster = await Cluster.create({ nodes: [binaries, binaries] })
      const [a, b] = cluster.nodes
      assert.ok(a && b)
      nodes = [a, b]
      const { machine } = cluster.upstream
      const certificates = `cd /run
        key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
        openssl req -x509 $key -subj /CN=upstream.test -addext subjectAltName=DNS:upstream.test -keyout tls.key -out tls.crt
        openssl req -x509 $key -subj /CN=node -keyout node.key -out node.crt
        echo '${HTPASSWD}' > htpasswd`
      await machine.exec(['sh', '-ec', certificates])
      const read = (name: string) => machine.exec(['cat', `/run/${name}`])
      const tls = { certificate: '/run/tls.crt', key: '/run/tls.key' }
      const tokens = {
        realm: 'https://upstream.test:5446/token',
        service: 'upstream',
        issuer: 'token-server',
        rootcertbundle: tls.certificate,
      }
      const script = fileURLToPath(new URL('../harness/token-server.ts', import.meta.url))
      const login = `alice:${PASSWORD}`
      const argv = [script, '5446', tls.certificate, tls.key, login]
      tokenServer = machine.run([process.execPath, ...argv])
      await until(() => tokenServer.log().includes('ready'), { what: 'the token server listens' })
      for (const [port, more] of [
        [5443, { auth: { htpasswd: { realm: 'r', path: '/run/htpasswd' } }, http: { tls } }],
        [5444, { http: { tls: { ...tls, clientcas: ['/run/node.crt'] } } }],
        [5445, { auth: { token: tokens }, http: { tls } }],
        [5447, { http: { prefix: '/hub/' } }],
      ] as const) {
        const config = { ...CONFIG, ...more, http: { ...more.http, addr: `:${port}` } }
        const path = `/run/registry-${port}.json`
        await machine.exec(['sh', '-c', `cat > ${path} <<'END'\n${JSON.stringify(config)}\nEND`])
        const registry = machine.run([tools.registry, 'serve', path])
        await until(
          () => machine.exec(['sh', '-c', `ss -tln | grep -q :${port}`]).then(() => true),
          {
            what: `the upstream listens on ${port}`,
          },
        ).catch((error: unknown) => {
          throw new Error(`${String(error)}\n${registry.tail()}`, { cause: error })
        })
      }
      await Promise.all(
        nodes.map(async (node) => {
          await node.writeFile('/etc/shoal/ca.crt', await read('tls.crt'))
          await node.writeFile('/etc/shoal/node.crt', await read('node.crt'))
          await node.writeFile('/etc/shoal/node.key', (nodeKey = await read('node.key')))
          await node.writeFile('/etc/shoal/docker.json', DOCKER_JSON)
          const pod = `server = "https://upstream.test:5443"\nca = "/etc/shoal/ca.crt"\n`
          const first = '[host."http://127.0.0.1:5001"]\n'
          await node.writeFile(`${CERTS}/pod.test/hosts.toml`, pod + first)
          const more =
            '\nprivate: ["pod.test=upstream"]\ncredentials: [/etc/shoal/docker.json]\nlog: {level: trace}\n'
          await appendFile(node.machine.path('/etc/shoal/config.yaml'), more)
          await node.writeFile(REGISTRIES, REGISTRIES_YAML)
          const us = 'server = "http://127.0.0.1:5001"\n[host]\n'
          await node.writeFile(`${CERTS}/_default/hosts.toml`, us)
          await Promise.all([node.startContainerd(), node.startDaemon()])
        }),
      )
    })
    after(() => cluster[Symbol.asyncDispose]())

    async function pulled(
      node: ClusterNode,
      reference: string,
      how: 'ctr' | 'CRI',
      ...flags: readonly string[]
    ): Promise<void> {
      const pull =
        how === 'ctr'
          ? node.ctr('images', 'pull', '--hosts-dir', CERTS, ...flags, reference)
          : node.cri.pull(reference)
      await pull.catch((error: unknown) => {
        throw new Error(`${reference} by ${how}: ${String(error)}\n${node.daemon.tail()}`, {
          cause: error,
        })
      })
    }

    function ask(node: ClusterNode, registry: string, path: string): Promise<HttpAnswer> {
      return node.machine.get(`http://127.0.0.1:5001/v2/${path}?ns=${registry}`)
    }

    /** Requests to upstreams that were made, not skipped because the upstream is known to be down. */
    async function attempts(node: ClusterNode): Promise<string[]> {
      const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
      const lines = body
        .split('\n')
        .filter((line) => line.startsWith('shoal_upstream_attempts_total'))
      return lines.filter((line) => !line.includes('"skipped"'))
    }

    test('are those that registries.yaml names now', async () => {
      const [a] = nodes
      const image = await buildImage({ layers: [1000], seed: `${version} live` })
      await cluster.upstream.push(image, 'org/live:1')
      const path = 'live/manifests/1'
      assert.equal((await ask(a, 'renamed.test', path)).status, 404)
      const read = () => a.daemon.log().split('registries.yaml read').length
      const before = read()
      await a.writeFile(REGISTRIES, REGISTRIES_YAML.replace('plain.test', 'renamed.test'))
      await until(() => read() > before, { what: 'the file is read again' })
      const { status, headers } = await ask(a, 'renamed.test', path)
      assert.deepEqual([status, headers.get('shoal-source')], [200, 'upstream'])
      // One that is broken is reported, and the last good one stays
      await a.writeFile(REGISTRIES, 'mirrors: [\n')
      await until(() => a.daemon.log().includes('configuration cannot be used'))
      assert.equal((await ask(a, 'renamed.test', path)).status, 200)
      await a.writeFile(REGISTRIES, REGISTRIES_YAML)
      await until(() => read() > before + 1, { what: 'the file is read once more' })
    })

    test('say what a tag means that moves; without them the nodes know', async () => {
      const [a, b] = nodes
      const asked = async (node: ClusterNode, tag: string) => {
        const { headers } = await ask(node, 'plain.test', `moving/manifests/${tag}`)
        return [headers.get('docker-content-digest'), headers.get('shoal-tag')]
      }
      const push = async (seed: string) => {
        const image = await buildImage({ layers: [1000], seed: `${version} ${seed}` })
        for (const tag of ['latest', '1']) await cluster.upstream.push(image, `org/moving:${tag}`)
        return image.manifest.descriptor.digest
      }
      const first = await push('first')
      for (const tag of ['latest', '1']) await pulled(a, `plain.test/moving:${tag}`, 'ctr')
      const second = await push('second')
      // What is said of `latest` in the default rules; other tags are taken to stay
      assert.deepEqual(await asked(a, 'latest'), [second, 'fresh'])
      assert.deepEqual(await asked(a, '1'), [first, 'last-known-good'])
      await cluster.upstream.stop()
      // What another node was told within the last seconds is as good as the upstream's word
      await until(async () => (await asked(b, 'latest')).join() === `${first},last-known-good`)
      await cluster.upstream.start()
    })

    test('get no login of this node where the policy says upstream: containerd goes itself', async () => {
      const [a] = nodes
      const image = await buildImage({ layers: [1000], seed: `${version} pod` })
      await cluster.upstream.push(image, 'org/pod:1')
      const path = 'org/pod/manifests/1'
      // Its default endpoint is found to be down
      await ask(a, 'pod.test', 'org/pod/manifests/0')
      // It is left alone for a second at first, which a busy machine may take to ask
      await until(async () => {
        const before = await attempts(a)
        assert.equal((await ask(a, 'pod.test', path)).status, 404)
        assert.deepEqual(await attempts(a), before, 'it costs no wait again')
        return true
      })
      const reference = 'pod.test/org/pod:1'
      await assert.rejects(pulled(a, reference, 'ctr'), /401|authorization|not found/)
      await pulled(a, reference, 'ctr', '--user', `alice:${PASSWORD}`)
      // The same by another name, for which it says nothing
      assert.equal((await ask(a, 'login.test', path)).status, 200)
    })

    test('leave no secret in anything that a node writes', async () => {
      const [a] = nodes
      const image = await buildImage({ layers: [1000], seed: `${version} secret` })
      await cluster.upstream.push(image, 'org/secret:1')
      const asked = async (tag: string) => {
        const path = `org/secret/manifests/${tag}`
        const both = ['login.test', 'token.test'].map((registry) => ask(a, registry, path))
        return (await Promise.all(both)).map(({ status }) => status)
      }
      assert.deepEqual(await asked('1'), [200, 200])
      // A login that is refused, and files whose mistakes stand where secrets do
      const refused = REGISTRIES_YAML.replace(PASSWORD, 'hunter2-refused')
      const wrong = `configs: {upstream.test:5443: {auth: {password: [hunter2-list]}}, x: {auth: hunter2}}\n`
      const times = () =>
        a.daemon.log().split(/registries\.yaml read|configuration cannot be used/).length
      for (const text of [refused, wrong, REGISTRIES_YAML]) {
        const before = times()
        await a.writeFile(REGISTRIES, text)
        await until(() => times() > before, { what: 'the file is read' })
        await asked(`${before}`)
      }
      await a.writeFile('/etc/shoal/docker.json', `{"auths": {"token.test": {"auth": "${LOGIN}`)
      await asked('none')
      await until(() => a.daemon.log().includes('it is not JSON'))
      await a.writeFile('/etc/shoal/docker.json', DOCKER_JSON)
      for (const said of [
        'upstream refuses the login of this node',
        'configuration cannot be used',
      ])
        await until(() => a.daemon.log().includes(said), { what: said })

      const shoal = (...args: readonly string[]) =>
        a.exec(['sh', '-c', 'shoal "$@" 2>&1 || true', 'shoal', ...args])
      const written = [
        a.daemon.log(),
        nodes[1].daemon.log(),
        await shoal('config', 'print'),
        await shoal('config', 'check'),
        await shoal('mirror', 'diff'),
        await shoal('status'),
        await shoal('status', '--json'),
        await shoal('explain', 'login.test/org/secret:1'),
        await shoal('explain', 'token.test/org/secret:1', '--json'),
        await a.exec(['cat', ...['cmdline', 'environ'].map((of) => `/proc/${a.daemon.pid}/${of}`)]),
        await a.exec(['sh', '-c', 'find /var/lib/shoal -type f -size -1000k -exec cat {} +']),
      ]
      for (const [port, paths] of [
        ['9090', ['metrics', 'readyz', 'livez', 'status', '', 'debug']],
        ['5001', ['v2/', 'v2/org/secret/manifests/1?ns=login.test', 'v2/x?ns=token.test']],
      ] as const) {
        for (const path of paths) {
          const answer = await a.machine.get(`http://127.0.0.1:${port}/${path}`)
          written.push(JSON.stringify([...answer.headers]), answer.body)
        }
      }
      const secrets = [
        PASSWORD,
        LOGIN,
        'hunter2',
        nodeKey.split('\n')[1] ?? '',
        // Every token begins with this header
        Buffer.from('{"typ":"JWT"').toString('base64url').slice(0, 15),
      ]
      for (const text of written) {
        for (const secret of secrets)
          assert.ok(!text.includes(secret), `${secret} is in ${text.slice(0, 2000)}`)
      }
    })

    test('are asked by one node once; then they may stop, and the other pulls from it', async () => {
      const [a, b] = nodes
      const images: { reference: string; how: 'ctr' | 'CRI'; image: DemoImage }[] = []
      for (const [registry, path] of [
        ['plain.test', ''],
        ['login.test', 'org/'],
        ['certificate.test', 'org/'],
        ['token.test', 'org/'],
        ['path.test', 'team/'],
      ] as const) {
        for (const how of ['ctr', 'CRI'] as const) {
          const name = `${registry.replace('.test', '')}-${how.toLowerCase()}`
          const image = await buildImage({ layers: [1_500_000, 1000], seed: `${version} ${name}` })
          await cluster.upstream.push(image, `org/${name}:1`)
          images.push({ reference: `${registry}/${path}${name}:1`, how, image })
        }
      }
      // All upstreams at once
      await Promise.all(images.map(({ reference, how }) => pulled(a, reference, how)))
      await until(() => /^alice repository:org\/token-ctr:pull$/m.test(tokenServer.log()))
      const size = images
        .flatMap(({ image }) => image.blobs())
        .reduce((sum, { descriptor }) => sum + descriptor.size, 0)
      // Once each, but for the manifests, which are asked for by tag and by digest
      // An answer is counted when all of it has gone, which its client may know before
      const counted = await until(async () => {
        const bytes = await a.bytesFrom('upstream')
        return bytes >= size && bytes
      })
      assert.ok(counted < size + 100_000, `${counted} of ${size}`)

      for (const { reference } of images) await b.knows(reference)
      await cluster.upstream.machine[Symbol.asyncDispose]()
      for (const { reference, how } of images) {
        await pulled(b, reference, how)
        assert.equal(await b.rootfs(reference), await a.rootfs(reference), reference)
      }
    })

    test('that are gone cost a wait once, and nothing after that', async () => {
      const [a] = nodes
      const skipped = async () => {
        const { body } = await a.machine.get('http://127.0.0.1:9090/metrics')
        return Number(
          /^shoal_upstream_attempts_total\{outcome="skipped"\} (\d+)$/m.exec(body)?.[1] ?? 0,
        )
      }
      for (const tag of ['1', '2'])
        assert.equal((await ask(a, 'certificate.test', `org/nothing/manifests/${tag}`)).status, 404)
      // They are left alone for a second at first, and longer each time: a busy machine may be too late for the first.
      let tag = 2
      await until(async () => {
        const before = await skipped()
        tag += 1
        const { status } = await ask(a, 'certificate.test', `org/nothing/manifests/${tag}`)
        assert.equal(status, 404)
        // Both endpoints and the registry itself
        await until(async () => (await skipped()) - before >= 3, { timeoutMs: 2000 })
        assert.equal((await skipped()) - before, 3)
        return true
      })
    })
  })
}
