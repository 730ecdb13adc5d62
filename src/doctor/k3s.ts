import type { EffectiveConfig } from '../config/effective.ts'
import { readRegistries, type Registries } from '../config/registries.ts'
import { ConfigInvalidError, formatProblem } from '../config/yaml-file.ts'
import { findings, some, type Finding } from './finding.ts'

/** What registries.yaml says, or why it cannot be read. */
export type RegistriesFacts = { readonly path: string } & (
  | { readonly read: Registries }
  | { readonly problem: string }
)

const NOTHING: Registries = { mirrors: new Map(), configs: new Map(), warnings: [] }

/** Reads registries.yaml. */
export async function lookAtRegistries(path: string): Promise<RegistriesFacts> {
  try {
    return { path, read: await readRegistries(path) }
  } catch (error) {
    if (!(error instanceof ConfigInvalidError)) throw error
    return { path, problem: error.message.split('\n')[0] ?? '' }
  }
}

/** What it says, nothing if it cannot be read. */
export function registriesOf(facts: RegistriesFacts): Registries {
  return 'read' in facts ? facts.read : NOTHING
}

const registries = findings('registries')

/** Is registries.yaml understood? */
export function checkRegistries(facts: RegistriesFacts): Finding[] {
  if ('problem' in facts)
    return [
      registries.fail(
        facts.problem,
        `mend ${facts.path}: K3s does not start with it, and until then what it said before counts`,
      ),
    ]
  const { mirrors, configs, warnings } = facts.read
  const found = warnings.map((warning) =>
    registries.warn(
      formatProblem(warning),
      `correct that line of ${facts.path}: it is ignored as it is`,
    ),
  )
  if (found.length > 0) return found
  const names = [...mirrors.keys()]
  if (names.length === 0 && configs.size === 0)
    return [registries.notApplicable(`${facts.path} says nothing`)]
  return [
    registries.pass(
      `${facts.path}: ${names.length} mirrors${names.length > 0 ? ` (${some(names)})` : ''}, ${configs.size} configs`,
    ),
  ]
}

const k3s = findings('K3s')

/** What do K3s' files switch on here? */
export function checkK3s(
  {
    k3s: { present, off, config },
    sharing,
    registries: path,
  }: Pick<EffectiveConfig, 'k3s' | 'sharing' | 'registries'>,
  facts: RegistriesFacts,
): Finding[] {
  if (!present) return [k3s.notApplicable('K3s is not on this node')]
  if (off)
    return [
      k3s.warn(
        `the embedded registry is off: ${config} has no embedded-registry: true, or sharing is off`,
        `set embedded-registry: true in ${config} on every server, and restart K3s and Shoal`,
      ),
    ]
  const names = [...registriesOf(facts).mirrors.keys()]
  if (names.length === 0 && 'read' in facts)
    return [
      k3s.warn(
        `${path} has no mirrors, so nothing but the home registry is shared`,
        `list registries under mirrors in ${path}, or "*": for all`,
      ),
    ]
  return [
    k3s.pass(
      sharing === 'auto'
        ? 'this is an agent, which shares when its servers do'
        : 'the embedded registry is on',
    ),
  ]
}
