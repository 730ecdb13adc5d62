import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { buildImage, buildIndex } from '../../../src/cli/demo-image.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import {
  isManifestMediaType,
  ManifestInvalidError,
  MAX_MANIFEST_BYTES,
  mayBeManifest,
  MEDIA_TYPE,
  parseDescriptor,
  parseManifest,
  type Descriptor,
} from '../../../src/oci/manifest.ts'

const seed = 20_265

const descriptor = fc
  .record({ content: fc.string(), size: fc.maxSafeNat(), mediaType: fc.string() })
  .map(({ content, size, mediaType }): Descriptor => ({
    digest: digestOf(content),
    size,
    mediaType,
  }))
const [config, layer] = ['config', 'layer'].map((text) => ({
  digest: digestOf(text),
  size: text.length,
  mediaType: 'application/vnd.example',
}))

function parse(value: unknown) {
  return parseManifest(Buffer.from(JSON.stringify(value)))
}

suite('manifest', () => {
  test('may begin with white space and a brace, and with nothing else', () => {
    const text = JSON.stringify({ schemaVersion: 2, config, layers: [layer] })
    const beginnings = fc.string({
      unit: fc.constantFrom(' ', '\t', '\n', '\r', '{', '[', '\ufeff'),
    })
    fc.assert(
      fc.property(beginnings, fc.nat({ max: 20 }), (before, shown) => {
        const bytes = Buffer.from(before + text)
        const parsed = (() => {
          try {
            return parseManifest(bytes)
          } catch {
            return undefined
          }
        })()
        assert.ok(parsed === undefined || mayBeManifest(bytes.subarray(0, shown)))
      }),
      { seed },
    )
    for (const layerOf of [[0x1f, 0x8b, 0x08], [0x28, 0xb5, 0x2f, 0xfd], [0x5b], [0x00]])
      assert.ok(!mayBeManifest(Uint8Array.from(layerOf)))
  })

  test('gives the children as they were written, in order', () => {
    fc.assert(
      fc.property(descriptor, fc.array(descriptor), (first, others) => {
        assert.deepEqual(parse({ schemaVersion: 2, config: first, layers: others }), {
          mediaType: MEDIA_TYPE.ociManifest,
          children: [first, ...others],
        })
        assert.deepEqual(parse({ schemaVersion: 2, manifests: others }), {
          mediaType: MEDIA_TYPE.ociIndex,
          children: others,
        })
      }),
      { seed },
    )
  })

  const types: readonly [string, object, string][] = [
    ['by its shape', { config, layers: [layer] }, MEDIA_TYPE.ociManifest],
    ['by its shape, without layers', { config }, MEDIA_TYPE.ociManifest],
    ['by its shape', { manifests: [layer] }, MEDIA_TYPE.ociIndex],
    ['by its shape, when empty', { manifests: [] }, MEDIA_TYPE.ociIndex],
    ...[MEDIA_TYPE.dockerManifest, MEDIA_TYPE.ociManifest, 'application/vnd.example+json'].map(
      (mediaType): [string, object, string] => ['as written', { mediaType, config }, mediaType],
    ),
    ...[MEDIA_TYPE.dockerList, MEDIA_TYPE.ociIndex].map((mediaType): [string, object, string] => [
      'as written',
      { mediaType, manifests: [] },
      mediaType,
    ]),
  ]
  for (const [how, value, mediaType] of types) {
    test(`has its media type ${how}: ${mediaType}`, () => {
      assert.equal(parse({ schemaVersion: 2, ...value }).mediaType, mediaType)
    })
  }

  test('reads what the image builder makes', async () => {
    const image = await buildImage({ layers: [10, 20] })
    assert.deepEqual(parseManifest(image.manifest.bytes), {
      mediaType: MEDIA_TYPE.ociManifest,
      children: [image.config, ...image.layers].map((blob) => blob.descriptor),
    })
    assert.deepEqual(parseManifest(buildIndex([image]).manifest.bytes), {
      mediaType: MEDIA_TYPE.ociIndex,
      children: [{ ...image.manifest.descriptor, platform: image.platform }],
    })
  })

  test('a child without a media type is octets', () => {
    const [child] = parse({
      schemaVersion: 2,
      manifests: [{ digest: digestOf('x'), size: 1 }],
    }).children
    assert.equal(child?.mediaType, MEDIA_TYPE.octets)
  })

  const valid = { schemaVersion: 2, config, layers: [layer] }
  const invalid: readonly [string, unknown][] = [
    ['null', null],
    ['a number', 2],
    ['a text', 'manifest'],
    ['a list', [valid]],
    ['nothing in it', {}],
    ['no schemaVersion', { config, layers: [layer] }],
    ['schemaVersion 1', { ...valid, schemaVersion: 1 }],
    ['schemaVersion as text', { ...valid, schemaVersion: '2' }],
    ['neither config nor manifests', { schemaVersion: 2, layers: [layer] }],
    ['manifests that are no list', { schemaVersion: 2, manifests: { 0: layer } }],
    ['a media type that is no text', { ...valid, mediaType: 7 }],
    ['both layers and manifests', { ...valid, manifests: [layer] }],
    ['both a config and manifests', { schemaVersion: 2, config, manifests: [] }],
    ['a manifest that calls itself an index', { ...valid, mediaType: MEDIA_TYPE.ociIndex }],
    ['a manifest that calls itself a list', { ...valid, mediaType: MEDIA_TYPE.dockerList }],
    [
      'an index that calls itself a manifest',
      { schemaVersion: 2, mediaType: MEDIA_TYPE.dockerManifest, manifests: [layer] },
    ],
    ['a config that is text', { ...valid, config: digestOf('config') }],
    ['layers that are no list', { ...valid, layers: { 0: layer } }],
    ['a layer that is null', { ...valid, layers: [null] }],
    ['a layer that is a list', { ...valid, layers: [[]] }],
    ['a layer without digest', { ...valid, layers: [{ size: 1 }] }],
    ['a layer with a bad digest', { ...valid, layers: [{ ...layer, digest: 'sha256:../../x' }] }],
    ['a layer without size', { ...valid, layers: [{ digest: digestOf('x') }] }],
    ...[-1, 1.5, 2 ** 53, '1', null].map((size): [string, unknown] => [
      `a layer of size ${JSON.stringify(size)}`,
      { ...valid, layers: [{ ...layer, size }] },
    ]),
  ]
  for (const [what, value] of invalid) {
    test(`refuses ${what}`, () => {
      assert.throws(() => parse(value), ManifestInvalidError)
    })
  }

  test('refuses garbage, and nothing worse happens', () => {
    const texts = fc.oneof(fc.json(), fc.string(), fc.constant('{"schemaVersion":2,'))
    const bytes = fc.oneof(
      fc.uint8Array(),
      texts.map((text) => new Uint8Array(Buffer.from(text))),
    )
    fc.assert(
      fc.property(bytes, (garbage) => {
        assert.throws(() => parseManifest(garbage), ManifestInvalidError)
      }),
      { seed, numRuns: 1000 },
    )
  })

  test('survives any value in any place', () => {
    fc.assert(
      fc.property(
        fc.record(
          {
            schemaVersion: fc.oneof(fc.constant(2), fc.jsonValue()),
            mediaType: fc.jsonValue(),
            config: fc.oneof(descriptor, fc.jsonValue()),
            layers: fc.oneof(fc.array(descriptor), fc.jsonValue()),
            manifests: fc.oneof(fc.array(descriptor), fc.jsonValue()),
          },
          { requiredKeys: ['schemaVersion'] },
        ),
        (value) => {
          try {
            for (const child of parse(value).children)
              assert.deepEqual(parseDescriptor(child), child)
          } catch (error) {
            assert(error instanceof ManifestInvalidError, String(error))
          }
        },
      ),
      { seed, numRuns: 1000 },
    )
  })

  test('refuses what is too large, deeply nested, or no UTF-8', () => {
    const padded = Buffer.alloc(MAX_MANIFEST_BYTES, ' ')
    padded.write(JSON.stringify(valid))
    assert.equal(parseManifest(padded).children.length, 2)
    const over = Buffer.concat([padded, Buffer.from(' ')])
    assert.throws(() => parseManifest(over), ManifestInvalidError)
    for (const unit of ['[', '{"a":', '"']) {
      const deep = Buffer.alloc(MAX_MANIFEST_BYTES, unit)
      assert.throws(() => parseManifest(deep), ManifestInvalidError)
    }
    const broken = Buffer.from(JSON.stringify(valid).replace('vnd', '\u0001'))
    broken[broken.indexOf(1)] = 0xff
    assert.throws(() => parseManifest(broken), ManifestInvalidError)
    // Go's JSON, which is that of all clients, takes no byte order mark.
    const marked = Buffer.from(`\uFEFF${JSON.stringify(valid)}`)
    assert.throws(() => parseManifest(marked), ManifestInvalidError)
  })

  test('media types of manifests are known from all others', () => {
    for (const name of ['ociIndex', 'ociManifest', 'dockerList', 'dockerManifest'] as const) {
      assert(isManifestMediaType(MEDIA_TYPE[name]))
    }
    for (const other of [MEDIA_TYPE.octets, MEDIA_TYPE.ociConfig, '', 'text/html']) {
      assert(!isManifestMediaType(other))
    }
  })
})
