// A program that writes into a layout until it is killed, one line for every image that it was told is stored.
import { buildImage } from '../../../src/cli/demo-image.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { tagName } from '../../../src/oci/reference.ts'
import { LayoutStore } from '../../../src/store/layout/layout-store.ts'

const [path = '', first = '0'] = process.argv.slice(2)
const log = createLogger({ level: 'silent' })
const store = new LayoutStore({ log }, { path, maxBytes: 1e9 })
await store.start()
for (let count = Number(first); ; count++) {
  const image = await buildImage({ layers: [50_000], seed: `writer ${count}` })
  for (const { descriptor, bytes } of image.blobs()) {
    const ingest = await store.ingest(descriptor)
    await ingest.write(bytes)
    await ingest.commit()
  }
  await store.tag(tagName('shoal.test', 'writer', `v${count % 10}`), image.manifest.descriptor)
  process.stdout.write(`${count}\n`)
}
