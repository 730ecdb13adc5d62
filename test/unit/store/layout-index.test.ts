import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { digestOf } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { tagName } from '../../../src/oci/reference.ts'
import { LayoutIndex, LayoutIndexInvalidError } from '../../../src/store/layout/layout-index.ts'

const seed = 20_261
const REF_NAME = 'org.opencontainers.image.ref.name'
const CONTAINERD_NAME = 'io.containerd.image.name'

function descriptor(text: string) {
  return { mediaType: MEDIA_TYPE.ociManifest, digest: digestOf(text), size: text.length }
}

function named(name: string) {
  return tagName('shoal.test', 'team/app', name)
}

function parse(manifests: readonly unknown[]): LayoutIndex {
  return LayoutIndex.parse(JSON.stringify({ schemaVersion: 2, manifests }))
}

function tagsOf(index: LayoutIndex): Record<string, string> {
  return Object.fromEntries([...index.tags].map(([tag, entry]) => [tag, entry.descriptor.digest]))
}

suite('index.json', () => {
  const names: readonly [string, Record<string, unknown>, string | undefined][] = [
    ['a full name in ref.name', { [REF_NAME]: 'a.test/b:1' }, 'a.test/b:1'],
    ['a full name in containerd.name', { [CONTAINERD_NAME]: 'a.test/b:1' }, 'a.test/b:1'],
    [
      'as containerd exports it: a full name, and the tag alone',
      { [CONTAINERD_NAME]: 'a.test/b:1', [REF_NAME]: '1' },
      'a.test/b:1',
    ],
    ['a tag alone', { [REF_NAME]: 'latest' }, undefined],
    ['no registry', { [REF_NAME]: 'library/alpine:3' }, undefined],
    ['no tag', { [REF_NAME]: 'a.test/b' }, undefined],
    ['a tag and a digest', { [REF_NAME]: `a.test/b:1@${digestOf('')}` }, undefined],
    ['a path', { [REF_NAME]: 'a.test/../b:1' }, undefined],
    ['no text', { [REF_NAME]: 7 }, undefined],
    ['nothing', {}, undefined],
  ]
  for (const [what, annotations, tag] of names) {
    test(`an entry with ${what} has ${tag === undefined ? 'no tag' : 'its tag'}`, () => {
      const index = parse([{ ...descriptor('x'), annotations }])
      assert.deepEqual(tagsOf(index), tag === undefined ? {} : { [tag]: digestOf('x') })
      assert.equal(index.entries.length, 1, 'it begins an image all the same')
    })
  }

  test('the last of two entries with one name counts, ref.name before containerd.name', () => {
    const tag = named('1')
    const entry = (text: string, name: string) => ({
      ...descriptor(text),
      annotations: { [name]: tag },
    })
    const twice = parse([entry('a', REF_NAME), entry('b', REF_NAME)])
    assert.deepEqual(tagsOf(twice), { [tag]: digestOf('b') })
    // What skopeo leaves when it moves a tag to an entry that stands earlier in the list.
    const moved = parse([entry('a', REF_NAME), entry('b', CONTAINERD_NAME)])
    assert.deepEqual(tagsOf(moved), { [tag]: digestOf('a') })
  })

  test('a tag that moves leaves nothing of its own, and the other names of the entry', () => {
    const other = named('other')
    const index = parse([
      { ...descriptor('a'), annotations: { [REF_NAME]: named('1'), [CONTAINERD_NAME]: other } },
      {
        ...descriptor('b'),
        annotations: { [REF_NAME]: named('1'), [CONTAINERD_NAME]: named('1') },
      },
      { ...descriptor('c'), annotations: { [REF_NAME]: '1', [CONTAINERD_NAME]: named('1') } },
    ]).withTag(named('1'), descriptor('d'), { pulled: false })
    assert.deepEqual(tagsOf(index), { [named('1')]: digestOf('d'), [other]: digestOf('a') })
    assert.deepEqual(
      index.entries.map((entry) => entry.json['annotations']),
      [
        { [CONTAINERD_NAME]: other },
        { [REF_NAME]: '1' },
        { [REF_NAME]: named('1'), [CONTAINERD_NAME]: named('1') },
      ],
    )
  })

  test('a tag that is there already changes nothing', () => {
    const annotations = { [REF_NAME]: named('1'), by: 'hand' }
    const index = parse([{ ...descriptor('a'), annotations }])
    assert.equal(index.withTag(named('1'), descriptor('a'), { pulled: false }), index)
    assert.equal(index.withTag(named('1'), descriptor('a'), { pulled: true }), index)
  })

  test('what was pulled becomes kept by a push of the same, and not the other way round', () => {
    const tag = named('1')
    const pulled = LayoutIndex.EMPTY.withTag(tag, descriptor('a'), { pulled: true })
    assert.equal(pulled.tags.get(tag)?.pulled, true)
    assert.equal(pulled.withTag(tag, descriptor('a'), { pulled: true }), pulled)
    const pushed = pulled.withTag(tag, descriptor('a'), { pulled: false })
    assert.equal(pushed.tags.get(tag)?.pulled, false)
    assert.equal(pushed.entries.length, 1)
    assert.equal(pushed.withTag(tag, descriptor('a'), { pulled: true }), pushed)
  })

  test('anything is either an index, whose foreign parts stay, or refused', () => {
    const entry = fc.oneof(
      fc.json().map((text): unknown => JSON.parse(text)),
      fc.record({
        mediaType: fc.string(),
        digest: fc.oneof(fc.string(), fc.string().map(digestOf)),
        size: fc.oneof(fc.nat(), fc.double(), fc.string()),
        annotations: fc.oneof(
          fc.dictionary(fc.string(), fc.jsonValue()),
          fc.record({ [REF_NAME]: fc.oneof(fc.string(), fc.constant('a.test/b:1')) }),
          fc.jsonValue(),
        ),
      }),
    )
    fc.assert(
      fc.property(fc.array(entry), fc.dictionary(fc.string(), fc.jsonValue()), (list, rest) => {
        const text = JSON.stringify({ ...rest, manifests: list })
        const manifests = (JSON.parse(text) as { manifests: unknown[] }).manifests
        const tag = tagName('shoal.test', 'not/among-them', 'v1')
        const index = LayoutIndex.parse(text).withTag(tag, descriptor('new'), { pulled: false })
        const again = LayoutIndex.parse(index.toString())
        assert.deepEqual(tagsOf(again), tagsOf(index))
        assert.equal(again.tags.get(tag)?.descriptor.digest, digestOf('new'))
        const written = JSON.parse(index.toString()) as { manifests: unknown[] }
        assert.deepEqual(written.manifests.slice(0, -1), manifests)
        const without = again.withoutEntries(new Set(again.entries.slice(-1)))
        assert.deepEqual(JSON.parse(without.toString()), JSON.parse(text))
      }),
      { seed },
    )
    fc.assert(
      fc.property(fc.oneof(fc.json(), fc.string()), (text) => {
        try {
          LayoutIndex.parse(text)
        } catch (error) {
          assert(error instanceof LayoutIndexInvalidError)
        }
      }),
      { seed },
    )
  })
})
