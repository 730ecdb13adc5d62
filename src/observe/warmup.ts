/** How far a node is with an image that is to be there before it is needed: a line of what `POST /pull` answers. */
export interface WarmupReport {
  readonly node: string
  readonly image: string
  /** `waits`: others come first */
  readonly stage: 'waits' | 'gets' | 'has' | 'failed'
  /** Bytes of blobs, as far as it is known what there is to get, and of those that are there */
  readonly size: number
  readonly have: number
  /** Bytes that came, by the names of those who gave them */
  readonly sources: Readonly<Record<string, number>>
  /** Why it failed, in one line */
  readonly reason?: string
}
