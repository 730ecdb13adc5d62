import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { Upstream, type ClusterNode } from '../test/harness/cluster.ts'
import { load } from './contender.ts'
import { importImages } from './images.ts'
import type { Section } from './report.ts'
import { inTurns, manifestPath, reachable, Sheet, type Turns } from './turns.ts'

/** What happens to a pull, and to others beside it, when something is slow or goes away. */

const BLOB = 300_000_000
/** The links of the holders, in Mbit/s: the blob takes five seconds. */
const LINK = 500
/** A client that gets nothing for so long gives up, in s. */
const PATIENCE = 30

/** A holder loses its link without a word, in the middle of a blob that another one has as well. */
export async function vanish(
  turns: Turns,
  holders: readonly [ClusterNode, ClusterNode],
  puller: ClusterNode,
): Promise<Section> {
  const wanted = [{ reference: `${Upstream.host}/bench/vanish:1`, layers: [BLOB] }]
  const [image] = await importImages(holders[0], wanted)
  await importImages(holders[1], wanted)
  const layer = image?.layers[0]
  if (image === undefined || layer === undefined) throw new Error('no image was made')
  const path = `/v2/bench/vanish/blobs/${layer.digest}`
  for (const holder of holders) await holder.link.shape(LINK)
  const sheet = new Sheet()
  await inTurns(turns, 'vanish', [...holders, puller], async (contender) => {
    await reachable(puller, contender, manifestPath(image))
    const read = () => load(puller, contender, path, '--patience', String(PATIENCE))
    const calm = await read()
    if (calm.bytes < layer.size) throw new Error(`${contender.name} gave ${calm.bytes} bytes`)
    const before = await Promise.all(holders.map(sent))
    const reading = read()
    const early = reading.then(({ bytes }) => {
      throw new Error(`${contender.name} was done before anybody vanished, with ${bytes} bytes`)
    })
    early.catch(() => {})
    let giver: ClusterNode | undefined
    while (giver === undefined) {
      await Promise.race([delay(50), early])
      const now = await Promise.all(holders.map(sent))
      giver = holders.find((_, index) => (now[index] ?? 0) - (before[index] ?? 0) > BLOB / 2)
    }
    await giver.link.cut()
    const { seconds, bytes } = await reading
    await giver.link.restore()
    sheet.add(contender, 'nobody vanishes: s', 'less', calm.seconds, 2)
    sheet.add(contender, 'one of two holders vanishes: s', 'less', seconds, 2)
    sheet.add(contender, 'lost by it: s', 'less', seconds - calm.seconds, 2)
    sheet.add(contender, 'of the blob, %', 'more', (100 * bytes) / layer.size, 0)
  })
  return {
    title: 'A holder vanishes in the middle of a blob of 300 MB',
    method: `Two nodes have it, at ${LINK} Mbit/s each; the link of the one that gives is cut without a word when half has come. The client gives up when it gets nothing for ${PATIENCE} s; what it has got by then is the last line.`,
    figures: sheet.figures(),
  }
}

/** Bytes it has sent so far. */
async function sent(node: ClusterNode): Promise<number> {
  const line = /eth0:(.*)/.exec(await node.exec(['cat', '/proc/self/net/dev']))?.[1] ?? ''
  return Number(line.trim().split(/\s+/)[8])
}

const DISK_BYTES_PER_SECOND = 20_000_000
const DISK_LAYERS = 4
const DISK_LAYER = 60_000_000
const HAMMER = 5
const CGROUP = '/sys/fs/cgroup/blkio/shoal-bench'
const CONTENT = '/var/lib/containerd/io.containerd.content.v1.content'

/** Manifests are asked for while blobs are read that are not in memory, from a disk that is slow. */
export async function slowDisk(
  turns: Turns,
  holder: ClusterNode,
  puller: ClusterNode,
): Promise<Section> {
  if (!existsSync('/sys/fs/cgroup/blkio')) throw new Error('a slow disk takes cgroup v1 (blkio)')
  const reference = `${Upstream.host}/bench/disk:1`
  const layers = Array<number>(DISK_LAYERS).fill(DISK_LAYER)
  const file = holder.machine.path('/run/disk')
  const run = (command: string, ...args: readonly string[]): string =>
    execFileSync(command, args, { encoding: 'utf8' }).trim()
  run('truncate', '-s', String(2 * DISK_LAYERS * DISK_LAYER), file)
  run('mkfs.ext4', '-q', '-F', file)
  const loop = run('losetup', '--find', '--show', file)
  try {
    // On the disk, and below it for when it is gone again
    const directories = ['mkdir', '-p', `${CONTENT}/ingest`, `${CONTENT}/blobs/sha256`]
    await holder.exec(directories)
    await holder.exec(['mount', loop, CONTENT])
    await holder.exec(directories)
    const [image] = await importImages(holder, [{ reference, layers }])
    if (image === undefined) throw new Error('no image was made')
    mkdirSync(CGROUP)
    const device = readFileSync(`/sys/block/${loop.replace('/dev/', '')}/dev`, 'utf8').trim()
    const limit = `${device} ${DISK_BYTES_PER_SECOND}`
    writeFileSync(`${CGROUP}/blkio.throttle.read_bps_device`, limit)
    const sheet = new Sheet()
    await inTurns(turns, 'disk', [holder, puller], async (contender) => {
      await reachable(puller, contender, manifestPath(image))
      await reachable(holder, contender, manifestPath(image))
      writeFileSync(`${CGROUP}/cgroup.procs`, String(contender.pid(holder)))
      const forget = `sync; for f in ${CONTENT}/blobs/sha256/*; do dd of=$f oflag=nocache conv=notrunc,fdatasync count=0 status=none; done`
      await holder.exec(['sh', '-c', forget])
      const blobs = Promise.allSettled(
        image.layers.map(({ digest }) =>
          load(puller, contender, `/v2/bench/disk/blobs/${digest}`, '--seconds', '0'),
        ),
      )
      await delay(1000)
      for (const [name, node] of [
        ['at the holder', holder],
        ['from a peer', puller],
      ] as const) {
        const flags = ['--parallel', '4', '--seconds', String(HAMMER)]
        const result = await load(node, contender, manifestPath(image), ...flags)
        sheet.add(
          contender,
          `${name}: answers/s`,
          'more',
          (result.statuses['200'] ?? 0) / result.seconds,
          0,
        )
        sheet.add(contender, `${name}: p50, ms`, 'less', result.p50, 2)
        sheet.add(contender, `${name}: p99, ms`, 'less', result.p99, 2)
      }
      const read = (await blobs).flatMap((each) =>
        each.status === 'fulfilled' ? [each.value] : [],
      )
      const bytes = read.reduce((sum, each) => sum + each.bytes, 0)
      const seconds = Math.max(...read.map((each) => each.seconds))
      sheet.add(contender, 'blobs in sum: MB/s', 'more', bytes / 1e6 / seconds, 1)
    })
    return {
      title: 'Manifests beside blobs from a slow disk',
      method: `Another node reads ${DISK_LAYERS} blobs of ${DISK_LAYER / 1e6} MB at once that are not in memory, from a disk whose reads are held at ${DISK_BYTES_PER_SECOND / 1e6} MB/s (a loop device under the cgroup controller blkio). Beside that, 4 connections ask for a manifest, at the holder and then through the node that reads.`,
      figures: sheet.figures(),
    }
  } finally {
    await holder.exec(['umount', '--lazy', CONTENT]).catch(() => {})
    run('losetup', '--detach', loop)
    if (existsSync(CGROUP)) rmdirSync(CGROUP)
  }
}
