import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, beforeEach, suite, test } from 'node:test'
import { promisify } from 'node:util'
import { BUNDLED } from '../harness/bundle.ts'
import { Machine } from '../harness/machine.ts'
import { skipWithout, sshdEnvironment, tools } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'sshd')

const REGISTRIES = '/etc/rancher/k3s/registries.yaml'
const OLD = '# by hand, no line end: ä\nmirrors:\n  docker.io:'
const NEW = 'mirrors:\n  docker.io:\n    endpoint: ["https://mirror.test"]\n'

/** Says what it was asked; units are files with their state, and one that is `broken` does not come back. */
const SYSTEMCTL = `#!/bin/sh
case $1 in
  cat) [ -e /run/units/$2 ] ;;
  is-active) cat /run/units/$2; [ "$(cat /run/units/$2)" = active ] ;;
  restart)
    echo "restart $2" >> /run/asked
    while [ -e /run/hang ]; do sleep 0.05; done
    if [ -e /run/broken ]; then echo failed > /run/units/$2; echo "Job for $2 failed" >&2; exit 1; fi
    echo active > /run/units/$2 ;;
esac
`
const SSHD_CONFIG = `Port 22
HostKey /run/host_key
AuthorizedKeysFile /run/authorized_keys
PidFile /run/sshd.pid
PasswordAuthentication no
StrictModes no
UsePAM no
SetEnv PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
`
/** Answers /readyz as Shoal does, with 200 while there is a file. */
const READYZ = `require('http').createServer((request, response) => {
  response.statusCode = require('fs').existsSync('/run/ready') ? 200 : 503
  response.end()
}).listen(9090, '127.0.0.1')`

interface Ran {
  readonly status: number
  readonly out: string
  readonly err: string
}

function jsonLines(text: string): Record<string, unknown>[] {
  return text
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as Record<string, unknown>)
}

suite('shoal rollout over real sshd', { skip }, () => {
  let directory: string
  let control: Machine
  const nodes = new Map<string, Machine>()

  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'shoal-rollout-'))
    await promisify(execFile)('ssh-keygen', ['-qt', 'ed25519', '-N', '', '-f', file('id')])
    control = await Machine.create('control')
    const units = { server: 'k3s', agent1: 'k3s-agent', agent2: 'k3s-agent', plain: 'shoal' }
    let known = ''
    for (const [index, [name, unit]] of Object.entries(units).entries()) {
      const node = await Machine.create(name)
      nodes.set(name, node)
      known += await startNode(node, index, unit)
    }
    await writeFile(file('known_hosts'), known)
    const names = [...nodes.keys()]
    const sshConfig = `UserKnownHostsFile ${file('known_hosts')}
GlobalKnownHostsFile /dev/null
IdentityFile ${file('id')}
IdentitiesOnly yes
${names.map((name, index) => `Host ${name}\n  HostName 10.9.${index}.2\n  HostKeyAlias ${name}`).join('\n')}
Host *
  User root
`
    await writeFile(file('ssh_config'), sshConfig)
    await writeFile(file('new.yaml'), NEW)
  })
  after(async () => {
    for (const machine of [...nodes.values(), control]) await machine[Symbol.asyncDispose]()
    await rm(directory, { recursive: true, force: true })
  })
  beforeEach(async () => {
    for (const [name, node] of nodes) {
      await sh(
        node,
        `rm -rf /etc/rancher /etc/shoal /run/asked /run/broken /run/hang /usr/local/bin/sudo
        for unit in /run/units/*; do echo active > $unit; done
        mkdir -p /etc/rancher/k3s; touch /run/ready`,
      )
      if (name === 'agent2') continue // has none
      await writeFile(node.path(REGISTRIES), OLD)
      await chmod(node.path(REGISTRIES), 0o640)
    }
    await hosts('agent1\nagent2 agent\nplain\nserver server\n')
  })

  const file = (name: string) => join(directory, name)
  const hosts = (text: string) => writeFile(file('hosts'), text)
  const sh = (machine: Machine, script: string) => machine.exec(['sh', '-c', script])
  const node = (name: string): Machine => {
    const found = nodes.get(name)
    assert.ok(found)
    return found
  }

  /** @returns its line for known_hosts */
  async function startNode(machine: Machine, index: number, unit: string): Promise<string> {
    const link = `link add n${index} type veth peer name eth0 netns ${machine.pid}`
    await control.exec(['ip', ...link.split(' ')])
    await sh(control, `ip addr add 10.9.${index}.1/24 dev n${index}; ip link set n${index} up`)
    await sh(machine, `ip addr add 10.9.${index}.2/24 dev eth0; ip link set eth0 up`)
    await sh(
      machine,
      `mkdir -p /run/sshd /run/units /etc/ssh; touch /run/containerd-is-here
      grep -q ^sshd: /etc/passwd || echo 'sshd:x:974:65534::/run/sshd:/usr/sbin/nologin' >> /etc/passwd
      echo 'ops:*:1974:1974::/run/ops:/bin/sh' >> /etc/passwd
      mkdir -p /run/ops; chmod 755 /run; ssh-keygen -qt ed25519 -N '' -f /run/host_key
      echo active > /run/units/${unit}.service`,
    )
    await writeFile(machine.path('/run/sshd_config'), SSHD_CONFIG)
    await writeFile(machine.path('/run/authorized_keys'), await readFile(file('id.pub')))
    await writeFile(machine.path('/usr/local/bin/systemctl'), SYSTEMCTL, { mode: 0o755 })
    await writeFile(machine.path('/usr/local/bin/containerd'), '#!/bin/sh\n', { mode: 0o755 })
    machine.run([tools.sshd ?? '', '-D', '-e', '-f', '/run/sshd_config'], { env: sshdEnvironment })
    machine.run([process.execPath, '-e', READYZ])
    await until(
      () =>
        sh(machine, 'bash -c ": < /dev/tcp/127.0.0.1/22 && : < /dev/tcp/127.0.0.1/9090"').then(
          () => true,
          () => false,
        ),
      {
        what: `sshd of ${machine.hostname}`,
      },
    )
    const [type, key] = (await readFile(machine.path('/run/host_key.pub'), 'utf8')).split(' ')
    return `${machine.hostname} ${type} ${key}\n`
  }

  function start(...args: readonly string[]) {
    const common = ['rollout', '--hosts', file('hosts'), '--ssh-config', file('ssh_config')]
    const [node, bundle] = BUNDLED
    const child = control.spawn(node, [bundle, ...common, ...args])
    let [out, err] = ['', '']
    child.stdout?.on('data', (chunk: Buffer) => (out += chunk.toString()))
    child.stderr?.on('data', (chunk: Buffer) => (err += chunk.toString()))
    const ended = once(child, 'close').then(([status]): Ran => ({
      status: Number(status),
      out,
      err,
    }))
    return { child, ended }
  }
  const run = (...args: readonly string[]): Promise<Ran> => start(...args).ended
  const rollout = (...args: readonly string[]): Promise<Ran> =>
    run('--registries', file('new.yaml'), ...args)

  const textOf = (name: string, path = REGISTRIES): Promise<string | undefined> =>
    readFile(node(name).path(path), 'utf8').catch(() => undefined)
  const asked = async (name: string): Promise<string[]> =>
    ((await textOf(name, '/run/asked')) ?? '').split('\n').filter(Boolean)
  const leftOvers = async (name: string): Promise<string[]> =>
    (await readdir(node(name).path('/etc/rancher/k3s'))).filter(
      (each) => each !== 'registries.yaml',
    )

  test('a file goes to servers, then agents; a second run does nothing; undo is byte for byte', async () => {
    const dry = await rollout('--dry-run')
    assert.equal(dry.status, 0, dry.err)
    assert.match(dry.out, /^server \(K3s server\): restarts k3s\n--- /)
    assert.match(dry.out, /\n\+ {4}endpoint: \["https:\/\/mirror\.test"\]\n/)
    assert.equal(await textOf('server'), OLD)

    const first = await rollout()
    assert.equal(first.status, 0, first.err)
    assert.equal(first.out, 'server: done\nagent1: done\nagent2: done\nplain: done\n')
    for (const name of nodes.keys()) assert.equal(await textOf(name), NEW, name)
    const { mode } = await stat(node('server').path(REGISTRIES))
    assert.equal(mode & 0o777, 0o640)
    assert.equal((await stat(node('agent2').path(REGISTRIES))).mode & 0o777, 0o600)
    assert.deepEqual(await asked('server'), ['restart k3s.service'])
    assert.deepEqual(await asked('agent2'), ['restart k3s-agent.service'])
    assert.deepEqual(await asked('plain'), []) // Shoal watches the file itself

    const second = await rollout('--json')
    assert.deepEqual(
      jsonLines(second.out).filter(({ event }) => event === 'result'),
      ['server', 'agent1', 'agent2', 'plain'].map((host) => {
        return { event: 'result', host, outcome: 'unchanged' }
      }),
    )
    assert.equal((await asked('server')).length, 1)

    const back = await rollout('--undo')
    assert.equal(back.status, 0, back.err)
    for (const name of ['server', 'agent1', 'plain']) assert.equal(await textOf(name), OLD, name)
    assert.equal(await textOf('agent2'), undefined)
    assert.equal((await stat(node('server').path(REGISTRIES))).mode & 0o777, 0o640)
    for (const name of nodes.keys()) assert.deepEqual(await leftOvers(name), [], name)
    assert.equal((await asked('server')).length, 2)
    const again = await rollout('--undo')
    assert.match(again.out, /^server: unchanged\n/)
  })

  test('the first failure stops it, says what to do, and the same again goes on', async () => {
    await writeFile(node('agent1').path('/run/broken'), '')
    const failed = await rollout()
    assert.equal(failed.status, 1)
    assert.match(
      failed.out,
      /^server: done\nagent1: failed: k3s-agent after its restart: Job for k3s-agent\.service failed; see "journalctl -u k3s-agent" there\nagent2: untouched\nplain: untouched\n$/,
    )
    assert.match(failed.err, /1 of 4 nodes failed, 2 were not begun\n {2}=> .*--undo/)
    assert.equal(await textOf('agent2'), undefined)

    await rm(node('agent1').path('/run/broken'))
    const again = await rollout('--batch', '2')
    assert.equal(again.out, 'server: unchanged\nagent1: done\nagent2: done\nplain: done\n')
    assert.equal((await asked('agent1')).length, 2) // its file was there already, but K3s was not well
  })

  test('a node that is not ready again fails at the deadline', async () => {
    await hosts('server')
    await sh(node('server'), 'touch /run/hang')
    const { ended } = start('--registries', file('new.yaml'), '--deadline', '2')
    await until(async () => (await asked('server')).length === 1)
    await sh(node('server'), 'rm /run/ready /run/hang')
    const { status, out } = await ended
    assert.equal(status, 1)
    assert.match(out, /server: failed: .*(\/readyz with 200|no end after)/)
  })

  test('nothing is changed anywhere while one node is not fit', async () => {
    await hosts('server\nagent1 server\nplain:2222\n')
    const { status, err } = await rollout()
    assert.equal(status, 1)
    assert.match(err, /nothing was changed anywhere:\n/)
    assert.match(err, /agent1: the hosts file says server, but it is a K3s agent\n/)
    assert.match(err, /plain:2222: ssh: .*[Cc]onnection refused/)
    assert.equal(await textOf('server'), OLD)
    await writeFile(file('certs.yaml'), 'configs: {r.test: {tls: {ca_file: /etc/no-ca.pem}}}\n')
    await hosts('server')
    const certs = await run('--registries', file('certs.yaml'))
    assert.match(certs.err, /server: \/etc\/no-ca\.pem is not there/)
    await writeFile(file('bad.yaml'), 'mirrors: [a\n')
    assert.match((await run('--registries', file('bad.yaml'))).err, /bad\.yaml:/)
  })

  test('a user without root needs sudo that does not ask; an unknown host key is refused', async () => {
    await hosts('ops@server')
    assert.match((await rollout()).err, /ops@server: the user is not root, and there is no sudo/)
    const sudo = (script: string) =>
      writeFile(node('server').path('/usr/local/bin/sudo'), `#!/bin/sh\n${script}`, { mode: 0o755 })
    await sudo('echo "sudo: a password is required" >&2; exit 1')
    assert.match((await rollout()).err, /ops@server: sudo asks for a password: /)
    // It cannot make him root here; it passes on what it was told, and the files are his.
    await sudo('[ "$1" = -n ] && shift && exec "$@"')
    await sh(
      node('server'),
      'chown -R ops:1974 /etc/rancher 2>/dev/null || chown -R 1974:1974 /etc/rancher; chmod 777 /run; chmod 666 /run/units/*',
    )
    const { status, err } = await rollout()
    assert.equal(status, 0, err)
    assert.equal(await textOf('server'), NEW)
    await hosts('root@10.9.0.2')
    assert.match((await rollout()).err, /ssh: Host key verification failed/)
  })

  test('restarts are only where K3s needs them; the daemon is restarted for its own file', async () => {
    await hosts('server\nplain')
    await writeFile(file('comment.yaml'), `# new\n${OLD}\n`)
    const { status, err } = await run('--registries', file('comment.yaml'))
    assert.equal(status, 0, err)
    assert.equal(await textOf('server'), `# new\n${OLD}\n`)
    assert.deepEqual(await asked('server'), [])
    await writeFile(file('shoal.yaml'), 'bootstrap: [10.0.0.1]\n')
    await writeFile(file('k3s.yaml'), 'embedded-registry: true\ntoken: hunter2\n')
    const both = ['--config', file('shoal.yaml'), '--k3s-config', file('k3s.yaml')]
    const dry = await run(...both, '--dry-run')
    assert.doesNotMatch(dry.out + dry.err, /hunter2/)
    assert.equal((await run(...both)).status, 0)
    assert.deepEqual(await asked('server'), ['restart k3s.service'])
    assert.deepEqual(await asked('plain'), ['restart shoal.service'])
    const dropIn = '/etc/rancher/k3s/config.yaml.d/50-shoal.yaml'
    assert.equal(await textOf('server', dropIn), 'embedded-registry: true\ntoken: hunter2\n')
    assert.equal(await textOf('plain', dropIn), undefined)
    assert.equal((await run(...both, '--undo')).status, 0)
    assert.deepEqual(await readdir(node('server').path('/etc/rancher/k3s/config.yaml.d')), [])
  })

  test('killed at any step, the file is the old one or the new one, and the next run ends it', async () => {
    await hosts('server')
    const steps = ['cat 1', 'chmod 1', 'cp 1', 'mv 1', 'sync 1', 'mv 2', 'rm 2', 'sync 2']
    for (const step of steps) {
      const [program = '', nth = ''] = step.split(' ')
      const standIn = node('server').path(`/usr/local/bin/${program}`)
      // Does half of it if it copies, and then the shell that called it is gone, and with it the connection.
      const work = program === 'cat' ? 'head -c 10' : `/usr/bin/${program} "$@"`
      const script = `#!/bin/sh
        case "$(tr '\\0' ' ' < /proc/$PPID/cmdline)" in *shoal-none-before*mktemp*|*mktemp*shoal-none-before*) ;; *) exec /usr/bin/${program} "$@" ;; esac
        echo x >> /run/calls
        [ "$(wc -l < /run/calls)" = ${nth} ] || exec /usr/bin/${program} "$@"
        ${work}
        kill -9 $PPID`
      await rm(node('server').path('/run/calls'), { force: true })
      await writeFile(standIn, script, { mode: 0o755 })
      const broken = await rollout()
      await rm(standIn)
      assert.equal(broken.status, 1, `${step}: ${broken.out}${broken.err}`)
      assert.ok([OLD, NEW].includes((await textOf('server')) ?? ''), step)
      const before = (await asked('server')).length
      const again = await rollout()
      assert.equal(again.out, 'server: done\n', `${step}: ${again.err}`)
      assert.equal(await textOf('server'), NEW)
      assert.equal((await asked('server')).length, before + 1, step)
      assert.equal((await rollout('--undo')).status, 0)
      assert.equal(await textOf('server'), OLD, step)
      assert.deepEqual(await leftOvers('server'), [], step)
    }
  })

  test('interrupted while a node restarts, it ends; the next run restarts what was not seen healthy', async () => {
    await hosts('server\nagent1')
    await writeFile(node('server').path('/run/hang'), '')
    const { child, ended } = start('--registries', file('new.yaml'))
    await until(async () => (await asked('server')).length === 1)
    child.kill('SIGINT')
    const { status, out } = await ended
    assert.equal(status, 1)
    assert.match(out, /^server: failed: k3s after its restart: interrupted.*\nagent1: untouched\n$/)
    await rm(node('server').path('/run/hang'))
    assert.equal((await rollout()).out, 'server: done\nagent1: done\n')
    assert.equal((await asked('server')).length, 2)
  })
})
