import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { BUNDLED } from '../../harness/bundle.ts'
import { until } from '../../wait.ts'

/** Runs the command line as a process of its own; `wrapper` is a program that becomes it. */
export function shoal(args: readonly string[], wrapper: readonly string[] = []) {
  const [command = '', ...rest] = [...wrapper, ...BUNDLED, ...args]
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
    { timeoutMs: 60_000, what: 'the node has started' },
  )
  return JSON.parse(line) as Record<'local' | 'peer' | 'p2p' | 'admin', string>
}
