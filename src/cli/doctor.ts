import { Command } from 'commander'
import manifest from '../../package.json' with { type: 'json' }
import { ConfigInvalidError, formatProblem, type ConfigProblem } from '../config/yaml-file.ts'
import type { EffectiveConfig } from '../config/effective.ts'
import { examine, type DaemonSays } from '../doctor/examination.ts'
import { findings, type Finding } from '../doctor/finding.ts'
import { mirrorEndpoint } from '../mirror/certs-dir.ts'
import type { RoundTrip } from '../observe/round-trip.ts'
import type { NodeStatus } from '../observe/status.ts'
import { addConfigOptions, loadFromCommand } from './config.ts'
import { printable, wrap } from './text.ts'

/** How long the daemon may take to answer, in ms. */
const ANSWER = 5000
/** The same while it tries pulls with its peers. */
const ROUND_TRIPS = 20_000
/** Exit status when doctor itself could not work, so that scripts can tell that from a finding. */
const COULD_NOT = 2
/** Width of a terminal that does not say how wide it is, and the least that is written for. */
const USUAL_COLUMNS = 80
const LEAST_COLUMNS = 40

const MARKS = { pass: 'ok', warn: 'warn', fail: 'FAIL', 'not applicable': '-' } as const
const COLORS = { pass: 32, warn: 33, fail: 31, 'not applicable': 2 } as const

/** `shoal doctor`. */
export function doctorCommand(): Command {
  const doctor = new Command('doctor')
    .description(
      'find what keeps this node from working, and say what to do: exit status 0, 1 when something fails, 2 when this command cannot work',
    )
    .exitOverride(({ exitCode }) => process.exit(exitCode === 0 ? 0 : COULD_NOT))
    .option('--json', 'print it as JSON')
    .option('--quiet', 'print only what is wrong')
    .action(async () => {
      try {
        const { json, quiet } = doctor.opts<{ json?: true; quiet?: true }>()
        if (process.stderr.isTTY && json !== true && quiet !== true)
          process.stderr.write('Looking at this node and its peers …\n')
        const found = await consult(doctor)
        const { columns, isTTY } = process.stdout
        process.stdout.write(
          json === true
            ? `${JSON.stringify(found, null, 2)}\n`
            : describeFindings(found, {
                columns: columns ?? USUAL_COLUMNS,
                color: isTTY === true && !process.env['NO_COLOR'],
                quiet: quiet === true,
              }),
        )
        process.exitCode = found.some(({ verdict }) => verdict === 'fail') ? 1 : 0
      } catch (error) {
        process.exitCode = COULD_NOT
        throw error
      }
    })
  return addConfigOptions(doctor)
}

async function consult(command: Command): Promise<Finding[]> {
  let config: EffectiveConfig
  let warnings: readonly ConfigProblem[]
  try {
    ;({ config, warnings } = await loadFromCommand(command))
  } catch (error) {
    if (!(error instanceof ConfigInvalidError)) throw error
    const { fail } = findings('configuration')
    return error.message
      .split('\n')
      .map((problem) =>
        fail(problem, 'correct that line; shoal config check says when all is right'),
      )
  }
  const origin = mirrorEndpoint(config.listen.admin)
  const daemon = await ask(origin)
  const { pass, warn } = findings('configuration')
  const differing = daemon === undefined ? [] : differences(config, daemon.config)
  const configuration =
    differing.length > 0
      ? warn(
          `the daemon runs with other values than the files have now: ${differing.join(', ')}`,
          'restart it, so that they count: systemctl restart shoal',
        )
      : pass(daemon === undefined ? 'it is valid' : 'it is valid, and what the daemon runs with')
  const found = await examine({
    // What the daemon was started with counts, not what this shell would give it
    config: daemon?.config ?? config,
    origin,
    daemon,
    version: manifest.version,
    root: process.getuid?.() === 0,
    pulls: process.getuid?.() === 0,
    roundTrips: () => tryPulls(origin),
  })
  const old = warnings.map((warning) => warn(formatProblem(warning), 'rename it there'))
  return [configuration, ...old, ...found]
}

/** What the daemon says of itself; undefined when none answers. */
async function ask(
  origin: string,
): Promise<(DaemonSays & { config: EffectiveConfig }) | undefined> {
  const get = async (path: string) =>
    fetch(`${origin}${path}`, { signal: AbortSignal.timeout(ANSWER) })
  try {
    const status: unknown = await (await get('/status')).json()
    const config: unknown = await (await get('/config')).json()
    const metrics = await (await get('/metrics')).text()
    if (!isStatus(status) || !isConfig(config)) return undefined
    return { status, config, metrics }
  } catch {
    return undefined
  }
}

/** What the daemon finds when it tries pulls with its peers; undefined from one that is too old for it. */
async function tryPulls(origin: string): Promise<readonly RoundTrip[] | undefined> {
  try {
    const response = await fetch(`${origin}/round-trips`, {
      method: 'POST',
      headers: { 'x-shoal': 'doctor' },
      signal: AbortSignal.timeout(ROUND_TRIPS),
    })
    const said: unknown = await response.json()
    // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- nobody else answers that so
    return response.ok && Array.isArray(said) ? (said as RoundTrip[]) : undefined
  } catch {
    return undefined
  }
}

/** The daemon is trusted, but not that it is what answers: it is one if it says what only it says. */
function isStatus(value: unknown): value is NodeStatus {
  return isObject(value) && ['notReady', 'sharing', 'mesh', 'mirror'].every((key) => key in value)
}

function isConfig(value: unknown): value is EffectiveConfig {
  return isObject(value) && ['dataDir', 'listen', 'k3s', 'certsDir'].every((key) => key in value)
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null
}

/** Keys whose values differ; those are left out that only the daemon was given as flags or variables, as in a pod. */
function differences(file: EffectiveConfig, running: EffectiveConfig): string[] {
  const keys = [
    'bootstrap',
    'mesh',
    'listen',
    'sharing',
    'store',
    'registries',
    'certsDir',
  ] as const
  return keys.filter((key) => JSON.stringify(file[key]) !== JSON.stringify(running[key]))
}

/** A table for people: one line for each finding, wrapped to the terminal, with what to do below it. */
export function describeFindings(
  found: readonly Finding[],
  { columns, color, quiet }: { columns: number; color: boolean; quiet: boolean },
): string {
  const width = Math.max(columns, LEAST_COLUMNS)
  const bad = (finding: Finding) => finding.verdict === 'fail' || finding.verdict === 'warn'
  const lines = found
    .filter((finding) => !quiet || bad(finding))
    .flatMap((finding) => {
      const { check, verdict, said } = finding
      const mark = MARKS[verdict].padEnd(4)
      const shown = color ? `\u001B[${COLORS[verdict]}m${mark}\u001B[0m` : mark
      const [first = '', ...others] = wrap(printable(`${check}: ${said}`), width - 5)
      return [
        `${shown} ${first}`,
        ...others.map((line) => `     ${line}`),
        ...('remedy' in finding
          ? wrap(printable(finding.remedy), width - 8).map(
              (line, index) => `     ${index === 0 ? '=> ' : '   '}${line}`,
            )
          : []),
      ]
    })
  const count = (verdict: Finding['verdict']) =>
    found.filter((each) => each.verdict === verdict).length
  const summary = `${count('pass')} ok, ${count('warn')} to look at, ${count('fail')} failed`
  return `${[...lines, summary].join('\n')}\n`
}
