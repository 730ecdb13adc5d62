import assert from 'node:assert/strict'
import { globSync, readFileSync } from 'node:fs'
import { isBuiltin } from 'node:module'
import { basename, join, normalize } from 'node:path'
import { test } from 'node:test'

/** What those may import who put a node together. */
const COMPOSITION = [
  'oci',
  'lifecycle.ts',
  'make-directory.ts',
  'system-error.ts',
  'bounded-map.ts',
  'observe',
  'config',
  'store',
  'routing',
  'pull',
  'push',
  'prefetch',
  'http',
  'mirror',
  'doctor',
  'traffic',
  'trust',
]

/**
 * Who may import whom, by room: the directory under `src`, or the file that lies there itself. A room may always import
 * itself. What ends in `.ts` is a single file: the interface of another room, or data.
 */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  oci: [],
  'lifecycle.ts': [],
  'held-socket.ts': [], // what the process is started with, for the command, and the listener that serves it
  'make-directory.ts': ['system-error.ts'], // for every room that has files of its own
  'system-error.ts': [], // what the system says of files, which every room that has some reads
  'alarm.ts': [], // for rooms that work at something from time to time
  'names.ts': ['system-error.ts'], // names of other machines, for every room that goes there
  'bounded-map.ts': [], // what is remembered, of which there is an end in every room that hears others
  kernel: [], // system calls, most of them on descriptors, for both ends of the byte path
  observe: ['make-directory.ts'],
  config: ['oci', 'lifecycle.ts', 'system-error.ts', 'observe/log.ts'],
  mirror: [
    'oci',
    'lifecycle.ts',
    'make-directory.ts',
    'system-error.ts',
    'observe/log.ts',
    'config/endpoints.ts',
    'config/registries.ts',
  ],
  rollout: ['system-error.ts', 'config/registries.ts', 'config/yaml-file.ts'],
  install: ['make-directory.ts', 'system-error.ts', 'mirror/file.ts'],
  // It looks at a node from outside, with what the node itself uses.
  doctor: [
    'names.ts',
    'oci/reference.ts',
    'config',
    'mirror',
    'observe/round-trip.ts',
    'observe/status.ts',
    'store/containerd/client.ts',
    'store/containerd/cri/images.ts',
    'pull/private/probe.ts',
    'pull/upstream/client.ts',
    'pull/upstream/logins.ts',
    'pull/upstream/routes.ts',
    'trust/token-file.ts',
  ],
  store: [
    'oci',
    'lifecycle.ts',
    'make-directory.ts',
    'system-error.ts',
    'bounded-map.ts',
    'observe/log.ts',
    'routing/router.ts',
    'pull/source.ts',
  ],
  trust: ['lifecycle.ts', 'make-directory.ts', 'system-error.ts', 'observe/log.ts'],
  routing: [
    'oci',
    'lifecycle.ts',
    'make-directory.ts',
    'system-error.ts',
    'bounded-map.ts',
    'names.ts',
    'observe/log.ts',
    'observe/round-trip.ts',
    'store/store.ts',
    'pull/source.ts',
    'trust/token.ts',
  ],
  // What bytes of all kinds share
  traffic: ['oci', 'config/rates.ts'],
  pull: [
    'traffic',
    'oci',
    'lifecycle.ts',
    'system-error.ts',
    'bounded-map.ts',
    'names.ts',
    'observe/explain.ts',
    'observe/log.ts',
    'observe/round-trip.ts',
    'store/store.ts',
    'routing/claims.ts',
    'routing/router.ts',
    'config/endpoints.ts',
    'config/registries.ts',
    'kernel',
  ],
  push: [
    'oci',
    'lifecycle.ts',
    'system-error.ts',
    'alarm.ts',
    'bounded-map.ts',
    'observe/log.ts',
    'store/store.ts',
    'routing/router.ts',
    'routing/claims.ts',
    'pull/source.ts',
  ],
  // It uses what pins and copies use, and says why something cannot be got
  prefetch: [
    'oci',
    'pull/source.ts',
    'alarm.ts',
    'lifecycle.ts',
    'observe/log.ts',
    'observe/warmup.ts',
    'config/watched-files.ts',
    'push/fetcher.ts',
    'routing/router.ts',
    'store/store.ts',
  ],
  http: [
    'oci',
    'lifecycle.ts',
    'held-socket.ts',
    'bounded-map.ts',
    'kernel',
    'observe',
    'pull/source.ts',
    'push',
    'prefetch/warmup.ts',
    'traffic',
  ],
  daemon: [...COMPOSITION, 'kernel'], // memory that malloc holds
  'daemon.ts': [...COMPOSITION, 'daemon'],
  cli: [
    'oci',
    'lifecycle.ts',
    'held-socket.ts',
    'observe',
    'config',
    'mirror',
    'rollout',
    'doctor',
    'install',
    'trust/token.ts',
    'daemon.ts',
  ],
}

/** The one room of each third-party library; a scope stands for all of its packages. */
const LIBRARY_ROOM: Readonly<Record<string, readonly string[]>> = {
  '@bufbuild/protobuf': ['store', 'routing'], // containerd speaks it, and so do the nodes among each other
  '@chainsafe': ['routing'],
  '@grpc/grpc-js': ['store'],
  '@libp2p': ['routing'],
  '@multiformats/multiaddr': ['routing'],
  asn1js: ['trust'],
  bcryptjs: ['push'],
  commander: ['cli'],
  'datastore-core': ['routing'],
  fastify: ['http'],
  'interface-datastore': ['routing'],
  koffi: ['kernel'],
  libp2p: ['routing'],
  multiformats: ['routing', 'trust'], // a peer id is the text of a node's key
  pino: ['observe'],
  'prom-client': ['observe'],
  'smol-toml': ['mirror'],
  undici: ['pull'],
  yaml: ['config'],
  zod: ['config'],
}

/** What is allowed beyond that, each with its reason. */
const EXCEPTIONS: readonly (readonly [from: string, to: string, reason: string])[] = [
  ['cli/demo.ts', 'store/layout/layout-store.ts', 'puts its image into the store of a node'],
  ['cli/doctor.ts', 'package.json', 'says its version'],
  ['cli/program.ts', 'package.json', 'says its version'],
  ['daemon.ts', 'package.json', 'says its version to other nodes'],
  ['daemon/node-status.ts', 'package.json', 'says its version'],
]

/** `from` and `to` are files relative to `src`; `to` may also be the specifier of a package. */
interface Import {
  readonly from: string
  readonly to: string
}

const source = new URL('../src/', import.meta.url).pathname

function importsOf(from: string, text: string): Import[] {
  const code = text.replaceAll(/^\s*(\/\/|\/?\*).*$/gm, '')
  return [...code.matchAll(/(?:\bfrom\s+|\bimport\s*\(?\s*)'([^']+)'/g)].map(([, to = '']) => ({
    from,
    to: to.startsWith('.') ? normalize(join(from, '..', to)).replace(/^(\.\.\/)+/, '') : to,
  }))
}

function roomOf(file: string): string {
  return file.split('/', 1)[0] ?? file
}

/** What is wrong with an import, undefined if nothing is. */
function violation({ from, to }: Import): string | undefined {
  const room = roomOf(from)
  const wrong = `${from} must not import ${to}`
  if (isBuiltin(to) || EXCEPTIONS.some((known) => known[0] === from && known[1] === to))
    return undefined
  if (!/\.(ts|json)$/.test(to)) {
    const [scope = '', name = ''] = to.split('/')
    const rooms = LIBRARY_ROOM[scope] ?? LIBRARY_ROOM[`${scope}/${name}`]
    if (rooms === undefined) return `${wrong}: no room is named here for that library`
    return rooms.includes(room) ? undefined : `${wrong}: it lives in ${rooms.join(', ')}`
  }
  const allowed = MAY_IMPORT[room]
  if (allowed === undefined) return `${from}: nothing here says what ${room} may import`
  return [room, ...allowed].some((other) => to === other || roomOf(to) === other)
    ? undefined
    : wrong
}

/** What is wrong with a file's name, undefined if nothing is. */
function misnamed(file: string): string | undefined {
  return /^(index|utils?|helpers?|types|common|misc)(\.ts)?$/.test(basename(file)) ||
    /(^|\/)(utils?|helpers?|common)\//.test(file)
    ? `${file}: a file has a noun of its own`
    : undefined
}

const files = globSync('**/*.ts', { cwd: source })

test('rooms import only what they may', () => {
  const imports = files.flatMap((file) => importsOf(file, readFileSync(join(source, file), 'utf8')))
  assert.ok(imports.length > 50, `found only ${imports.length} imports in ${source}`)
  assert.deepEqual(
    imports.flatMap((each) => violation(each) ?? []),
    [],
  )
})

test('every file has a noun of its own', () => {
  assert.deepEqual(
    files.flatMap((file) => misnamed(file) ?? []),
    [],
  )
})

test('every exception is still needed', () => {
  for (const [from, to] of EXCEPTIONS) {
    const imports = importsOf(from, readFileSync(join(source, from), 'utf8'))
    assert.ok(
      imports.some((each) => each.to === to),
      `${from} no longer imports ${to}`,
    )
  }
})

test('the rules catch what breaks them', () => {
  const code = `
import { open } from 'node:fs/promises'
import { createServer } from 'fastify'
import {
  type A,
} from '../store/containerd/content.ts'
import '../http/admin.ts'
export { b } from './peers.ts'
export type { C } from '../store/store.ts'
// import { d } from '../cli/main.ts'
const e = await import('../daemon.ts')
const f = await import('left-pad')`
  const broken = importsOf('pull/example.ts', code).flatMap((each) => violation(each) ?? [])
  assert.deepEqual(
    broken.map((text) => text.replace(/:.*/, '')),
    ['fastify', 'store/containerd/content.ts', 'http/admin.ts', 'daemon.ts', 'left-pad'].map(
      (to) => `pull/example.ts must not import ${to}`,
    ),
  )
  assert.match(violation({ from: 'oci/digest.ts', to: 'lifecycle.ts' }) ?? '', /must not/)
  assert.match(violation({ from: 'elsewhere/new.ts', to: 'oci/digest.ts' }) ?? '', /nothing here/)
  for (const file of ['pull/index.ts', 'utils/bytes.ts', 'http/types.ts', 'oci/helpers/x.ts']) {
    assert.notEqual(misnamed(file), undefined, file)
  }
})
