/**
 * How long a new user waits: on a Debian with nothing installed, from README alone, until an image has come from another node. Takes root,
 * debootstrap and a network for apt and npm; the base system is there before the clock starts. Not part of the tests: it downloads
 * half a gigabyte. The two hosts have networks of their own with a cable between them, and no systemd, so that units are started by hand.
 */
import { execFile } from 'node:child_process'
import { cp, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { buildImage, imageArchive } from '../src/cli/demo-image.ts'
import { CriImages } from '../src/store/containerd/cri/images.ts'
import { blocksOf } from '../test/harness/docs.ts'
import { Machine } from '../test/harness/machine.ts'
import { readUnitStart } from '../test/harness/unit-file.ts'
import { until } from '../test/wait.ts'

const ROOT = new URL('..', import.meta.url).pathname
const IMAGE = 'ksd.test.com/ksd/nginx:1.27'
const SUITE = 'bookworm'
const CERTIFICATES = '/etc/ssl/certs/ca-certificates.crt'
const run = promisify(execFile)
const options = { maxBuffer: 64 * 1024 * 1024 }

/** The commands of README under a heading. */
function readme(heading: string): string {
  const block = blocksOf('README.md').find((each) => each.heading === heading)
  if (block === undefined) throw new Error(`README has no commands under "${heading}"`)
  return block.text
}

const directory = await mkdtemp(join(tmpdir(), 'shoal-new-user-'))
const base = join(directory, 'debian')
await using stack = new AsyncDisposableStack()
stack.defer(() => rm(directory, { recursive: true, force: true }))

console.log('a minimal Debian, before the clock starts')
await run('debootstrap', ['--variant=minbase', SUITE, base], options)
await mkdir(join(base, 'opt/shoal'), { recursive: true })
const tree = `git -C '${ROOT}' archive HEAD | tar -x -C '${base}/opt/shoal'`
await run('sh', ['-euc', tree], options)
// Whom this machine trusts
await mkdir(join(base, 'etc/ssl/certs'), { recursive: true })
await cp(CERTIFICATES, join(base, 'etc/ssl/trusted.crt'))
for (const [what, where] of [
  ['--types=proc proc', 'proc'],
  ['--bind /dev', 'dev'],
] as const) {
  await run('mount', [...what.split(' '), join(base, where)])
  stack.defer(() => run('umount', ['--lazy', join(base, where)]).then(() => {}))
}

const begin = performance.now()
let last = begin
function lap(what: string): void {
  const now = performance.now()
  console.log(`${((now - last) / 1000).toFixed(1).padStart(6)} s  ${what}`)
  last = now
}
const inBase = (command: string) =>
  run('chroot', [base, 'sh', '-euc', command], {
    ...options,
    env: {
      PATH: '/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
      HOME: '/root',
      DEBIAN_FRONTEND: 'noninteractive',
      NODE_EXTRA_CA_CERTS: '/etc/ssl/trusted.crt',
    },
  })

const packages = 'npm libatomic1 containerd'
await inBase(`apt-get update -qq && apt-get install -y -qq --no-install-recommends ${packages}`)
lap(`apt-get install ${packages}`)
const { stdout } = await inBase(`cd /opt/shoal && npm run --silent demo -- --exit`)
if (!stdout.includes('Every blob has the digest it was asked for by.')) throw new Error(stdout)
lap('npm run demo: three nodes on this host pull from each other')

// Two hosts that are both as this one is now.
const hosts = await Promise.all(
  ['10.0.0.11', '10.0.0.12'].map(async (address, index) => {
    const machine = stack.use(await Machine.create(`host${index + 1}`))
    const layers = `lowerdir=${base},upperdir=/run/upper,workdir=/run/work`
    const overlay = `mkdir /run/upper /run/work /run/root && mount -t overlay -o ${layers} overlay /run/root
      mount -t proc proc /run/root/proc && mount --rbind /dev /run/root/dev && mount -t tmpfs tmpfs /run/root/run`
    await machine.exec(['sh', '-euc', overlay])
    return { machine, address }
  }),
)
const [one, two] = hosts
if (one === undefined || two === undefined) throw new Error('two hosts')
const cable = ['type', 'veth', 'peer', 'name', 'eth0', 'netns']
await one.machine.exec(['ip', 'link', 'add', 'eth0', ...cable, String(two.machine.pid)])
for (const { machine, address } of hosts) {
  await machine.exec(['ip', 'address', 'add', `${address}/24`, 'dev', 'eth0'])
  await machine.exec(['ip', 'link', 'set', 'eth0', 'up'])
  await machine.exec(['ip', 'route', 'add', 'default', 'dev', 'eth0'])
}
const at = (machine: Machine, command: string) =>
  machine.exec(['chroot', '/run/root', 'sh', '-euc', command], { timeoutMs: 120_000 })

for (const { machine } of hosts) {
  // What README says has to be in containerd's configuration, and Debian has not.
  const config =
    '[plugins."io.containerd.grpc.v1.cri".registry]\n  config_path = "/etc/containerd/certs.d"'
  await at(machine, `echo '${config}' >> /etc/containerd/config.toml`)
  machine.run(['chroot', '/run/root', 'containerd'])
  await until(() => at(machine, 'ctr version'), { timeoutMs: 30_000, what: 'containerd answers' })
  const [install = ''] = readme('A node in a minute').split('\n')
  await at(machine, install.replace(' install ', ' install --no-start '))
  const { argv } = readUnitStart(machine.path('/run/root/etc/systemd/system/shoal.service'))
  machine.run(['chroot', '/run/root', ...argv])
}
for (const { machine } of hosts)
  await until(
    async () => {
      const { body } = await machine.get('http://127.0.0.1:9090/metrics')
      return /^shoal_peers 1$/m.test(body) && true
    },
    { timeoutMs: 60_000, what: 'the hosts have found each other' },
  )
lap('shoal install on two hosts, which find each other')

await writeFile(
  one.machine.path('/run/root/run/image.tar'),
  imageArchive(await buildImage({ layers: [20_000_000, 1000] }), [IMAGE]),
)
await at(one.machine, 'ctr --namespace k8s.io images import /run/image.tar')
using cri = new CriImages(two.machine.path('/run/root/run/containerd/containerd.sock'))
await until(() => cri.pull(IMAGE), {
  timeoutMs: 30_000,
  what: 'the pull comes from the other host',
})
const metrics = (await two.machine.get('http://127.0.0.1:9090/metrics')).body
const bytes = /^shoal_bytes_total\{listener="local",source="peer".*\} (\d+)$/m.exec(metrics)?.[1]
if (Number(bytes) < 20_000_000) throw new Error(`only ${bytes} bytes came from the peer`)
lap(`an image imported on one, pulled on the other: ${bytes} bytes from the peer`)
console.log(`${((last - begin) / 1000).toFixed(1).padStart(6)} s  in all`)
