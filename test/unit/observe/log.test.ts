import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { closeSync, constants, openSync, readSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { createLogger } from '../../../src/observe/log.ts'
import { hasCode } from '../../../src/system-error.ts'
import { until } from '../../wait.ts'

suite('the log', () => {
  test('has no more lines than it may, and tells how many were left out', async (t) => {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-log-'))
    t.after(() => rm(directory, { recursive: true }))
    const file = join(directory, 'log')
    const destination = openSync(file, 'w')
    const log = createLogger({ level: 'info', destination, maxLines: 20 })
    const child = log.child({ component: 'test' })
    const said = async () => {
      const lines = (await readFile(file, 'utf8')).split('\n').filter((line) => line !== '')
      return lines.map((line) => JSON.parse(line) as { msg: string; lines?: number })
    }
    const TRIED = 5000
    for (let index = 0; index < TRIED; index += 1) child.warn({ index }, 'flood')
    // Lines below the level cost nothing.
    for (let index = 0; index < TRIED; index += 1) child.debug('not said')
    await until(
      async () => {
        log.info('afterwards')
        return (await said()).some(({ msg }) => msg === 'afterwards')
      },
      { what: 'there is room again' },
    )
    const lines = await said()
    const written = lines.filter(({ msg }) => msg === 'flood').length
    assert.ok(written >= 100 && written < 1000, `${written} lines`)
    const tried = lines.findIndex(({ msg }) => msg === 'afterwards')
    const { msg, lines: leftOut = 0 } = lines[tried - 1] ?? { msg: '' }
    assert.equal(msg, 'lines of the log were left out')
    assert.ok(leftOut >= TRIED - written, `${leftOut} of ${TRIED}`)
  })

  test('is whole, and in order, when its reader is slow and nothing more is logged', async (t) => {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-log-'))
    t.after(() => rm(directory, { recursive: true }))
    const pipe = join(directory, 'pipe')
    execFileSync('mkfifo', [pipe])
    const reader = openSync(pipe, constants.O_RDONLY | constants.O_NONBLOCK)
    t.after(() => closeSync(reader))
    const log = createLogger({ level: 'info', destination: openSync(pipe, 'w') })
    const LINES = 5000
    // More than a pipe holds, some of it while another thread writes
    for (let index = 0; index < LINES; index += 1) {
      log.info({ index }, 'a line')
      if (index % 100 === 0) await nextTurn()
    }
    const buffer = Buffer.alloc(64 * 1024)
    let text = ''
    await until(
      () => {
        try {
          text += buffer.toString('latin1', 0, readSync(reader, buffer))
        } catch (error) {
          // There is nothing at the moment
          if (!hasCode(error, 'EAGAIN')) throw error
        }
        return text.split('\n').length > LINES
      },
      { what: 'all lines have come' },
    )
    const indexes = text
      .split('\n', LINES)
      .map((line) => (JSON.parse(line) as { index: number }).index)
    assert.deepEqual(
      indexes,
      Array.from(indexes, (_, index) => index),
    )
  })
})
