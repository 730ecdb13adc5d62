import assert from 'node:assert/strict'
import { mock, suite, test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { Mesh, type MeshMember } from '../../../src/routing/mesh/mesh.ts'
import { silent } from './nodes.ts'

const HOUR = 3_600_000
const TICK = 50

/** A mesh whose clock a test moves, and whose network it cuts. */
class World implements AsyncDisposable {
  now = 0
  readonly dialled: { id: string; at: number }[] = []
  readonly connected = new Set<string>()
  readonly mesh: Mesh
  /** How a dial ends */
  dial: (member: MeshMember) => Promise<void> = async () => {
    throw new Error('no route')
  }

  constructor() {
    mock.timers.enable({ apis: ['setInterval'] })
    const connect = async (member: MeshMember): Promise<void> => {
      this.dialled.push({ id: member.id, at: this.now })
      await this.dial(member)
    }
    this.mesh = new Mesh(
      { log: silent, connect, isConnected: (id) => this.connected.has(id) },
      { now: () => this.now },
    )
  }

  async pass(ms: number, step = TICK): Promise<void> {
    for (const end = this.now + ms; this.now < end;) {
      this.now += step
      mock.timers.tick(TICK)
      await nextTurn()
    }
  }

  /** From now on whoever is dialled is there. */
  heal(): void {
    this.dial = async ({ id }) => {
      this.connected.add(id)
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.mesh.stop()
    mock.timers.reset()
  }
}

function member(number: number, address = `/ip4/10.0.${number >> 8}.${number & 255}/tcp/5002`) {
  return { id: `node-${number}`, addresses: [address] }
}

suite('mesh: nodes that went without goodbye', () => {
  test('are found again within seconds after hours', async () => {
    await using world = new World()
    await world.mesh.start()
    for (const number of [1, 2, 3]) world.mesh.lost(member(number))
    await world.pass(20 * HOUR, 1000)
    world.heal()
    await world.pass(6000)
    assert.equal(world.connected.size, 3)
    assert.equal(world.mesh.unsettled, false)
  })

  test('cost two dials a second however many they are, and each gets its turn', async () => {
    await using world = new World()
    await world.mesh.start()
    for (let number = 0; number < 400; number += 1) world.mesh.lost(member(number))
    await world.pass(20_000)
    const before = world.dialled.length
    await world.pass(300_000)
    const turns = world.dialled.slice(before)
    assert.ok(turns.length < 700, `${turns.length} dials in 300 s`)
    assert.equal(new Set(turns.map(({ id }) => id)).size, 400)
  })

  test('one that comes back brings the others at once', async () => {
    await using world = new World()
    await world.mesh.start()
    const members = Array.from({ length: 400 }, (_, number) => member(number))
    for (const each of members) world.mesh.lost(each)
    await world.pass(HOUR, 500)
    world.heal()
    await world.pass(1000)
    assert.ok(world.connected.size > 0)
    assert.ok(world.connected.size < 10)
    for (const each of members) world.mesh.hear(each, 'hello')
    await world.pass(3000)
    assert.equal(world.connected.size, 400)
  })

  test('are forgotten after a day, or when they say goodbye elsewhere', async () => {
    await using world = new World()
    await world.mesh.start()
    world.mesh.lost(member(1))
    world.mesh.lost(member(2))
    world.mesh.forget(member(2).id)
    await world.pass(25 * HOUR, 60_000)
    const before = world.dialled.length
    await world.pass(60_000)
    assert.equal(world.dialled.length, before)
    assert.deepEqual(new Set(world.dialled.map(({ id }) => id)), new Set(['node-1']))
  })
})

suite('mesh: nodes heard of', () => {
  test('a miss is uncertain until each of them has answered or failed to', async () => {
    await using world = new World()
    await world.mesh.start()
    assert.equal(world.mesh.unsettled, false)
    world.mesh.hear(member(1), 'hello')
    assert.equal(world.mesh.unsettled, true)
    await world.pass(200)
    assert.equal(world.mesh.unsettled, false)
    world.mesh.hear(member(1), 'discovery')
    assert.equal(world.mesh.unsettled, false, 'an old rumour is no news')
    await world.pass(1500)
    world.mesh.hear(member(1), 'hello')
    assert.equal(world.mesh.unsettled, true, 'somebody is connected with it')
    world.heal()
    await world.pass(200)
    assert.equal(world.mesh.unsettled, false)
    assert.ok(world.connected.has('node-1'))
  })

  test('one that is connected and never says hello is none', async () => {
    await using world = new World()
    await world.mesh.start()
    world.dial = async () => {}
    world.mesh.hear(member(1), 'hello')
    await world.pass(500)
    assert.equal(world.mesh.unsettled, true)
    await world.pass(1500)
    assert.equal(world.mesh.unsettled, false)
    await world.pass(60_000)
    assert.ok(world.dialled.length < 8, `${world.dialled.length} dials`)
  })

  test('thousands at one address cost a few tries, and do not hide who was lost there', async () => {
    await using world = new World()
    await world.mesh.start()
    const address = '/ip4/10.0.0.1/tcp/5002'
    for (let number = 0; number < 5000; number += 1) {
      world.mesh.hear(member(number, address), number % 2 === 0 ? 'hello' : 'discovery')
    }
    world.mesh.lost(member(5000, address))
    await world.pass(5000)
    const ids = new Set(world.dialled.map(({ id }) => id))
    assert.ok(ids.has('node-5000'))
    assert.ok(ids.size <= 5 && world.dialled.length <= 12, `${world.dialled.length} dials`)
  })

  test('garbage is not dialled, and thousands of plausible ones leave room for the true', async () => {
    await using world = new World()
    await world.mesh.start()
    const addresses = ['', '/', '/dns4/localhost/tcp/80', '/ip4/10.0.0.1/udp/1', '/ip4/1.1.1.1']
    for (let number = 0; number < 1000; number += 1) {
      world.mesh.hear({ id: `garbage-${number}`, addresses }, 'hello')
    }
    assert.equal(world.mesh.unsettled, false)
    for (let number = 0; number < 5000; number += 1) world.mesh.hear(member(number), 'hello')
    world.mesh.lost(member(6000))
    await world.pass(30_000)
    assert.ok(world.dialled.some(({ id }) => id === 'node-6000'))
    assert.ok(!world.dialled.some(({ id }) => id.startsWith('garbage')))
    assert.ok(new Set(world.dialled.map(({ id }) => id)).size <= 2048)
    await world.pass(600_000, 500)
    const before = world.dialled.length
    await world.pass(60_000)
    const rest = world.dialled.slice(before)
    assert.deepEqual(new Set(rest.map(({ id }) => id)), new Set(['node-6000']))
  })
})
