import assert from 'node:assert/strict'
import { afterEach, test } from 'node:test'
import { IdleMemory, releaseMemory, type Use } from '../../../src/daemon/idle-memory.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { until } from '../../wait.ts'

const MIB = 1024 * 1024
const log = createLogger({ level: 'silent' })

/** A process that uses `cpu` seconds of CPU between two looks. */
class Process {
  resident = 100 * MIB
  cpu = 0
  looks = 0
  released: number[] = []
  #cpuSeconds = 0
  readonly idle = new IdleMemory(
    {
      log,
      use: (): Use => {
        this.looks += 1
        return { resident: this.resident, cpuSeconds: (this.#cpuSeconds += this.cpu) }
      },
      release: async () => {
        this.released.push(this.resident)
        this.resident -= 15 * MIB
      },
    },
    { every: 10 },
  )

  /** Resolves when it was looked at so often once more. */
  async looked(times: number): Promise<void> {
    const before = this.looks
    await until(() => this.looks >= before + times, { timeoutMs: 10_000 })
  }
}

let running: Process | undefined
afterEach(() => running?.idle.stop())

test('memory is given back at rest, and again only when it has grown, or something has ended', async () => {
  running = new Process()
  await running.idle.start()
  await running.looked(10)
  assert.deepEqual(running.released, [100 * MIB])
  running.resident += 3 * MIB
  await running.looked(10)
  assert.equal(running.released.length, 1)
  running.resident += 2 * MIB
  await running.looked(10)
  assert.deepEqual(running.released, [100 * MIB, 90 * MIB])
  running.resident -= 5 * MIB
  await running.looked(10)
  assert.deepEqual(running.released, [100 * MIB, 90 * MIB, 70 * MIB])
})

test('after that it is left alone for some looks, however much it grows', async () => {
  const times: number[] = []
  let calls = 0
  const idle = new IdleMemory(
    {
      log,
      use: () => ({ resident: 100 * MIB * (calls += 1), cpuSeconds: 0 }),
      release: async () => void times.push(calls),
    },
    { every: 5 },
  )
  await idle.start()
  await until(() => times.length >= 3, { timeoutMs: 10_000 })
  await idle.stop()
  // One look after it, and five more
  assert.ok(times.every((time, index) => index === 0 || time - (times[index - 1] ?? 0) === 6))
})

test('nothing is done while the node works', async () => {
  running = new Process()
  // A fifth of a core
  running.cpu = 0.002
  await running.idle.start()
  await running.looked(5)
  assert.deepEqual(running.released, [])
  running.cpu = 0
  await running.looked(5)
  assert.equal(running.released.length, 1)
})

test('when it is stopped it looks no more, and what goes wrong ends nothing', async () => {
  let failures = 0
  let looks = 0
  const use = (): Use => ({ resident: 100 * MIB * (looks += 1), cpuSeconds: 0 })
  const release = async (): Promise<void> => {
    failures += 1
    throw new Error('not today')
  }
  const idle = new IdleMemory({ log, use, release }, { every: 5 })
  await idle.start()
  await until(() => failures >= 2, { timeoutMs: 10_000 })
  await idle.stop()
  const then = looks
  await new Promise((resolve) => setTimeout(resolve, 50))
  assert.equal(looks, then)
})

test('what is garbage goes back to the system', async () => {
  const objects = Array.from({ length: 400_000 }, (_, index) => ({
    index,
    name: `object ${index}`,
  }))
  assert.equal(objects.length, 400_000)
  const before = process.memoryUsage().heapUsed
  objects.length = 0
  await releaseMemory()
  assert.ok(process.memoryUsage().heapUsed < before - 20 * MIB)
})
