import assert from 'node:assert/strict'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { Ingests } from '../../../src/store/containerd/ingests.ts'

test('what is being received is found by its name, which is read once', async (t) => {
  const content = await mkdtemp(join(tmpdir(), 'shoal-ingests-'))
  t.after(() => rm(content, { recursive: true, force: true }))
  const [digest, other] = [digestOf(Buffer.from('a')), digestOf(Buffer.from('b'))]
  const ingests = new Ingests()
  const names = async (of = digest) =>
    (await ingests.of(of, content)).map(({ name }) => name).toSorted()
  assert.deepEqual(await names(), [])
  const begin = async (id: string, ref?: string) => {
    const directory = join(content, 'ingest', id)
    await mkdir(directory, { recursive: true })
    await writeFile(join(directory, 'data'), 'x')
    if (ref !== undefined) await writeFile(join(directory, 'ref'), ref)
  }
  await begin('1')
  await begin('2', `k8s.io/2/layer-${digest}`)
  await begin('3', `k8s.io/3/layer-${other}`)
  assert.deepEqual(await names(), [`k8s.io/2/layer-${digest}`])
  await begin('1', `k8s.io/1/layer-${digest}`)
  assert.deepEqual(await names(), [`k8s.io/1/layer-${digest}`, `k8s.io/2/layer-${digest}`])
  // Nobody ever does that to one that is there; it shows that nothing more is read.
  for (const id of ['1', '2', '3']) await rm(join(content, 'ingest', id, 'ref'))
  assert.deepEqual(await names(), [`k8s.io/1/layer-${digest}`, `k8s.io/2/layer-${digest}`])
  assert.deepEqual(await names(other), [`k8s.io/3/layer-${other}`])
  await rm(join(content, 'ingest', '2'), { recursive: true })
  assert.deepEqual(await names(), [`k8s.io/1/layer-${digest}`])
  await rm(join(content, 'ingest', '1'), { recursive: true })
  assert.deepEqual(await names(), [])
  await begin('1')
  assert.deepEqual(await names(), [], 'what is gone is forgotten')
})

test('of more than a number of them the others are not looked at', async (t) => {
  const content = await mkdtemp(join(tmpdir(), 'shoal-ingests-'))
  t.after(() => rm(content, { recursive: true, force: true }))
  const digest = digestOf(Buffer.from('a'))
  for (const id of ['1', '2', '3', '4', '5']) {
    const directory = join(content, 'ingest', id)
    await mkdir(directory, { recursive: true })
    await writeFile(join(directory, 'ref'), `k8s.io/${id}/layer-${digest}`)
    await writeFile(join(directory, 'data'), 'x')
  }
  assert.equal((await new Ingests({ most: 3 }).of(digest, content)).length, 3)
  assert.equal((await new Ingests().of(digest, content)).length, 5)
})
