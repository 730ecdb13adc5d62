import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { until } from '../wait.ts'

/** What a page has to look like while it is looked at. */
export interface Viewport {
  readonly width: number
  readonly height: number
  readonly dark?: boolean
}

/** A page in a real Chromium without a window, spoken to over its DevTools protocol. */
export class Browser implements AsyncDisposable {
  readonly #child: ChildProcess
  readonly #directory: string
  readonly #socket: WebSocket
  readonly #waiting = new Map<number, (message: { result?: unknown; error?: unknown }) => void>()
  /** Errors and refusals that the page has reported */
  readonly complaints: string[] = []
  #ids = 0

  private constructor(child: ChildProcess, directory: string, socket: WebSocket) {
    this.#child = child
    this.#directory = directory
    this.#socket = socket
    socket.addEventListener('message', ({ data }) => {
      const message = JSON.parse(String(data)) as {
        id?: number
        method?: string
        params?: { entry?: { level: string; text: string }; exceptionDetails?: { text: string } }
        result?: unknown
        error?: unknown
      }
      if (message.id !== undefined) this.#waiting.get(message.id)?.(message)
      if (message.method === 'Runtime.exceptionThrown')
        this.complaints.push(JSON.stringify(message.params?.exceptionDetails))
      if (message.method === 'Log.entryAdded' && message.params?.entry?.level === 'error')
        this.complaints.push(message.params.entry.text)
    })
  }

  /** Starts one; its profile is thrown away with it. */
  static async start(program: string): Promise<Browser> {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-browser-'))
    const child = spawn(
      program,
      [
        '--headless=new',
        '--no-sandbox',
        '--disable-gpu',
        '--disable-dev-shm-usage',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--hide-scrollbars',
        `--user-data-dir=${directory}`,
        '--remote-debugging-port=0',
        'about:blank',
      ],
      { stdio: 'ignore' },
    )
    try {
      const port = await until(
        async () => {
          if (child.exitCode !== null) throw new Error('chromium has ended')
          const [port] = (await readFile(join(directory, 'DevToolsActivePort'), 'utf8')).split('\n')
          return port !== '' && port
        },
        { timeoutMs: 60_000, what: 'chromium is there' },
      )
      // The port is there before the page is.
      const page = await until(
        async () => {
          const pages = (await (await fetch(`http://127.0.0.1:${port}/json`)).json()) as {
            type: string
            webSocketDebuggerUrl: string
          }[]
          return pages.find(({ type }) => type === 'page')
        },
        { timeoutMs: 60_000, what: 'chromium has a page' },
      )
      const socket = new WebSocket(page.webSocketDebuggerUrl)
      await once(socket, 'open')
      const browser = new Browser(child, directory, socket)
      for (const domain of ['Page', 'Runtime', 'Log', 'Network'])
        await browser.#ask(`${domain}.enable`)
      return browser
    } catch (error) {
      child.kill('SIGKILL')
      throw error
    }
  }

  /** Resolves when the page is loaded. */
  async open(url: string, { width, height, dark = false }: Viewport): Promise<void> {
    await this.resize({ width, height, dark })
    await this.#ask('Page.navigate', { url })
    await until(async () => (await this.evaluate('document.readyState')) === 'complete')
  }

  async resize({ width, height, dark = false }: Viewport): Promise<void> {
    await this.#ask('Emulation.setDeviceMetricsOverride', {
      width,
      height,
      deviceScaleFactor: 1,
      mobile: false,
    })
    const features = [{ name: 'prefers-color-scheme', value: dark ? 'dark' : 'light' }]
    await this.#ask('Emulation.setEmulatedMedia', { features })
  }

  /** The value of an expression in the page. */
  async evaluate(expression: string): Promise<unknown> {
    const answer = (await this.#ask('Runtime.evaluate', {
      expression,
      returnByValue: true,
      awaitPromise: true,
    })) as { result: { value?: unknown }; exceptionDetails?: unknown }
    if (answer.exceptionDetails !== undefined)
      throw new Error(JSON.stringify(answer.exceptionDetails))
    return answer.result.value
  }

  /** As the key on a keyboard does. */
  async press(key: string, code = key): Promise<void> {
    const virtual = { Tab: 9, Enter: 13, ' ': 32 }[key] ?? 0
    const event = { key, code, windowsVirtualKeyCode: virtual }
    const text = key === 'Enter' ? '\r' : key.length === 1 ? key : undefined
    await this.#ask('Input.dispatchKeyEvent', { type: 'keyDown', ...event, ...(text && { text }) })
    await this.#ask('Input.dispatchKeyEvent', { type: 'keyUp', ...event })
  }

  /** Writes the whole page, as it is now, to a PNG file. */
  async screenshot(path: string): Promise<void> {
    const { data } = (await this.#ask('Page.captureScreenshot', {
      format: 'png',
      captureBeyondViewport: true,
    })) as { data: string }
    await writeFile(path, Buffer.from(data, 'base64'))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#socket.close()
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      const exit = once(this.#child, 'exit')
      this.#child.kill('SIGKILL')
      await exit
    }
    // Its helpers end a moment after it, and write until then.
    await until(() => rm(this.#directory, { recursive: true, force: true }).then(() => true), {
      what: 'the profile is gone',
    })
  }

  async #ask(method: string, params: object = {}): Promise<unknown> {
    const id = (this.#ids += 1)
    const { promise, resolve } = Promise.withResolvers<{ result?: unknown; error?: unknown }>()
    this.#waiting.set(id, resolve)
    const timer = setTimeout(() => resolve({ error: `${method}: no answer` }), 30_000)
    this.#socket.send(JSON.stringify({ id, method, params }))
    const { result, error } = await promise
    clearTimeout(timer)
    this.#waiting.delete(id)
    if (error !== undefined) throw new Error(JSON.stringify(error))
    return result
  }
}
