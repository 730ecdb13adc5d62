import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { until } from '../../wait.ts'

const MAIN = new URL('../../../src/cli/main.ts', import.meta.url).pathname

/** Runs the command line from its sources, as a process of its own; `wrapper` is a program that becomes it. */
export function shoal(args: readonly string[], wrapper: readonly string[] = []) {
  const [command = '', ...rest] = [...wrapper, process.execPath, MAIN, ...args]
  const child = spawn(command, rest, { stdio: ['ignore', 'pipe', 'pipe'] })
  const output = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].on('data', (chunk: Buffer) => {
      output[name] += chunk.toString()
    })
  }
  const ended = once(child, 'close').then(([code, signal]) => ({
    code: code as number | null,
    signal: signal as string | null,
    ...output,
  }))
  return { child, output, ended }
}

/** Where a node says it listens, from its log. */
export async function startedLine(output: {
  stdout: string
}): Promise<Record<'local' | 'peer' | 'p2p' | 'admin', string>> {
  const line = await until(
    () => output.stdout.split('\n').find((text) => text.includes('"msg":"started"')),
    { timeoutMs: 30_000, what: 'the node has started' },
  )
  return JSON.parse(line) as Record<'local' | 'peer' | 'p2p' | 'admin', string>
}
