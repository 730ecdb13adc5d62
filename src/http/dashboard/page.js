// The dashboard of one node. What it shows comes from /events; it sets text only, never markup, because names come from other nodes.

/** In the order in which they are stacked, with what they are called here. */
const SOURCES = [
  ['local', 'this node'],
  ['inflight', 'coming in already'],
  ['peer', 'peers'],
  ['upstream', 'upstreams'],
]
/** Length of a step of traffic, in ms. */
const STEP = 5000
const HOUR = 3_600_000
/** Images that /images gives at a time. */
const PAGE = 100

const at = (id) => document.getElementById(id)
const state = { node: undefined, peers: [], pulls: [], traffic: new Map(), from: 0 }

/** An element with attributes and children; text is text. */
function element(name, attributes = {}, ...children) {
  const made = name.startsWith('svg:')
    ? document.createElementNS('http://www.w3.org/2000/svg', name.slice(4))
    : document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  made.append(...children)
  return made
}

/** Changes text only when it differs, so that a reader of the screen is not told the same again. */
function say(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text
}

function bytes(count) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB']
  let value = count
  let unit = 0
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000
    unit += 1
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`
}

function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`
  const seconds = ms / 1000
  if (seconds < 60) return `${seconds.toFixed(1)} s`
  const minutes = Math.floor(seconds / 60)
  return minutes < 60
    ? `${minutes} min ${Math.round(seconds % 60)} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`
}

const sum = (counts) => Object.values(counts).reduce((total, value) => total + value, 0)

function showNode() {
  const { node } = state
  if (node === undefined) return
  document.title = `${node.name} · Shoal`
  say('name', node.name)
  const shared =
    node.sharing.registries === 'all' ? 'all registries' : node.sharing.registries.join(', ')
  say(
    'subtitle',
    `${node.version} · ${node.store.kind} ${node.store.version ?? ''} · ${node.sharing.on ? `shares ${shared}` : 'shares nothing'}`,
  )
  const pill = at('state')
  pill.className = `pill ${node.notReady === null ? 'good' : 'bad'}`
  say('state', node.notReady === null ? 'ready' : 'not ready')
  say('peerCount', String(node.mesh.peers))
  say('peerNote', `they hold ${node.mesh.keys} digests and tags`)
  say('imageCount', String(node.store.images))
  say('imageNote', `${node.store.announced} digests and tags announced`)

  const notices = []
  if (node.notReady !== null) notices.push(['bad', `This node is not ready: ${node.notReady}.`])
  if (!node.sharing.on) notices.push(['', `This node does not share: ${node.sharing.setBy}.`])
  if (node.mesh.peers === 0)
    notices.push([
      '',
      'No peer is connected: whatever this node has not got comes from the upstreams.',
    ])
  for (const text of node.complaints) notices.push(['bad', text])
  if (node.mirror.withdrawn)
    notices.push([
      'bad',
      'containerd is not sent here for now, because this node was out of order.',
    ])
  if (node.mirror.complaint !== null) notices.push(['bad', node.mirror.complaint])
  for (const { url, limited } of node.upstream.resting)
    notices.push(['', limited ? `${url} limits how often this node may ask.` : `${url} is down.`])
  const text = JSON.stringify(notices)
  if (at('notices').dataset.text === text) return
  at('notices').dataset.text = text
  at('notices').replaceChildren(
    ...notices.map(([kind, words]) => element('p', { class: `notice ${kind}` }, words)),
  )
}

/** Who reads from whom, below whom: a branch of a tree, each node once. */
function branch(name, children, seen) {
  seen.add(name)
  const below = (children.get(name) ?? []).filter((each) => !seen.has(each))
  return element(
    'li',
    {},
    name === '' ? 'nobody yet' : name,
    ...(below.length === 0
      ? []
      : [element('ul', {}, ...below.map((each) => branch(each, children, seen)))]),
  )
}

function far(have, size) {
  return size === 0 ? 'begins' : `${Math.floor((100 * have) / size)} % of ${bytes(size)}`
}

function shortened(what) {
  return what.replace(/(sha256:.{12})\w*/, '$1')
}

/** What is got by several nodes at once, with the tree in which it goes from one to the next. */
function showTogether() {
  const { pulls, lists } = state.node.together
  const text = JSON.stringify([pulls, lists])
  if (at('together').dataset.text === text) return
  at('together').dataset.text = text
  const trees = lists.map(({ what, members, leaders, reads, have, size }) => {
    const children = new Map([['upstream', [...leaders]]])
    for (const { by, from } of reads) {
      if (!children.has(from)) children.set(from, [])
      if (!children.get(from).includes(by)) children.get(from).push(by)
    }
    const readers = new Set([...children.values()].flat())
    const roots = [...children.keys()].filter((name) => !readers.has(name))
    const seen = new Set()
    return element(
      'li',
      {},
      element(
        'p',
        {},
        `${members} nodes get ${what === null ? 'the same' : shortened(what)}, ${far(have, size)}:`,
      ),
      element('ul', { class: 'tree' }, ...roots.map((name) => branch(name, children, seen))),
    )
  })
  const own = pulls.map(({ what, from, have, size }) => {
    const whom = { '': 'nobody yet', upstream: 'the upstream, for all' }[from] ?? from
    return element(
      'li',
      {},
      element('p', {}, `This node gets ${shortened(what)} from ${whom}: ${far(have, size)}.`),
    )
  })
  at('together').hidden = own.length + trees.length === 0
  at('trees').replaceChildren(...own, ...trees)
}

function showPeers() {
  const wanted = at('peerFilter').value.trim().toLowerCase()
  const shown = state.peers.filter((peer) =>
    [peer.name, peer.at, peer.zone ?? '', peer.region ?? ''].some((text) =>
      text.toLowerCase().includes(wanted),
    ),
  )
  at('peers').replaceChildren(
    ...shown.map((peer) =>
      element(
        'tr',
        {},
        element('td', {}, peer.name),
        element('td', {}, peer.at),
        element('td', {}, [peer.region, peer.zone].filter(Boolean).join(' / ') || '–'),
      ),
    ),
  )
  at('noPeers').hidden = shown.length > 0
  say('noPeers', state.peers.length === 0 ? 'No peer is connected.' : 'No peer of that name.')
}

function bar(counts, size) {
  const done = sum(counts)
  const whole = Math.max(size, done, 1)
  const percent = Math.floor((100 * done) / whole)
  const drawn = element('div', {
    class: 'bar',
    role: 'progressbar',
    'aria-valuenow': percent,
    'aria-valuemin': 0,
    'aria-valuemax': 100,
    'aria-label': 'bytes received',
  })
  for (const [source] of SOURCES) {
    if (!counts[source]) continue
    const part = element('span', { class: source })
    part.style.width = `${(100 * counts[source]) / whole}%`
    drawn.append(part)
  }
  return drawn
}

/** Where bytes came from, in words. */
function origin(counts) {
  const parts = SOURCES.filter(([source]) => counts[source]).map(
    ([source, name]) => `${bytes(counts[source])} from ${name}`,
  )
  return parts.join(', ') || 'nothing yet'
}

function said(pull) {
  if (pull.state === 'running') {
    const done = sum(pull.bytes)
    const rate = pull.durationMs > 0 ? (1000 * done) / pull.durationMs : 0
    return `${bytes(done)} · ${bytes(rate)}/s`
  }
  return `${pull.state === 'failed' ? 'failed · ' : ''}${bytes(sum(pull.bytes))} · ${duration(pull.durationMs)}`
}

/** The same by name, where who gave it has one. */
function giversOf({ givers, bytes: counts }) {
  const parts = Object.entries(givers).map(([name, count]) => `${bytes(count)} from ${name}`)
  return parts.join(', ') || origin(counts)
}

function details(pull) {
  const missed = Object.entries(pull.missed)
    .map(([reason, count]) => `${reason} (${count})`)
    .join(', ')
  return element(
    'div',
    { class: 'details' },
    element(
      'p',
      {},
      `${new Date(pull.startedAt).toLocaleTimeString()} · ${pull.requests} requests · ${origin(pull.bytes)}${
        missed === '' ? '' : ` · the upstream was needed: ${missed}`
      }`,
    ),
    element(
      'ul',
      {},
      ...pull.contents.map((content) =>
        element(
          'li',
          {},
          element('code', {}, content.target.replace(/^(sha256:.{12}).*/, '$1')),
          element('span', {}, content.kind),
          element('span', {}, content.outcome ?? 'running'),
          element(
            'span',
            {},
            `${giversOf(content)} of ${bytes(content.size)} in ${duration(content.durationMs)}${
              content.missed === undefined ? '' : `, no peer gave it: ${content.missed}`
            }`,
          ),
        ),
      ),
    ),
  )
}

/** Rows are kept by the pull they show, so that what is open stays open, and the focus where it is. */
const rows = new Map()

function showPulls() {
  const onlyRunning = at('onlyRunning').checked
  const shown = state.pulls.filter((pull) => !onlyRunning || pull.state === 'running')
  const wanted = shown.map((pull) => {
    const text = JSON.stringify(pull)
    const known = rows.get(pull.id)
    if (known?.text === text) return known.row
    const row = known?.row ?? element('li', {})
    row.className = `pull ${pull.state}`
    const open = row.firstChild ?? element('details', {}, element('summary', {}))
    open.firstChild.replaceChildren(
      element('span', { class: 'image' }, pull.image),
      bar(pull.bytes, pull.size),
      element('span', { class: 'said' }, said(pull)),
    )
    if (open.childNodes.length > 1) open.lastChild.remove()
    open.append(details(pull))
    row.append(open)
    rows.set(pull.id, { text, row })
    return row
  })
  for (const id of rows.keys()) if (!shown.some((pull) => pull.id === id)) rows.delete(id)
  const list = at('pulls')
  for (const [index, row] of wanted.entries())
    if (list.childNodes[index] !== row) list.insertBefore(row, list.childNodes[index] ?? null)
  while (list.childNodes.length > wanted.length) list.lastChild.remove()
  at('noPulls').hidden = wanted.length > 0
  say(
    'noPulls',
    onlyRunning ? 'No pull is running.' : 'No client of this node has pulled anything yet.',
  )
}

function showTraffic() {
  const now = Date.now()
  const totals = { local: 0, inflight: 0, peer: 0, upstream: 0 }
  for (const [time, counts] of state.traffic) {
    if (time < now - HOUR) state.traffic.delete(time)
    else for (const [source] of SOURCES) totals[source] += counts[source] ?? 0
  }
  const all = sum(totals)
  const kept = all - totals.upstream
  say('saved', bytes(kept))
  say(
    'savedNote',
    all === 0
      ? 'nobody pulled in the last hour'
      : `${Math.round((100 * kept) / all)} % of the last hour's ${bytes(all)}`,
  )
  say('upstreamBytes', bytes(totals.upstream))
  const price = Number(at('price').value)
  say('money', price > 0 ? `${((kept / 1e9) * price).toFixed(2)} not spent in the last hour` : '')

  const span = Number(at('span').value)
  const chart = at('chart')
  const width = chart.clientWidth || 800
  const height = chart.clientHeight || 170
  const [left, bottom, top] = [64, 20, 8]
  chart.setAttribute('viewBox', `0 0 ${width} ${height}`)
  // As many bars as there is room for, each of whole steps.
  const steps = Math.max(1, Math.ceil(span / STEP / Math.floor((width - left) / 5)))
  const each = steps * STEP
  const first = Math.floor((now - span) / each) * each + each
  const bars = new Map()
  for (const [time, counts] of state.traffic) {
    const begin = Math.floor(time / each) * each
    if (begin < first) continue
    const total = bars.get(begin) ?? { local: 0, inflight: 0, peer: 0, upstream: 0 }
    for (const [source] of SOURCES) total[source] += counts[source] ?? 0
    bars.set(begin, total)
  }
  const rate = (count) => (1000 * count) / each
  const most = Math.max(1000, ...[...bars.values()].map((counts) => rate(sum(counts))))
  const unit = 10 ** Math.floor(Math.log10(most))
  const peak = [1, 2, 5, 10].map((factor) => factor * unit).find((value) => value >= most) ?? most
  const y = (value) => height - bottom - (value / peak) * (height - bottom - top)
  const drawn = [0, peak / 2, peak].flatMap((value) => [
    element('svg:line', { class: 'grid', x1: left, x2: width, y1: y(value), y2: y(value) }),
    element(
      'svg:text',
      { class: 'axis', x: left - 6, y: y(value) + 4, 'text-anchor': 'end' },
      `${bytes(value)}/s`,
    ),
  ])
  const slot = (width - left) / (span / each)
  for (const [begin, counts] of bars) {
    let below = 0
    for (const [source] of SOURCES) {
      const value = rate(counts[source])
      if (value === 0) continue
      drawn.push(
        element('svg:rect', {
          class: source,
          x: left + ((begin - first) / each) * slot,
          y: y(below + value),
          width: Math.max(1, slot - 1),
          height: y(below) - y(below + value),
        }),
      )
      below += value
    }
  }
  drawn.push(
    element(
      'svg:text',
      { class: 'axis', x: left, y: height - 4 },
      `${duration(span)} ago`.replace(' 0 s', '').replace(' 0 min', ''),
    ),
    element('svg:text', { class: 'axis', x: width, y: height - 4, 'text-anchor': 'end' }, 'now'),
  )
  chart.replaceChildren(...drawn)
  at('legend').replaceChildren(
    ...SOURCES.map(([source, name]) =>
      element(
        'li',
        {},
        element('span', { class: `swatch ${source}` }),
        `${name} ${bytes(totals[source])}`,
      ),
    ),
  )
  at('trafficText').textContent = `In the last hour: ${origin(totals)}.`
}

let asked = 0
async function showImages() {
  const turn = (asked += 1)
  const query = new URLSearchParams({ match: at('imageFilter').value.trim(), from: state.from })
  const response = await fetch(`images?${query}`)
  const { total, images } = await response.json()
  if (turn !== asked) return
  at('images').replaceChildren(
    ...images.map(({ name, replicas }) =>
      element(
        'tr',
        {},
        element('td', {}, name),
        element('td', { class: 'number' }, String(replicas)),
      ),
    ),
  )
  say(
    'page',
    total === 0 ? 'none' : `${state.from + 1} to ${state.from + images.length} of ${total}`,
  )
  at('previous').disabled = state.from === 0
  at('next').disabled = state.from + PAGE >= total
}

function turnTo(from) {
  state.from = Math.max(0, from)
  showImages().catch(() => say('page', 'this node does not answer'))
}

async function examine() {
  const button = at('examine')
  button.disabled = true
  say('doctorNote', 'Examining …')
  try {
    const found = await (await fetch('doctor')).json()
    const rank = ['fail', 'warn', 'pass', 'not applicable']
    found.sort((a, b) => rank.indexOf(a.verdict) - rank.indexOf(b.verdict))
    at('findings').replaceChildren(
      ...found.map(({ check, verdict, said: words, remedy }) =>
        element(
          'li',
          { class: verdict === 'not applicable' ? 'none' : verdict },
          element('b', {}, { pass: 'ok', warn: 'look', fail: 'failed' }[verdict] ?? '–'),
          element(
            'div',
            {},
            element('p', {}, `${check}: ${words}`),
            ...(remedy === undefined ? [] : [element('p', {}, `What to do: ${remedy}`)]),
          ),
        ),
      ),
    )
    const wrong = found.filter(({ verdict }) => verdict === 'fail').length
    say(
      'doctorNote',
      wrong === 0 ? 'Nothing fails.' : `${wrong} ${wrong === 1 ? 'check fails' : 'checks fail'}.`,
    )
  } catch {
    say('doctorNote', 'This node does not answer.')
  }
  button.disabled = false
}

function listen() {
  const events = new EventSource('events')
  const on = (name, use) => events.addEventListener(name, ({ data }) => use(JSON.parse(data)))
  let images
  on('node', (node) => {
    const changed = node.store.announced !== images
    images = node.store.announced
    state.node = node
    showNode()
    showTogether()
    if (changed) turnTo(state.from)
  })
  on('peers', (peers) => {
    state.peers = peers
    showPeers()
  })
  on('pulls', (pulls) => {
    state.pulls = pulls
    showPulls()
  })
  on('traffic', (steps) => {
    for (const step of steps) state.traffic.set(step.at, step.bytes)
    showTraffic()
  })
  events.addEventListener('error', () => {
    at('state').className = 'pill bad'
    say('state', 'no connection')
  })
  events.addEventListener('open', showNode)
}

/** What the uplink costs: as this reader has it, else as the node is configured. */
async function usePrice() {
  const remembered = localStorage.getItem('price')
  const { dashboard } = remembered === null ? await (await fetch('config')).json() : {}
  const price = remembered ?? dashboard?.gigabytePrice ?? 0
  if (Number(price) > 0) at('price').value = price
  showTraffic()
}

usePrice().catch(() => {})
at('price').addEventListener('input', () => {
  localStorage.setItem('price', at('price').value)
  showTraffic()
})
at('span').addEventListener('change', showTraffic)
at('onlyRunning').addEventListener('change', showPulls)
at('peerFilter').addEventListener('input', showPeers)
at('imageFilter').addEventListener('input', () => turnTo(0))
at('previous').addEventListener('click', () => turnTo(state.from - PAGE))
at('next').addEventListener('click', () => turnTo(state.from + PAGE))
at('examine').addEventListener('click', () => void examine())
addEventListener('resize', showTraffic)
setInterval(showTraffic, STEP)
listen()
// What is wrong is told without being asked for; so often a node is not examined that pages could burden it.
void examine()
