/** Writes what is generated in docs/; with --check it only says whether they are up to date. */
import { globSync, readFileSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import type { Command } from 'commander'
import { z } from 'zod'
import { remedyFor } from '../src/cli/failure.ts'
import { createProgram } from '../src/cli/program.ts'
import { configKeys, configSchema } from '../src/config/schema.ts'
import { metricsOfANode } from './metrics-of-a-node.ts'

const ROOT = new URL('../', import.meta.url).pathname
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

const metrics = (await metricsOfANode()).map(({ name, type, help, labels }) => {
  const cells = [`\`${name}\``, type, labels.map((label) => `\`${label}\``).join(', '), help]
  return `| ${cells.join(' | ')} |\n`
})
const metricsTable = `| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n${metrics.join('')}`

/** Help texts as a terminal of a usual width shows them, without the flags of configuration keys, which have a table of their own. */
const commands = (function describe(command: Command, above: string): string {
  const name = `${above}${command.name()}`
  const keys = new Set(configKeys.map(({ flag }) => flag))
  command.configureHelp({
    helpWidth: 100,
    visibleOptions: ({ options }) => options.filter(({ long }) => !keys.has(long ?? '')),
  })
  const own = command.commands.length > 0 && above === '' ? '#' : '##'
  const text = `#${own} ${name}\n\n\`\`\`text\n${command.helpInformation().trimEnd()}\n\`\`\`\n\n`
  return text + command.commands.map((each) => describe(each, `${name} `)).join('')
})(createProgram(), '')

/** Error classes with their codes, and what the source says of them. */
const CLASS =
  /\/\*\*((?:(?!\*\/)[^])*)\*\/\n(?:export )?class \w+ extends Error \{(?:(?!\n\})[^])*?code = '(ERR_\w+)'/g
const errors = globSync('**/*.ts', { cwd: `${ROOT}src`, exclude: ['**/gen/**'] })
  .toSorted()
  .flatMap((file) =>
    [...readFileSync(`${ROOT}src/${file}`, 'utf8').matchAll(CLASS)].map(
      ([, comment = '', code = '']) => {
        const words = comment
          .replaceAll(/\s*\n?\s*\*\s+/g, ' ')
          .replaceAll(/\{@link ([^}]+)\}/g, '`$1`')
        return { code, file, words: words.replaceAll('|', '\\|').trim() }
      },
    ),
  )
  .toSorted((a, b) => (a.code < b.code ? -1 : 1))
  .map(({ code, file, words }) => {
    const remedy = remedyFor(Object.assign(new Error(''), { code })) ?? ''
    return `| \`${code}\` | ${words} | ${remedy} | \`${file}\` |\n`
  })
const errorTable = `| code | meaning | what to do | in |\n| --- | --- | --- | --- |\n${errors.join('')}`

/** What Helm checks `config` by, so that a typing mistake is found before any node has it. */
const values = 'deploy/helm/shoal/values.schema.json'
const valuesSchema: { definitions: { config: JsonSchema } } = JSON.parse(
  readFileSync(`${ROOT}${values}`, 'utf8'),
)
interface JsonSchema {
  default?: unknown
  description?: string
  properties?: Record<string, JsonSchema>
}
valuesSchema.definitions.config = (function describe(schema: JsonSchema, above: string) {
  // Helm's values say what they are; what is left out is the daemon's to choose.
  delete schema.default
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const key = `${above}${name}`
    const description = configKeys.find((each) => each.name === key)?.description
    if (description !== undefined) field.description = description
    describe(field, `${key}.`)
  }
  return schema
})(z.toJSONSchema(configSchema, { io: 'input', unrepresentable: 'any' }) as JsonSchema, '')
delete (valuesSchema.definitions.config as { $schema?: string }).$schema
await settle(values, `${JSON.stringify(valuesSchema, null, 2)}\n`, 'src/config/schema.ts')

for (const [name, source, text] of [
  ['configuration.md', 'src/config/schema.ts', table],
  ['metrics.md', 'a running node', metricsTable],
  ['cli.md', 'src/cli', commands],
  ['errors.md', 'src', errorTable],
] as const) {
  const first = `<!-- generated from ${source} by scripts/generate-docs.ts: begin -->\n`
  const page = readFileSync(`${ROOT}docs/${name}`, 'utf8')
  const begin = page.indexOf(first)
  const end = page.indexOf(END, begin)
  if (begin < 0 || end < 0) throw new Error(`docs/${name} has lost its markers`)
  const updated = `${page.slice(0, begin)}${first}\n${text}\n${page.slice(end)}`
  await settle(`docs/${name}`, updated, source)
}

/** Writes a file, or says that it is not as it should be. */
async function settle(path: string, text: string, source: string): Promise<void> {
  if (readFileSync(`${ROOT}${path}`, 'utf8') === text) return
  if (!process.argv.includes('--check')) return writeFile(`${ROOT}${path}`, text)
  console.error(
    `${path} differs from ${source}: run \`scripts/run scripts/generate-docs.ts\` and commit`,
  )
  process.exitCode = 1
}
