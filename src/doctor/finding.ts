/** What one check has found, in words for people. */
export type Finding = {
  /** Which check; the same words every time, so that scripts can look for it */
  readonly check: Check
  readonly said: string
} & (
  | { readonly verdict: 'pass' | 'not applicable' }
  /** With the one thing to do about it */
  | { readonly verdict: 'warn' | 'fail'; readonly remedy: string }
)

/** The checks in the order in which they are told: what the others need comes first. */
export const CHECKS = [
  'configuration',
  'daemon',
  'rights',
  'containerd',
  'config_path',
  'hosts.toml',
  'logins',
  'layers',
  'K3s',
  'registries',
  'sharing',
  'ports',
  'addresses',
  'MTU',
  'mesh',
  'peers',
  'reachable',
  'round trip',
  'clock',
  'token',
  'upstream',
  'prefetch',
  'disk',
  'files',
] as const

export type Check = (typeof CHECKS)[number]

/** How the checks write down what they have found. */
export function findings(check: Check) {
  return {
    pass: (said: string): Finding => ({ check, verdict: 'pass', said }),
    notApplicable: (said: string): Finding => ({ check, verdict: 'not applicable', said }),
    warn: (said: string, remedy: string): Finding => ({ check, verdict: 'warn', said, remedy }),
    fail: (said: string, remedy: string): Finding => ({ check, verdict: 'fail', said, remedy }),
  }
}

/** Some names, and how many more there are. */
export function some(names: readonly string[], most = 3): string {
  const rest = names.length - most
  return names.slice(0, most).join(', ') + (rest > 0 ? ` and ${rest} more` : '')
}
