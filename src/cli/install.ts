import { execFile } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { readdir, rm } from 'node:fs/promises'
import { promisify } from 'node:util'
import { Command } from 'commander'
import type { EffectiveConfig } from '../config/effective.ts'
import { DEFAULT_CONFIG_FILE, printFlags } from '../config/load.ts'
import { InstallError, Journal } from '../install/journal.ts'
import { addConfigOptions, loadFromCommand } from './config.ts'
import { applyMirror, restoreMirror } from './mirror.ts'
import { addProgressOptions, progressOf } from './progress.ts'

/** Where the program, its unit, and what takes them away again are put. */
const PROGRAM = '/usr/local/bin/shoal'
const UNIT = '/etc/systemd/system/shoal.service'
const JOURNAL = 'install.json'
/** The unit as it comes with the program: seen from the bundle, and from the sources. */
const UNIT_SOURCES = ['../deploy/systemd/shoal.service', '../../deploy/systemd/shoal.service']
/** Where the single executable has unpacked itself */
const CACHE = '/var/cache/shoal'
/** How long systemd may take, in ms: a stop waits for transfers. */
const SYSTEMCTL = 60_000

/** Tells of a step, in one line. */
type Say = NonNullable<Parameters<typeof applyMirror>[2]>

/** `shoal install`. */
export function installCommand(): Command {
  const install = new Command('install')
    .description(
      'put Shoal on this host: the program, its configuration, a systemd unit, and hosts.toml for containerd; shoal uninstall takes all of it away',
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
        await put(journal, renderConfig(config, source), say)
        await applyMirror(config, [], say)
        if (start) {
          await systemctl('daemon-reload')
          await systemctl('enable', 'shoal')
          await systemctl('restart', 'shoal')
        }
      } catch (error) {
        // Half an installation is worse than none; of one that was there before, the old half is as good.
        if (first)
          await takeAway(config, journal, { force: true, stop: start, state: !stateful, say })
        throw error
      }
      progress.result(
        start
          ? 'installed and started; shoal doctor says how it is'
          : 'installed; systemctl enable --now shoal starts it',
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

async function put(journal: Journal, config: string, say: Say): Promise<void> {
  const program = realProgram()
  if (program !== PROGRAM) await journal.link(PROGRAM, program)
  if (existsSync(DEFAULT_CONFIG_FILE)) {
    say(`${DEFAULT_CONFIG_FILE}: kept as it is`)
  } else {
    await journal.write(DEFAULT_CONFIG_FILE, config)
    say(`${DEFAULT_CONFIG_FILE}: created`)
  }
  await journal.write(UNIT, unitText())
  say(`${UNIT}: written`)
}

/** @returns what was left, and why */
async function takeAway(
  config: EffectiveConfig,
  journal: Journal,
  { force, stop, state, say }: { force: boolean; stop: boolean; state: boolean; say: Say },
): Promise<string[]> {
  // The daemon first: it would put hosts.toml right again.
  if (stop && existsSync(UNIT)) await systemctl('disable', '--now', 'shoal')
  await restoreMirror(config, say)
  const left = (await journal.undo({ force })).map(
    (path) => `${path}: left, it was changed; shoal uninstall --purge would not`,
  )
  if (stop) await systemctl('daemon-reload').catch(() => {})
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

function unitText(): string {
  for (const source of UNIT_SOURCES) {
    const url = new URL(source, import.meta.url)
    if (existsSync(url)) return readFileSync(url, 'utf8')
  }
  throw new InstallError(
    `the systemd unit that belongs to this program is missing: ${UNIT_SOURCES[0]}`,
    'unpack Shoal anew',
  )
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

async function assertSystemd(): Promise<void> {
  await systemctl('--version').catch((error: unknown) => {
    throw new InstallError(
      'this host has no systemd',
      'use --no-start, and have another supervisor run shoal serve',
      { cause: error },
    )
  })
}

async function systemctl(...args: readonly string[]): Promise<void> {
  try {
    await promisify(execFile)('systemctl', args, { timeout: SYSTEMCTL })
  } catch (error) {
    const reason = error instanceof Error ? error.message.trim() : String(error)
    throw new InstallError(
      `systemctl ${args.join(' ')} failed: ${reason}`,
      'its log says why: journalctl -u shoal',
      { cause: error },
    )
  }
}
