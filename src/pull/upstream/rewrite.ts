/** A repository's name as rewritten by the first pattern that changes it; K3s' containerd does the same. */
export function rewrite(repository: string, rewrites: ReadonlyMap<string, string>): string {
  for (const [pattern, replacement] of rewrites) {
    const expression = compile(pattern)
    if (expression === undefined) continue
    let rewritten = ''
    let end = 0
    for (const match of repository.matchAll(expression)) {
      rewritten += repository.slice(end, match.index) + expand(replacement, match)
      end = match.index + match[0].length
    }
    rewritten += repository.slice(end)
    if (rewritten !== repository) return rewritten
  }
  return repository
}

/**
 * Go's syntax as far as both languages have it, and its flags at the beginning.
 * @see https://pkg.go.dev/regexp/syntax
 */
function compile(pattern: string): RegExp | undefined {
  const [, flags = '', rest = pattern] = /^\(\?([ims]+)\)([^]*)$/.exec(pattern) ?? []
  const source = rest.replaceAll('(?P<', '(?<').replaceAll('\\z', '$').replaceAll('\\A', '^')
  try {
    return new RegExp(source, `g${flags}`)
  } catch {
    return undefined
  }
}

/** @see https://pkg.go.dev/regexp#Regexp.Expand: `$1x` is a group named `1x`, which there is none of */
function expand(template: string, match: RegExpExecArray): string {
  return template.replaceAll(
    /\$(?:(\$)|\{(\w+)\}|(\w+))/g,
    (_, dollar?: string, braced?: string, plain?: string) => {
      const name = braced ?? plain ?? ''
      const value = /^[0-9]+$/.test(name) ? match[Number(name)] : match.groups?.[name]
      return dollar ?? value ?? ''
    },
  )
}
