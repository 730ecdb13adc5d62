import { Command, InvalidArgumentError } from 'commander'
import { mirrorEndpoint } from '../mirror/certs-dir.ts'
import type { PullPlan } from '../observe/explain.ts'
import type { ContentReport, PullReport } from '../observe/pull-history.ts'
import { imageInFull } from '../oci/reference.ts'
import { askDaemon } from './ask-daemon.ts'
import { addConfigOptions, loadGiven } from './config.ts'
import { formatBytes, printable } from './text.ts'

/** Holders of one piece of content that are named; of more it is said how many. */
const NAMED_HOLDERS = 4
const TIERS: Readonly<Record<string, string>> = {
  zone: 'nodes of this zone',
  region: 'of this region',
  elsewhere: 'other nodes',
  mirrors: 'mirrors of registries.yaml',
  origin: 'the registry itself',
}

/** `shoal explain`. */
export function explainCommand(): Command {
  const explain = new Command('explain')
    .description(
      'say who holds an image, what a pull of it would do now and why, and how those before went',
    )
    .argument('<IMAGE>', 'as in docker.io/library/alpine:3.20, or alpine')
    .option('--json', 'print it as JSON')
    .option('--pulls <N>', 'tell of so many pulls of it that were made here', whole, 3)
    .action(async (image: string) => {
      const { config } = await loadGiven(explain)
      const origin = mirrorEndpoint(config.listen.admin)
      const path = `/explain?image=${encodeURIComponent(imageInFull(image))}`
      const plan = await askDaemon<PullPlan>(origin, path, [
        'image',
        'claims',
        'tiers',
        'upstream',
        'content',
      ])
      const { pulls: limit, json } = explain.opts<{ pulls: number; json?: true }>()
      const of = encodeURIComponent(plan.image.replace(/@.*$/, ''))
      const pulls = await askDaemon<PullReport[]>(origin, `/pulls?limit=${limit}&of=${of}`, [])
      process.stdout.write(
        json === true
          ? `${JSON.stringify({ ...plan, pulls }, null, 2)}\n`
          : describePlan(plan, Date.now()) + describePulls(pulls),
      )
    })
  return addConfigOptions(explain, ['listen.admin'])
}

function whole(text: string): number {
  if (!/^\d{1,4}$/.test(text) || Number(text) < 1)
    throw new InvalidArgumentError('expected a number from 1 to 9999')
  return Number(text)
}

/** A plan in words; `now` in ms since 1970. */
export function describePlan(plan: PullPlan, now: number): string {
  const lines: [name: string, text: string][] = [
    ['image', plan.image],
    ['shared', `${plan.shared ? 'yes' : 'no'}; logins and private images: ${plan.policy}`],
    ...(plan.tag === null ? [] : [['tag', describeRule(plan.tag)] as [string, string]]),
    ...plan.claims.map((claim, index): [string, string] => [
      index === 0 ? 'claims' : '',
      describeClaim(claim, now),
    ]),
    ['means', plan.digest === null ? plan.because : `${plan.digest}: ${plan.because}`],
    ['asked', ['this node', ...plan.tiers.map(describeTier)].join(', then ')],
    ...describeUpstream(plan.upstream),
    ...plan.content.map((each): [string, string] => [each.kind, describeContent(each, plan)]),
    ...(plan.missing === null ? [] : [['', plan.missing] as [string, string]]),
  ]
  return lines.map(([name, text]) => `${name.padEnd(9)} ${printable(text)}\n`).join('')
}

/** How pulls of it went that were made here: what was asked, what answered, where the bytes came from, and why not from a peer. */
export function describePulls(pulls: readonly PullReport[]): string {
  if (pulls.length === 0) return 'pulled    not through this node, of what it remembers\n'
  return pulls
    .flatMap(({ image, startedAt, durationMs, state, bytes, missed, contents, requests }) => {
      const at = new Date(startedAt).toISOString().replace(/\.\d+Z$/, 'Z')
      const sources = Object.entries(bytes).map(([from, sum]) => `${formatBytes(sum)} ${from}`)
      const reasons = Object.entries(missed).map(([why, times]) => `${why} (${times})`)
      const earlier = requests - contents.length
      return [
        `pulled    ${at} ${image}, ${state} in ${(durationMs / 1000).toFixed(1)} s: ${sources.join(', ') || 'nothing'}`,
        ...(reasons.length > 0 ? [`          the upstream was needed: ${reasons.join(', ')}`] : []),
        ...contents.map((content) => `          ${describeReport(content)}`),
        ...(earlier > 0 ? [`          and ${earlier} more, earlier or for the same`] : []),
      ]
    })
    .map((line) => `${printable(line)}\n`)
    .join('')
}

function describeReport(report: ContentReport): string {
  const { kind, target, source, size, bytes, givers, missed, outcome, durationMs } = report
  const named = Object.entries(givers).map(([from, sum]) => `${formatBytes(sum)} ${from}`)
  const counted = Object.entries(bytes).map(([from, sum]) => `${formatBytes(sum)} ${from}`)
  const from = (named.length > 0 ? named : counted).join(', ') || source || 'nobody'
  const ended = outcome === undefined ? 'running' : outcome === 'ok' ? '' : `, ${outcome}`
  const why = missed === undefined ? '' : `, no peer gave it: ${missed}`
  return `${kind} ${target} ${formatBytes(size)}: ${from} in ${durationMs} ms${ended}${why}`
}

function describeRule({ match, revalidate, budgetMs }: NonNullable<PullPlan['tag']>): string {
  const rule = `(rule ${match})`
  if (revalidate === 'never') return `the upstream is not asked again what it means ${rule}`
  const often =
    revalidate === 'always' ? 'each time' : `when its last answer is ${revalidate / 1000} s old`
  return `the upstream is asked ${often}, and waited for ${budgetMs} ms ${rule}`
}

function describeClaim(
  { kind, digest, node, name, at, lost }: PullPlan['claims'][number],
  now: number,
): string {
  const ago = Math.max(0, Math.round((now - at) / 1000))
  const what = kind === 'observed' ? 'seen at the upstream' : kind
  return `${digest ?? ''} ${what} ${ago} s ago by ${name ?? node}${lost ? ', and lost' : ''}`.trim()
}

function describeTier({ tier, budgetMs }: PullPlan['tiers'][number]): string {
  return `${TIERS[tier] ?? tier} (${budgetMs / 1000} s)`
}

function describeUpstream({ on, endpoints }: PullPlan['upstream']): [string, string][] {
  if (!on) return [['upstream', 'off: this node asks no registry itself']]
  if (endpoints.length === 0) return [['upstream', 'none is asked for this registry']]
  return endpoints.map(({ url, tier, repository, passedOver }, index) => [
    index === 0 ? 'upstream' : '',
    `${url} for ${repository} (${TIERS[tier]})${passedOver === null ? '' : `, not now: ${passedOver}`}`,
  ])
}

function describeContent(
  { digest, size, here, holders }: PullPlan['content'][number],
  { upstream }: PullPlan,
): string {
  const named = holders.slice(0, NAMED_HOLDERS).map(({ name, tier, asked }) => {
    const doubt =
      asked === 'now'
        ? ''
        : asked === 'last'
          ? ', last: it did not answer'
          : ', not: it gave wrong content'
    return `${name} (${tier}${doubt})`
  })
  const more = holders.length - named.length
  const from = [
    ...(here ? ['this node'] : []),
    ...named,
    ...(more > 0 ? [`${more} more`] : []),
    ...(!here && named.length === 0 ? [upstream.on ? 'the upstream' : 'nobody'] : []),
  ]
  return `${digest} ${formatBytes(size)}: ${from.join(', ')}`
}
