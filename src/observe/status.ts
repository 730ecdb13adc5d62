/** What a node says of itself on its admin listener. Nothing in it is secret. */
export interface NodeStatus {
  readonly version: string
  readonly name: string
  /** Why it cannot do its work now; null when it is ready */
  readonly notReady: string | null
  /** libp2p peer id; null before routing has started */
  readonly id: string | null
  /** As `host:port`, several separated by commas, by listener */
  readonly listen: Readonly<Record<'local' | 'peer' | 'p2p' | 'admin', string>> | null
  /** Whether a service manager holds the socket of the local listener, so that pulls wait while this node is started again */
  readonly socketHeld: boolean
  readonly sharing: {
    readonly on: boolean
    /** `auto` follows K3s' servers */
    readonly configured: 'on' | 'off' | 'auto'
    /** What says so, and where it is written, in words */
    readonly setBy: string
    /** With `auto` the name of the node that is followed; null while none has said anything */
    readonly leader: string | null
    readonly registries: readonly string[] | 'all'
    /** What in registries.yaml, or what is missing there, makes it these */
    readonly because: string
  }
  readonly store: {
    readonly kind: 'containerd' | 'layout'
    /** containerd's socket, or the directory */
    readonly at: string
    /** containerd's namespace; null for a layout */
    readonly namespace: string | null
    /** containerd's version; null for a layout, and while containerd does not answer */
    readonly version: string | null
    readonly read: boolean
    /** Tags held, whether they are shared or not */
    readonly images: number
    /** Digests and tags */
    readonly announced: number
  }
  readonly push: {
    readonly access: 'off' | 'local' | 'auth'
    /** Nodes that are to have each image */
    readonly copies: number
    /** Images of the home registry that this node keeps */
    readonly images: number
    /** Of these, those of which there are too few copies */
    readonly short: number
    /** Images that it is getting for other nodes */
    readonly fetching: number
    /** Some of those with too few copies: nodes that have one, and that are to have one */
    readonly waiting: readonly {
      readonly image: string
      readonly have: number
      readonly wanted: number
    }[]
    /** Some of those it is getting, in bytes; of those it has not begun with nothing is known */
    readonly getting: readonly {
      readonly image: string
      readonly bytes: number
      readonly size: number
    }[]
  }
  readonly mesh: {
    readonly kind: 'shoal' | 'spegel'
    /** Those connected now */
    readonly peers: readonly {
      readonly name: string
      /** Where its registry answers */
      readonly origins: readonly string[]
      /** `HOST:PORT` where it listens for libp2p, at the host it is connected from; none where it does not say */
      readonly p2p: readonly string[]
    }[]
    /** Digests and tags that they say they hold */
    readonly keys: number
  }
  /** What is being got together with other nodes at the moment */
  readonly together: {
    /** By this node: from `upstream`, for the others too, or from another node, by its name */
    readonly pulls: readonly {
      readonly what: string
      readonly from: string
      readonly have: number
      readonly size: number
    }[]
    /** The lists this node keeps for others, the largest: who leads, by name, and how many read, how far from it */
    readonly lists: readonly {
      /** A digest or a tag; null where this node does not get it itself, and so does not know */
      readonly what: string | null
      readonly members: number
      readonly leaders: readonly string[]
      readonly depth: number
      readonly have: number
      readonly size: number
      /** Who reads from whom, by name; 32 at most */
      readonly reads: readonly { readonly by: string; readonly from: string }[]
    }[]
  }
  readonly upstream: {
    readonly on: boolean
    /** Endpoints that are not asked now */
    readonly resting: readonly RestingEndpoint[]
  }
  /** Bytes of content since the daemon started */
  readonly traffic: {
    /** To clients of this node, and of that what came from an upstream */
    readonly clients: number
    readonly clientsUplink: number
    /** Got for nobody in particular, that is prefetches and copies, and of that what came from an upstream */
    readonly own: number
    readonly ownUplink: number
    /** To other nodes */
    readonly given: number
  }
  /** Images that are got before they are needed */
  readonly prefetch: {
    /** Being got, or waiting, for whomever */
    readonly getting: number
    /** In the lists of `prefetch` */
    readonly listed: number
    /** Why the lists as they are now do not count; null when they do */
    readonly complaint: string | null
    /** Of these, those that are not there: why not (null while that is not known), and when they are tried again, in ms */
    readonly missing: readonly {
      readonly image: string
      readonly reason: string | null
      readonly retryMs: number
    }[]
  }
  /** What may pass now */
  readonly limits: readonly {
    readonly link: 'upload' | 'download' | 'wan'
    /** Bytes a second; null is no limit */
    readonly rate: number | null
    /** When another one will hold, in ISO 8601; null if none will */
    readonly until: string | null
  }[]
  /** Why what registries.yaml or K3s' configuration say now does not count; then what they said before does */
  readonly complaints: readonly string[]
  readonly mirror: {
    /** Where `mirror apply` wrote; null where nothing is applied */
    readonly certsDir: string | null
    readonly withdrawn: boolean
    /** Why the files are not as they should be; null when they are */
    readonly complaint: string | null
  }
}

/** An upstream that is left alone for a time. */
export interface RestingEndpoint {
  readonly url: string
  /** It answers, but has asked for a pause; otherwise it is down */
  readonly limited: boolean
  /** Until it is asked or tried again, in ms; 0 while it is tried */
  readonly forMs: number
}
