import { globSync, readFileSync } from 'node:fs'

const ROOT = new URL('../../', import.meta.url).pathname

/** A fenced block of a page. */
export interface Block {
  /** From the root of the repository, e.g. `docs/how-to/dns.md` */
  readonly page: string
  /** The nearest heading above it */
  readonly heading: string
  /** What the fence says it is, e.g. `sh` */
  readonly language: string
  readonly text: string
}

/** Pages for users. */
export const pages: readonly string[] = globSync(
  ['README.md', 'docs/*.md', 'docs/how-to/*.md', 'deploy/**/*.md'],
  { cwd: ROOT },
).toSorted()

export function readPage(page: string): string {
  return readFileSync(`${ROOT}${page}`, 'utf8')
}

/** All fenced blocks of a page, in order. */
export function blocksOf(page: string): Block[] {
  const blocks: Block[] = []
  let heading = ''
  let open: { language: string; lines: string[] } | undefined
  for (const line of readPage(page).split('\n')) {
    const fence = /^ {0,3}```(\w*)$/.exec(line)
    if (open !== undefined) {
      if (fence) {
        blocks.push({ page, heading, language: open.language, text: open.lines.join('\n') + '\n' })
        open = undefined
      } else open.lines.push(line)
    } else if (fence) open = { language: fence[1] ?? '', lines: [] }
    else heading = /^#+ (.*)$/.exec(line)?.[1] ?? heading
  }
  if (open !== undefined) throw new Error(`${page}: the block under "${heading}" has no end`)
  return blocks
}

/**
 * The shell commands under a heading of a page, block by block.
 * @throws when there are none: then a test would have nothing to run
 */
export function commandsUnder(page: string, heading: string): string[] {
  const found = blocksOf(page).filter(
    (block) => block.language === 'sh' && block.heading === heading,
  )
  if (found.length === 0) throw new Error(`${page} has no commands under "${heading}"`)
  return found.map(({ text }) => text)
}
