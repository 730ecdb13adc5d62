import { chmodSync, globSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { Readable } from 'node:stream'
import { run } from 'node:test'
import { spec } from 'node:test/reporters'

/** Groups in the order they run, cheap first, and how many files of each run at a time: most of what a test does is to wait. */
const GROUPS: Readonly<Record<string, { globs: readonly string[]; together: number }>> = {
  unit: {
    globs: ['test/*.test.ts', 'test/{unit,compliance,fakes,conformance}/**/*.test.ts'],
    together: Math.max(2, availableParallelism() - 1),
  },
  containerd: { globs: ['test/containerd/**/*.test.ts'], together: 2 },
  cluster: { globs: ['test/cluster/**/*.test.ts'], together: 2 },
}
/** These look at how many bytes cross a link or are in memory, act in the middle of a blob, or make what others run: they have the machine for themselves. */
const ALONE: ReadonlySet<string> = new Set(
  [
    'coldstart',
    'dashboard',
    'exe',
    'image',
    'parallel-layers',
    'prefetch',
    'strangers',
    'swarm',
    'vanished',
  ].map((name) => `test/cluster/${name}.test.ts`),
)

/** A hang ends as a failure here, not as a job that is cancelled from outside. */
const TEST_TIMEOUT_MS = 240_000
/** Of a whole file; a nightly run has more of it. */
const FILE_TIMEOUT_MS = Number(process.env['SHOAL_FILE_TIMEOUT_MS'] ?? 900_000)

/**
 * Where tests have their temporary files; it goes away with the run, so that one that was killed leaves nothing either. Users
 * that a test becomes come through, and its name is short because paths of sockets are.
 */
const TEMPORARY = mkdtempSync(join(tmpdir(), 'shoal-'))
chmodSync(TEMPORARY, 0o711)
process.env['TMPDIR'] = TEMPORARY
process.on('exit', () => rmSync(TEMPORARY, { recursive: true, force: true, maxRetries: 3 }))
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const)
  process.once(signal, () => process.exit(1))

const COUNTS = ['tests', 'suites', 'passed', 'failed', 'cancelled', 'skipped', 'todo'] as const

type Event = { type: string; data: unknown }

/** Runs batch after batch as if it were one run: one report, one summary, which is the end of the output. */
async function* runAll(
  batches: readonly { files: string[]; together: number }[],
): AsyncGenerator<Event> {
  const totals = new Map<string, number>()
  const started = performance.now()
  const startedMs = Date.now()
  for (const { files, together } of batches) {
    const stream: AsyncIterable<Event> = run({
      files,
      concurrency: together,
      timeout: FILE_TIMEOUT_MS,
      execArgv: ['--enable-source-maps', `--test-timeout=${TEST_TIMEOUT_MS}`],
    })
    for await (const event of stream) {
      const data = event.data as {
        file?: string
        nesting?: number
        counts?: Record<string, number>
      }
      if (event.type === 'test:diagnostic' && data.nesting === 0 && data.file === undefined)
        continue
      if (event.type === 'test:summary' && data.file === undefined) {
        for (const name of COUNTS) {
          totals.set(name, (totals.get(name) ?? 0) + (data.counts?.[name] ?? 0))
        }
        continue
      }
      if (event.type === 'test:fail') process.exitCode = 1
      yield event
    }
  }
  // What the official suite of the distribution spec has found, for whoever keeps it.
  for (const report of globSync('dist/conformance/*/report.html'))
    if (statSync(report).mtimeMs > startedMs)
      yield {
        type: 'test:diagnostic',
        data: { nesting: 0, message: `report ${resolve(report)}`, level: 'info' },
      }
  const left = readdirSync(TEMPORARY)
  if (left.length > 0)
    yield {
      type: 'test:diagnostic',
      data: { nesting: 0, message: `temporary files were left: ${left.join(', ')}`, level: 'warn' },
    }
  const summary = [...totals, ['duration_ms', Math.round(performance.now() - started)] as const]
  for (const [name, value] of summary) {
    const message = `${name.replace('passed', 'pass').replace('failed', 'fail')} ${value}`
    yield { type: 'test:diagnostic', data: { nesting: 0, message, level: 'info' } }
  }
}

const wanted = process.argv.slice(2)
const names = wanted.length === 0 || wanted[0] === 'all' ? Object.keys(GROUPS) : wanted
const batches = names.flatMap((name) => {
  const { globs, together } = GROUPS[name] ?? { globs: [name], together: 1 }
  const files = globSync(globs)
  const isAlone = (file: string): boolean => ALONE.has(file)
  return [
    { files: files.filter((file) => !isAlone(file)), together },
    { files: files.filter(isAlone), together: 1 },
  ]
})
if (batches.every(({ files }) => files.length === 0))
  throw new Error(`no tests in ${names.join(', ')}`)

Readable.from(runAll(batches.filter(({ files }) => files.length > 0)))
  .compose(new spec())
  .pipe(process.stdout)
