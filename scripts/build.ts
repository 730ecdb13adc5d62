import { execFile } from 'node:child_process'
import { cp, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { promisify } from 'node:util'
import { build, transform, type Plugin } from 'esbuild'

/**
 * Bundles the commands into `dist/program-*.cjs`, what not all of them need (the daemon, the client for upstreams) into files beside it that are
 * loaded when they are needed, and each thread that bytes pass through or passwords are compared on into another, all with source maps. Then a demo is
 * run, and what V8 has compiled of the program by then goes beside its files; `dist/shoal.mjs` is what runs them with it.
 */

/** A daemon that runs may yet ask for a file of the build that it was started from. */
const KEPT_BUILDS = 4
/** The demo is given up after this long, in ms. */
const WARM_UP = 120_000

/** libp2p-noise is given what it computes with (`src/routing/noise-crypto.ts`), and begins a WebAssembly of its own none the less, but in browsers. */
const withoutWebAssembly: Plugin = {
  name: 'noise without WebAssembly',
  setup(build) {
    build.onResolve({ filter: /^\.\/crypto\/index\.js$/ }, ({ resolveDir }) =>
      resolveDir.includes('/@chainsafe/libp2p-noise/')
        ? { path: join(resolveDir, 'crypto/index.browser.js') }
        : undefined,
    )
  },
}

const root = new URL('..', import.meta.url).pathname
const dist = join(root, 'dist')
// V8 keeps the text. Names stay, for stack traces.
const small = { minifyWhitespace: true, minifySyntax: true, legalComments: 'none' } as const
const common = {
  outdir: dist,
  write: false,
  bundle: true,
  platform: 'node',
  target: 'node26',
  format: 'esm',
  sourcesContent: false,
  ...small,
  logLevel: 'warning',
} as const
// V8 gives out what it has compiled of scripts alone, and only modules are split: what is split is made a script then.
const modules = await build({
  ...common,
  entryPoints: { program: join(root, 'src/cli/main.ts') },
  outExtension: { '.js': '.cjs' },
  splitting: true,
  plugins: [withoutWebAssembly],
  entryNames: '[name]-[hash]',
  chunkNames: '[name]-[hash]',
  sourcemap: 'inline',
  // It has a native part, which stays where it is.
  external: ['koffi'],
  define: { 'import.meta.url': '__url' },
  banner: { js: "const __url = require('node:url').pathToFileURL(__filename).href;" },
})
const scripts = await Promise.all(
  modules.outputFiles.map(async ({ path, text }) => {
    const name = basename(path)
    const { code, map } = await transform(text, {
      ...small,
      format: 'cjs',
      platform: 'node',
      target: 'node26',
      supported: { 'dynamic-import': false },
      sourcemap: 'external',
      sourcesContent: false,
      sourcefile: name,
    })
    return { name, map, text: `${code}//# sourceMappingURL=${name}.map\n` }
  }),
)
// Each in one file: in several it would be 12 MB of memory for each thread, not 11.
const threads = await build({
  ...common,
  entryPoints: {
    'passage-worker': join(root, 'src/pull/passage-worker.ts'),
    'password-worker': join(root, 'src/push/password-worker.ts'),
  },
  outExtension: { '.js': '.mjs' },
  sourcemap: true,
  external: ['koffi'],
  // CommonJS packages in an ES module need a require of their own.
  banner: {
    js: "import { createRequire as __createRequire } from 'node:module'; const require = __createRequire(import.meta.url);",
  },
})
const program = scripts.find(({ name }) => name.startsWith('program-'))?.name ?? ''
const main = await readFile(join(root, 'scripts/program-main.mjs'), 'utf8')

await mkdir(dist, { recursive: true })
// The dashboard's page goes as it is.
await cp(join(root, 'src/http/dashboard'), join(dist, 'dashboard'), { recursive: true })
for (const { path, contents } of threads.outputFiles) await put(basename(path), contents)
for (const { name, text, map } of scripts) {
  await put(`${name}.map`, map)
  await put(name, text)
}
// What has the name that is run comes last, when all that it needs is there.
const temporary = join(dist, `shoal.${process.pid}.mjs`)
await writeFile(temporary, main.replaceAll('PROGRAM', program))
await warmUp(temporary)
await rename(temporary, join(dist, 'shoal.mjs'))

/** Names of the files that the bundle now consists of, without maps and what was compiled. */
export const bundle = [
  ...threads.outputFiles.map(({ path }) => basename(path)).filter((name) => name.endsWith('.mjs')),
  ...scripts.map(({ name }) => name),
  'shoal.mjs',
]

const list = join(dist, 'builds.json')
const earlier = await readFile(list, 'utf8').then(
  (text) => JSON.parse(text) as string[][],
  () => [],
)
const others = earlier.filter((build) => build.join() !== bundle.join())
const kept = [bundle, ...others].slice(0, KEPT_BUILDS)
await writeFile(list, JSON.stringify(kept))
for (const name of new Set(earlier.flat()).difference(new Set(kept.flat())))
  for (const file of [name, `${name}.map`, `${name}.cache`])
    await rm(join(dist, file), { force: true })

/** By a rename: a start at the same moment never sees half of it. */
async function put(name: string, contents: string | Uint8Array): Promise<void> {
  const temporary = join(dist, `${name}.${process.pid}`)
  await writeFile(temporary, contents)
  await rename(temporary, join(dist, name))
}

/** Only by the same flags as those of `bin/shoal` is it of use. What could not be compiled is compiled when it is run. */
async function warmUp(main: string): Promise<void> {
  const { NODE_OPTIONS: _, ...env } = process.env
  const argv = ['--max-semi-space-size=2', join(root, 'scripts/warm-up.mjs'), main]
  await promisify(execFile)(process.execPath, argv, { env, timeout: WARM_UP }).catch(
    (error: unknown) =>
      process.stderr.write(`build: nothing is compiled beforehand: ${String(error)}\n`),
  )
}
