import assert from 'node:assert/strict'
import { openSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
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
})
