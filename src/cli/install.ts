import { existsSync } from 'node:fs'
import { readdir, rm } from 'node:fs/promises'
import { isIP } from 'node:net'
import { Command } from 'commander'
import { formatAddress } from '../config/addresses.ts'
import type { EffectiveConfig } from '../config/effective.ts'
import { DEFAULT_CONFIG_FILE, printFlags } from '../config/load.ts'
import { InstallError, Journal } from '../install/journal.ts'
import {
  assertSystemd,
  installedUnits,
  reloadUnits,
  socketUnit,
  startUnits,
  stopUnits,
  writeUnits,
} from '../install/units.ts'
import { addConfigOptions, loadFromCommand } from './config.ts'
import { applyMirror, restoreMirror } from './mirror.ts'
import { addProgressOptions, progressOf } from './progress.ts'

/** Where the program, and what takes all of it away again are put. */
const PROGRAM = '/usr/local/bin/shoal'
const JOURNAL = 'install.json'
/** Where the single executable has unpacked itself */
const CACHE = '/var/cache/shoal'

/** Tells of a step, in one line. */
type Say = NonNullable<Parameters<typeof applyMirror>[2]>

/** `shoal install`. */
export function installCommand(): Command {
  const install = new Command('install')
    .description(
      'put Shoal on this host: the program, its configuration, systemd units, and hosts.toml for containerd; shoal uninstall takes all of it away',
    )
    .option('--no-start', 'leave the service as it is: neither enable nor start it')
    .action(async () => {
      const progress = progressOf(install)
      const say = (line: string) => progress.step(line)
      assertRoot('install')
      const { config, source } = await loadFromCommand(install)
      const { start } = install.opts<{ start: boolean }>()
      if (start) await assertSystemd()
      const stateful = existsSync(config.dataDir)
      const journal = await Journal.open(journalOf(config))
      const first = journal.empty
      try {
        const before = await socketUnit()
        await put(journal, config, renderConfig(config, source), say)
        await applyMirror(config, [], say)
        if (start) await startUnits(before)
      } catch (error) {
        // Half an installation is worse than none; of one that was there before, the old half is as good.
        if (first)
          await takeAway(config, journal, { force: true, stop: start, state: !stateful, say })
        throw error
      }
      progress.result(
        start
          ? 'installed and started; shoal doctor says how it is'
          : `installed; systemctl enable --now ${installedUnits().join(' ')} starts it`,
        { installed: true, started: start },
      )
    })
  return addConfigOptions(addProgressOptions(install))
}

/** `shoal uninstall`. */
export function uninstallCommand(): Command {
  const uninstall = new Command('uninstall')
    .description('take away what shoal install put on this host: everything is as it was before')
    .option('--purge', "also what was changed since, and images in Shoal's own store")
    .action(async () => {
      const progress = progressOf(uninstall)
      assertRoot('uninstall')
      const { config } = await loadFromCommand(uninstall)
      const journal = await Journal.open(journalOf(config))
      if (journal.empty)
        throw new InstallError(
          'nothing is installed here',
          'nothing: shoal install was not run with this data directory, or is undone',
        )
      const force = uninstall.opts<{ purge?: true }>().purge === true
      const left = await takeAway(config, journal, {
        force,
        stop: true,
        state: true,
        say: (line) => progress.step(line),
      })
      progress.result(['uninstalled', ...left].join('\n'), { installed: false, left })
    })
  return addConfigOptions(addProgressOptions(uninstall), [
    'certsDir',
    'dataDir',
    'registries',
    'k3s.config',
  ])
}

async function put(
  journal: Journal,
  { listen }: EffectiveConfig,
  config: string,
  say: Say,
): Promise<void> {
  const program = realProgram()
  if (program !== PROGRAM) await journal.link(PROGRAM, program)
  if (existsSync(DEFAULT_CONFIG_FILE)) {
    say(`${DEFAULT_CONFIG_FILE}: kept as it is`)
  } else {
    await journal.write(DEFAULT_CONFIG_FILE, config)
    say(`${DEFAULT_CONFIG_FILE}: created`)
  }
  const { address } = listen.local
  const held = address !== undefined && isIP(address.host) !== 0 && address.port !== 0
  // systemd takes addresses only, and what is chosen anew at each start cannot be held.
  for (const path of await writeUnits(journal, held ? formatAddress(address) : undefined))
    say(`${path}: written`)
}

/** @returns what was left, and why */
async function takeAway(
  config: EffectiveConfig,
  journal: Journal,
  { force, stop, state, say }: { force: boolean; stop: boolean; state: boolean; say: Say },
): Promise<string[]> {
  // The daemon first: it would put hosts.toml right again.
  if (stop) await stopUnits()
  await restoreMirror(config, say)
  const left = (await journal.undo({ force })).map(
    (path) => `${path}: left, it was changed; shoal uninstall --purge would not`,
  )
  if (stop) await reloadUnits().catch(() => {})
  if (!state) return left
  await rm(CACHE, { recursive: true, force: true })
  const store = config.layout.path
  const holds = (await readdir(store).catch(() => [])).length > 0
  if (holds && !force) {
    left.push(`${store}: left, it holds images; shoal uninstall --purge would not`)
  } else await rm(config.dataDir, { recursive: true, force: true })
  return left
}

function journalOf({ dataDir }: EffectiveConfig): string {
  return `${dataDir}/${JOURNAL}`
}

/** What was given, as a file a person may go on with. */
function renderConfig(config: EffectiveConfig, source: (name: string) => string): string {
  const hint = '# bootstrap: [10.0.0.11, 10.0.0.12]   # some other nodes; any of them will do\n'
  return `# Configuration of Shoal: docs/configuration.md has all keys, \`shoal config print\` what they are now.
${config.bootstrap.length === 0 ? hint : ''}${printFlags(config, source)}`
}

/** What was started: the launcher, or the single executable, which say so; else the launcher beside the bundle. */
function realProgram(): string {
  const said = process.env['SHOAL_PROGRAM']
  if (said !== undefined && existsSync(said)) return said
  throw new InstallError('it is not known which program this is', 'start it by bin/shoal')
}

function assertRoot(what: string): void {
  if (process.getuid?.() !== 0)
    throw new InstallError(
      `shoal ${what} changes files in /etc`,
      `run it as root (sudo shoal ${what})`,
    )
}
