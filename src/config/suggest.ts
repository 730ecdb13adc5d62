/** The candidate that was probably meant by a misspelt word, if one is near: up to a third of its letters differ. */
export function nearest(word: string, candidates: readonly string[]): string | undefined {
  const wanted = word.toLowerCase()
  const [best] = candidates
    .map((candidate) => ({ candidate, distance: distance(candidate.toLowerCase(), wanted) }))
    .toSorted((a, b) => a.distance - b.distance)
  // Of a path such as `limits.requests` only the last name can be misspelt by much
  const letters = wanted.length - wanted.lastIndexOf('.') - 1
  if (best === undefined || best.distance > Math.max(1, Math.floor(letters / 3))) return undefined
  return best.candidate
}

/** Levenshtein's: how many letters must be changed, put in or taken out. */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, index) => index)
  for (const [i, letter] of Array.from(a).entries()) {
    const next = [i + 1]
    for (const [j, other] of Array.from(b).entries()) {
      const kept = (row[j] ?? 0) + (letter === other ? 0 : 1)
      next.push(Math.min(kept, (row[j + 1] ?? 0) + 1, (next[j] ?? 0) + 1))
    }
    row = next
  }
  return row[b.length] ?? 0
}
