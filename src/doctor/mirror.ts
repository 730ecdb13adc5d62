import type { EffectiveConfig } from '../config/effective.ts'
import type { Registries } from '../config/registries.ts'
import { readApplied } from '../mirror/applied.ts'
import { mirrorEndpoint, planApply, selectRoutes, type Change } from '../mirror/certs-dir.ts'
import { firstHost } from '../mirror/hosts-toml.ts'
import { findings, some, type Finding } from './finding.ts'

export interface MirrorFacts {
  readonly certsDir: string
  /** `mirror apply` was run on this node */
  readonly applied: boolean
  /** Where `mirror apply` wrote, if that is another directory */
  readonly elsewhere: string | undefined
  /** Where containerd is to be sent; undefined when it cannot be: tools alone are served, at a unix socket */
  readonly endpoint: string | undefined
  /** What `mirror apply` would do now; a text when that cannot be found out */
  readonly plan: readonly Change[] | string
  /** The daemon has taken its entries out, being out of order */
  readonly withdrawn: boolean
  /** Containerd is not to be sent here: K3s' embedded registry is off */
  readonly aside: boolean
}

/** Plans what `mirror apply` would do, and does none of it. */
export async function lookAtMirror(
  config: Pick<
    EffectiveConfig,
    'certsDir' | 'dataDir' | 'listen' | 'localCertificate' | 'registry' | 'k3s'
  >,
  registries: Registries,
  withdrawn: boolean,
): Promise<MirrorFacts> {
  const { certsDir, k3s, localCertificate: certificate } = config
  const { address } = config.listen.local
  const scheme = certificate === undefined ? 'http' : 'https'
  const endpoint = address && mirrorEndpoint(address, scheme)
  const reader = k3s.present ? 'k3s' : 'containerd'
  const about = { certsDir, endpoint, withdrawn, aside: k3s.off }
  if (endpoint === undefined) return { ...about, applied: false, elsewhere: undefined, plan: [] }
  try {
    const applied = await readApplied(config.dataDir)
    const { disableDefaultEndpoint } = k3s
    const plan = await planApply(applied?.certsDir ?? certsDir, {
      endpoint,
      certificate,
      homeRegistry: config.registry.name,
      routes: selectRoutes(applied?.registries ?? [], registries, {
        reader,
        disableDefaultEndpoint,
      }),
      reader,
      withdrawn: withdrawn || k3s.off,
    })
    const elsewhere =
      applied === undefined || applied.certsDir === certsDir ? undefined : applied.certsDir
    return { ...about, applied: applied !== undefined, elsewhere, plan }
  } catch (error) {
    const plan = error instanceof Error ? error.message : String(error)
    return { ...about, applied: false, elsewhere: undefined, plan }
  }
}

const { pass, warn, fail, notApplicable } = findings('hosts.toml')
const APPLY = 'run shoal mirror apply as root'

/** Is there a hosts.toml that is valid, and are we the first in it? */
export function checkMirror(facts: MirrorFacts): Finding[] {
  const { plan, applied, certsDir, endpoint, withdrawn, aside, elsewhere } = facts
  if (endpoint === undefined)
    return [
      warn(
        'listen.local is a unix socket only, which tools can use and containerd cannot',
        'give it an address as well, such as 127.0.0.1:5001,unix:/run/shoal.sock, if containerd is to ask this node',
      ),
    ]
  if (typeof plan === 'string')
    return [
      fail(`the files in ${certsDir} cannot be read: ${plan}`, 'run it as root: sudo shoal doctor'),
    ]
  const found: Finding[] = []
  if (elsewhere !== undefined)
    found.push(
      warn(
        `shoal mirror apply wrote to ${elsewhere}, but containerd is said to read ${certsDir}`,
        `run shoal mirror restore --certs-dir ${elsewhere}, then shoal mirror apply`,
      ),
    )
  for (const { path, refused } of plan)
    if (refused !== undefined)
      found.push(
        fail(
          `${path} ${refused}`,
          `mend or remove ${path}; containerd cannot use it either, and pulls of its registry fail`,
        ),
      )
  const behind = plan.flatMap(({ path, before, refused }) => {
    const first = refused === undefined && before !== undefined ? firstHost(before) : undefined
    return first === undefined || first === endpoint || !(before ?? '').includes(endpoint)
      ? []
      : [{ path, first }]
  })
  for (const { path, first } of behind)
    found.push(
      fail(
        `${path} asks ${first} before ${endpoint}`,
        `put [host."${endpoint}"] first in that file, or take it out and run shoal mirror apply`,
      ),
    )
  if (aside)
    return [
      ...found,
      notApplicable("K3s' embedded registry is off, so containerd is not sent here"),
    ]
  if (withdrawn)
    found.push(
      fail(
        'the daemon has taken its entries out, because its registry was out of order',
        'see why it is not ready; it puts them back by itself when it is',
      ),
    )
  else {
    const due = plan.filter(
      ({ before, after, refused }) => before !== after && refused === undefined,
    )
    if (!applied && due.length > 0)
      found.push(
        fail(`containerd is not sent to ${endpoint}: nothing was applied in ${certsDir}`, APPLY),
      )
    else if (due.length > 0)
      found.push(
        fail(`${some(due.map(({ path }) => path))} is not as shoal mirror apply made it`, APPLY),
      )
    else if (found.length === 0)
      found.push(pass(`${plan.length} files in ${certsDir} name ${endpoint} first`))
  }
  return found
}
