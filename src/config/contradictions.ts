import { isLoopback } from '../oci/reference.ts'
import { formatAddress } from './addresses.ts'
import { formatRates } from './rates.ts'
import type { Config } from './schema.ts'

/** What is said of the token, of TLS and of the mesh must go together: a node never falls back to less than it was told. */
export function* contradictions({
  tokenFile,
  tokenRequired,
  tls,
  mesh,
  bootstrap,
  push,
  listen,
  private: rules,
  upstream,
  limits,
}: Config): Generator<{ path: readonly (string | number)[]; message: string }> {
  if (push.access === 'auth' && push.users === undefined)
    yield { path: ['push', 'access'], message: 'auth needs push.users, and there is none' }
  if (
    listen.push !== undefined &&
    (push.access !== 'auth' || push.cert === undefined || push.key === undefined)
  )
    yield {
      path: ['listen', 'push'],
      message: 'needs push.access: auth, push.users, push.cert and push.key',
    }
  const { address } = listen.local
  if (address !== undefined && !isLoopback(formatAddress(address)) && !listen.exposed)
    yield {
      path: ['listen', 'local'],
      message:
        'is an address that other machines reach, where all of them may do everything: say listen.exposed: true if that is meant',
    }
  const places = new Map<string, string>()
  for (const key of ['local', 'admin', 'metrics', 'push', 'peer', 'p2p'] as const) {
    const place = key === 'local' ? address : listen[key]
    if (place === undefined || place === 'auto' || place.port === 0) continue
    const written = formatAddress(place)
    const other = places.get(written)
    if (other !== undefined)
      yield { path: ['listen', key], message: `is ${written}, where listen.${other} is already` }
    places.set(written, key)
  }
  if (limits.uploadRate !== undefined && formatRates(limits.upload) !== 'unlimited')
    yield {
      path: ['limits', 'uploadRate'],
      message: 'is called limits.upload now, which is set too',
    }
  for (const [index, { policy }] of rules.entries()) {
    if (policy !== 'verify') continue
    const path = ['private', index]
    if (tokenFile === undefined)
      yield { path, message: 'verify needs tokenFile: without it nodes give to whoever asks' }
    if (upstream === 'off')
      yield { path, message: 'verify needs upstream: on, for who may pull is asked there' }
    if (address === undefined)
      yield { path, message: 'verify needs an address in listen.local, where containerd asks' }
  }
  const files = Object.values(tls).filter((file) => file !== undefined)
  if (files.length > 0 && files.length < 3)
    yield { path: ['tls'], message: 'needs all of cert, key and ca, or none of them' }
  if (tokenFile === undefined) {
    if (tokenRequired)
      yield { path: ['tokenRequired'], message: 'needs tokenFile, and there is none' }
    if (files.length > 0)
      yield {
        path: ['tls'],
        message: 'needs tokenFile too: certificates do not keep strangers from joining the mesh',
      }
    return
  }
  if (mesh === 'spegel')
    yield { path: ['mesh'], message: 'spegel knows no token, so that tokenFile cannot be kept to' }
  for (const [index, { type }] of bootstrap.entries())
    if (type === 'http')
      yield {
        path: ['bootstrap', index],
        message: 'with tokenFile no node answers /id: name HOST[:PORT] instead',
      }
}
