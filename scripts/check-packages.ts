/** Checks what the lockfile brings: no package that would run a script when it is installed, and no licence, that nobody has looked at. */
import { readFileSync } from 'node:fs'

/** Packages with an install script, which is not run (`ignore-scripts`), and why they do without. */
const SCRIPTS: Readonly<Record<string, string>> = {
  '@bufbuild/buf': 'checks its platform package, which is there by the lockfile',
  esbuild: 'the same',
  koffi: 'would build its native part, which comes as a platform package',
  protobufjs: 'warns of versions; a dependency of grpc-js for what is not used here',
}
const LICENCES = new Set([
  '0BSD',
  'Apache-2.0',
  'Apache-2.0 OR MIT',
  '(Apache-2.0 AND BSD-3-Clause)',
  'BSD-3-Clause',
  'ISC',
  'MIT',
])

interface Locked {
  readonly license?: string
  readonly hasInstallScript?: boolean
  readonly resolved?: string
  readonly integrity?: string
  readonly optional?: boolean
}

const lock = JSON.parse(readFileSync(new URL('../package-lock.json', import.meta.url), 'utf8')) as {
  packages: Record<string, Locked>
}
const problems: string[] = []
const needless = new Set(Object.keys(SCRIPTS))
for (const [path, locked] of Object.entries(lock.packages)) {
  if (path === '') continue
  const name = path.slice(path.lastIndexOf('node_modules/') + 'node_modules/'.length)
  if (locked.hasInstallScript === true && !needless.delete(name))
    problems.push(`${path} has an install script: say in scripts/check-packages.ts why it may`)
  if (!LICENCES.has(locked.license ?? ''))
    problems.push(`${path} has the licence ${locked.license ?? 'of nobody'}, which is not listed`)
  if (locked.resolved !== undefined) problems.push(`${path} is locked to one host`)
  // Those of other platforms are not fetched
  if (locked.integrity === undefined && locked.optional !== true)
    problems.push(`${path} has no hash`)
}
for (const name of needless) problems.push(`${name} has no install script any more`)
for (const problem of problems) console.error(problem)
process.exitCode = problems.length > 0 ? 1 : 0
