import { connect, createServer } from 'node:net'
import { parseArgs } from 'node:util'

/**
 * What is far away, where the kernel has no netem: connections are passed on to `--to`, and what comes back arrives `--delay` ms later. As
 * much is on the way at a time as Linux' largest receive window holds where nobody has set it.
 *
 *     scripts/run bench/far-link.ts --listen PORT --to PORT --delay MS
 */
const { values: flags } = parseArgs({
  options: { listen: { type: 'string' }, to: { type: 'string' }, delay: { type: 'string' } },
})
const delay = Number(flags.delay)
const WINDOW = 6 * 1024 * 1024

createServer((near) => {
  const far = connect(Number(flags.to), '127.0.0.1')
  near.pipe(far)
  let onTheWay = 0
  far.on('data', (chunk) => {
    onTheWay += chunk.length
    if (onTheWay >= WINDOW) far.pause()
    setTimeout(() => {
      near.write(chunk, () => {
        onTheWay -= chunk.length
        if (onTheWay < WINDOW) far.resume()
      })
    }, delay)
  })
  far.on('end', () => setTimeout(() => near.end(), delay))
  far.on('error', () => near.destroy())
  near.on('error', () => far.destroy())
  near.on('close', () => far.destroy())
}).listen(Number(flags.listen), () => process.stdout.write('ready\n'))
