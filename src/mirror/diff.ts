/** Lines that stay as they are, shown around a change. */
const CONTEXT = 3

/**
 * The change of one file as a unified diff, empty if there is none. All from the first to the last line that differ is
 * one hunk, which is what `mirror` changes: one place.
 */
export function unifiedDiff(
  path: string,
  before: string | undefined,
  after: string | undefined,
): string {
  if (before === after) return ''
  const old = split(before ?? '')
  const now = split(after ?? '')
  let head = 0
  while (head < Math.min(old.length, now.length) && old[head] === now[head]) head++
  let tail = 0
  while (tail < Math.min(old.length, now.length) - head && old.at(-1 - tail) === now.at(-1 - tail))
    tail++

  const from = Math.max(0, head - CONTEXT)
  const oldTo = Math.min(old.length, old.length - tail + CONTEXT)
  const nowTo = Math.min(now.length, now.length - tail + CONTEXT)
  return [
    `--- ${before === undefined ? '/dev/null' : path}\n`,
    `+++ ${after === undefined ? '/dev/null' : path}\n`,
    `@@ -${span(from, oldTo)} +${span(from, nowTo)} @@\n`,
    ...old.slice(from, head).map((line) => marked(' ', line)),
    ...old.slice(head, old.length - tail).map((line) => marked('-', line)),
    ...now.slice(head, now.length - tail).map((line) => marked('+', line)),
    ...old.slice(old.length - tail, oldTo).map((line) => marked(' ', line)),
  ].join('')
}

/** Lines with their ends. */
function split(text: string): string[] {
  return text.split(/(?<=\n)/).filter((line) => line !== '')
}

function span(from: number, to: number): string {
  const count = to - from
  return `${count === 0 ? from : from + 1},${count}`
}

function marked(mark: string, line: string): string {
  return line.endsWith('\n') ? mark + line : `${mark}${line}\n\\ No newline at end of file\n`
}
