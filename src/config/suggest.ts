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

/** Damerau's: how many letters must be changed, put in, taken out, or exchanged with the next one. */
function distance(a: string, b: string): number {
  let before: number[] = []
  let row = Array.from({ length: b.length + 1 }, (_, index) => index)
  for (let i = 0; i < a.length; i++) {
    const next = [i + 1]
    for (let j = 0; j < b.length; j++) {
      const kept = (row[j] ?? 0) + (a[i] === b[j] ? 0 : 1)
      const exchanged = i > 0 && j > 0 && a[i] === b[j - 1] && a[i - 1] === b[j]
      const other = exchanged ? (before[j - 1] ?? 0) + 1 : Infinity
      next.push(Math.min(kept, other, (row[j + 1] ?? 0) + 1, (next[j] ?? 0) + 1))
    }
    before = row
    row = next
  }
  return row[b.length] ?? 0
}
