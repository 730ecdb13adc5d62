import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { globSync } from 'node:fs'
import { copyFile, mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'

/**
 * Makes `dist/shoal-linux-<arch>`, one file that needs nothing but glibc, libstdc++ and libatomic, as Node does: Node with the bundle and what belongs to it. It is for
 * the architecture of this machine, or for the one that is named: `x64` or `arm64`.
 * @see https://nodejs.org/api/single-executable-applications.html
 */
const root = new URL('..', import.meta.url).pathname
const [architecture = process.arch] = process.argv.slice(2)
if (!['x64', 'arm64'].includes(architecture))
  throw new Error(`there is no Node for ${architecture}: x64 or arm64`)
const { bundle } = await import('./build.ts')
const modules = architecture === process.arch ? root : await modulesFor(architecture)
const native = `node_modules/@koromix/koffi-linux-${architecture}`

const files = new Map(
  [
    {
      from: root,
      names: [
        ...bundle.map((name) => `dist/${name}`),
        // Of this machine's V8
        ...(architecture === process.arch ? bundle.map((name) => `dist/${name}.cache`) : []),
        'dist/dashboard/*',
        'deploy/systemd/shoal.{service,socket}',
      ],
    },
    {
      from: modules,
      names: [
        'node_modules/koffi/{package.json,index.js,index.cjs,indirect.js,indirect.cjs}',
        'node_modules/koffi/{lib,src}/**/*.{js,cjs}',
        `${native}/{package.json,index.js}`,
        `${native}/linux_${architecture}/*`,
      ],
    },
  ].flatMap(({ from, names }) =>
    globSync(names, { cwd: from })
      .toSorted()
      .map((name) => [name, join(from, name)] as const),
  ),
)
const work = await mkdirIn(join(root, '.cache/exe'))
await writeFile(join(work, 'start.cjs'), "import('./dist/shoal.mjs')\n")
await copyFile(join(root, 'scripts/exe-main.mjs'), join(work, 'main.mjs'))

const assets: Record<string, string> = { 'start.cjs': join(work, 'start.cjs') }
const hash = createHash('sha256')
for (const [name, file] of files) {
  assets[name] = file
  hash.update(`${name}\0`).update(await readFile(file))
}
await writeFile(join(work, 'build'), hash.digest('hex').slice(0, 32))
assets['build'] = join(work, 'build')

const output = join(root, `dist/shoal-linux-${architecture}`)
await rm(output, { force: true })
await writeFile(
  join(work, 'sea.json'),
  JSON.stringify({
    main: join(work, 'main.mjs'),
    mainFormat: 'module',
    executable: join(modules, `node_modules/node-linux-${architecture}/bin/node`),
    output,
    disableExperimentalSEAWarning: true,
    // As bin/shoal starts Node
    execArgv: ['--max-semi-space-size=2'],
    assets,
  }),
)
await promisify(execFile)(process.execPath, ['--build-sea', join(work, 'sea.json')])
process.stdout.write(`${output}\n`)

/** The parts that differ for another architecture, as the lockfile has them, in a directory of their own: nothing of it runs here. */
async function modulesFor(cpu: string): Promise<string> {
  const directory = join(root, `.cache/modules-${cpu}`)
  const { lockfileVersion, packages } = JSON.parse(
    await readFile(join(root, 'package-lock.json'), 'utf8'),
  ) as { lockfileVersion: number; packages: Record<string, { version: string }> }
  const names = ['koffi', `@koromix/koffi-linux-${cpu}`, `node-linux-${cpu}`]
  const locked = Object.fromEntries(
    names.map((name) => {
      const entry = packages[`node_modules/${name}`]
      if (entry === undefined) throw new Error(`package-lock.json has no ${name}`)
      return [`node_modules/${name}`, { ...entry, optionalDependencies: {} }]
    }),
  )
  const manifest = {
    name: 'modules',
    // What is not optional has to be for this machine.
    optionalDependencies: Object.fromEntries(
      names.map((name) => [name, locked[`node_modules/${name}`]?.version]),
    ),
  }
  const lock = { lockfileVersion, requires: true, packages: { '': manifest, ...locked } }
  const text = JSON.stringify(lock)
  if ((await readFile(join(directory, 'done'), 'utf8').catch(() => '')) === text) return directory
  await mkdir(directory, { recursive: true })
  await writeFile(join(directory, 'package.json'), JSON.stringify(manifest))
  await writeFile(join(directory, 'package-lock.json'), text)
  const only = ['--ignore-scripts', '--os=linux', `--cpu=${cpu}`, '--no-audit', '--no-fund']
  await promisify(execFile)('npm', ['ci', ...only], { cwd: directory })
  await writeFile(join(directory, 'done'), text)
  return directory
}

async function mkdirIn(path: string): Promise<string> {
  await rm(path, { recursive: true, force: true })
  await mkdir(dirname(path), { recursive: true })
  await mkdir(path)
  return path
}
