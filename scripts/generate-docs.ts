/** Writes the table of keys in docs/configuration.md; with --check it only says whether the table is up to date. */
import { readFile, writeFile } from 'node:fs/promises'
import { configKeys } from '../src/config/schema.ts'

const PAGE = new URL('../docs/configuration.md', import.meta.url)
const BEGIN = '<!-- generated from src/config/schema.ts by scripts/generate-docs.ts: begin -->\n'
const END = '<!-- generated: end -->\n'

const rows = configKeys.map(({ name, flag, default: value, env, description }) => {
  const variable = env === undefined ? '' : ` Also by the variable \`${env}\`.`
  const cells = [
    `\`${name}\``,
    value === '' ? '' : `\`${value}\``,
    `${description}${variable}`,
    `\`${flag}\``,
  ]
  return `| ${cells.join(' | ')} |\n`
})
const table = `| key | default | meaning | flag |\n| --- | --- | --- | --- |\n${rows.join('')}`

const page = await readFile(PAGE, 'utf8')
const begin = page.indexOf(BEGIN)
const end = page.indexOf(END, begin)
if (begin < 0 || end < 0) throw new Error('docs/configuration.md has lost its markers')
const updated = `${page.slice(0, begin)}${BEGIN}\n${table}\n${page.slice(end)}`

if (!process.argv.includes('--check')) {
  await writeFile(PAGE, updated)
} else if (updated !== page) {
  console.error(
    'docs/configuration.md differs from the schema: run `scripts/run scripts/generate-docs.ts` and commit',
  )
  process.exitCode = 1
}
