import { existsSync, statfsSync } from 'node:fs'
import { homedir, hostname } from 'node:os'
import { dirname } from 'node:path'
import { Command, Option } from 'commander'
import { effectiveConfig, type EffectiveConfig, type HostFacts } from '../config/effective.ts'
import { DEFAULT_CONFIG_FILE, loadConfig, printConfig, type LoadedConfig } from '../config/load.ts'
import { readK3sConfig, type K3sConfig } from '../config/k3s.ts'
import { formatProblem, type ConfigProblem } from '../config/yaml-file.ts'
import { configKeys, type Config, type ConfigKey } from '../config/schema.ts'

/** Adds `--config` and the flags of the keys, all of them if none are named. */
export function addConfigOptions(command: Command, names?: readonly string[]): Command {
  command.option('--config <FILE>', `configuration file (default: ${DEFAULT_CONFIG_FILE})`)
  for (const key of configKeys) {
    if (names === undefined || names.includes(key.name)) command.addOption(configOption(key))
  }
  if (names === undefined) command.addOption(embeddedRegistryOption())
  return command
}

function configOption(key: ConfigKey): Option {
  // No default of commander's: a flag that was not given must not hide what the file says.
  const ending =
    key.type === 'list' ? '; may be repeated' : key.default && ` (default: ${key.default})`
  const description = key.description.replaceAll('`', '').replace(/\.$/, '')
  const option = new Option(`${key.flag} <${key.placeholder}>`, description + ending)
  return key.type === 'list'
    ? option.argParser((text: string, list: readonly string[] | undefined) => [
        ...(list ?? []),
        text,
      ])
    : option
}

/** What K3s calls it: another name of `--sharing`, which wins. */
function embeddedRegistryOption(): Option {
  return new Option('--embedded-registry [BOOL]', 'the same as --sharing on, or off with false')
    .choices(['true', 'false'])
    .preset('true')
}

/** The configuration a command was given, by file, environment and flags; what it leaves to `auto` is not decided. */
export async function loadGiven(command: Command): Promise<LoadedConfig> {
  const options: Record<string, unknown> = command.opts()
  const flags = new Map<string, string | readonly string[]>()
  for (const key of configKeys) {
    const value = options[configOption(key).attributeName()]
    if (typeof value === 'string') flags.set(key.name, value)
    else if (Array.isArray(value)) flags.set(key.name, value.map(String))
  }
  const { config: file, embeddedRegistry } = options
  if (embeddedRegistry !== undefined && !flags.has('sharing'))
    flags.set('sharing', embeddedRegistry === 'true' ? 'on' : 'off')
  const loaded = await loadConfig({
    file: typeof file === 'string' ? file : undefined,
    flags,
    env: process.env,
  })
  say(loaded.warnings)
  return loaded
}

function say(warnings: readonly ConfigProblem[]): void {
  for (const warning of warnings) process.stderr.write(`warning: ${formatProblem(warning)}\n`)
}

/** The same with everything `auto` decided. `reconsider` decides that again, should K3s' configuration have changed. */
export async function loadFromCommand(command: Command): Promise<{
  config: EffectiveConfig
  source: LoadedConfig['source']
  warnings: LoadedConfig['warnings']
  reconsider: () => Promise<EffectiveConfig>
  /** Where it is written, and what it says there, and in flags and variables, when it is read */
  written: { path: string; read: () => Promise<Config> }
}> {
  const loaded = await loadGiven(command)
  const readK3s = () => readK3sConfig(loaded.config.k3s.config)
  const decide = (k3s: K3sConfig | undefined): EffectiveConfig => {
    const sharing = loaded.source('sharing')
    return effectiveConfig(loaded.config, hostFacts(), k3s, { sharing })
  }
  const k3s = await readK3s()
  const { warnings = [] } = k3s ?? {}
  say(warnings)
  const { config: given } = command.opts<{ config?: string }>()
  return {
    config: decide(k3s),
    source: loaded.source,
    warnings: [...loaded.warnings, ...warnings],
    reconsider: async () => decide(await readK3s()),
    written: {
      path: given ?? DEFAULT_CONFIG_FILE,
      read: async () => (await loadGiven(command)).config,
    },
  }
}

/** `shoal config`. */
export function configCommand(): Command {
  const command = new Command('config').description('show and check the configuration')
  const print = new Command('print')
    .description('print the effective configuration, with where each value comes from')
    .action(async () => {
      const { config, source } = await loadFromCommand(print)
      process.stdout.write(printConfig(config, source))
    })
  const check = new Command('check')
    .description('check the configuration: exit status 0, or 1 with everything that is wrong')
    .action(async () => {
      await loadFromCommand(check)
    })
  return command.addCommand(addConfigOptions(print)).addCommand(addConfigOptions(check))
}

/** What this machine says of itself. */
export function hostFacts(): HostFacts {
  return {
    // Node has it on every system Shoal runs on
    uid: process.getuid?.() ?? 0,
    homeDirectory: homedir(),
    xdgDataHome: process.env['XDG_DATA_HOME'],
    hostName: hostname(),
    exists: existsSync,
    diskBytes: (path) => {
      let existing = path
      while (!existsSync(existing)) existing = dirname(existing)
      const { blocks, bsize } = statfsSync(existing)
      return blocks * bsize
    },
  }
}
