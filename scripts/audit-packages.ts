/**
 * Asks the registry of packages what is known to be wrong with those that ship (`npm audit`): exit status 1 when something of weight is
 * not explained here. A registry that does not answer such questions, as mirrors often do not, is no finding: it is said, and the
 * status is 0.
 */
import { spawnSync } from 'node:child_process'

/** Advisories that do not concern what ships, by their URL, and why. */
const EXPLAINED: Readonly<Record<string, string>> = {}
const SERIOUS = new Set(['high', 'critical'])
/** For the whole question, in ms. */
const PATIENCE = 60_000

interface Advisory {
  readonly title: string
  readonly url: string
  readonly severity: string
  readonly name: string
}

interface Report {
  readonly vulnerabilities?: Readonly<
    Record<string, { readonly via: readonly (string | Advisory)[] }>
  >
  readonly message?: string
  readonly error?: { readonly summary?: string }
}

const { stdout, stderr, error } = spawnSync(
  'npm',
  ['audit', '--json', '--omit=dev', '--fetch-retries=0', '--fetch-timeout=20000'],
  { cwd: new URL('..', import.meta.url), encoding: 'utf8', timeout: PATIENCE },
)
const report = read(stdout)
if (report?.vulnerabilities === undefined) {
  const why = error?.message ?? report?.message ?? report?.error?.summary ?? stderr.split('\n')[0]
  console.error(`NOT AUDITED: the registry of packages does not answer npm audit (${why})`)
} else {
  const advisories = new Map(
    Object.values(report.vulnerabilities)
      .flatMap(({ via }) => via)
      .flatMap((each) => (typeof each === 'string' ? [] : [[each.url, each] as const])),
  )
  const serious = [...advisories.values()].filter(
    ({ severity, url }) => SERIOUS.has(severity) && EXPLAINED[url] === undefined,
  )
  for (const { name, severity, title, url } of serious)
    console.error(`${name}: ${severity}: ${title} (${url})`)
  for (const url of Object.keys(EXPLAINED))
    if (!advisories.has(url)) console.error(`${url} is explained, and not there any more`)
  console.error(`audited: ${advisories.size} advisories, ${serious.length} of weight`)
  process.exitCode = serious.length > 0 ? 1 : 0
}

function read(text: string): Report | undefined {
  try {
    return JSON.parse(text) as Report
  } catch {
    return undefined
  }
}
