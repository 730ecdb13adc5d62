import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { promisify } from 'node:util'
import { hashSync } from 'bcryptjs'
import { buildImage, imageArchive } from '../../src/cli/demo-image.ts'
import { Containerd } from '../harness/containerd.ts'
import { LoopbackNode } from '../harness/loopback-node.ts'
import {
  containerdBinaries,
  skipWithout,
  tools,
  type ContainerdBinaries,
} from '../harness/tools.ts'

const USER = 'ci'
const PASSWORD = 'a password of some length'

/** A node that takes pushes from who logs in, and the clients of somebody who does. */
class Workshop implements AsyncDisposable {
  readonly node: LoopbackNode
  readonly containerd: Containerd | undefined
  readonly registry: string
  readonly #stack: AsyncDisposableStack

  private constructor(
    node: LoopbackNode,
    containerd: Containerd | undefined,
    stack: AsyncDisposableStack,
  ) {
    this.node = node
    this.containerd = containerd
    this.registry = node.addresses.local
    this.#stack = stack
  }

  static async open(binaries?: ContainerdBinaries): Promise<Workshop> {
    await using stack = new AsyncDisposableStack()
    const containerd = binaries && stack.use(await Containerd.start(binaries))
    const users = join(await LoopbackNode.directory(stack), 'htpasswd')
    await writeFile(users, `${USER}:${hashSync(PASSWORD, 10)}\n`)
    const store =
      containerd === undefined
        ? ['--store=layout']
        : ['--store=containerd', `--containerd-address=${containerd.socket}`]
    const node = stack.use(
      await LoopbackNode.start(...store, '--push-access=auth', `--push-users=${users}`),
    )
    await mkdir(node.file('home'))
    // buildah wants it to be there
    await writeFile(join(node.file('home'), 'auth.json'), '{}')
    return new Workshop(node, containerd, stack.move())
  }

  /** Runs a client, in a directory of its own where it keeps its logins. */
  async run(program: string | undefined, ...args: readonly string[]): Promise<string> {
    const home = this.node.file('home')
    const env = {
      ...process.env,
      HOME: home,
      DOCKER_CONFIG: join(home, '.docker'),
      REGISTRY_AUTH_FILE: join(home, 'auth.json'),
    }
    const options = { env, cwd: home, timeout: 120_000, maxBuffer: 16 * 1024 * 1024 }
    const { stdout } = await promisify(execFile)(program ?? '', [...args], options)
    return stdout
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack[Symbol.asyncDispose]()
  }
}

const { skopeo, crane, oras, helm, buildah } = tools

function clientsSuite(name: string, binaries?: ContainerdBinaries): void {
  suite(
    `clients push to ${name}`,
    { skip: skipWithout('skopeo', 'buildah', 'crane', 'oras', 'helm') },
    () => {
      test('skopeo logs in, pushes, copies, lists, deletes; without a login it is refused', async () => {
        await using shop = await Workshop.open(binaries)
        const { registry, node } = shop
        const image = await buildImage({ layers: [500_000, 20_000], seed: name })
        await writeFile(node.file('image.tar'), imageArchive(image, ['image']))
        const copy = ['copy', '--quiet', '--insecure-policy', '--preserve-digests']
        const plain = ['--src-tls-verify=false', '--dest-tls-verify=false']
        const push = () =>
          shop.run(
            skopeo,
            ...copy,
            ...plain,
            `oci-archive:${node.file('image.tar')}`,
            `docker://${registry}/team/app:v1`,
          )
        await assert.rejects(push(), /unauthorized|authentication required|login is required/)
        await assert.rejects(
          shop.run(skopeo, 'login', '--tls-verify=false', '-u', USER, '-p', 'wrong', registry),
        )
        await shop.run(skopeo, 'login', '--tls-verify=false', '-u', USER, '-p', PASSWORD, registry)
        await push()
        const inspected = JSON.parse(
          await shop.run(
            skopeo,
            'inspect',
            '--tls-verify=false',
            `docker://${registry}/team/app:v1`,
          ),
        ) as { Digest: string; RepoTags: string[] }
        assert.equal(inspected.Digest, image.manifest.descriptor.digest)
        assert.deepEqual(inspected.RepoTags, ['v1'])
        await shop.run(
          skopeo,
          ...copy,
          ...plain,
          `docker://${registry}/team/app:v1`,
          `docker://${registry}/team/copy:v2`,
        )
        const listed = await shop.run(
          skopeo,
          'list-tags',
          '--tls-verify=false',
          `docker://${registry}/team/copy`,
        )
        assert.deepEqual((JSON.parse(listed) as { Tags: string[] }).Tags, ['v2'])
        if (shop.containerd !== undefined) {
          const images = await shop.containerd.ctr('image', 'check')
          assert.match(images, /registry\.localhost\/team\/app:v1 .* complete \(/)
          assert.match(images, /registry\.localhost\/team\/copy:v2 .* complete \(/)
        }
        await shop.run(skopeo, 'delete', '--tls-verify=false', `docker://${registry}/team/copy:v2`)
        await assert.rejects(
          shop.run(skopeo, 'inspect', '--tls-verify=false', `docker://${registry}/team/copy:v2`),
        )
      })

      test('buildah, which speaks as podman does, logs in, pushes, pulls', async () => {
        await using shop = await Workshop.open(binaries)
        const { registry, node } = shop
        const at = (where: string) => [
          '--storage-driver=vfs',
          `--root=${node.file(where)}`,
          `--runroot=${node.file(`${where}.run`)}`,
        ]
        const run = (where: string, ...args: readonly string[]) =>
          shop.run(buildah, ...at(where), ...args)
        await writeFile(node.file('hello'), 'hello\n')
        const container = (await run('one', 'from', 'scratch')).trim()
        await run('one', 'copy', container, node.file('hello'), '/hello')
        const reference = `${registry}/team/built:v1`
        const id = (await run('one', 'commit', '--quiet', container, reference)).trim()
        const push = () => run('one', 'push', '--quiet', '--tls-verify=false', reference)
        await assert.rejects(push(), /unauthorized|authentication required|login is required/)
        const login = (password: string) =>
          run('one', 'login', '--tls-verify=false', '-u', USER, '-p', password, registry)
        await assert.rejects(login('wrong'))
        await login(PASSWORD)
        await push()
        const pulled = await run('two', 'pull', '--quiet', '--tls-verify=false', reference)
        assert.equal(pulled.trim(), id)
        const again = (await run('two', 'from', '--pull-never', reference)).trim()
        const mounted = (await run('two', 'mount', again)).trim()
        assert.equal(await readFile(join(mounted, 'hello'), 'utf8'), 'hello\n')
        await run('two', 'umount', again)
        await run('one', 'logout', registry)
        await assert.rejects(push(), /unauthorized|authentication required|login is required/)
      })

      test('crane logs in, pushes, mounts, lists and pulls', async () => {
        await using shop = await Workshop.open(binaries)
        const { registry, node } = shop
        const image = await buildImage({ layers: [300_000], seed: `${name} crane` })
        await writeFile(node.file('image.tar'), imageArchive(image, ['image:1']))
        await mkdir(node.file('layout'))
        await promisify(execFile)('tar', ['-xf', node.file('image.tar'), '-C', node.file('layout')])
        const { digest } = image.manifest.descriptor
        await shop.run(crane, 'auth', 'login', registry, '-u', USER, '-p', PASSWORD)
        await shop.run(crane, 'push', '--insecure', node.file('layout'), `${registry}/a/one:v1`)
        assert.equal(
          (await shop.run(crane, 'digest', '--insecure', `${registry}/a/one:v1`)).trim(),
          digest,
        )
        await shop.run(crane, 'copy', '--insecure', `${registry}/a/one:v1`, `${registry}/b/two:v1`)
        await shop.run(crane, 'tag', '--insecure', `${registry}/b/two:v1`, 'v2')
        assert.deepEqual(
          (await shop.run(crane, 'ls', '--insecure', `${registry}/b/two`)).trim().split('\n'),
          ['v1', 'v2'],
        )
        assert.deepEqual(
          (await shop.run(crane, 'catalog', '--insecure', registry)).trim().split('\n'),
          ['a/one', 'b/two'],
        )
        await shop.run(crane, 'pull', '--insecure', `${registry}/b/two:v2`, node.file('pulled.tar'))
        await shop.run(crane, 'validate', '--insecure', '--remote', `${registry}/b/two@${digest}`)
        await shop.run(crane, 'delete', '--insecure', `${registry}/a/one@${digest}`)
        await assert.rejects(shop.run(crane, 'digest', '--insecure', `${registry}/a/one:v1`))
        assert.equal(
          (await shop.run(crane, 'digest', '--insecure', `${registry}/b/two:v1`)).trim(),
          digest,
        )
      })

      test('oras pushes an artifact, says something about it and finds that', async () => {
        await using shop = await Workshop.open(binaries)
        const { registry } = shop
        const home = shop.node.file('home')
        await shop.run(oras, 'login', '--plain-http', '-u', USER, '-p', PASSWORD, registry)
        await writeFile(join(home, 'module.wasm'), 'not really a module')
        await writeFile(join(home, 'sbom.json'), '{"packages": []}')
        const reference = `${registry}/team/module:v1`
        await shop.run(
          oras,
          'push',
          '--plain-http',
          '--artifact-type=application/vnd.wasm',
          reference,
          'module.wasm:application/wasm',
        )
        await shop.run(
          oras,
          'attach',
          '--plain-http',
          '--artifact-type=application/x.sbom',
          reference,
          'sbom.json',
        )
        const found = await shop.run(oras, 'discover', '--plain-http', '--format=json', reference)
        assert.match(found, /application\/x\.sbom/)
        await shop.run(oras, 'pull', '--plain-http', '-o', 'out', reference)
        assert.equal(await readFile(join(home, 'out/module.wasm'), 'utf8'), 'not really a module')
        const copied = `${registry}/team/copied:v1`
        await shop.run(
          oras,
          'copy',
          '-r',
          '--from-plain-http',
          '--to-plain-http',
          reference,
          copied,
        )
        assert.match(
          await shop.run(oras, 'discover', '--plain-http', '--format=json', copied),
          /application\/x\.sbom/,
        )
      })

      test('helm pushes and pulls a chart', async () => {
        await using shop = await Workshop.open(binaries)
        const { registry } = shop
        const login = ['--plain-http', '-u', USER, '-p', PASSWORD]
        await shop.run(helm, 'registry', 'login', registry, ...login)
        await shop.run(helm, 'create', 'web')
        await shop.run(helm, 'package', 'web')
        await shop.run(helm, 'push', '--plain-http', 'web-0.1.0.tgz', `oci://${registry}/charts`)
        const chart = `oci://${registry}/charts/web`
        await shop.run(helm, 'pull', '--plain-http', '-d', '..', chart, '--version', '0.1.0')
        assert.deepEqual(
          await readFile(shop.node.file('web-0.1.0.tgz')),
          await readFile(join(shop.node.file('home'), 'web-0.1.0.tgz')),
        )
      })
    },
  )
}

clientsSuite('the embedded store')

test(
  'another machine pushes over TLS, with a login for everything',
  { skip: skipWithout('skopeo') },
  async () => {
    await using stack = new AsyncDisposableStack()
    const directory = await LoopbackNode.directory(stack)
    const [users, cert, key] = ['users', 'cert.pem', 'key.pem'].map((name) => join(directory, name))
    await writeFile(users ?? '', `${USER}:${hashSync(PASSWORD, 4)}\n`)
    const newKey = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes']
    const subject = ['-subj', '/CN=node', '-addext', 'subjectAltName=IP:127.0.0.1']
    const files = ['-days', '2', '-keyout', key ?? '', '-out', cert ?? '']
    await promisify(execFile)('openssl', ['req', '-x509', ...newKey, ...subject, ...files])
    await using node = await LoopbackNode.start(
      '--store=layout',
      '--push-access=auth',
      `--push-users=${users}`,
      '--listen-push=127.0.0.1:0',
      `--push-cert=${cert}`,
      `--push-key=${key}`,
    )
    const image = await buildImage({ layers: [300_000], seed: 'over TLS' })
    const archive = join(directory, 'image.tar')
    await writeFile(archive, imageArchive(image, ['image']))
    const target = `docker://${node.addresses.push}/team/app:v1`
    const run = (...args: string[]) => promisify(execFile)(tools.skopeo ?? '', args)
    const copy = ['copy', '--quiet', '--insecure-policy', '--preserve-digests']
    // Whom it speaks with is shown by its certificate.
    await mkdir(join(directory, 'certs'))
    const trust = ['--dest-cert-dir', join(directory, 'certs')]
    const login = `${USER}:${PASSWORD}`
    const push = ['--dest-creds', login, `oci-archive:${archive}`, target]
    await assert.rejects(run(...copy, ...trust, ...push), /certificate/)
    await writeFile(join(directory, 'certs/ca.crt'), await readFile(cert ?? ''))
    await run(...copy, ...trust, ...push)
    const inspect = ['inspect', '--cert-dir', join(directory, 'certs')]
    await assert.rejects(run(...inspect, target), /unauthorized|authentication required|login/)
    const { stdout } = await run(...inspect, '--creds', login, target)
    const { digest } = image.manifest.descriptor
    assert.equal((JSON.parse(stdout) as { Digest: string }).Digest, digest)
    // On the node itself pulls take no login, and the image is that of the home registry.
    const local = await fetch(
      `http://${node.addresses.local}/v2/team/app/manifests/v1?ns=registry.localhost`,
    )
    assert.equal(local.headers.get('docker-content-digest'), digest)
  },
)
for (const need of ['containerd 1.x', 'containerd 2.x'] as const) {
  const major = need.slice('containerd '.length, -1)
  const binaries = containerdBinaries().find(({ version }) => version.startsWith(major))
  suite(need, { skip: skipWithout(need) }, () => clientsSuite(need, binaries))
}
