import type { Metrics } from '@libp2p/interface'

/** What takes a figure that nobody reads. */
const UNREAD = {
  update() {},
  increment() {},
  decrement() {},
  reset() {},
  observe() {},
  timer: () => () => {},
}

/**
 * For kad-dht to write its figures into. Told on is one of them, by kad-dht's own name for it: each request that goes
 * out or comes in, records among them. Answers are not.
 */
export function countRequests(onRequest: (direction: 'in' | 'out') => void): Metrics {
  const count = (direction: 'in' | 'out') => ({
    ...UNREAD,
    increment: () => onRequest(direction),
  })
  return {
    trackMultiaddrConnection() {},
    trackProtocolStream() {},
    registerMetric: () => UNREAD,
    registerMetricGroup: () => UNREAD,
    registerCounter: () => UNREAD,
    registerCounterGroup: (name: string) => {
      if (name.endsWith('_inbound_rpc_requests_total')) return count('in')
      return name.endsWith('_outbound_rpc_requests_total') ? count('out') : UNREAD
    },
    registerHistogram: () => UNREAD,
    registerHistogramGroup: () => UNREAD,
    registerSummary: () => UNREAD,
    registerSummaryGroup: () => UNREAD,
    traceFunction: <F>(_name: string, run: F): F => run,
    createTrace() {},
  }
}
