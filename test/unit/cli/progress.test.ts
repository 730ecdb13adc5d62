import assert from 'node:assert/strict'
import { Writable } from 'node:stream'
import { afterEach, beforeEach, suite, test } from 'node:test'
import { createProgress, type Progress } from '../../../src/cli/progress.ts'
import { formatBytes, formatSeconds } from '../../../src/cli/text.ts'
import { until } from '../../wait.ts'

/** Keeps what is written; as a terminal also what stands on it, of which it knows just enough. */
class Screen extends Writable {
  readonly isTTY: boolean
  columns: number
  readonly rows: number
  text = ''
  lines: string[] = ['']

  constructor({ isTTY = false, columns = 80, rows = 24 } = {}) {
    super({ decodeStrings: false })
    this.isTTY = isTTY
    this.columns = columns
    this.rows = rows
  }

  override _write(chunk: string, _encoding: string, done: () => void): void {
    this.text += chunk
    // oxlint-disable no-control-regex -- what a terminal obeys
    for (const [part] of chunk.matchAll(/\u001B\[\d*[A-Za-z]|\n|[^\u001B\n]+/g)) {
      const [, count = '', letter = ''] = /^\u001B\[(\d*)([A-Za-z])$/.exec(part) ?? []
      // oxlint-enable no-control-regex
      if (letter === 'A') {
        const up = Number(count)
        assert.ok(up < this.rows, 'the cursor leaves the screen')
        this.lines = this.lines.slice(0, Math.max(0, this.lines.length - 1 - up)).concat('')
      } else if (part === '\n') this.lines.push('')
      else if (letter === '') this.lines[this.lines.length - 1] += part
    }
    done()
  }
}

function start(options: {
  quiet?: boolean
  json?: boolean
  terminal?: { columns: number; rows?: number }
}): { progress: Progress; out: Screen; err: Screen } {
  const out = new Screen()
  const err = new Screen(options.terminal && { isTTY: true, ...options.terminal })
  const { quiet = false, json = false } = options
  return { progress: createProgress({ quiet, json, out, err }), out, err }
}

suite('progress', () => {
  const kept = { ...process.env }
  beforeEach(() => {
    process.env['TERM'] = 'xterm'
    process.env['NO_COLOR'] = '1'
  })
  afterEach(() => {
    process.env = { ...kept }
  })

  for (const columns of [40, 60, 80, 132])
    test(`on a terminal of ${columns} columns no line of bars is longer`, () => {
      const { progress, err } = start({ terminal: { columns } })
      const bars = [1, 2, 3].map((index) => progress.bar(`b layer ${index}/3`, 24e6))
      for (const [index, bar] of bars.entries()) {
        bar.from('node-with-a-long-name.example.com')
        bar.add(8e6 * (index + 1))
      }
      progress.step('a step')
      const [step, ...rows] = err.lines
      assert.equal(step, 'a step')
      assert.equal(rows.filter((row) => row !== '').length, 3)
      for (const row of rows) assert.ok(row.length <= columns, `${row.length}: ${row}`)
      assert.match(rows[0] ?? '', /^b l.*1\/3 .*(33%|8\.0 MB of 24\.0 MB).*\/s +\d+m?\w* .*node-w/)
      bars[2]?.finish()
      bars[0]?.fail('the node has gone away')
      assert.match(err.lines[1] ?? '', columns < 80 ? /^b l.*3\/3 100% / : /24\.0 MB of 24\.0 MB/)
      assert.match(err.lines[2] ?? '', /the no/)
      assert.equal(err.lines.length, 5, 'two that have ended, one that runs, one step')
      progress.close()
    })

  test('a terminal that is made narrower has nothing left of the wider lines', () => {
    const { progress, err } = start({ terminal: { columns: 80 } })
    const bar = progress.bar('layer', 10)
    bar.from('b')
    bar.add(5)
    progress.step('one')
    const [row = ''] = err.lines.slice(1)
    err.columns = 40
    const broken = Math.ceil(row.length / 40)
    err.lines.splice(1, 1, ...Array.from({ length: broken }, () => 'part of it'))
    bar.finish()
    assert.equal(err.lines.join('\n').includes('part of it'), false)
    progress.close()
  })

  test('more bars than the terminal has lines do not leave it', () => {
    const { progress, err } = start({ terminal: { columns: 80, rows: 6 } })
    const bars = Array.from({ length: 20 }, (_, index) => progress.bar(`layer ${index}`, 10))
    progress.step('one')
    assert.equal(err.lines.at(-2), 'and 16 more')
    for (const bar of bars) bar.finish()
    progress.close()
    assert.equal(err.lines.filter((line) => line.startsWith('layer ')).length, 20)
  })

  test('colours are there unless NO_COLOR is set', () => {
    const escapes = (): boolean => {
      const { progress, err } = start({ terminal: { columns: 80 } })
      progress.bar('layer', 0).finish()
      progress.close()
      return err.text.includes('\u001B[32m')
    }
    assert.equal(escapes(), false)
    delete process.env['NO_COLOR']
    assert.equal(escapes(), true)
  })

  for (const [name, terminal] of [
    ['elsewhere', undefined],
    ['on a terminal that obeys nothing', { columns: 80 }],
  ] as const)
    test(`${name} there is one line for each step and each bar, with the outcome apart`, () => {
      process.env['TERM'] = 'dumb'
      delete process.env['NO_COLOR']
      const { progress, out, err } = start({ ...(terminal && { terminal }) })
      progress.step('begins')
      const bar = progress.bar('layer \u001B[2J1/2', 2e6)
      bar.from('node-a')
      bar.add(1e6)
      bar.from('upstream')
      bar.add(1e6)
      const counted = progress.bar('image')
      counted.fromAll('node-a 1 kB')
      counted.fromAll('node-a 1 kB, node-b 2 kB')
      counted.finish()
      const other = progress.bar('layer 2/2')
      other.fail('nobody has it')
      other.finish()
      bar.finish()
      progress.result('all is well', { well: true })
      progress.close()
      assert.match(
        err.text,
        /^begins\nimage: 0 B from node-a 1 kB, node-b 2 kB in 0\.\d\d s, 0 B\/s\nlayer 2\/2: failed after 0 B: nobody has it\nlayer \?\[2J1\/2: 2\.0 MB from node-a, upstream in 0\.\d\d s, [\d.]+ \wB\/s\n$/,
      )
      assert.equal(out.text, 'all is well\n')
    })

  test('with --json everything is an object a line, with --quiet only the outcome', async () => {
    const { progress, out, err } = start({ json: true })
    const events = () =>
      out.text
        .trimEnd()
        .split('\n')
        .map((line) => JSON.parse(line) as Record<string, unknown>)
    progress.step('begins')
    const bar = progress.bar('layer')
    bar.expect(100)
    bar.add(50)
    await until(() => events().some(({ event }) => event === 'progress'))
    bar.from('node-a')
    bar.add(50)
    bar.finish()
    progress.bar('config', 1).fail('gone')
    progress.result('all is well', { well: true })
    progress.close()
    assert.deepEqual(
      // As long as the wait above has lasted, it was told again.
      events()
        .map(({ event, label, bytes, total, source, reason, well }) =>
          [event, label, bytes, total, source, reason, well].filter((each) => each !== undefined),
        )
        .filter((each, index, all) => JSON.stringify(each) !== JSON.stringify(all[index - 1])),
      [
        ['step'],
        ['progress', 'layer', 50, 100, null],
        ['done', 'layer', 100, 100, 'node-a'],
        ['failed', 'config', 0, 1, null, 'gone'],
        ['result', true],
      ],
    )
    assert.equal(err.text, '')

    for (const json of [true, false]) {
      const silent = start({ json, quiet: true, terminal: { columns: 80 } })
      silent.progress.step('begins')
      silent.progress.bar('layer', 1).finish()
      silent.progress.result('all is well', { well: true })
      assert.equal(silent.err.text, '')
      assert.equal(silent.out.text, json ? '{"event":"result","well":true}\n' : 'all is well\n')
    }
  })

  test('bytes and times have three figures', () => {
    assert.deepEqual(
      [0, 999, 999.6, 12_340, 99_960, 1e9, 123e12].map((bytes) => formatBytes(bytes)),
      ['0 B', '999 B', '1.0 kB', '12.3 kB', '100 kB', '1.0 GB', '123 TB'],
    )
    assert.deepEqual(
      [0, 0.2, 59.5, 65, 3599.5, 3720, 1e9].map((seconds) => formatSeconds(seconds)),
      ['0s', '1s', '1m00s', '1m05s', '1h00m', '1h02m', '>99h'],
    )
  })
})
