/** Who keeps the list for `key`: of `ids` the same one, whoever asks (rendezvous hashing). Undefined for none. */
export function winner(key: string, ids: Iterable<string>): string | undefined {
  let best: string | undefined
  let highest = -1
  for (const id of ids) {
    const score = hash(key, id)
    if (score < highest || (score === highest && best !== undefined && id > best)) continue
    highest = score
    best = id
  }
  return best
}

/** FNV-1a with a finalizer, 32 bits: short texts that differ in one place end far from each other. */
export function hash(...texts: readonly string[]): number {
  let value = 0x811c9dc5
  for (const text of texts) {
    for (let index = 0; index < text.length; index += 1) {
      value ^= text.charCodeAt(index)
      value = Math.imul(value, 0x01000193)
    }
  }
  value ^= value >>> 16
  value = Math.imul(value, 0x85ebca6b)
  value ^= value >>> 13
  value = Math.imul(value, 0xc2b2ae35)
  return (value ^ (value >>> 16)) >>> 0
}
