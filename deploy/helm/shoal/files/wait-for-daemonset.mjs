// Ends when the DaemonSet is ready on every node it belongs to. Runs in a pod, with its service account; the Job has the deadline.
import { readFileSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'

const {
  KUBERNETES_SERVICE_HOST: host,
  KUBERNETES_SERVICE_PORT: port,
  DAEMONSET: path,
} = process.env
const directory = process.env.SERVICE_ACCOUNT ?? '/var/run/secrets/kubernetes.io/serviceaccount'
const url = `https://${host.includes(':') ? `[${host}]` : host}:${port}${path}`
for (let said = ''; ; await setTimeout(1000)) {
  let now
  try {
    const authorization = `Bearer ${readFileSync(`${directory}/token`, 'utf8').trim()}`
    const response = await fetch(url, {
      headers: { authorization },
      signal: AbortSignal.timeout(5000),
    })
    if (!response.ok) throw new Error(`the API server answers ${response.status}`)
    const { metadata, status } = await response.json()
    // Its controller has not seen it yet, and what it says means nothing.
    const seen = status.observedGeneration >= metadata.generation
    const { numberReady: ready, desiredNumberScheduled: all } = status
    now = seen ? `${ready} of ${all} nodes are done` : 'not begun'
    if (seen && ready >= all) {
      console.log(now)
      break
    }
  } catch (error) {
    now = `${error.message}${error.cause ? `: ${error.cause.message}` : ''}`
  }
  if (now !== said) console.log((said = now))
}
