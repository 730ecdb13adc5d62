import type { NodeStatus } from '../observe/status.ts'
import { findings, some, type Finding } from './finding.ts'

const { pass, warn, fail, notApplicable } = findings('prefetch')

/** Can the lists of images be used, and is what they name here? */
export function checkPrefetch({
  status,
}: {
  readonly status: Pick<NodeStatus, 'prefetch'> | undefined
}): Finding[] {
  if (status === undefined) return [notApplicable('only the running daemon knows')]
  const { complaint, listed, missing } = status.prefetch
  if (complaint)
    return [
      fail(
        `the lists of images cannot be used, and count as they were before: ${complaint}`,
        'correct that list: a name in each line, as docker.io/library/nginx:1.27, and # before what is for people; it is read again within a second',
      ),
    ]
  if (listed === 0) return [notApplicable('no list of images names any')]
  const failed = missing.filter(({ reason }) => reason !== null)
  if (failed.length > 0)
    return [
      warn(
        `${failed.length} of ${listed} listed images cannot be got: ${some(failed.map(({ image, reason }) => `${image}: ${reason}`))}`,
        'see that their names are right and that a registry or another node has them; they are tried again by themselves',
      ),
    ]
  return [pass(`${listed - missing.length} of ${listed} listed images are here`)]
}
