/** Longer headers are read no further, in characters. */
const MAX_LENGTH = 4096

/** What a registry wants to be shown. */
export interface Challenge {
  /** In lower case */
  readonly scheme: string
  /** Their names in lower case */
  readonly parameters: ReadonlyMap<string, string>
}

/**
 * What a `WWW-Authenticate` says, up to where it makes no sense.
 * @see https://www.rfc-editor.org/rfc/rfc9110.html#name-www-authenticate
 */
export function parseChallenges(header: string): Challenge[] {
  const challenges: { scheme: string; parameters: Map<string, string> }[] = []
  const part = /\s*,?\s*(?:([\w-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))|([\w-]+)(?=\s|,|$))/gy
  for (const [, name, quoted, token, scheme] of header.slice(0, MAX_LENGTH).matchAll(part)) {
    if (scheme !== undefined)
      challenges.push({ scheme: scheme.toLowerCase(), parameters: new Map() })
    else if (name !== undefined)
      challenges
        .at(-1)
        ?.parameters.set(name.toLowerCase(), quoted?.replaceAll(/\\(.)/g, '$1') ?? token ?? '')
  }
  return challenges
}
