import { inspect } from 'node:util'
import { wrap } from './text.ts'

/**
 * What to do about errors that end a command, by their codes: ours, and those of the system. An error that knows better says it
 * itself, as `remedy`.
 */
const REMEDIES: Readonly<Record<string, string>> = {
  ERR_CERTIFICATE: 'correct the files that are named, or take their keys out of the configuration',
  ERR_CERTS_DIR: 'run it as root, or name the directory that containerd reads with --certs-dir',
  ERR_CONFIG_INVALID: 'correct what is named; shoal config check says when all is right',
  ERR_DAEMON_REFUSED: "the daemon's log says more: journalctl -u shoal",
  ERR_DEMO_FAILED: 'run it with --log-level info: the log of the nodes says why',
  ERR_HELD_SOCKET:
    'have one ListenStream= in shoal.socket, the same as listen.local, or do without it: systemctl disable --now shoal.socket',
  ERR_HOSTS_TOML: 'mend or remove that file, and run it again',
  ERR_IDENTITY_INVALID: 'restore that file, or remove it: then this node gets a new identity',
  ERR_LAYOUT_INDEX_INVALID:
    'restore that file, or remove the directory: then its images are pulled anew',
  ERR_MIRROR_INCOMPLETE: 'mend or remove the files that are named, and run it again',
  ERR_PIN: "see shoal status; the daemon's log says more: journalctl -u shoal",
  ERR_REFERENCE_INVALID: 'write it as in docker.io/library/alpine:3.20',
  ERR_REGISTRIES_EDIT: 'write it in the usual form, one key a line, and run it again',
  ERR_REGISTRY_NAME: 'write it as HOST or HOST:PORT, such as docker.io or 127.0.0.1:5000',
  ERR_ROLLOUT_NODE: 'put that right on the node, and run the same again',
  ERR_ROLLOUT_REFUSED: 'put the causes right, and run the same again',
  ERR_STORE_FULL: 'make room on that disk',
  ERR_STORE_UNAVAILABLE: 'see that it runs and may be read: shoal doctor says which it is',
  ERR_TOKEN_FILE: "put the cluster's token there, with mode 600; shoal token new makes one",
  ERR_TOKEN_INVALID: 'make one with shoal token new, the same for all nodes',
  EACCES: 'run it as root (sudo), or as the user whom that belongs to',
  EPERM: 'run it as root (sudo), or as the user whom that belongs to',
  EROFS: 'name another directory: that one cannot be written to',
  ENOENT: 'correct that path',
  ENOTDIR: 'correct that path: a part of it is no directory',
  EISDIR: 'correct that path: it is a directory',
  ENOSPC: 'make room on that disk',
  EDQUOT: 'make room on that disk',
  EMFILE: 'raise the limit of open files: ulimit -n',
}
const INTERNAL = 'report it with what shoal --verbose prints, given before the command'

/** What to do about an error, if that is known. */
export function remedyFor(error: unknown): string | undefined {
  if (!(error instanceof Error)) return undefined
  if ('remedy' in error && typeof error.remedy === 'string') return error.remedy
  return 'code' in error ? REMEDIES[String(error.code)] : INTERNAL
}

/**
 * A failure for people: what went wrong, and below it the one thing to do. The stack and the causes come with `verbose` only; no
 * line is longer than `columns`, where that is given.
 */
export function describeFailure(
  error: unknown,
  { verbose, columns = Infinity }: { verbose: boolean; columns?: number | undefined },
): string {
  const what = error instanceof Error ? error.message : String(error)
  const ours = !(error instanceof Error) || 'code' in error
  const remedy = remedyFor(error)
  const lines = [
    ...fold(`shoal: ${ours ? '' : 'internal error: '}${what}`, columns),
    ...(remedy === undefined ? [] : fold(`=> ${remedy}`, columns - 2).map((line) => `  ${line}`)),
    ...(verbose && error instanceof Error ? ['', ...stacks(error)] : []),
  ]
  return `${lines.join('\n')}\n`
}

function fold(text: string, columns: number): string[] {
  return text
    .split('\n')
    .flatMap((line) => (columns === Infinity ? [line] : wrap(line, Math.max(columns, 20))))
}

function stacks(error: Error): string[] {
  const stack = error.stack ?? error.message
  return error.cause instanceof Error
    ? [stack, 'caused by', ...stacks(error.cause)]
    : [stack, ...(error.cause === undefined ? [] : [`caused by ${inspect(error.cause)}`])]
}
