import type { EffectiveConfig } from '../config/effective.ts'
import { PROBE } from '../pull/private/probe.ts'
import { CriImages } from '../store/containerd/cri/images.ts'
import { findings, type Finding } from './finding.ts'

export interface LoginFacts {
  /** Registries or names whose images need a login, as this node verifies it */
  readonly verified: readonly string[]
  /** Why a pull with a login, that is given to whoever shows it here, failed; undefined when it was let in */
  readonly failure: string | undefined
}

/** How long containerd may take for an image of 1 KiB that is on this node. */
const PATIENCE = { deadlineMs: 10_000 }

/**
 * Has containerd pull an image of 1 KiB that this node gives only to who shows a login, as kubelet has it pull for a pod, and
 * removes it.
 */
export async function lookAtLogins(
  config: Pick<EffectiveConfig, 'containerd' | 'private' | 'registry'>,
): Promise<LoginFacts> {
  const verified = config.private
    .filter(({ policy }) => policy === 'verify')
    .map(({ registry }) => registry)
  if (verified.length === 0) return { verified, failure: undefined }
  using cri = new CriImages(config.containerd.address)
  const image = PROBE.imageOf(config.registry.name)
  try {
    await cri.pull(image, PROBE.login, PATIENCE)
    await cri.remove(image)
    return { verified, failure: undefined }
  } catch (error) {
    return { verified, failure: error instanceof Error ? error.message : String(error) }
  }
}

const { pass, fail, notApplicable } = findings('logins')

/** Does containerd show this node the logins of pods, without which nobody is let in? */
export function checkLogins(facts: LoginFacts | undefined): Finding[] {
  if (facts === undefined)
    return [notApplicable('run shoal doctor as root beside the running daemon to have it tried')]
  const { verified, failure } = facts
  if (verified.length === 0) return [notApplicable('no registry has private: verify')]
  const names = verified.join(', ')
  if (failure === undefined)
    return [pass(`containerd shows this node the logins of pods, which ${names} needs`)]
  return [
    fail(
      `containerd did not show this node the login it was given (${failure}): images of ${names} come from the registry only, and not at all while that is down`,
      'run shoal mirror apply as root; if that changes nothing, this containerd keeps logins from mirrors: set private: upstream for it',
    ),
  ]
}
