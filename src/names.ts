import type { LookupAddress } from 'node:dns'
import { lookup as lookupBySystem, Resolver } from 'node:dns/promises'
import { readFile } from 'node:fs/promises'
import type { LookupFunction } from 'node:net'
import { callbackify } from 'node:util'
import { hasCode } from './system-error.ts'

/** How long a name server is waited for, in ms, and how often it is asked. */
const QUESTION = { timeout: 1000, tries: 2 }
/** How long the addresses of the other family are waited for, in ms. @see https://www.rfc-editor.org/rfc/rfc8305#section-3 */
const OTHER_FAMILY = 50
const HOSTS = '/etc/hosts'

const asking = new Map<string, Promise<LookupAddress[]>>()

/** As `dns.lookup`, by {@link addressesOf}. */
export const lookup: LookupFunction = (hostname, options, callback) => {
  ask(hostname, (error, addresses) => {
    if (error !== null) return callback(error, [])
    const wanted = addresses.filter(({ family }) => !options.family || family === options.family)
    const [first] = wanted
    if (options.all === true) callback(null, wanted)
    else if (first !== undefined) callback(null, first.address, first.family)
    else callback(new Error(`${hostname} has no such address`), [])
  })
}

/**
 * Addresses of a name, of which no server need answer: it holds up no other. The system's own lookup takes one of two threads
 * for many seconds, and behind two dead names a good one would wait. The system is asked last, for what it may know
 * beyond `/etc/hosts` and DNS; one question for each name at a time.
 * @throws when there is none, or nobody says so within some seconds
 */
export function addressesOf(hostname: string): Promise<LookupAddress[]> {
  const running = asking.get(hostname)
  if (running !== undefined) return running
  const answer = find(hostname).finally(() => asking.delete(hostname))
  asking.set(hostname, answer)
  return answer
}

const ask = callbackify(addressesOf)

async function find(hostname: string): Promise<LookupAddress[]> {
  const listed = inHosts(await readFile(HOSTS, 'utf8').catch(() => ''), hostname)
  if (listed.length > 0) return listed
  // Without a dot it is a name of the domains that only the system knows to search
  if (!hostname.includes('.')) return lookupBySystem(hostname, { all: true })
  const resolver = new Resolver(QUESTION)
  const four = nonEmpty(resolver.resolve4(hostname), 4)
  const six = nonEmpty(resolver.resolve6(hostname), 6)
  try {
    await Promise.any([four, six])
  } catch (error) {
    // The system would wait for the same server, and longer
    const useless =
      error instanceof AggregateError &&
      error.errors.some((each) => hasCode(each, 'ETIMEOUT') || hasCode(each, 'EBADRESP'))
    if (useless) throw new Error(`no name server answers for ${hostname}`, { cause: error })
    return lookupBySystem(hostname, { all: true })
  }
  const late = Promise.withResolvers<LookupAddress[]>()
  const timer = setTimeout(() => late.resolve([]), OTHER_FAMILY)
  const both = await Promise.all(
    [four, six].map((family) => Promise.race([family.catch(() => []), late.promise])),
  )
  clearTimeout(timer)
  return both.flat()
}

async function nonEmpty(answer: Promise<string[]>, family: 4 | 6): Promise<LookupAddress[]> {
  const addresses = await answer
  if (addresses.length === 0) throw new Error('no address of this family')
  return addresses.map((address) => ({ address, family }))
}

/** @see https://man7.org/linux/man-pages/man5/hosts.5.html */
function inHosts(text: string, hostname: string): LookupAddress[] {
  return text.split('\n').flatMap((line) => {
    const [address = '', ...names] = line.replace(/#.*/, '').trim().split(/\s+/)
    const named = names.some((name) => name.toLowerCase() === hostname.toLowerCase())
    return named ? [{ address, family: address.includes(':') ? 6 : 4 }] : []
  })
}
