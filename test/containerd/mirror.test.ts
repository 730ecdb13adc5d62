/**
 * That containerd takes the files `mirror apply` writes, and goes where they say: to us first. Every registry here has
 * nothing, so that containerd asks all it knows of, in its order. Those on loopback are asked directly; what containerd wants
 * of any other host it wants of a proxy, which writes that down and refuses.
 */
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer, type RequestListener, type Server } from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import type { Socket } from 'node:net'
import { TLSSocket } from 'node:tls'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, suite, test } from 'node:test'
import { parse, type TomlTable } from 'smol-toml'
import { buildImage } from '../../src/cli/demo-image.ts'
import { readRegistries } from '../../src/config/registries.ts'
import {
  perform,
  planApply,
  planRestore,
  selectRoutes,
  type MirrorInit,
} from '../../src/mirror/certs-dir.ts'
import { Containerd, withEachContainerd } from '../harness/containerd.ts'

const REPOSITORY = 'library/a'

/** Registries that have nothing, and in what order they were asked. */
class Registries implements AsyncDisposable {
  #asked: { who: string }[] = []
  readonly #servers: Server[] = []

  get asked(): readonly string[] {
    return this.#asked.map(({ who }) => who)
  }

  /** Starts one; its `HOST:PORT`. With `tls` it speaks TLS and says as whom it was asked. */
  async start(name: string, tls?: { key: Buffer; cert: Buffer }): Promise<string> {
    /** Over TLS: those that have not been asked over yet, by the port of the other side. */
    const connections = new Map<number, { who: string }>()
    const answer: RequestListener = (request, response) => {
      const url = new URL(request.url ?? '/', 'http://registry')
      const registry = url.searchParams.get('ns')
      const [, prefix] = /^(.*)\/library\/a\//.exec(url.pathname) ?? []
      const path = prefix === undefined || prefix === '/v2' ? '' : prefix
      const certificate =
        request.socket instanceof TLSSocket ? request.socket.getPeerCertificate() : undefined
      const who =
        certificate?.subject?.CN === undefined ? '' : ` as ${String(certificate.subject.CN)}`
      const asker = `${name}${path}${who}${registry === null ? '' : ` for ${registry}`}`
      const first = connections.get(request.socket.remotePort ?? 0)
      if (first === undefined) this.#asked.push({ who: asker })
      else first.who = asker
      connections.delete(request.socket.remotePort ?? 0)
      response.writeHead(404).end()
    }
    if (tls === undefined) return this.#listen(createServer(answer))
    const server = createTlsServer({ ...tls, requestCert: true, rejectUnauthorized: false }, answer)
    // That a handshake has failed may be heard only after whoever was asked next.
    server.on('connection', ({ remotePort }: Socket) => {
      const entry = { who: `${name} not trusted` }
      connections.set(remotePort ?? 0, entry)
      this.#asked.push(entry)
    })
    return this.#listen(server)
  }

  /** The one who stands for all that is not on loopback; its URL. */
  async startProxy(): Promise<string> {
    const server = createServer((request, response) => {
      this.#asked.push({ who: new URL(request.url ?? '/', 'http://registry').host })
      response.writeHead(404).end()
    })
    server.on('connect', (request, socket) => {
      this.#asked.push({ who: request.url ?? '' })
      socket.end('HTTP/1.1 502 Bad Gateway\r\n\r\n')
    })
    return `http://${await this.#listen(server)}`
  }

  /** Who is asked while `action` fails for want of content. */
  async during(action: () => Promise<unknown>): Promise<string[]> {
    this.#asked = []
    await assert.rejects(action())
    const { asked } = this
    return asked.filter((entry, index) => entry !== asked[index - 1])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const server of this.#servers) {
      server.close()
      server.closeAllConnections()
    }
  }

  async #listen(server: Server): Promise<string> {
    this.#servers.push(server)
    await new Promise<void>((resolve) => {
      server.listen(0, '127.0.0.1', resolve)
    })
    const address = server.address()
    assert.ok(typeof address === 'object' && address !== null)
    return `127.0.0.1:${address.port}`
  }
}

withEachContainerd((binaries) => {
  test('containerd asks us first, by the files that mirror writes', async (t) => {
    await using registries = new Registries()
    const us = await registries.start('us')
    const endpoint = await registries.start('endpoint')
    const mirrored = await registries.start('mirrored')
    const other = await registries.start('other')
    const theirs = await registries.start('theirs')
    const certsDir = await mkdtemp(join(tmpdir(), 'shoal-certs-'))
    t.after(() => rm(certsDir, { recursive: true }))
    await using containerd = await Containerd.start(binaries)
    const pull = (registry: string) =>
      registries.during(() =>
        containerd.ctr('image', 'pull', '--hosts-dir', certsDir, `${registry}/${REPOSITORY}:1`),
      )

    // A file as K3s writes it
    await mkdir(join(certsDir, 'k3s.test.com'))
    await writeFile(
      join(certsDir, 'k3s.test.com', 'hosts.toml'),
      `# File generated by k3s. DO NOT EDIT.

server = "http://${theirs}/v2"
capabilities = ["pull", "resolve", "push"]

[host]
[host."http://${endpoint}/v2"]
  capabilities = ["pull", "resolve"]
`,
    )
    const before = await pull('k3s.test.com')
    assert.deepEqual(before, ['endpoint for k3s.test.com', 'theirs for k3s.test.com'])

    const rewrites = new Map<string, string>()
    const mirrors = new Map([
      [mirrored, { endpoints: [`http://${endpoint}`], rewrites }],
      ['*', { endpoints: [], rewrites }],
    ])
    const written = { mirrors, configs: new Map(), warnings: [] }
    const changes = await planApply(certsDir, {
      endpoint: `http://${us}`,
      homeRegistry: 'registry.localhost',
      routes: selectRoutes(['k3s.test.com', mirrored, '*'], written, { reader: 'containerd' }),
      reader: 'containerd',
    })
    await perform(changes)

    assert.deepEqual(await pull('k3s.test.com'), ['us for k3s.test.com', ...before])
    assert.deepEqual(await pull(mirrored), [
      `us for ${mirrored}`,
      `endpoint for ${mirrored}`,
      'mirrored',
    ])
    // By _default
    assert.deepEqual((await pull(other))[0], `us for ${other}`)
    // Nobody but us, and us only once
    assert.deepEqual(await pull('registry.localhost'), ['us for registry.localhost'])
    assert.equal(registries.asked.length, 1)

    const image = 'registry.localhost/a:1'
    await containerd.import(await buildImage({ layers: [1000] }), [image])
    const push = () => containerd.ctr('image', 'push', '--hosts-dir', certsDir, image)
    // containerd 1.6 does not name the registry when it pushes; asked by a loopback address we are the home registry
    for (const asked of await registries.during(push))
      assert.match(asked, /^us( for registry\.localhost)?$/)
    assert.notEqual(registries.asked.length, 0)

    // Without a default endpoint: not even the registry itself
    const kept = selectRoutes([mirrored, '*'], written, {
      reader: 'containerd',
      disableDefaultEndpoint: true,
    })
    const alone = { endpoint: `http://${us}`, homeRegistry: 'registry.localhost' }
    await perform(await planApply(certsDir, { ...alone, routes: kept, reader: 'containerd' }))
    assert.deepEqual(await pull(mirrored), [`us for ${mirrored}`, `endpoint for ${mirrored}`])
    assert.deepEqual(await pull(other), [`us for ${other}`])

    await perform(await planRestore(certsDir))
    assert.deepEqual(await pull('k3s.test.com'), before)
  })
})

/** What containerd may trust, in files. */
const pki = mkdtempSync(join(tmpdir(), 'shoal-pki-'))
after(() => rmSync(pki, { recursive: true }))
for (const [name, subject] of [
  ['server', '/CN=127.0.0.1'],
  ['node', '/CN=node'],
] as const) {
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2']
  const files = ['-keyout', `${name}.key`, '-out', `${name}.crt`]
  const names = ['-subj', subject, '-addext', 'subjectAltName=IP:127.0.0.1']
  execFileSync('openssl', ['req', '-x509', ...key, ...names, ...files], {
    cwd: pki,
    stdio: 'ignore',
  })
}
const CA = join(pki, 'server.crt')

interface Rule {
  readonly rule: string
  /** registries.yaml, in which `us`, `a` and `b` in braces are registries on loopback and `tls` one that speaks TLS */
  readonly yaml: string
  /** `--disable-default-registry-endpoint` */
  readonly disabled?: boolean
  readonly withdrawn?: boolean
  /** The registry that is pulled from; `r.lan` if nothing is said */
  readonly registry?: string
  /** The directory of its hosts.toml if it has another name, and is there before */
  readonly directory?: string
  /** What hosts.toml says: hosts in order, what is said of them, and last the server */
  readonly file: readonly string[]
  /** The same for K3s' containerd, where it differs */
  readonly k3s?: readonly string[] | 'no file'
  /** Who is asked in what order, by containerd as everybody has it */
  readonly asked: readonly string[]
}

const RULES: readonly Rule[] = [
  {
    rule: 'a registry without endpoints: we, then itself',
    yaml: 'mirrors: {r.lan: }',
    file: ['us', 'server https://r.lan'],
    asked: ['us', 'r.lan:443'],
  },
  {
    rule: 'endpoints keep their order; on loopback with a port they are http',
    yaml: 'mirrors: {r.lan: {endpoint: ["{b}", "{a}"]}}',
    file: ['us', 'b', 'a', 'server https://r.lan'],
    asked: ['us', 'b', 'a', 'r.lan:443'],
  },
  {
    rule: 'without a scheme all others are https, loopback without a port or with 443 too',
    yaml: 'mirrors: {r.lan: {endpoint: [m.lan, "m.lan:80", localhost, "127.0.0.1:443"]}}',
    file: [
      'us',
      'https://m.lan',
      'https://m.lan:80',
      'https://localhost',
      'https://127.0.0.1:443',
      'server https://r.lan',
    ],
    asked: ['us', 'm.lan:443', 'm.lan:80', 'r.lan:443'],
  },
  {
    rule: 'the registry of docker.io is registry-1.docker.io',
    yaml: 'mirrors: {docker.io: {endpoint: ["{a}"]}}',
    registry: 'docker.io',
    file: ['us', 'a', 'server https://registry-1.docker.io'],
    asked: ['us', 'a', 'registry-1.docker.io:443'],
  },
  {
    rule: 'as an endpoint too, and no other name of it is special',
    yaml: 'mirrors: {r.lan: {endpoint: [docker.io, index.docker.io]}}',
    file: ['us', 'https://registry-1.docker.io', 'https://index.docker.io', 'server https://r.lan'],
    asked: ['us', 'registry-1.docker.io:443', 'index.docker.io:443', 'r.lan:443'],
  },
  {
    rule: 'no path, / and /v2 are the same, and what is listed twice is asked once',
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}", "http://{a}/", "http://{a}/v2", "{b}"]}}',
    file: ['us', 'a', 'b', 'server https://r.lan'],
    asked: ['us', 'a', 'b', 'r.lan:443'],
  },
  {
    rule: 'any other path is kept and overrides',
    yaml: 'mirrors: {r.lan: {endpoint: ["http://{a}/v2/", "http://{b}/p/v2", "http://{b}/q"]}}',
    file: ['us', 'a/v2/ override', 'b/p/v2 override', 'b/q override', 'server https://r.lan'],
    asked: ['us', 'a', 'b/p/v2', 'b/q', 'r.lan:443'],
  },
  {
    rule: 'what is no URL is left out, the others stay',
    yaml: 'mirrors: {r.lan: {endpoint: ["http://a b", "http://[::1", "", "ftp://m.lan", "{a}"]}}',
    file: ['us', 'a', 'server https://r.lan'],
    asked: ['us', 'a', 'r.lan:443'],
  },
  {
    rule: 'the port stays as written, so that :443 is another endpoint than the registry itself',
    yaml: 'mirrors: {r.lan: {endpoint: ["https://r.lan:443"]}}',
    file: ['us', 'https://r.lan:443', 'server https://r.lan'],
    asked: ['us', 'r.lan:443'],
  },
  {
    rule: 'the registry itself, listed last, is not asked twice',
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}", "https://r.lan"]}}',
    file: ['us', 'a', 'server https://r.lan'],
    asked: ['us', 'a', 'r.lan:443'],
  },
  {
    rule: 'listed earlier it is asked there and again at the end',
    yaml: 'mirrors: {r.lan: {endpoint: ["https://r.lan", "{a}"]}}',
    file: ['us', 'https://r.lan', 'a', 'server https://r.lan'],
    asked: ['us', 'r.lan:443', 'a', 'r.lan:443'],
  },
  {
    rule: 'the wildcard is for what has no entry of its own, which then asks the registry itself',
    yaml: 'mirrors: {"*": {endpoint: ["{a}"]}, other.lan: {endpoint: ["{b}"]}}',
    directory: '_default',
    file: ['us', 'a'],
    k3s: ['us', 'a', 'server '],
    asked: ['us', 'a', 'r.lan:443'],
  },
  {
    rule: 'of two sections of mirrors both count',
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}"]}}\nmirrors: {other.lan: {endpoint: ["{b}"]}}',
    file: ['us', 'a', 'server https://r.lan'],
    asked: ['us', 'a', 'r.lan:443'],
  },
  {
    rule: 'of two entries for a registry the last counts, whole',
    yaml: 'mirrors:\n  r.lan: {endpoint: ["{a}"], rewrite: {x: y}}\n  r.lan: {endpoint: ["{b}"]}',
    file: ['us', 'b', 'server https://r.lan'],
    asked: ['us', 'b', 'r.lan:443'],
  },
  {
    rule: 'an entry of its own counts alone',
    yaml: 'mirrors: {"*": {endpoint: ["{a}"]}, r.lan: {endpoint: ["{b}"]}}',
    file: ['us', 'b', 'server https://r.lan'],
    asked: ['us', 'b', 'r.lan:443'],
  },
  {
    rule: 'without mirrors all registries are shared, but none under K3s',
    yaml: '',
    directory: '_default',
    file: ['us'],
    k3s: 'no file',
    asked: ['us', 'r.lan:443'],
  },
  {
    rule: 'a key with a port is that port',
    yaml: 'mirrors: {"r.lan:5000": }',
    registry: 'r.lan:5000',
    file: ['us', 'server https://r.lan:5000'],
    asked: ['us', 'r.lan:5000'],
  },
  {
    rule: "a directory in containerd's other spelling is the one that counts",
    yaml: 'mirrors: {"r.lan:5000": }',
    registry: 'r.lan:5000',
    directory: 'r.lan_5000_',
    file: ['us', 'server https://r.lan:5000'],
    asked: ['us', 'r.lan:5000'],
  },
  {
    rule: 'no default endpoint: the registry itself is never asked',
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}", "{b}"]}}',
    disabled: true,
    file: ['us', 'a', 'server b'],
    k3s: ['us', 'a', 'b'],
    asked: ['us', 'a', 'b'],
  },
  {
    rule: 'no default endpoint, and no other: only we are asked',
    yaml: 'mirrors: {r.lan: }',
    disabled: true,
    file: ['server us'],
    k3s: ['us'],
    asked: ['us'],
  },
  {
    rule: 'no default endpoint, of the wildcard',
    yaml: 'mirrors: {"*": {endpoint: ["http://{a}/p"]}}',
    disabled: true,
    directory: '_default',
    file: ['us', 'server a/p override'],
    k3s: ['us', 'a/p override'],
    asked: ['us', 'a/p'],
  },
  {
    rule: 'no default endpoint: what has an entry under configs, even an empty one, keeps it',
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}"]}}\nconfigs: {r.lan: }',
    disabled: true,
    file: ['us', 'a', 'server https://r.lan'],
    asked: ['us', 'a', 'r.lan:443'],
  },
  {
    rule: 'no default endpoint: what is under configs only is not touched',
    yaml: 'mirrors: {other.lan: }\nconfigs: {r.lan: {tls: {insecure_skip_verify: true}}}',
    disabled: true,
    file: ['server https://r.lan skip_verify'],
    k3s: 'no file',
    asked: ['r.lan:443'],
  },
  {
    rule: 'certificates are those of exactly the host and port of an endpoint',
    yaml: `mirrors: {r.lan: {endpoint: ["https://{tls}"]}}\nconfigs: {"{tls}": {tls: {ca_file: ${CA}}}}`,
    file: ['us', 'tls ca', 'server https://r.lan'],
    asked: ['us', 'tls', 'r.lan:443'],
  },
  {
    rule: 'those of the host without its port are not',
    yaml: `mirrors: {r.lan: {endpoint: ["https://{tls}"]}}\nconfigs: {127.0.0.1: {tls: {ca_file: ${CA}}}}`,
    file: ['us', 'tls', 'server https://r.lan'],
    asked: ['us', 'tls not trusted', 'r.lan:443'],
  },
  {
    rule: 'nor are those of the wildcard',
    yaml: `mirrors: {r.lan: {endpoint: ["https://{tls}"]}}\nconfigs: {"*": {tls: {ca_file: ${CA}}}}`,
    file: ['us', 'tls', 'server https://r.lan'],
    asked: ['us', 'tls not trusted', 'r.lan:443'],
  },
  {
    rule: 'a client certificate is shown',
    yaml: `mirrors: {r.lan: {endpoint: ["https://{tls}"]}}
configs: {"{tls}": {tls: {ca_file: ${CA}, cert_file: ${pki}/node.crt, key_file: ${pki}/node.key}}}`,
    file: ['us', 'tls ca client', 'server https://r.lan'],
    asked: ['us', 'tls as node', 'r.lan:443'],
  },
  {
    rule: 'insecure_skip_verify takes any certificate',
    yaml: 'mirrors: {r.lan: {endpoint: ["https://{tls}"]}}\nconfigs: {"{tls}": {tls: {insecure_skip_verify: yes}}}',
    file: ['us', 'tls skip_verify', 'server https://r.lan'],
    asked: ['us', 'tls', 'r.lan:443'],
  },
  {
    rule: 'certificates of a registry are for the server, those of registry-1.docker.io before those of docker.io',
    yaml: `mirrors: {docker.io: }
configs: {docker.io: {tls: {ca_file: ${CA}}}, registry-1.docker.io: {tls: {insecure_skip_verify: true}}}`,
    registry: 'docker.io',
    file: ['us', 'server https://registry-1.docker.io skip_verify'],
    asked: ['us', 'registry-1.docker.io:443'],
  },
  {
    rule: 'as an endpoint registry-1.docker.io is configured as docker.io',
    yaml: `mirrors: {r.lan: {endpoint: [docker.io]}}\nconfigs: {docker.io: {tls: {ca_file: ${CA}}}}`,
    file: ['us', 'https://registry-1.docker.io ca', 'server https://r.lan'],
    asked: ['us', 'registry-1.docker.io:443', 'r.lan:443'],
  },
  {
    rule: 'the certificates of the wildcard are for what has no file',
    yaml: 'mirrors: {other.lan: }\nconfigs: {"*": {tls: {insecure_skip_verify: true}}}',
    directory: '_default',
    file: ['server  skip_verify'],
    k3s: 'no file',
    asked: ['r.lan:443'],
  },
  {
    rule: 'they are lost when the wildcard is a mirror as well',
    yaml: 'mirrors: {"*": }\nconfigs: {"*": {tls: {insecure_skip_verify: true}}}',
    directory: '_default',
    file: ['us'],
    k3s: ['us', 'server '],
    asked: ['us', 'r.lan:443'],
  },
  {
    rule: 'an empty entry under configs does not keep a registry out of the wildcard',
    yaml: 'mirrors: {"*": {endpoint: ["{a}"]}}\nconfigs: {r.lan: }',
    directory: '_default',
    file: ['us', 'a'],
    k3s: ['us', 'a', 'server '],
    asked: ['us', 'a', 'r.lan:443'],
  },
  {
    rule: 'a login, even an empty one, does; it is not in the file',
    yaml: 'mirrors: {"*": {endpoint: ["{a}"]}}\nconfigs: {r.lan: {auth: {}}}',
    file: ['server https://r.lan'],
    k3s: 'no file',
    asked: ['r.lan:443'],
  },
  {
    rule: "rewrites are for the endpoints listed, not for us nor the registry itself, and K3s' containerd only",
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}", "{b}"], rewrite: {"^library/(.*)": "x/$1"}}}',
    file: ['us', 'a', 'b', 'server https://r.lan'],
    k3s: ['us', 'a rewrite', 'b rewrite', 'server https://r.lan'],
    asked: ['us', 'a', 'b', 'r.lan:443'],
  },
  {
    rule: 'before loopback names nobody stands',
    yaml: 'mirrors: {other.lan: , "{b}": {endpoint: ["{a}"]}}',
    registry: '{b}',
    file: ['a', 'server b'],
    k3s: 'no file',
    asked: ['a', 'b'],
  },
  {
    rule: 'we, listed by hand with or without a scheme, are first and once',
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}", "{us}", "http://{us}/v2"]}}',
    file: ['us', 'a', 'server https://r.lan'],
    asked: ['us', 'a', 'r.lan:443'],
  },
  {
    rule: 'while we are withdrawn the others are asked',
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}"]}}',
    withdrawn: true,
    file: ['a', 'server https://r.lan'],
    asked: ['a', 'r.lan:443'],
  },
  {
    rule: 'while we are withdrawn from all registries they are asked themselves',
    yaml: 'mirrors: {"*": }',
    withdrawn: true,
    directory: '_default',
    file: [],
    k3s: ['server '],
    asked: ['r.lan:443'],
  },
  {
    rule: 'withdrawn, without a default endpoint: still not the registry itself',
    yaml: 'mirrors: {r.lan: {endpoint: ["{a}"]}}',
    withdrawn: true,
    disabled: true,
    file: ['server a'],
    k3s: ['a'],
    asked: ['a'],
  },
  {
    rule: 'where nobody else may be asked we are not withdrawn',
    yaml: 'mirrors: {r.lan: }',
    withdrawn: true,
    disabled: true,
    file: ['server us'],
    k3s: ['us'],
    asked: ['us'],
  },
]

/** A hosts.toml in the words of {@link Rule}. */
function outline(toml: TomlTable, names: ReadonlyMap<string, string>): string[] {
  const name = (url: string) => {
    const [, address = '', path = ''] = /^https?:\/\/(127\.0\.0\.1:[0-9]+)(.*)$/.exec(url) ?? []
    const known = names.get(address)
    return known === undefined ? url : `${known}${path}`
  }
  const words = (table: TomlTable) => [
    ...(table['override_path'] === true ? ['override'] : []),
    ...['ca', 'client', 'skip_verify', 'rewrite'].filter((key) => key in table),
  ]
  const hosts = Object.entries(toml['host'] as Record<string, TomlTable>)
  const { server } = toml
  return [
    ...hosts.map(([url, table]) => [name(url), ...words(table)].join(' ')),
    ...(typeof server === 'string' ? [['server', name(server), ...words(toml)].join(' ')] : []),
  ]
}

withEachContainerd((binaries) => {
  suite('registries.yaml means to containerd what it means to K3s', () => {
    test('in every rule', async (t) => {
      await using registries = new Registries()
      const tls = ['key', 'crt'].map((end) => readFileSync(join(pki, `server.${end}`)))
      const [key = Buffer.alloc(0), cert = Buffer.alloc(0)] = tls
      const addresses = {
        us: await registries.start('us'),
        a: await registries.start('a'),
        b: await registries.start('b'),
        tls: await registries.start('tls', { key, cert }),
      }
      const names = new Map(Object.entries(addresses).map(([name, address]) => [address, name]))
      const fill = (text: string) =>
        Object.entries(addresses).reduce(
          (filled, [name, address]) => filled.replaceAll(`{${name}}`, address),
          text,
        )
      const proxy = await registries.startProxy()
      // Both take it from their environment: ctr of containerd 1.6, and containerd itself
      Object.assign(process.env, { HTTP_PROXY: proxy, HTTPS_PROXY: proxy })
      delete process.env['NO_PROXY']
      delete process.env['no_proxy']
      await using containerd = await Containerd.start(binaries)

      for (const rule of RULES) {
        await t.test(rule.rule, async () => {
          const directory = await mkdtemp(join(containerd.directory, 'rule-'))
          const yaml = join(directory, 'registries.yaml')
          await writeFile(yaml, fill(rule.yaml))
          const read = await readRegistries(yaml)
          const registry = fill(rule.registry ?? 'r.lan')
          const write = async (reader: MirrorInit['reader']) => {
            const certsDir = join(directory, reader)
            await mkdir(join(certsDir, rule.directory ?? '.'), { recursive: true })
            const options = { reader, disableDefaultEndpoint: rule.disabled ?? false }
            const changes = await planApply(certsDir, {
              endpoint: `http://${addresses.us}`,
              homeRegistry: 'registry.localhost',
              routes: selectRoutes([], read, options),
              reader,
              withdrawn: rule.withdrawn ?? false,
            })
            await perform(changes)
            const path = join(certsDir, rule.directory ?? registry, 'hosts.toml')
            const text = await readFile(path, 'utf8').catch(() => undefined)
            return { certsDir, said: text === undefined ? 'no file' : outline(parse(text), names) }
          }
          const k3s = await write('k3s')
          const { certsDir, said } = await write('containerd')
          const asked = await registries.during(() =>
            containerd.ctr('image', 'pull', '--hosts-dir', certsDir, `${registry}/${REPOSITORY}:1`),
          )
          // Who is not the registry itself is told which one is meant.
          const wanted = rule.asked.map((who) => {
            const [name = ''] = who.split(/[ /]/)
            const told = name in addresses && fill(`{${name}}`) !== registry
            return told && !who.endsWith('not trusted') ? `${who} for ${registry}` : who
          })
          assert.deepEqual(
            { said, k3s: k3s.said, asked },
            { said: rule.file, k3s: rule.k3s ?? rule.file, asked: wanted },
          )
        })
      }
    })
  })

  test('a daemon that was killed costs containerd no time: its connections are refused', async () => {
    const registries = new Registries()
    const us = await registries.start('us')
    await registries[Symbol.asyncDispose]()
    await using others = new Registries()
    const mirrored = await others.start('registry')
    await using containerd = await Containerd.start(binaries)
    const certsDir = join(containerd.directory, 'certs.d')
    const read = await readRegistries(join(certsDir, 'no registries.yaml'))
    await perform(
      await planApply(certsDir, {
        endpoint: `http://${us}`,
        homeRegistry: 'registry.localhost',
        routes: selectRoutes([mirrored], read, { reader: 'containerd' }),
        reader: 'containerd',
      }),
    )
    const begun = performance.now()
    const asked = await others.during(() =>
      containerd.ctr('image', 'pull', '--hosts-dir', certsDir, `${mirrored}/${REPOSITORY}:1`),
    )
    assert.deepEqual(asked, ['registry'])
    // Some 40 ms are usual; what would hurt is a time-out, of which containerd's are of 30 s
    assert.ok(performance.now() - begun < 20_000)
  })
})
