import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { unifiedDiff } from '../../../src/mirror/diff.ts'

suite('a unified diff', () => {
  test('is empty where nothing changes', () => {
    assert.equal(unifiedDiff('f', 'a\n', 'a\n'), '')
    assert.equal(unifiedDiff('f', undefined, undefined), '')
  })

  test('shows three lines around the change', () => {
    const before = ['1', '2', '3', '4', '5', '6', '7', '8', ''].join('\n')
    assert.equal(
      unifiedDiff('/f', before, before.replace('5\n', 'five\nand more\n')),
      '--- /f\n+++ /f\n@@ -2,7 +2,8 @@\n 2\n 3\n 4\n-5\n+five\n+and more\n 6\n 7\n 8\n',
    )
  })

  test('shows a file that is new or gone', () => {
    assert.equal(
      unifiedDiff('/f', undefined, 'a\n'),
      '--- /dev/null\n+++ /f\n@@ -0,0 +1,1 @@\n+a\n',
    )
    assert.equal(
      unifiedDiff('/f', 'a\n', undefined),
      '--- /f\n+++ /dev/null\n@@ -1,1 +0,0 @@\n-a\n',
    )
  })

  test('is one that patch takes', (t) => {
    const directory = mkdtempSync(join(tmpdir(), 'shoal-diff-'))
    t.after(() => rmSync(directory, { recursive: true }))
    const file = join(directory, 'f')
    try {
      execFileSync('patch', ['--version'], { stdio: 'ignore' })
    } catch {
      t.skip('needs patch')
      return
    }
    for (const [before, after] of [
      ['a\nb\n', 'a\nx\nb\n'],
      ['a', 'a\nb'],
      ['a\nb\nc\nd\ne\nf\n', 'a\nb\nc\nd\ne\nf\ng\n'],
      ['a\n', 'a'],
    ] as const) {
      writeFileSync(file, before)
      execFileSync('patch', ['-s', file], { input: unifiedDiff(file, before, after) })
      assert.equal(readFileSync(file, 'utf8'), after)
    }
  })
})
