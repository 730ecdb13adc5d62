import { Command } from 'commander'
import type { EffectiveConfig } from '../config/effective.ts'
import { formatProblem, readTextFile } from '../config/yaml-file.ts'
import { readRegistries } from '../config/registries.ts'
import {
  addEndpoint,
  isOwnFile,
  RegistriesEditError,
  removeEndpoint,
  withoutSecrets,
} from '../config/registries-edit.ts'
import {
  mirrorEndpoint,
  perform,
  planApply,
  planRestore,
  selectRoutes,
  type Change,
  type MirrorInit,
} from '../mirror/certs-dir.ts'
import { forgetApplied, readApplied, writeApplied } from '../mirror/applied.ts'
import { unifiedDiff } from '../mirror/diff.ts'
import { readContainerdConfig } from '../mirror/containerd-config.ts'
import { addConfigOptions, loadFromCommand } from './config.ts'

/** Some files stayed as they were although they should not; which and why was printed. */
class MirrorIncompleteError extends Error {
  override readonly name = 'MirrorIncompleteError'
  readonly code = 'ERR_MIRROR_INCOMPLETE'
}

const CONTAINERD_CONFIG = '/etc/containerd/config.toml'
const CERTS_DIR = '/etc/containerd/certs.d'
const RESTORE_KEYS = ['certsDir', 'dataDir', 'registries', 'k3s.config']

/** `shoal mirror`: puts this node's daemon in front of registries, in containerd's configuration. */
export function mirrorCommand(): Command {
  return new Command('mirror')
    .description("put this node's registry in front of others, in containerd's hosts.toml files")
    .addCommand(
      planning('apply', 'change the files; what was there is kept').action(
        async (registries: readonly string[], _options: unknown, command: Command) => {
          const { config, inK3s } = await load(command)
          if (!inK3s) return applyMirror(config, registries)
          const changes = await plan(registries, config, inK3s)
          await report(changes, print)
          if (changes.some(({ before, after }) => before !== after))
            process.stdout.write('note: K3s reads it when it starts: restart k3s or k3s-agent\n')
          complain(changes)
          return undefined
        },
      ),
    )
    .addCommand(
      planning('diff', 'print what apply would change').action(
        async (registries: readonly string[], _options: unknown, command: Command) => {
          const { config, inK3s } = await load(command)
          const changes = await plan(registries, config, inK3s)
          for (const { path, before, after, refused, notes } of changes) {
            const shown = (text: string | undefined) =>
              inK3s && text !== undefined ? withoutSecrets(text) : text
            process.stdout.write(unifiedDiff(path, shown(before), shown(after)))
            if (refused !== undefined) process.stderr.write(`${path}: left alone, it ${refused}\n`)
            for (const note of notes) process.stderr.write(`${path}: note: ${note}\n`)
          }
        },
      ),
    )
    .addCommand(
      withK3s(addConfigOptions(new Command('restore'), RESTORE_KEYS))
        .description('take back everything apply did, byte for byte')
        .action(async (_options: unknown, command: Command) => {
          const { config, inK3s } = await load(command)
          if (!inK3s) return restoreMirror(config)
          const changes = [await planK3sRestore(config.registries)]
          await report(changes, print)
          complain(changes)
          return undefined
        }),
    )
}

/**
 * Writes containerd's hosts.toml files, for these registries or those of registries.yaml, and tells what was done.
 * @throws {MirrorIncompleteError}
 */
export async function applyMirror(
  config: EffectiveConfig,
  registries: readonly string[],
  say: (line: string) => void = print,
): Promise<void> {
  const changes = await plan(registries, config, false)
  await report(changes, say)
  await remember(config, registries, say)
  await hintAtConfigPath(config.certsDir, say)
  complain(changes)
}

/**
 * Takes out of them what {@link applyMirror} put in, and tells what was done.
 * @throws {MirrorIncompleteError}
 */
export async function restoreMirror(
  config: EffectiveConfig,
  say: (line: string) => void = print,
): Promise<void> {
  // First: the daemon is not to put back what is taken out.
  const applied = await readApplied(config.dataDir).catch(() => undefined)
  if (applied?.certsDir === config.certsDir) await forgetApplied(config.dataDir)
  const changes = await planRestore(config.certsDir)
  await report(changes, say)
  complain(changes)
}

function planning(name: string, description: string): Command {
  const command = new Command(name)
    .description(description)
    .argument(
      '[registry...]',
      'registries, as in docker.io; without any those of registries.yaml, else all',
    )
  return withK3s(addConfigOptions(command, [...RESTORE_KEYS, 'registry.name', 'listen.local']))
}

function withK3s(command: Command): Command {
  return command.option(
    '--k3s',
    "instead list this node's registry in registries.yaml, from which K3s writes hosts.toml at each start",
  )
}

async function load(command: Command): Promise<{ config: EffectiveConfig; inK3s: boolean }> {
  const { config } = await loadFromCommand(command)
  return { config, inK3s: command.opts()['k3s'] === true }
}

async function plan(
  named: readonly string[],
  config: EffectiveConfig,
  inK3s: boolean,
): Promise<Change[]> {
  const registries = await readRegistries(config.registries)
  for (const warning of registries.warnings)
    process.stderr.write(`warning: ${formatProblem(warning)}\n`)
  const reader = inK3s || config.k3s.present ? 'k3s' : 'containerd'
  const { disableDefaultEndpoint } = config.k3s
  const certificate = config.localCertificate
  if (inK3s && certificate !== undefined)
    throw new MirrorIncompleteError(
      'private: verify needs hosts.toml files, which say whom containerd may trust: use `shoal mirror apply` without --k3s',
    )
  const init = {
    endpoint: mirrorEndpoint(
      config.listen.local.address,
      certificate === undefined ? 'http' : 'https',
    ),
    certificate,
    homeRegistry: config.registry.name,
    routes: selectRoutes(named, registries, { reader, disableDefaultEndpoint }),
    reader,
    withdrawn: config.k3s.off,
  } as const
  if (config.k3s.off)
    process.stderr.write(
      "note: K3s' embedded registry is off here (`embedded-registry` in its configuration, or `sharing`), so containerd is sent to the other endpoints only\n",
    )
  if (reader === 'k3s' && init.routes.size === 0)
    process.stderr.write(
      `note: ${config.registries} has no mirrors, so only ${config.registry.name} is served here: K3s shares what is under mirrors\n`,
    )
  return inK3s ? [await planK3sApply(config.registries, init)] : planApply(config.certsDir, init)
}

async function planK3sApply(
  path: string,
  { endpoint, homeRegistry, routes }: MirrorInit,
): Promise<Change> {
  const before = await readTextFile(path, { ignoreBOM: true })
  const names = [...routes.keys(), homeRegistry].map((name) => (name === '_default' ? '*' : name))
  try {
    const after = addEndpoint(before, endpoint, [...new Set(names)])
    return { path, before, after, notes: [] }
  } catch (error) {
    if (!(error instanceof RegistriesEditError)) throw error
    return { path, before, after: before, refused: error.message, notes: [] }
  }
}

async function planK3sRestore(path: string): Promise<Change> {
  const before = await readTextFile(path, { ignoreBOM: true })
  const left = before === undefined ? '' : removeEndpoint(before)
  return { path, before, after: left === '' && isOwnFile(before) ? undefined : left, notes: [] }
}

/** The daemon keeps what was applied as long as this is known; what was applied holds without it. */
async function remember(
  { certsDir, dataDir }: EffectiveConfig,
  registries: readonly string[],
  say: (line: string) => void,
): Promise<void> {
  try {
    await writeApplied(dataDir, { certsDir, registries })
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error)
    say(`note: the daemon will not keep the files so: ${reason}`)
  }
}

async function report(changes: readonly Change[], say: (line: string) => void): Promise<void> {
  await perform(changes)
  for (const change of changes) {
    say(`${change.path}: ${outcome(change)}`)
    for (const note of change.notes) say(`  note: ${note}`)
  }
}

function outcome({ before, after, refused }: Change): string {
  if (refused !== undefined) return `left alone, it ${refused}`
  if (before === after) return 'unchanged'
  if (before === undefined) return 'created'
  return after === undefined ? 'removed' : 'changed'
}

function complain(changes: readonly Change[]): void {
  const refused = changes.filter((change) => change.refused !== undefined).length
  if (refused > 0) {
    throw new MirrorIncompleteError(`${refused} of ${changes.length} files could not be changed`)
  }
}

/** Without `config_path` containerd never looks at what was written; no error says so. */
async function hintAtConfigPath(certsDir: string, say: (line: string) => void): Promise<void> {
  // K3s sets it itself, and what another directory is for is not known here
  if (certsDir !== CERTS_DIR) return
  const unreadable = { configPath: certsDir }
  const { configPath } =
    (await readContainerdConfig(CONTAINERD_CONFIG).catch(() => unreadable)) ?? {}
  if (configPath?.split(':').includes(certsDir) === true) return
  for (const line of [
    `note: ${CONTAINERD_CONFIG} does not set config_path; containerd's CRI plugin reads these files only with`,
    `  config_path = "${certsDir}"`,
    '  in [plugins."io.containerd.grpc.v1.cri".registry], from containerd 2.0 on [plugins."io.containerd.cri.v1.images".registry]',
  ])
    say(line)
}

function print(line: string): void {
  process.stdout.write(`${line}\n`)
}
