import { Command, InvalidArgumentError } from 'commander'
import { readK3sConfig } from '../config/k3s.ts'
import { loadConfig } from '../config/load.ts'
import { readRegistries } from '../config/registries.ts'
import { withoutSecrets } from '../config/registries-edit.ts'
import { formatAddress } from '../config/addresses.ts'
import { ConfigInvalidError, formatProblem, readTextFile } from '../config/yaml-file.ts'
import { unifiedDiff } from '../mirror/diff.ts'
import { readHosts } from '../rollout/hosts.ts'
import {
  performRollout,
  planRollout,
  PLACES,
  type Kind,
  type NodePlan,
  type NodeResult,
  type RolloutInit,
} from '../rollout/rollout.ts'
import { Ssh } from '../rollout/ssh.ts'
import { addProgressOptions, progressOf, type Progress } from './progress.ts'

/** Not every node is as it should be; which, and why, was printed. */
class RolloutFailedError extends Error {
  override readonly name = 'RolloutFailedError'
  readonly code = 'ERR_ROLLOUT_FAILED'
  readonly remedy: string
  constructor(what: string, remedy: string) {
    super(what)
    this.remedy = remedy
  }
}

interface Options {
  readonly hosts: string
  readonly registries?: string
  readonly config?: string
  readonly k3sConfig?: string
  readonly batch: number
  readonly deadline: number
  readonly sshConfig?: string
  readonly undo?: true
  readonly dryRun?: true
}

/** `shoal rollout`: configuration to many nodes by ssh. */
export function rolloutCommand(): Command {
  const command = new Command('rollout')
    .description('bring registries.yaml and configuration to many nodes by ssh, node after node')
    .requiredOption(
      '--hosts <FILE>',
      'the nodes, one a line: [USER@]HOST[:PORT] [server|agent] [identity=FILE]',
    )
    .option('--registries <FILE>', `becomes ${PLACES.registries} of every node`)
    .option('--config <FILE>', `the daemon's configuration, becomes ${PLACES.config}`)
    .option('--k3s-config <FILE>', `a drop-in for K3s, becomes ${PLACES.k3sConfig}`)
    .option('--dry-run', 'look at every node and print what would be done, as a diff')
    .option('--undo', 'where these files are in place, put back what was there before')
    .option('--batch <N>', 'agents at a time; servers are always changed one by one', whole, 1)
    .option('--deadline <SECONDS>', 'for a unit to be healthy after its restart', whole, 300)
    .option('--ssh-config <FILE>', "instead of the user's ssh_config")
    .action((options: Options) => rollout(options, progressOf(command)))
  return addProgressOptions(command)
}

async function rollout(options: Options, progress: Progress): Promise<void> {
  const init = await readInit(options, progress)
  const aborter = new AbortController()
  const interrupt = () => aborter.abort()
  // Once: whoever asks again does not want to wait for what is under way.
  process.once('SIGINT', interrupt).once('SIGTERM', interrupt)
  const { signal } = aborter
  const { sshConfig, dryRun } = options
  try {
    await using ssh = await Ssh.create(sshConfig === undefined ? {} : { configFile: sshConfig })
    const plans = await planRollout(init, ssh, signal)
    for (const { host, notes } of plans)
      for (const note of notes) progress.step(`${host.name}: note: ${note}`)
    if (dryRun === true) {
      for (const plan of plans) progress.result(describePlan(plan), planFields(plan))
      return
    }
    const report = (host: { readonly name: string }, step: string) =>
      progress.step(`${host.name}: ${step}`)
    const results = await performRollout(plans, init, ssh, { signal, report })
    for (const result of results) {
      const { host, ...outcome } = result
      progress.result(describeResult(result), { host: host.name, ...outcome })
    }
    conclude(results, init.undo)
  } finally {
    process.off('SIGINT', interrupt).off('SIGTERM', interrupt)
  }
}

/** Reads and checks everything that is here, before any node is asked. */
async function readInit(options: Options, progress: Progress): Promise<RolloutInit> {
  const hosts = await readHosts(options.hosts)
  const files = new Map<Kind, string>()
  const needed: string[] = []
  let admin = '127.0.0.1:9090'
  const take = async (kind: Kind, path: string) => {
    const text = await readTextFile(path, { ignoreBOM: true })
    if (text === undefined)
      throw new ConfigInvalidError([{ file: path, message: 'does not exist' }])
    files.set(kind, text)
  }
  // The daemon first: K3s starts with it.
  if (options.config !== undefined) {
    await take('config', options.config)
    const { config } = await loadConfig({ file: options.config })
    admin = formatAddress(config.listen.admin)
    needed.push(...config.credentials)
  }
  if (options.k3sConfig !== undefined) {
    await take('k3sConfig', options.k3sConfig)
    await readK3sConfig(options.k3sConfig)
  }
  if (options.registries !== undefined) {
    await take('registries', options.registries)
    const { configs, warnings } = await readRegistries(options.registries)
    for (const warning of warnings) progress.step(`warning: ${formatProblem(warning)}`)
    for (const { tls } of configs.values())
      needed.push(
        ...[tls?.caFile, tls?.certFile, tls?.keyFile].filter((file) => file !== undefined),
      )
  }
  if (files.size === 0)
    throw new ConfigInvalidError([
      { message: 'nothing to roll out: give --registries, --config or --k3s-config' },
    ])
  return {
    hosts,
    files,
    needed: [...new Set(needed)].filter((file) => file !== ''),
    undo: options.undo === true,
    batch: options.batch,
    admin,
    deadline: options.deadline * 1000,
  }
}

function describePlan({ host, role, changes, restarts }: NodePlan): string {
  const kind = role === undefined ? 'without K3s' : `K3s ${role}`
  const todo = restarts.length === 0 ? 'restarts nothing' : `restarts ${restarts.join(', then ')}`
  const diffs = changes.map(({ path, before, after }) => shownDiff(path, before, after))
  return changes.length + restarts.length === 0
    ? `${host.name} (${kind}): nothing to do`
    : `${host.name} (${kind}): ${todo}\n${diffs.join('')}`.replace(/\n$/, '')
}

/** A diff for people: passwords and tokens are not in it, and that they differ is said. */
function shownDiff(path: string, before: string | undefined, after: string | undefined): string {
  const shown = (text: string | undefined) => (text === undefined ? text : withoutSecrets(text))
  return (
    unifiedDiff(path, shown(before), shown(after)) ||
    `${path}: differs in logins only, which are not shown\n`
  )
}

function planFields({ host, role, changes, restarts }: NodePlan): Record<string, unknown> {
  return {
    host: host.name,
    role: role ?? null,
    changes: changes.map(({ path, before, after }) => ({
      path,
      diff: shownDiff(path, before, after),
    })),
    restarts,
  }
}

function describeResult(result: NodeResult): string {
  const reason = result.outcome === 'failed' ? `: ${result.reason}` : ''
  return `${result.host.name}: ${result.outcome}${reason}`
}

function conclude(results: readonly NodeResult[], undo: boolean): void {
  const count = (outcome: NodeResult['outcome']) =>
    results.filter((result) => result.outcome === outcome).length
  if (count('failed') + count('untouched') === 0) return
  const ways = undo
    ? 'put the cause right and run the same again'
    : 'put the cause right and run the same again, or take it back: the same with --undo'
  throw new RolloutFailedError(
    `${count('failed')} of ${results.length} nodes failed, ${count('untouched')} were not begun`,
    ways,
  )
}

function whole(text: string): number {
  if (!/^[1-9]\d{0,4}$/.test(text)) throw new InvalidArgumentError('expected a number from 1')
  return Number(text)
}
