import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { globSync } from 'node:fs'
import { copyFile, mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'

/**
 * Makes `dist/shoal-linux-<arch>`, one file that needs nothing but glibc: Node with the bundle and what belongs to it. It is for
 * the architecture of this machine, as its Node is.
 * @see https://nodejs.org/api/single-executable-applications.html
 */
const root = new URL('..', import.meta.url).pathname
const architecture = process.arch
const native = `node_modules/@koromix/koffi-linux-${architecture}`
await import('./build.ts')

const files = globSync(
  [
    'dist/*.mjs',
    'dist/dashboard/*',
    'deploy/systemd/shoal.service',
    'node_modules/koffi/{package.json,index.js,index.cjs,indirect.js,indirect.cjs}',
    'node_modules/koffi/{lib,src}/**/*.{js,cjs}',
    `${native}/{package.json,index.js}`,
    `${native}/linux_${architecture}/*`,
  ],
  { cwd: root },
).toSorted()
const work = await mkdirIn(join(root, '.cache/exe'))
await writeFile(join(work, 'start.cjs'), "import('./dist/shoal.mjs')\n")
await copyFile(join(root, 'scripts/exe-main.mjs'), join(work, 'main.mjs'))

const assets: Record<string, string> = { 'start.cjs': join(work, 'start.cjs') }
const hash = createHash('sha256')
for (const file of files) {
  assets[file] = join(root, file)
  hash.update(`${file}\0`).update(await readFile(join(root, file)))
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
    output,
    disableExperimentalSEAWarning: true,
    assets,
  }),
)
await promisify(execFile)(process.execPath, ['--build-sea', join(work, 'sea.json')])
process.stdout.write(`${output}\n`)

async function mkdirIn(path: string): Promise<string> {
  await rm(path, { recursive: true, force: true })
  await mkdir(dirname(path), { recursive: true })
  await mkdir(path)
  return path
}
