import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'

const path = (relative: string) => fileURLToPath(new URL(`../../${relative}`, import.meta.url))

// It makes the bundle anew where a source is newer.
execFileSync(path('bin/shoal'), ['--version'], { stdio: 'ignore' })

/** The command line as it ships, without its launcher. It is there in a fifth of the time that its sources take. */
export const BUNDLED: readonly [node: string, bundle: string] = [
  process.execPath,
  path('dist/shoal.mjs'),
]
