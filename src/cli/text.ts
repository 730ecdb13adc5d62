/** Names come from other nodes and from files, and a terminal obeys what is not text. */
export function printable(text: string): string {
  return text.replaceAll(/\p{C}/gu, '?')
}

/** Bytes for people, in units of 1000: `12.3 MB`. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB']
  let value = bytes
  let unit = 0
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000
    unit += 1
  }
  return `${unit === 0 || value >= 99.95 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`
}

/** A time for people: `8s`, `2m05s`, `1h02m`. */
export function formatSeconds(seconds: number): string {
  const whole = Math.ceil(seconds)
  if (whole < 60) return `${whole}s`
  const [large, small, units] =
    whole < 3600
      ? [Math.floor(whole / 60), whole % 60, 'ms']
      : [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), 'hm']
  if (large > 99) return '>99h'
  return `${large}${units[0]}${String(small).padStart(2, '0')}${units[1]}`
}

/** Breaks between words, and within one only where it is longer than a line. */
export function wrap(text: string, width: number): string[] {
  const lines: string[] = []
  let line = ''
  for (const word of text
    .split(' ')
    .flatMap((each) => each.match(new RegExp(`.{1,${width}}`, 'g')) ?? [''])) {
    if (line !== '' && line.length + 1 + word.length > width) {
      lines.push(line)
      line = word
    } else line = line === '' ? word : `${line} ${word}`
  }
  return [...lines, line]
}

/** The first row is the heading; columns are as wide as what is in them. */
export function table(rows: readonly (readonly string[])[]): string {
  const widths = (rows[0] ?? []).map((_, column) =>
    Math.max(...rows.map((row) => row[column]?.length ?? 0)),
  )
  return rows
    .map((row) =>
      row
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join('   ')
        .trimEnd(),
    )
    .join('\n')
}
