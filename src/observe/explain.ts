/** What a pull of an image would do now, and why. Nothing in it is secret. */
export interface PullPlan {
  /** In full, as it was understood */
  readonly image: string
  /** Its registry is one of those whose images the nodes share */
  readonly shared: boolean
  /** Whether this node's logins are used, and who may pull: a policy of `private` */
  readonly policy: string
  /** What decides what the tag means; null for an image by digest, and where the registry is of this cluster */
  readonly tag: {
    /** The rule of `tags` that matches */
    readonly match: string
    /** When the upstream is asked again; a number is for how many ms its answer is good */
    readonly revalidate: 'always' | 'never' | number
    /** How long it is waited for, in ms */
    readonly budgetMs: number
  } | null
  /** What nodes claim that the tag means, the newest first */
  readonly claims: readonly {
    readonly kind: 'observed' | 'pushed' | 'deleted'
    readonly digest: string | null
    /** libp2p peer id, and the node's name if it is connected */
    readonly node: string
    readonly name: string | null
    /** ms since 1970, by the clock the nodes keep together */
    readonly at: number
    /** Another node has claimed something since */
    readonly lost: boolean
  }[]
  /** What it means without the upstream; null if no node knows */
  readonly digest: string | null
  readonly because: string
  /** In the order in which they are asked, and how long each is waited for, in ms */
  readonly tiers: readonly { readonly tier: string; readonly budgetMs: number }[]
  readonly upstream: {
    readonly on: boolean
    readonly endpoints: readonly {
      readonly url: string
      readonly tier: 'mirrors' | 'origin'
      readonly repository: string
      /** Why it is not asked now; null if it is */
      readonly passedOver: string | null
    }[]
  }
  /** What the image is made of, for this node's platform, as far as a node holds its manifests */
  readonly content: readonly {
    readonly digest: string
    readonly kind: 'index' | 'manifest' | 'config' | 'layer'
    readonly size: number
    /** This node holds it */
    readonly here: boolean
    /** Other nodes that say they hold it, in the order in which they would be asked */
    readonly holders: readonly {
      readonly name: string
      readonly tier: 'zone' | 'region' | 'elsewhere'
      /** `last`: it could not be reached a moment ago; `not`: it gave wrong content */
      readonly asked: 'now' | 'last' | 'not'
    }[]
  }[]
  /** Why `content` is not all of it; null if it is */
  readonly missing: string | null
}
