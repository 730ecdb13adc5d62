import type { EffectiveConfig } from '../config/effective.ts'
import { readTokenFile, TokenFileError } from '../trust/token-file.ts'
import { findings, type Finding } from './finding.ts'

export interface TokenFacts {
  /** Undefined when none is configured */
  readonly path: string | undefined
  /** Why it cannot be used */
  readonly problem: string | undefined
  readonly mesh: EffectiveConfig['mesh']
}

/** Reads the token file as the daemon does; what is in it is not kept. */
export async function lookAtToken({
  tokenFile: path,
  mesh,
}: Pick<EffectiveConfig, 'tokenFile' | 'mesh'>): Promise<TokenFacts> {
  if (path === undefined) return { path, problem: undefined, mesh }
  try {
    await readTokenFile(path)
    return { path, problem: undefined, mesh }
  } catch (error) {
    if (!(error instanceof TokenFileError)) throw error
    return { path, problem: error.message, mesh }
  }
}

const { pass, warn, fail, notApplicable } = findings('token')

/** Is what nodes say to each other protected? */
export function checkToken({ path, problem, mesh }: TokenFacts): Finding[] {
  if (mesh === 'spegel') return [notApplicable("Spegel's mesh knows no token")]
  if (path === undefined)
    return [
      warn(
        'there is no cluster token: content goes between nodes as plain HTTP, and anybody who reaches their ports may read it, or be a node',
        'make one with shoal token new > /etc/shoal/token, put the same on every node, and set tokenFile: /etc/shoal/token',
      ),
    ]
  if (problem !== undefined)
    return [fail(problem, `put the token of the cluster into ${path}, with mode 600`)]
  return [pass('nodes show each other that they have the token, and encrypt')]
}
