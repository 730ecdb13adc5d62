// Runs a demo by the `shoal.mjs` that is named, and puts beside each file of the program what V8 has compiled of it by then.
import { renameSync, writeFileSync } from 'node:fs'
import v8 from 'node:v8'

const { setFlagsFromString } = v8
const [node, , main] = process.argv
process.argv = [node, main, 'demo', '--exit', '--quiet']
// What runs but once, as all of a start does, would be let go of.
setFlagsFromString('--no-flush-bytecode')
// V8 takes it only where its flags are those by which it was given out: a daemon that starts has not set its own yet.
v8.setFlagsFromString = () => {}
const { scripts } = await import(main)
process.on('exit', (code) => {
  if (code !== 0) return
  setFlagsFromString('--flush-bytecode')
  for (const [file, script] of scripts) {
    const temporary = `${file}.cache.${process.pid}`
    // V8 does not look whether it is whole.
    writeFileSync(temporary, script.createCachedData(), { flush: true })
    renameSync(temporary, `${file}.cache`)
  }
})
