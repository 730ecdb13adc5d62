import { cp, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { basename } from 'node:path'
import { build, type Plugin } from 'esbuild'

/**
 * Bundles the commands into `dist/shoal.mjs`, what not all of them need (the daemon, the client for upstreams) into files beside it that are
 * loaded when they are needed, and each thread that bytes pass through or passwords are compared on into another, all with source maps: half the
 * start time and three quarters of the memory of the same program run from node_modules.
 */

/** A daemon that runs may yet ask for a file of the build that it was started from. */
const KEPT_BUILDS = 4

/**
 * To import a built-in module is to read all that it exports: `node:http` then loads an HTTP client of Node's own, which nobody uses here, for
 * the sake of its `WebSocket`. That is 3 MB of a daemon's memory. `require` reads nothing that is not asked for.
 */
const unreadExports: Plugin = {
  name: 'unread-exports',
  setup(plugins) {
    plugins.onResolve({ filter: /^(node:)?http$/ }, ({ kind }) =>
      kind === 'import-statement' ? { path: 'node:http', namespace: 'required' } : undefined,
    )
    plugins.onLoad({ filter: /./, namespace: 'required' }, ({ path }) => ({
      contents: `module.exports = require(${JSON.stringify(path)})`,
    }))
  },
}

const root = new URL('..', import.meta.url).pathname
const common = {
  outdir: `${root}dist`,
  outExtension: { '.js': '.mjs' },
  write: false,
  bundle: true,
  platform: 'node',
  target: 'node26',
  format: 'esm',
  sourcemap: true,
  sourcesContent: false,
  // V8 keeps the text. Names stay, for stack traces.
  minifyWhitespace: true,
  minifySyntax: true,
  legalComments: 'none',
  // It has a native part, which stays where it is.
  external: ['koffi'],
  // CommonJS packages in an ES module need a require of their own.
  banner: {
    js: "import { createRequire as __createRequire } from 'node:module'; const require = __createRequire(import.meta.url);",
  },
  logLevel: 'warning',
} as const
const program = await build({
  ...common,
  external: [...common.external],
  entryPoints: { shoal: `${root}src/cli/main.ts` },
  splitting: true,
  chunkNames: '[name]-[hash]',
  plugins: [unreadExports],
})
// Each in one file: in several it would be 12 MB of memory for each thread, not 11.
const threads = await build({
  ...common,
  external: [...common.external],
  entryPoints: {
    'passage-worker': `${root}src/pull/passage-worker.ts`,
    'password-worker': `${root}src/push/password-worker.ts`,
  },
})
await mkdir(`${root}dist`, { recursive: true })
// The dashboard's page goes as it is.
await cp(`${root}src/http/dashboard`, `${root}dist/dashboard`, { recursive: true })
// The program comes last, and all by a rename: a start at the same moment never sees half of it.
const outputFiles = [...threads.outputFiles, ...program.outputFiles]
const isProgram = ({ path }: { path: string }): boolean => basename(path) === 'shoal.mjs'
for (const file of outputFiles.toSorted((a, b) => Number(isProgram(a)) - Number(isProgram(b)))) {
  const temporary = `${file.path}.${process.pid}`
  await writeFile(temporary, file.contents)
  await rename(temporary, file.path)
}

/** Names of the files that the bundle now consists of, without maps. */
export const bundle = outputFiles
  .map(({ path }) => basename(path))
  .filter((name) => name.endsWith('.mjs'))

const list = `${root}dist/builds.json`
const earlier = await readFile(list, 'utf8').then(
  (text) => JSON.parse(text) as string[][],
  () => [],
)
const others = earlier.filter((build) => build.join() !== bundle.join())
const kept = [bundle, ...others].slice(0, KEPT_BUILDS)
await writeFile(list, JSON.stringify(kept))
for (const name of new Set(earlier.flat()).difference(new Set(kept.flat())))
  for (const file of [name, `${name}.map`]) await rm(`${root}dist/${file}`, { force: true })
