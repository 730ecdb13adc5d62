import { request as overHttp, type IncomingMessage } from 'node:http'
import { createInterface } from 'node:readline'
import { text } from 'node:stream/consumers'
import { Command, InvalidArgumentError, Option } from 'commander'
import { mirrorEndpoint } from '../mirror/certs-dir.ts'
import { parsePlatform } from '../oci/platform.ts'
import { imageInFull } from '../oci/reference.ts'
import type { WarmupReport } from '../observe/warmup.ts'
import { DaemonRefusedError, DaemonSilentError } from './ask-daemon.ts'
import { addConfigOptions, loadGiven } from './config.ts'
import { addProgressOptions, progressOf, type Progress, type ProgressBar } from './progress.ts'
import { formatBytes } from './text.ts'

/** What a shell says of a command that was interrupted: 128 and the number of the signal. */
const INTERRUPTED = 130

interface PullFlags {
  readonly everywhere?: true
  readonly zone?: string | true
  readonly platform?: readonly string[]
}

/** `shoal pull`. */
export function pullCommand(): Command {
  const pull = new Command('pull')
    .description(
      'bring images into the store of this node, or of others too, before they are needed: exit status 0 when all are there, 1 when some are not',
    )
    .argument('<IMAGE...>', 'as in docker.io/library/alpine:3.20, or alpine')
    .addOption(
      new Option('--everywhere', 'into all nodes that are connected (needs tokenFile)').conflicts(
        'zone',
      ),
    )
    .option('--zone [ZONE]', 'into those of a zone, by default that of this node')
    .option(
      '--platform <PLATFORM>',
      'of an image for several platforms, such as linux/arm64, or all; may be repeated (default: the platform of each node)',
      collectPlatform,
    )
    .action(async (images: string[]) => {
      const { config } = await loadGiven(pull)
      const { everywhere, zone, platform } = pull.opts<PullFlags>()
      const body = {
        images: images.map(imageInFull),
        where:
          everywhere === true
            ? 'everywhere'
            : zone === undefined
              ? 'here'
              : zone === true
                ? 'zone'
                : { zone },
        ...(platform !== undefined && {
          platforms: platform.includes('all') ? 'all' : platform,
        }),
      }
      const stop = new AbortController()
      const interrupt = (): void => stop.abort()
      process.once('SIGINT', interrupt)
      process.once('SIGTERM', interrupt)
      const progress = progressOf(pull)
      const view = new PullView(progress)
      try {
        for await (const report of ask(mirrorEndpoint(config.listen.admin), body, stop.signal))
          view.show(report)
        process.exitCode = view.end() ? 0 : 1
      } catch (error) {
        view.close()
        if (!stop.signal.aborted) throw error
        process.stderr.write('shoal: stopped; what has come stays, and is not got again\n')
        process.exitCode = INTERRUPTED
      } finally {
        process.off('SIGINT', interrupt)
        process.off('SIGTERM', interrupt)
      }
    })
  return addConfigOptions(addProgressOptions(pull), ['listen.admin'])
}

function collectPlatform(text: string, before: readonly string[] = []): readonly string[] {
  if (text !== 'all' && parsePlatform(text) === undefined)
    throw new InvalidArgumentError('expected a platform such as linux/arm64, or all')
  return [...before, text]
}

/** Reports as the daemon sends them; ends when all have ended. Whoever stops to listen stops the pull. */
async function* ask(
  origin: string,
  body: object,
  signal: AbortSignal,
): AsyncGenerator<WarmupReport, void> {
  const answered = Promise.withResolvers<IncomingMessage>()
  const request = overHttp(`${origin}/pull`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    signal,
  })
  request.on('response', answered.resolve)
  request.on('error', answered.reject)
  request.end(JSON.stringify(body))
  const response = await answered.promise.catch((cause: unknown) => {
    signal.throwIfAborted()
    const running = 'start it with shoal serve, or name where it is with --listen-admin'
    throw new DaemonSilentError(`no daemon of Shoal answers at ${origin}: ${running}`, { cause })
  })
  if (response.statusCode !== 200)
    throw new DaemonRefusedError((await text(response)).trim() || `answered ${response.statusCode}`)
  try {
    for await (const line of createInterface({ input: response })) {
      // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- the daemon's own words
      yield JSON.parse(line) as WarmupReport
    }
  } catch (cause) {
    signal.throwIfAborted()
    throw new DaemonSilentError(ENDED, { cause })
  }
  if (!response.complete) throw new DaemonSilentError(ENDED)
}

const ENDED =
  'the daemon ended before the pull did; what has come stays: give the same command when it runs again'

/** A bar for each image on each node. */
class PullView {
  readonly #progress: Progress
  readonly #bars = new Map<string, { bar: ProgressBar; have: number; came: number }>()
  readonly #last = new Map<string, WarmupReport>()

  constructor(progress: Progress) {
    this.#progress = progress
  }

  show(report: WarmupReport): void {
    const { node, image, stage, size, have, sources, reason } = report
    const key = `${node} ${image}`
    this.#last.set(key, report)
    if (stage === 'waits') return
    const known = this.#bars.get(key) ?? {
      bar: this.#progress.bar(`${node} ${image}`),
      have: 0,
      came: 0,
    }
    this.#bars.set(key, known)
    const { bar } = known
    if (size > 0) bar.expect(size)
    if (have > known.have) bar.add(have - known.have)
    known.have = Math.max(have, known.have)
    const names = Object.entries(sources).toSorted(([, a], [, b]) => b - a)
    if (names.length > 0)
      bar.fromAll(names.map(([name, bytes]) => `${name} ${formatBytes(bytes)}`).join(', '))
    if (stage === 'has') bar.finish()
    if (stage === 'failed') bar.fail(reason ?? 'it cannot be got')
  }

  close(): void {
    this.#progress.close()
  }

  /** Whether all have it. */
  end(): boolean {
    this.close()
    const all = [...this.#last.values()]
    const failed = all.filter(({ stage }) => stage !== 'has')
    const nodes = new Set(all.map(({ node }) => node))
    const images = new Set(all.map(({ image }) => image))
    const counted = `${images.size} ${images.size === 1 ? 'image' : 'images'} on ${nodes.size} ${nodes.size === 1 ? 'node' : 'nodes'}`
    const lines = [
      failed.length === 0 ? `${counted}: all there` : `${counted}: ${failed.length} not there`,
      ...failed.map(
        ({ node, image, reason = 'it has not ended' }) => `${node} ${image}: ${reason}`,
      ),
    ]
    this.#progress.result(lines.join('\n'), {
      images: images.size,
      nodes: nodes.size,
      failed: failed.map(({ node, image, reason }) => ({ node, image, reason })),
    })
    return failed.length === 0
  }
}
