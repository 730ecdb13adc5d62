import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { suite, test } from 'node:test'
import type { Command } from 'commander'
import { parseAllDocuments } from 'yaml'
import manifest from '../package.json' with { type: 'json' }
import { createProgram } from '../src/cli/program.ts'
import { blocksOf, pages, readPage } from './harness/docs.ts'

const ROOT = new URL('../', import.meta.url).pathname

/**
 * Where the commands of each page are run. What they need and a test has not got (an API server) is a stand-in there that
 * notes how it was called.
 */
const RUN_IN: Readonly<Record<string, Readonly<Record<string, string>>>> = {
  'README.md': {
    Shoal: 'ci',
    'A node in a minute': 'test/cluster/install.test.ts',
    'A node with vanilla containerd, by hand': 'test/cluster/readme.test.ts',
    'A K3s node, by hand': 'test/cluster/readme.test.ts',
    'Keep strangers out': 'test/cluster/docs.test.ts',
    'A private registry with no registry server': 'test/cluster/docs.test.ts',
    'Is it working?': 'test/cluster/readme.test.ts',
  },
  'docs/quick-start.md': {
    K3s: 'test/cluster/docs.test.ts',
    'Any host with containerd': 'test/cluster/docs.test.ts',
    'Kubernetes, with Helm': 'test/cluster/docs.test.ts',
    'A laptop': 'test/cluster/docs.test.ts',
  },
  'docs/how-to/air-gap.md': {
    'K3s without internet': 'test/cluster/image.test.ts',
    'What is shared': 'test/cluster/image.test.ts',
    'As a service': 'test/cluster/image.test.ts',
    'As pods': 'test/cluster/image.test.ts',
    'Your images': 'test/cluster/image.test.ts',
  },
  'docs/how-to/digests.md': { 'Digests instead of tags': 'test/cluster/docs.test.ts' },
  'docs/how-to/dns.md': {
    'Nodes by name': 'test/cluster/docs.test.ts',
    'One domain elsewhere': 'test/cluster/docs.test.ts',
  },
  'docs/how-to/insecure-registries.md': {
    'Registries without TLS, or with a certificate of their own': 'test/cluster/docs.test.ts',
  },
  'docs/how-to/metered-uplink.md': { 'A thin or metered uplink': 'test/cluster/docs.test.ts' },
  'docs/how-to/private-images.md': {
    'Shoal goes to the registry with a login': 'test/cluster/docs.test.ts',
    'Only those who may': 'test/cluster/docs.test.ts',
  },
  'docs/how-to/push-from-ci.md': {
    'On a node': 'test/cluster/docs.test.ts',
    'From other machines': 'test/cluster/docs.test.ts',
  },
  'docs/how-to/replace-a-registry.md': {
    'Copy what it has': 'test/cluster/docs.test.ts',
    'Keep the name': 'test/cluster/docs.test.ts',
  },
  'docs/upgrade.md': { Upgrading: 'test/cluster/docs.test.ts' },
  'docs/how-to/verify.md': {
    'containerd asks Shoal': 'test/cluster/docs.test.ts',
    'A pull comes from a peer': 'test/cluster/docs.test.ts',
    'What this node has': 'test/cluster/docs.test.ts',
  },
}

suite('documents for users', () => {
  test('all their commands are run somewhere, and nothing is said to be that is not', () => {
    const found = new Map<string, Set<string>>()
    for (const block of pages.flatMap(blocksOf)) {
      if (block.language !== 'sh') continue
      const headings = found.get(block.page) ?? new Set()
      found.set(block.page, headings.add(block.heading))
    }
    const listed = Object.entries(RUN_IN).map(
      ([page, headings]) => [page, new Set(Object.keys(headings))] as const,
    )
    assert.deepEqual(found, new Map(listed))
    for (const [page, headings] of Object.entries(RUN_IN))
      for (const [heading, file] of Object.entries(headings)) {
        if (file === 'ci') continue
        const source = readFileSync(join(ROOT, file), 'utf8')
        const known = source.includes(heading) || source.includes('INSTALL')
        assert.ok(known, `${file} does not run what is under "${heading}" in ${page}`)
      }
  })

  for (const page of pages) {
    const blocks = blocksOf(page)
    if (blocks.length === 0) continue
    test(`${page}: blocks can be read, and name commands, flags and scripts that exist`, () => {
      for (const { language, text } of blocks) {
        if (language === 'sh') execFileSync('sh', ['-n'], { input: text })
        if (language === 'yaml')
          for (const { errors } of parseAllDocuments(text)) assert.deepEqual(errors, [])
        if (language === 'sh' || language === 'console') for (const line of lines(text)) check(line)
      }
    })
  }

  for (const page of pages)
    test(`${page}: links lead somewhere`, () => {
      const links = readPage(page).matchAll(/\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)/g)
      for (const [, path = '', anchor] of links) {
        const target = path === '' ? page : join(dirname(page), path)
        assert.ok(existsSync(join(ROOT, target)), `${page} leads to ${target}`)
        if (anchor === undefined || !target.endsWith('.md')) continue
        const anchors = [...readPage(target).matchAll(/^#+ (.*)$/gm)].map(([, heading = '']) =>
          heading
            .toLowerCase()
            .replaceAll(/[^\p{L}\p{N}\s_-]/gu, '')
            .replaceAll(/\s/g, '-'),
        )
        assert.ok(anchors.includes(anchor), `${page} leads to #${anchor} of ${target}`)
      }
    })
})

/** Lines without prompts and comments, those that are continued put together. */
function lines(text: string): string[] {
  return text
    .replaceAll('\\\n', ' ')
    .split('\n')
    .map((line) =>
      line
        .replace(/^\$ /, '')
        .replace(/(^|\s)#.*$/, '')
        .trim(),
    )
}

function check(line: string): void {
  for (const [, script = ''] of line.matchAll(/\bnpm (?:run )?(?:--silent )?([\w:-]+)/g))
    assert.ok(['test', 'start', 'ci'].includes(script) || script in manifest.scripts, line)
  for (const part of line.split(/&&|\||;|\$\(/)) {
    const words = part.trim().split(/\s+/)
    const at = words.findIndex((word) => /(^|\/)shoal$/.test(word))
    // As the program, or as what kubectl runs in a pod
    if (at === 0 || (at > 0 && words[at - 1] === '--')) checkCommand(words.slice(at + 1), line)
  }
}

function checkCommand(words: readonly string[], line: string): void {
  let command: Command = createProgram()
  let rest = [...words]
  for (;;) {
    const next = command.commands.find((each) => each.name() === rest[0])
    if (next === undefined) break
    command = next
    rest = rest.slice(1)
  }
  assert.ok(command.parent !== null || words[0]?.startsWith('-'), `no such command: ${line}`)
  for (const word of rest) {
    if (!word.startsWith('--')) continue
    const flag = word.split('=', 1)[0] ?? ''
    const known = [...command.options, ...(command.parent?.options ?? [])]
    assert.ok(known.some(({ long }) => long === flag) || flag === '--help', `${flag} in: ${line}`)
  }
}
