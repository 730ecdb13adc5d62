import { isDeepStrictEqual } from 'node:util'
import { parseRegistries } from '../config/registries.ts'
import type { Host, Role } from './hosts.ts'
import { RemoteNode, type FileChange, type NodeFacts, type Unit } from './node.ts'
import { NodeError, type Ssh } from './ssh.ts'

/** What is rolled out where: the place is fixed, for K3s and Shoal look there. */
export const PLACES = {
  registries: '/etc/rancher/k3s/registries.yaml',
  k3sConfig: '/etc/rancher/k3s/config.yaml.d/50-shoal.yaml',
  config: '/etc/shoal/config.yaml',
} as const
export type Kind = keyof typeof PLACES

/** registries.yaml and K3s' drop-ins hold passwords and tokens. */
const MODES: Readonly<Record<Kind, string>> = { registries: '600', k3sConfig: '600', config: '644' }

/** Nodes that are looked at at the same time. */
const LOOKS = 8

export interface RolloutInit {
  readonly hosts: readonly Host[]
  /** At least one; checked already */
  readonly files: ReadonlyMap<Kind, string>
  /** Files that those name, which have to be on every node */
  readonly needed: readonly string[]
  /** Takes the files back where they are in place, instead of putting them there */
  readonly undo: boolean
  /** Nodes without K3s' datastore that are changed at the same time; servers are changed one by one always */
  readonly batch: number
  /** `HOST:PORT` of the daemon's admin listener on every node */
  readonly admin: string
  /** A restarted unit has to be healthy again so soon, in ms */
  readonly deadline: number
}

/** What is to be done on one node. */
export interface NodePlan {
  readonly host: Host
  readonly role: Role | undefined
  /** Those that differ from what is there */
  readonly changes: readonly FileChange[]
  /** In this order; also what an interrupted rollout has left to be done */
  readonly restarts: readonly Unit[]
  /** For people: what was left alone, and why */
  readonly notes: readonly string[]
  readonly needsReady: boolean
  /** Files whose restart an interrupted rollout has left to be done */
  readonly pending: readonly string[]
}

/** What became of a node. */
export type NodeResult =
  | { readonly host: Host; readonly outcome: 'done' | 'unchanged' }
  | { readonly host: Host; readonly outcome: 'failed'; readonly reason: string }
  | { readonly host: Host; readonly outcome: 'untouched' }

/** Some nodes are not as they should be before anything was done: nothing was changed anywhere. */
export class RolloutRefusedError extends Error {
  override readonly name = 'RolloutRefusedError'
  readonly code = 'ERR_ROLLOUT_REFUSED'
}

/**
 * Looks at every node, and says what is to be done, in the order in which it is: servers, agents, then nodes without K3s.
 * @throws {RolloutRefusedError} naming every node on which it could not be done
 */
export async function planRollout(
  init: RolloutInit,
  ssh: Ssh,
  signal: AbortSignal,
): Promise<NodePlan[]> {
  const plans: NodePlan[] = []
  const refusals: string[] = []
  const files = [...init.files].map(([kind, text]) => ({ path: PLACES[kind], text }))
  const inspection = { files, needed: init.undo ? [] : init.needed, admin: init.admin }
  await inParallel(init.hosts, LOOKS, async (host) => {
    try {
      const facts = await new RemoteNode(ssh, host).inspect(inspection, signal)
      plans.push(planNode(host, facts, init))
    } catch (error) {
      if (!(error instanceof NodeError)) throw error
      refusals.push(`${host.name}: ${error.message}`)
    }
  })
  if (refusals.length > 0)
    throw new RolloutRefusedError(
      `nothing was changed anywhere:\n${refusals.toSorted().join('\n')}`,
    )
  const place = ({ host, role }: NodePlan) =>
    [role === 'server' ? 0 : role === 'agent' ? 1 : 2, init.hosts.indexOf(host)] as const
  return plans.toSorted((a, b) => {
    const [[roleA, lineA], [roleB, lineB]] = [place(a), place(b)]
    return roleA - roleB || lineA - lineB
  })
}

/** What is to be done on a node, from what it is. */
export function planNode(
  host: Host,
  { role, units, ready, files }: NodeFacts,
  init: Pick<RolloutInit, 'files' | 'undo'>,
): NodePlan {
  const changes: FileChange[] = []
  const notes: string[] = []
  const pending: string[] = []
  const restarts = new Set<Unit>()
  const k3s: Unit | undefined =
    role === undefined ? undefined : role === 'server' ? 'k3s' : 'k3s-agent'
  for (const [index, [kind, text]] of [...init.files].entries()) {
    const file = files[index]
    if (file === undefined) throw new TypeError(`nothing is known of ${kind}`)
    const path = PLACES[kind]
    const reader = kind === 'config' ? 'shoal' : k3s
    // What is stopped stays so: it reads the file when it is started.
    const runs = reader !== undefined && (units.get(reader) ?? 'inactive') !== 'inactive'
    if (file.pending) {
      pending.push(path)
      if (runs) restarts.add(reader)
    }
    if (kind === 'k3sConfig' && role === undefined) {
      notes.push(`${path} is not for a node without K3s`)
      continue
    }
    const after = init.undo ? (file.backup ?? undefined) : text
    if (init.undo && (file.text !== text || file.backup === undefined)) {
      if (file.text !== text && file.text !== undefined)
        notes.push(`${path} is left alone: it is not the file that is to be taken back`)
      continue
    }
    if (file.text === after) continue
    const restart = runs && !(kind === 'registries' && meansTheSame(file.text, after))
    changes.push({ path, before: file.text, after, mode: MODES[kind], restart })
    if (restart) restarts.add(reader)
    else if (reader !== undefined && !runs) notes.push(`${reader} does not run, and is not started`)
  }
  const order: readonly Unit[] = ['shoal', 'k3s', 'k3s-agent']
  return {
    host,
    role,
    changes,
    restarts: order.filter((unit) => restarts.has(unit)),
    notes,
    needsReady: ready || restarts.has('shoal'),
    pending,
  }
}

/**
 * Does what was planned: servers one after the other, then the others in batches. After the first failure no other node is
 * begun.
 */
export async function performRollout(
  plans: readonly NodePlan[],
  init: RolloutInit,
  ssh: Ssh,
  { signal, report }: { signal: AbortSignal; report: (host: Host, step: string) => void },
): Promise<NodeResult[]> {
  const results = new Map<Host, NodeResult>()
  let stopped = false
  const roll = async (plan: NodePlan): Promise<void> => {
    const { host } = plan
    if (stopped || signal.aborted) return
    try {
      const done = await rollNode(plan, init, new RemoteNode(ssh, host), { signal, report })
      results.set(host, { host, outcome: done ? 'done' : 'unchanged' })
    } catch (error) {
      if (!(error instanceof NodeError)) throw error
      stopped = true
      results.set(host, { host, outcome: 'failed', reason: error.message })
    }
  }
  const [servers, others] = [
    plans.filter(({ role }) => role === 'server'),
    plans.filter(({ role }) => role !== 'server'),
  ]
  await inParallel(servers, 1, roll)
  for (let at = 0; at < others.length; at += init.batch)
    await inParallel(others.slice(at, at + init.batch), init.batch, roll)
  return plans.map(({ host }) => results.get(host) ?? { host, outcome: 'untouched' })
}

/** @returns false if there was nothing to do */
async function rollNode(
  { host, changes, restarts, needsReady, pending }: NodePlan,
  { undo, admin, deadline }: RolloutInit,
  node: RemoteNode,
  { signal, report }: { signal: AbortSignal; report: (host: Host, step: string) => void },
): Promise<boolean> {
  for (const change of changes) {
    if (undo) await node.undo(change, signal)
    else if (change.after !== undefined) {
      await node.write({ ...change, after: change.after }, signal)
    }
    report(host, `${change.path}: ${change.after === undefined ? 'removed' : 'written'}`)
  }
  for (const unit of restarts) {
    report(host, `restarting ${unit}`)
    await node
      .restart(unit, { admin: needsReady ? admin : undefined, deadline }, signal)
      .catch((error: unknown) => {
        if (!(error instanceof NodeError)) throw error
        const look = `see "journalctl -u ${unit}" there`
        throw new NodeError(`${unit} after its restart: ${error.message}; ${look}`, {
          cause: error,
        })
      })
    report(host, `${unit} is healthy`)
  }
  const settled = new Set([...pending, ...changes.map(({ path }) => path)])
  if (settled.size > 0) await node.settle([...settled], signal)
  return changes.length + restarts.length > 0
}

/** True if K3s writes the same from both: then nothing of it is to be restarted. */
function meansTheSame(before: string | undefined, after: string | undefined): boolean {
  try {
    const [was, is] = [before, after].map((text) => parseRegistries(text ?? '', 'registries.yaml'))
    // In their order: `mirrors` is a list of places in which K3s finds a registry
    return (
      isDeepStrictEqual([...(was?.mirrors ?? [])], [...(is?.mirrors ?? [])]) &&
      isDeepStrictEqual([...(was?.configs ?? [])], [...(is?.configs ?? [])])
    )
  } catch {
    // What is there cannot be read; K3s could not either
    return false
  }
}

/** Does something with each item, `width` at a time, beginning in their order. */
async function inParallel<T>(
  items: readonly T[],
  width: number,
  work: (item: T) => Promise<void>,
): Promise<void> {
  const queue = items.values()
  await Promise.all(
    Array.from({ length: Math.min(width, items.length) }, async () => {
      for (const item of queue) await work(item)
    }),
  )
}
