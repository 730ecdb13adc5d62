/** What an image is for. @see https://github.com/opencontainers/image-spec/blob/v1.1.1/image-index.md */
export interface Platform {
  readonly os: string
  readonly architecture: string
  readonly variant?: string
}

/** As Go calls what Node calls otherwise. @see https://go.dev/doc/install/source#environment */
const ARCHITECTURES: Readonly<Record<string, string>> = {
  x64: 'amd64',
  ia32: '386',
  ppc64: 'ppc64le',
  x86_64: 'amd64',
  aarch64: 'arm64',
  armhf: 'arm',
}

const PLATFORM = /^([a-z0-9]{1,32})\/([a-z0-9_]{1,32})(?:\/([a-z0-9]{1,16}))?$/

/** `linux/arm64`, `linux/arm/v7`; undefined if it is none. */
export function parsePlatform(text: string): Platform | undefined {
  const [, os, architecture, variant] = PLATFORM.exec(text.toLowerCase()) ?? []
  if (os === undefined || architecture === undefined) return undefined
  return normalize({ os, architecture, ...(variant !== undefined && { variant }) })
}

export function formatPlatform({ os, architecture, variant }: Platform): string {
  return [os, architecture, ...(variant === undefined ? [] : [variant])].join('/')
}

/** What runs on a machine, in the words of `node:os`: `machine` is such as `armv7l`. */
export function platformOf(own: { platform: string; arch: string; machine: string }): Platform {
  const variant = own.arch === 'arm' ? /^armv(\d)/.exec(own.machine)?.[1] : undefined
  return normalize({
    os: own.platform,
    architecture: own.arch,
    ...(variant !== undefined && { variant: `v${variant}` }),
  })
}

/**
 * Of the descriptors in an index those that are for one of some platforms, for each the one that fits best, as containerd picks
 * them. Those that say nothing of a platform are for all.
 * @see https://github.com/containerd/platforms/blob/v1.0.0/compare.go
 */
export function forPlatforms<T extends { readonly platform?: Platform }>(
  all: readonly T[],
  wanted: readonly Platform[],
): T[] {
  const chosen = new Set(all.filter(({ platform }) => platform === undefined))
  for (const platform of wanted) {
    const [best] = all
      .map((each) => ({ each, rank: rankOf(each.platform, platform) }))
      .filter(({ rank }) => rank >= 0)
      .toSorted((a, b) => a.rank - b.rank)
    if (best !== undefined) chosen.add(best.each)
  }
  return all.filter((each) => chosen.has(each))
}

/** How well something runs on a platform: 0 is best, -1 not at all. */
function rankOf(found: Platform | undefined, wanted: Platform): number {
  if (found === undefined) return -1
  const { os, architecture, variant } = normalize(found)
  if (os !== wanted.os) return -1
  const [have, want] = [levelOf(variant), levelOf(wanted.variant)]
  if (architecture === wanted.architecture) {
    const usual = USUAL[architecture] ?? 0
    const behind = (want || usual) - (have || usual)
    return behind >= 0 ? behind : -1
  }
  // What is for 32 bits runs there too, and is the last choice.
  return wanted.architecture === 'arm64' && architecture === 'arm' ? 20 - have : -1
}

/** The variant that is meant where none is said */
const USUAL: Readonly<Record<string, number>> = { arm: 7, arm64: 8, amd64: 1 }

function levelOf(variant = ''): number {
  return Number(/^v?(\d)/.exec(variant)?.[1] ?? 0)
}

function normalize({ os, architecture, variant }: Platform): Platform {
  const name = ARCHITECTURES[architecture] ?? architecture
  const usual = levelOf(variant) === USUAL[name] && name !== 'arm'
  return { os, architecture: name, ...(variant !== undefined && !usual && { variant }) }
}
