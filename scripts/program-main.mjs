// What `dist/shoal.mjs` is made of: it runs the bundle with what V8 had compiled of its files when the bundle was made, which stands beside each (`.cache`).
// V8 takes that only where its version and its flags are the same; else it compiles what is needed, as ever.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Script } from 'node:vm'

/** What has been run, by file: V8 can be asked what it has compiled of it. */
export const scripts = new Map()

const WRAPPER = ['(function (exports, require, module, __filename, __dirname) {', '\n})']
const directory = dirname(fileURLToPath(import.meta.url))
const requireByNode = createRequire(import.meta.url)
const modules = new Map()

function requireFile(name) {
  if (!name.startsWith('./')) return requireByNode(name)
  const file = `${directory}/${name.slice(2)}`
  const known = modules.get(file)
  if (known !== undefined) return known.exports
  const module = { exports: {} }
  modules.set(file, module)
  const script = new Script(`${WRAPPER[0]}${readFileSync(file, 'latin1')}${WRAPPER[1]}`, {
    filename: file,
    columnOffset: -WRAPPER[0].length,
    cachedData: compiled(file),
  })
  scripts.set(file, script)
  script.runInThisContext()(module.exports, requireFile, module, file, directory)
  return module.exports
}

function compiled(file) {
  try {
    return readFileSync(`${file}.cache`)
  } catch {
    return undefined
  }
}

// Source maps are followed only in what Node itself has loaded.
if (process.sourceMapsEnabled) requireByNode('./PROGRAM')
else requireFile('./PROGRAM')
