/** Where the program is loaded, as linkers have it */
const BASE = 0x40_0000
const HEADERS = 64 + 56

/**
 * A program for Linux on this machine's processor that needs nothing around it, and so can be all there is in an image: it prints a
 * text and ends with status 0.
 * @see https://refspecs.linuxfoundation.org/elf/gabi4+/ch5.pheader.html
 */
export function staticProgram(text: string): Buffer {
  const message = Buffer.from(text)
  const [machine, code] =
    process.arch === 'arm64' ? [0xb7, arm64(message.length)] : [0x3e, x64(message.length)]
  const headers = Buffer.alloc(HEADERS)
  const size = HEADERS + code.length + message.length
  headers.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1])
  headers.writeUInt16LE(2, 16) // an executable
  headers.writeUInt16LE(machine, 18)
  headers.writeUInt32LE(1, 20)
  headers.writeBigUInt64LE(BigInt(BASE + HEADERS), 24) // where it begins
  headers.writeBigUInt64LE(64n, 32) // the one program header, after this one
  headers.writeUInt16LE(64, 52)
  headers.writeUInt16LE(56, 54)
  headers.writeUInt16LE(1, 56)
  headers.writeUInt32LE(1, 64) // all of the file into memory,
  headers.writeUInt32LE(5, 68) // to be read and run
  headers.writeBigUInt64LE(BigInt(BASE), 80)
  headers.writeBigUInt64LE(BigInt(BASE), 88)
  headers.writeBigUInt64LE(BigInt(size), 96)
  headers.writeBigUInt64LE(BigInt(size), 104)
  headers.writeBigUInt64LE(0x1000n, 112)
  return Buffer.concat([headers, code, message])
}

/** write(1, what follows, length); exit(0) */
function x64(length: number): Buffer {
  const code = Buffer.from(
    'b801000000bf01000000488d3510000000ba000000000f05b83c00000031ff0f05',
    'hex',
  )
  code.writeUInt32LE(length, 18)
  return code
}

function arm64(length: number): Buffer {
  const code = [
    0xd280_0020, // mov x0, 1
    0x1000_00e1, // adr x1, what follows
    0xd280_0002 | (length << 5), // mov x2, length
    0xd280_0808, // mov x8, 64: write
    0xd400_0001, // svc 0
    0xd280_0000, // mov x0, 0
    0xd280_0ba8, // mov x8, 93: exit
    0xd400_0001, // svc 0
  ]
  const bytes = Buffer.alloc(4 * code.length)
  for (const [index, word] of code.entries()) bytes.writeUInt32LE(word >>> 0, 4 * index)
  return bytes
}
