import { constants, open, type FileHandle } from 'node:fs/promises'
import { setTimeout as delay } from 'node:timers/promises'
import {
  isAlias,
  isMap,
  isNode,
  isScalar,
  isSeq,
  LineCounter,
  parseDocument,
  Scalar,
  type DocumentOptions,
  type ParseOptions,
  type SchemaOptions,
} from 'yaml'
import { hasCode } from '../system-error.ts'

/** One thing wrong with the configuration, and where. */
export interface ConfigProblem {
  readonly file?: string
  /** From 1 */
  readonly line?: number
  /** From 1 */
  readonly column?: number
  /** A key path such as `listen.local`, or the flag or variable that set it */
  readonly key?: string
  readonly message: string
}

/** The configuration cannot be used; the message has one problem a line. */
export class ConfigInvalidError extends Error {
  override readonly name = 'ConfigInvalidError'
  readonly code = 'ERR_CONFIG_INVALID'
  readonly problems: readonly ConfigProblem[]

  constructor(problems: readonly ConfigProblem[], options?: ErrorOptions) {
    super(problems.map(formatProblem).join('\n'), options)
    this.problems = problems
  }
}

/** A problem as one line: where, and what. */
export function formatProblem({ file, line, column, key, message }: ConfigProblem): string {
  const place = [file, line, column].filter((part) => part !== undefined).join(':')
  return [place, key, message].filter((part) => part !== undefined && part !== '').join(': ')
}

/** No configuration of ours or of K3s comes near; a bigger file is a wrong file. */
const MAX_FILE_BYTES = 1024 * 1024
/** Enough for any file written by hand, with an alias for every registry; more is an attempt to fill the memory. */
const MAX_ALIASES = 10_000
/** Of what is wrong with a file so much is said; the rest mostly follows from it. */
const MAX_PROBLEMS = 10
/** What is no file, such as a pipe from another program, has so long to be read. */
const PIPE_TIMEOUT_MS = 5000
const PIPE_PAUSE_MS = 10

export type KeyPath = readonly PropertyKey[]

/** A YAML file that was read: what it says, and on which line. */
export interface YamlFile {
  readonly file: string
  readonly root: unknown
  /** The values of a key at the top that is there several times, in order; in {@link root} is the last of them */
  all(key: string): unknown[]
  /** The line of a second document, if there is one; only with `firstDocument` */
  readonly secondDocument: number | undefined
  /** Line of the key or list item, or of the nearest thing above it that is in the file */
  lineOf(path: KeyPath): number
  /** True for a value that is a scalar in quotes: YAML then means text, whatever it looks like. */
  isQuoted(path: KeyPath): boolean
}

/** How a file is read. */
export type YamlOptions = ParseOptions &
  DocumentOptions &
  SchemaOptions & {
    /** Of several documents the first counts, and the others are no error */
    readonly firstDocument?: boolean
  }

/**
 * Reads a YAML file; undefined if there is none.
 * @throws {ConfigInvalidError} if it cannot be read or is no YAML
 */
export async function readYamlFile(
  file: string,
  options: YamlOptions = {},
): Promise<YamlFile | undefined> {
  const text = await readTextFile(file)
  return text === undefined ? undefined : parseYaml(text, file, options)
}

/**
 * What a text says that is that of `file`, or could be.
 * @throws {ConfigInvalidError} if it is no YAML
 */
export function parseYaml(
  text: string,
  file: string,
  { firstDocument = false, ...options }: YamlOptions = {},
): YamlFile {
  const lines = new LineCounter()
  const document = parseDocument(text, {
    ...options,
    lineCounter: lines,
    prettyErrors: false,
    // Problems are thrown; the library itself is not to print any
    logLevel: 'error',
  })
  const more = document.errors.find(({ code }) => code === 'MULTIPLE_DOCS')
  const problems = [...document.errors, ...document.warnings]
    .filter((problem) => problem !== more || !firstDocument)
    .map(({ pos, code, message }) => {
      const { line, col } = lines.linePos(pos[0])
      return {
        file,
        line,
        column: col,
        message:
          code === 'MULTIPLE_DOCS'
            ? 'a second document begins here'
            : code === 'DUPLICATE_KEY'
              ? 'a key that stands there already: write what belongs to it in one place'
              : /call stack/.test(message)
                ? 'is nested too deeply'
                : message,
      }
    })
  if (problems.length > 0) throw new ConfigInvalidError(problems.slice(0, MAX_PROBLEMS))
  let root: unknown
  try {
    root = document.toJS({ maxAliasCount: MAX_ALIASES })
  } catch (error) {
    const reason = error instanceof Error ? error.message : 'cannot be read'
    const message = /alias count/.test(reason) ? 'its aliases stand for too much' : reason
    throw new ConfigInvalidError([{ file, message }], { cause: error })
  }

  /** The value at a path, and where its key begins, or that of the nearest thing above it. */
  const find = (path: KeyPath): { node: unknown; offset: number } => {
    let node: unknown = document.contents
    let offset = isNode(node) ? (node.range?.[0] ?? 0) : 0
    for (const segment of path) {
      if (isAlias(node)) node = node.resolve(document)
      let key: unknown
      if (isMap(node)) {
        // The last of several pairs is the one that counts
        const pair = node.items.findLast(
          (item) => isScalar(item.key) && String(item.key.value) === String(segment),
        )
        key = pair?.key
        node = pair?.value
      } else if (isSeq(node) && typeof segment === 'number') {
        key = node.items[segment]
        node = key
      }
      if (!isNode(key)) return { node: undefined, offset }
      offset = key.range?.[0] ?? offset
    }
    return { node: isAlias(node) ? node.resolve(document) : node, offset }
  }
  return {
    file,
    root,
    all: (key) =>
      isMap(document.contents)
        ? document.contents.items
            .filter((item) => isScalar(item.key) && String(item.key.value) === key)
            .map(({ value }): unknown =>
              isNode(value) ? value.toJS(document, { maxAliasCount: MAX_ALIASES }) : value,
            )
        : [],
    secondDocument: more && lines.linePos(more.pos[0]).line,
    lineOf: (path) => lines.linePos(find(path).offset).line,
    isQuoted: (path) => {
      const { node } = find(path)
      return isScalar(node) && node.type !== Scalar.PLAIN
    },
  }
}

/**
 * Reads a file of up to 1 MiB; undefined if there is none. What is no file, such as a pipe, is read too, but not waited for
 * longer than 5 s. With `ignoreBOM` a byte order mark is part of the text, as it has to be where the same bytes are
 * written again.
 * @throws {ConfigInvalidError} if it cannot be read or is no text
 */
export async function readTextFile(
  file: string,
  options: { ignoreBOM?: boolean } = {},
): Promise<string | undefined> {
  const fail = (message: string, cause?: unknown) =>
    new ConfigInvalidError([{ file, message }], { cause })
  try {
    // Or the opening of a pipe would wait until somebody writes into it.
    await using handle = await open(file, constants.O_RDONLY | constants.O_NONBLOCK)
    const isFile = (await handle.stat()).isFile()
    const end = performance.now() + PIPE_TIMEOUT_MS
    // Not readFile: a pipe or a device has no size to ask for beforehand.
    const buffer = Buffer.alloc(MAX_FILE_BYTES + 1)
    let length = 0
    for (;;) {
      const bytesRead = await readSome(handle, buffer, length)
      length += bytesRead ?? 0
      if (length > MAX_FILE_BYTES) throw fail('is larger than 1 MiB')
      if (bytesRead === 0 && length === 0 && !isFile) throw fail('is no file, and nothing is in it')
      if (bytesRead === 0) break
      if (performance.now() > end) throw fail('is no file, and its end does not come')
      if (bytesRead === undefined) await delay(PIPE_PAUSE_MS)
    }
    try {
      return new TextDecoder('utf-8', { ...options, fatal: true }).decode(
        buffer.subarray(0, length),
      )
    } catch (error) {
      throw fail('is not UTF-8 text', error)
    }
  } catch (error) {
    if (!(error instanceof Error) || !('code' in error)) throw error
    switch (error.code) {
      case 'ENOENT':
        return undefined
      case 'EISDIR':
        throw fail('is a directory', error)
      case 'EACCES':
      case 'EPERM':
        throw fail('cannot be read: permission denied', error)
      case 'ERR_CONFIG_INVALID':
        throw error
      default:
        throw fail(`cannot be read: ${error.message}`, error)
    }
  }
}

/** Undefined: nothing is there yet. */
async function readSome(
  handle: FileHandle,
  buffer: Buffer,
  offset: number,
): Promise<number | undefined> {
  try {
    return (await handle.read(buffer, offset, buffer.length - offset)).bytesRead
  } catch (error) {
    if (hasCode(error, 'EAGAIN')) return undefined
    throw error
  }
}

export function isMapping(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** A value as an error message names it. */
export function describe(value: unknown): string {
  if (value === null || value === undefined) return 'nothing'
  if (Array.isArray(value)) return 'a list'
  if (typeof value === 'object') return 'a mapping'
  if (typeof value === 'string') return JSON.stringify(shorten(withoutLogin(value)))
  return `the ${typeof value} ${JSON.stringify(value)}`
}

/** A login that somebody has written into a URL is for no log. */
export function withoutLogin(text: string): string {
  return text.replaceAll(/\/\/[^\s/@"']*@/g, '//***@')
}

function shorten(text: string): string {
  return text.length > 60 ? `${text.slice(0, 60)}…` : text
}
