import type { FastifyInstance } from 'fastify'
import { DistributionError } from '../oci/errors.ts'
import { hostOf } from '../oci/reference.ts'

/** What keeps an answer of ours from being shown as a page, or read by one. */
const HEADERS = {
  'content-security-policy': "default-src 'none'; frame-ancestors 'none'",
  'cross-origin-resource-policy': 'same-origin',
  'referrer-policy': 'no-referrer',
}

/**
 * Keeps pages of others from using a listener through the browser of somebody who works on this node. A page of another site
 * says so itself (`Origin`, `Sec-Fetch-Site`); one whose name was made to mean this node (DNS rebinding) shows in `Host`; and
 * what changes something needs a header that no form can send. There is no CORS, so that a browser lets no page add one.
 * @see https://www.w3.org/TR/fetch-metadata/ and https://fetch.spec.whatwg.org/#cors-safelisted-request-header
 */
export function keepPagesOut(
  server: FastifyInstance,
  { isOwn, mayWrite }: { isOwn: (host: string, url: string) => boolean; mayWrite: boolean },
): void {
  server.addHook('onRequest', async ({ method, headers, url }, reply) => {
    void reply.headers(HEADERS)
    const { host, origin } = headers
    const site = headers['sec-fetch-site']
    if (
      (origin !== undefined && URL.parse(origin)?.host !== host) ||
      site === 'cross-site' ||
      site === 'same-site'
    )
      throw new DistributionError('DENIED', 'pages of other sites have nothing to ask here')
    // HTTP/1.0 needs no Host, and no browser speaks it.
    if (host !== undefined && !isOwn(host, url))
      throw new DistributionError('DENIED', 'this is not the host that was asked for')
    if (mayWrite || method === 'GET' || method === 'HEAD') return
    if (headers['x-shoal'] === undefined && headers['content-type'] !== 'application/json')
      throw new DistributionError('DENIED', 'what changes something needs the header X-Shoal')
  })
}

/** An address, or a name that means this machine: no name service can make another name of it. */
export function isOwnName(host: string, names: readonly string[]): boolean {
  const name = hostOf(host)
  return (
    /^[0-9.]+$/.test(name) ||
    name.includes(':') ||
    name === 'localhost' ||
    name.endsWith('.localhost') ||
    names.includes(name)
  )
}
