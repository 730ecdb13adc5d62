import { until } from '../wait.ts'
import type { ExecOptions, Machine, Program } from './machine.ts'
import { tools } from './tools.ts'

/** What units refer to, of all that a distribution has */
const TARGETS = ['basic', 'default', 'multi-user', 'network-online', 'sockets', 'sysinit']

/** What the daemon prints, and what systemd does: there is no journal. */
const LOG = '/run/shoal.log'
const CONSOLE = '/run/console.log'

/**
 * systemd as the first process of a machine: units under `/etc/systemd/system` are started, held and started again as on a
 * real one, and `systemctl` works there. Processes are its own (a PID namespace), and so is a control group, which is
 * removed in the end. Of the distribution's units there is none but targets.
 */
export class ServiceManager implements AsyncDisposable {
  readonly #machine: Machine
  readonly #program: Program
  readonly #group: string
  /** What starts a program where the services run, from any program of the machine */
  readonly enter: readonly string[]

  private constructor(machine: Machine, program: Program, group: string, pid: number) {
    this.#machine = machine
    this.#program = program
    this.#group = group
    this.enter = ['nsenter', '--target', String(pid), '--pid', '--mount', '--']
  }

  static async start(machine: Machine): Promise<ServiceManager> {
    const group = `/run/.cgroup/shoal-test-${machine.pid}`
    // Groups of tests that were killed are taken away, too.
    await machine.exec([
      'sh',
      '-ec',
      `mkdir -p /run/systemd/system /run/.cgroup
       for each in /etc/systemd /usr/lib/systemd/system /usr/lib/systemd/system-generators; do mount -t tmpfs tmpfs $each; done
       mkdir -p /etc/systemd/system/shoal.service.d
       for target in ${TARGETS.join(' ')}; do echo '[Unit]' > /usr/lib/systemd/system/$target.target; done
       printf '[Unit]\\nDefaultDependencies=no\\n' > /usr/lib/systemd/system/shutdown.target
       printf '[Service]\\nStandardOutput=append:${LOG}\\nStandardError=append:${LOG}\\n' > /etc/systemd/system/shoal.service.d/log.conf
       mount -t cgroup2 cgroup2 /run/.cgroup
       for each in /run/.cgroup/shoal-test-*; do
         [ ! -d "$each" ] || [ -d "/proc/\${each##*-}" ] || find "$each" -depth -type d -exec rmdir {} + || true
       done
       mkdir ${group}`,
    ])
    const start = `echo $$ > ${group}/cgroup.procs
      exec unshare --pid --fork --kill-child --cgroup --mount --propagation private sh -ec '
        umount -l /run/.cgroup
        mount -t proc proc /proc
        umount -l /sys/fs/cgroup
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
        : > ${CONSOLE}
        mount --bind ${CONSOLE} /dev/console
        exec ${tools.systemd} --log-target=console --log-level=info --show-status=no'`
    // It is told what it is in, and does not look after what belongs to the machine outside.
    const env = { container: 'test' }
    const program = machine.run(['sh', '-ec', start], { env })
    try {
      const pid = await until(
        async () => {
          const children = `/proc/${program.pid}/task/${program.pid}/children`
          return Number(await machine.exec(['cat', children])) || undefined
        },
        { what: 'systemd is started' },
      )
      const manager = new ServiceManager(machine, program, group, pid)
      await until(() => manager.systemctl('is-active', 'default.target'), {
        timeoutMs: 60_000,
        what: 'systemd is up',
      })
      return manager
    } catch (error) {
      await program.kill()
      throw new Error(`${String(error)}; it says:\n${program.tail()}`, { cause: error })
    }
  }

  /** Runs a program where the services run, which sees only what they see. */
  exec(argv: readonly string[], options?: ExecOptions): Promise<string> {
    return this.#machine.exec([...this.enter, ...argv], options)
  }

  /** @throws with what it says when its exit status is not 0 */
  systemctl(...args: readonly string[]): Promise<string> {
    return this.exec(['/usr/bin/systemctl', ...args])
  }

  /** The process of a service dies, as in a crash. */
  async kill(service: string): Promise<void> {
    await this.systemctl('kill', '--kill-whom=main', '--signal=KILL', service)
  }

  /** A property of a unit, as `systemctl show` has it. */
  async property(unit: string, name: string): Promise<string> {
    return (await this.systemctl('show', '--value', '--property', name, unit)).trim()
  }

  /** Of some units, whether each runs, and at boots: `active enabled` */
  async statesOf(...units: readonly string[]): Promise<string[]> {
    const states = await Promise.all(
      units.map(async (unit) => [
        await this.property(unit, 'ActiveState'),
        await this.property(unit, 'UnitFileState'),
      ]),
    )
    return states.map((each) => each.join(' '))
  }

  /** The process of a service, as this machine's other programs see it. */
  async pidOf(service: string): Promise<number> {
    const processes = `${this.#group}/system.slice/${service}/cgroup.procs`
    return Number((await this.#machine.exec(['cat', processes])).split('\n', 1)[0])
  }

  /** What systemd says, and what the daemon has printed. */
  async log(): Promise<string> {
    return this.exec(['sh', '-c', `cat ${CONSOLE} ${LOG} || true`])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program.kill()
    const remove = `find ${this.#group} -depth -type d -exec rmdir {} +`
    // Its processes end one after the other.
    await until(() => this.#machine.exec(['sh', '-c', remove]).then(() => true), {
      timeoutMs: 30_000,
      what: 'the control group of systemd is empty',
    })
  }
}
