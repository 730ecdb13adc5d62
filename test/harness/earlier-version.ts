import { execFile } from 'node:child_process'
import { mkdir, mkdtemp, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const run = promisify(execFile)

/** Builds an earlier commit of this repository, and is what runs it; undefined where this clone does not reach back so far. */
export async function earlierVersion(
  commit: string,
  stack: AsyncDisposableStack,
): Promise<readonly string[] | undefined> {
  const there = await run('git', ['-C', ROOT, 'cat-file', '-e', `${commit}^{commit}`]).then(
    () => true,
    () => false,
  )
  if (!there) return undefined
  const directory = await mkdtemp(join(tmpdir(), 'shoal-earlier-'))
  stack.defer(() => rm(directory, { recursive: true, force: true }))
  const tree = join(directory, 'tree')
  await mkdir(tree)
  const archive = join(directory, 'archive.tar')
  await run('git', ['-C', ROOT, 'archive', '-o', archive, commit, 'src', 'scripts', 'package.json'])
  await run('tar', ['-xf', archive, '-C', tree])
  // Its packages are those of today: what is tried is what the versions say to each other.
  await symlink(join(ROOT, 'node_modules'), join(tree, 'node_modules'))
  await run(process.execPath, [join(tree, 'scripts', 'build.ts')])
  return [process.execPath, join(tree, 'dist', 'shoal.mjs')]
}
