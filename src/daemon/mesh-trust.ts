import type { EffectiveConfig } from '../config/effective.ts'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { loadIdentityKey } from '../routing/identity.ts'
import { PeerTls } from '../trust/peer-tls.ts'
import { TokenFile } from '../trust/token-file.ts'

export interface MeshTrustComponents {
  readonly component: (name: string) => Logger
  /** The addresses this node has now */
  readonly ownAddresses: () => readonly string[]
  /** Somebody was not let in at the peer listener */
  readonly onRefused: (who: { address: string; reason: string }) => void
  /** The file was read: with these tokens nodes know each other from now on */
  readonly onTokens: (tokens: readonly [string, ...string[]]) => void
}

/** By what the nodes of a mesh know each other; undefined is an open mesh, which anybody may join. */
export interface MeshTrust {
  readonly peerTls: PeerTls
  readonly parts: readonly Startable[]
}

export function createMeshTrust(
  { tokenFile, tls, banned, dataDir, nodeName }: EffectiveConfig,
  { component, ownAddresses, onRefused, onTokens }: MeshTrustComponents,
): MeshTrust | undefined {
  if (tokenFile === undefined) return undefined
  const log = component('trust')
  const { cert, key, ca } = tls
  const own =
    cert === undefined || key === undefined || ca === undefined
      ? undefined
      : { cert, key, ca, names: () => [...ownAddresses(), nodeName] }
  const peerTls = new PeerTls(
    { log, identity: () => loadIdentityKey(dataDir, { log }), onRefused },
    { banned, ...(own && { own }) },
  )
  const tokens = new TokenFile(
    { log },
    {
      path: tokenFile,
      changed: (read) => {
        peerTls.useTokens(read)
        onTokens(read)
      },
    },
  )
  return { peerTls, parts: [tokens, peerTls] }
}
