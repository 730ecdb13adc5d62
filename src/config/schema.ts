import * as z from 'zod'
import { isRegistry } from '../oci/reference.ts'
import {
  P2P_PORT,
  PEER_FALLBACK_PORT,
  PEER_PORT,
  SPEGEL_P2P_PORT,
  SPEGEL_PEER_PORT,
} from './addresses.ts'
import { K3S_CONFIG_FILE } from './k3s.ts'
import {
  absolutePath,
  address,
  anySize,
  autoAddress,
  autoCapacity,
  autoCount,
  autoPath,
  bootstrapEntry,
  capacity,
  choice,
  count,
  duration,
  label,
  labelKey,
  localListen,
  nodeAddresses,
  plain,
  privateRule,
  rates,
  size,
  tagRule,
  truth,
} from './values.ts'

/** What help texts and documentation say of a key beside its type. */
export interface KeyDoc {
  readonly description: string
  /** What stands for the value in help texts, e.g. `HOST:PORT` */
  readonly placeholder: string
  /** An environment variable that sets the key too */
  readonly env?: string
}

const docs = z.registry<KeyDoc>()

function section<T extends z.core.$ZodLooseShape>(keys: T) {
  return z.strictObject(keys, { error: 'expected a mapping' })
}

/**
 * Every key of the configuration: type, default, description. The type {@link Config}, the flags, the error messages and
 * the table in docs/configuration.md come from here. Decoding reads what a file says; encoding gives it back.
 */
export const configSchema = section({
  store: choice(['auto', 'containerd', 'layout']).prefault('auto').register(docs, {
    placeholder: 'STORE',
    description:
      "Where images are kept: `containerd`, or `layout` (an OCI image layout directory of Shoal's own). `auto` is containerd if its socket exists, for root also if only its state directory does, as before its start at boot; else layout.",
  }),
  containerd: section({
    address: autoPath().prefault('auto').register(docs, {
      placeholder: 'SOCKET',
      description:
        "containerd's socket. `auto` is the first that exists of `/run/containerd/containerd.sock` and `/run/k3s/containerd/containerd.sock`; before containerd's start, the one whose state directory exists, and where K3s is installed, K3s'.",
    }),
    namespace: label().prefault('k8s.io').register(docs, {
      placeholder: 'NAME',
      description: 'The containerd namespace whose images are shared.',
    }),
    contentPath: autoPath().prefault('auto').register(docs, {
      placeholder: 'DIRECTORY',
      description:
        "containerd's content directory, from which blobs are read. `auto` asks containerd; where it cannot be read, blobs come over gRPC.",
    }),
  }).prefault({}),
  layout: section({
    path: autoPath().prefault('auto').register(docs, {
      placeholder: 'DIRECTORY',
      description: 'Directory of the layout store. `auto` is `<dataDir>/store`.',
    }),
    maxBytes: autoCapacity().prefault('auto').register(docs, {
      placeholder: 'SIZE',
      description:
        'How large the layout store may grow. `auto` is 50GiB, or 80 % of the disk if that is less.',
    }),
  }).prefault({}),
  dataDir: autoPath().prefault('auto').register(docs, {
    placeholder: 'DIRECTORY',
    description:
      'Identity and other state of this node. `auto` is `/var/lib/shoal` for root, else `shoal` in the XDG data directory.',
  }),
  registry: section({
    name: plain(
      'the name of a registry, HOST or HOST:PORT, in lower case',
      (text) => isRegistry(text) && text === text.toLowerCase(),
    )
      .prefault('registry.localhost')
      .register(docs, {
        placeholder: 'HOST',
        description:
          'Name of the home registry: images of this cluster itself are called `<name>/repository:tag`.',
      }),
  }).prefault({}),
  listen: section({
    local: localListen().prefault('127.0.0.1:5001').register(docs, {
      placeholder: 'HOST:PORT',
      description:
        "The registry for this node's containerd and local clients. Whoever reaches it may do everything: keep it on loopback. `unix:/run/shoal.sock` is a socket for tools instead, which the daemon's user and group may use (mode 0660), and `127.0.0.1:5001,unix:/run/shoal.sock` is both; containerd itself needs the address.",
    }),
    exposed: truth().prefault(false).register(docs, {
      placeholder: 'BOOL',
      description:
        'Whether `listen.local` may be at an address that other machines reach, `true` or `false`: then all of them may do everything there.',
    }),
    peer: autoAddress()
      .prefault('auto')
      .register(docs, {
        placeholder: 'HOST:PORT',
        description: `The read-only registry for other nodes. \`auto\` is port ${PEER_PORT} of each \`nodeAddress\`, or ${PEER_FALLBACK_PORT} if that one is taken, and where K3s' embedded registry runs, which needs it for itself; with \`mesh: spegel\` ${SPEGEL_PEER_PORT}, at which Spegel nodes are asked too.`,
      }),
    p2p: autoAddress()
      .prefault('auto')
      .register(docs, {
        placeholder: 'HOST:PORT',
        description: `libp2p, over TCP. \`auto\` is port ${P2P_PORT} of each \`nodeAddress\`, with \`mesh: spegel\` ${SPEGEL_P2P_PORT}.`,
      }),
    push: address().optional().register(docs, {
      placeholder: 'HOST:PORT',
      description:
        'The registry for other machines, such as those that build images: over TLS (`push.cert`, `push.key`), and only for who logs in, pulls included. By whatever name it is asked, what is pushed goes into the home registry. Without it there is none.',
    }),
    admin: address().prefault('127.0.0.1:9090').register(docs, {
      placeholder: 'HOST:PORT',
      description:
        'Dashboard, metrics and health (`/`, `/metrics`, `/livez`, `/readyz`), and what the commands ask. Whoever reaches it sees what this node holds and may have it pull: keep it on loopback.',
    }),
    metrics: address().optional().register(docs, {
      placeholder: 'HOST:PORT',
      description:
        'Where other machines may read `/metrics`, and nothing else: for a Prometheus that is not on this node, such as `0.0.0.0:9091`. Without it there is no such place.',
    }),
  }).prefault({}),
  nodeAddress: nodeAddresses().prefault('auto').register(docs, {
    placeholder: 'ADDRESS,…',
    env: 'NODE_IP',
    description:
      "The addresses other nodes reach this one at, most useful first, three at most: for example an IPv4 and an IPv6 address. `auto` is those of the default route's interfaces, of each family one, IPv4 first, and follows them while they change; loopback, link-local addresses and the bridges of containers are never among them. Without a default route a node waits for one.",
  }),
  nodeName: label().prefault('auto').register(docs, {
    placeholder: 'NAME',
    env: 'NODE_NAME',
    description: 'What this node is called. `auto` is its host name.',
  }),
  bootstrap: z
    .array(bootstrapEntry(), {
      error:
        'expected a list of HOST[:PORT], multiaddrs, http(s)://HOST:PORT and kubernetes[:NAMESPACE/SERVICE]',
    })
    .prefault([])
    .register(docs, {
      placeholder: 'PEER',
      description: `Ways into the mesh: \`HOST[:PORT]\` (libp2p port, ${P2P_PORT} if not given, with \`mesh: spegel\` ${SPEGEL_P2P_PORT}; a name means all its addresses, so a headless Service works; a name without a port may have SRV records \`_shoal._tcp.HOST\` instead, which say where the nodes are), multiaddrs, \`http(s)://HOST:PORT\` (a peer's registry, asked for its \`/id\`), \`kubernetes\` (the internal addresses of all Nodes that are ready; the API server is watched for them, which takes the right to list and watch nodes) or \`kubernetes:NAMESPACE/SERVICE\` (the endpoints of a Service, at its port \`p2p\` if it has several; the right to list and watch endpointslices in that namespace is enough, and in large clusters it costs the API server far less). Beside them, nodes are tried that this one was connected with before: \`peers.json\` in \`dataDir\` keeps them.`,
    }),
  mesh: choice(['shoal', 'spegel']).prefault('shoal').register(docs, {
    placeholder: 'MESH',
    description:
      'Which nodes to join: `shoal`, or `spegel` for a mesh that has, or is to have, Spegel nodes in it. Then the ports are those of Spegel, and the same on all nodes.',
  }),
  tokenFile: absolutePath().optional().register(docs, {
    placeholder: 'FILE',
    description:
      "File with the cluster's token, as `shoal token new` prints it; the same on all nodes, and readable by the daemon only. With it every byte between nodes is encrypted, and nobody without the token can take part, read or ask. Several tokens, one a line, are good at once: the first is spoken, all are accepted. Changes of the file hold at once. Without it the mesh is open to whoever reaches it.",
  }),
  tokenRequired: truth().prefault(false).register(docs, {
    placeholder: 'BOOL',
    description: 'Whether this node refuses to run without `tokenFile`: `true` or `false`.',
  }),
  tls: section({
    cert: absolutePath().optional().register(docs, {
      placeholder: 'FILE',
      description:
        'Certificate of this node for `listen.peer`, in PEM, with those between it and `tls.ca`, in place of the one that the node makes itself from the token: for server and client use, with an address of `nodeAddress` or with `nodeName` in it. It goes with `tls.key`, `tls.ca` and `tokenFile`; all three files are read again when they change.',
    }),
    key: absolutePath().optional().register(docs, {
      placeholder: 'FILE',
      description: 'Private key of `tls.cert`, in PEM.',
    }),
    ca: absolutePath().optional().register(docs, {
      placeholder: 'FILE',
      description:
        "Authorities that may have signed other nodes' certificates, in PEM, instead of the one that the token makes.",
    }),
  }).prefault({}),
  banned: z
    .array(
      plain('a peer id, as `shoal status` shows it', (text) =>
        /^[1-9A-HJ-NP-Za-km-z]{10,100}$/.test(text),
      ),
      { error: 'expected a list of peer ids' },
    )
    .prefault([])
    .register(docs, {
      placeholder: 'ID',
      description:
        'Nodes, by peer id, with which this one has nothing to do. Who has the token can make itself a new identity, so that a ban holds only until it does: change the token as well.',
    }),
  kubernetes: section({
    kubeconfig: autoPath().prefault('auto').register(docs, {
      placeholder: 'FILE',
      description:
        "How to get to the API server that `kubernetes` in `bootstrap` means. `auto` is the service account in a pod; elsewhere the first that exists of `/etc/rancher/k3s/k3s.yaml` (K3s servers) and `agent/kubelet.kubeconfig` in K3s' data directory (agents; newer Kubernetes lets a kubelet read its own Node only, so that the node has a zone but finds nobody). Tokens and client certificates are understood, as data or as files, and read anew for each request.",
    }),
    readyLabel: labelKey().optional().register(docs, {
      placeholder: 'KEY',
      description:
        'A label, such as `shoal.example.com/ready`, that the Node called `nodeName` has, with the value `true`, while this daemon is ready, and no longer: for the `nodeSelector` of pods that are not to start where all pulls would go to the registry. It takes the right to patch nodes, which Kubernetes can give for all of them only. Without it no Node is changed.',
    }),
  }).prefault({}),
  topology: section({
    zone: label().optional().register(docs, {
      placeholder: 'NAME',
      description:
        'Zone of this node; peers of the same zone are asked first. Without it, with `kubernetes` in `bootstrap`, the label `topology.kubernetes.io/zone` of the Node that is called `nodeName`; changes of the label are followed.',
    }),
    region: label().optional().register(docs, {
      placeholder: 'NAME',
      description:
        'Region of this node; after the zone, its peers are asked next. Without it the label `topology.kubernetes.io/region`, in the same way.',
    }),
  }).prefault({}),
  push: section({
    access: choice(['auto', 'off', 'local', 'auth']).prefault('auto').register(docs, {
      placeholder: 'WHO',
      description:
        'Who may push to this node, and delete: `off` nobody, `local` whoever reaches `listen.local`, `auth` who logs in as one of `push.users`. `auto` is `local` with the embedded store, else `off`.',
    }),
    users: absolutePath().optional().register(docs, {
      placeholder: 'FILE',
      description:
        'The users of `push.access: auth`, as `htpasswd -B` writes them (bcrypt; other hashes are refused). Changes hold at once.',
    }),
    cert: absolutePath().optional().register(docs, {
      placeholder: 'FILE',
      description:
        'Certificate of `listen.push`, in PEM, with those between it and its root. It and `push.key` are read again when they change.',
    }),
    key: absolutePath().optional().register(docs, {
      placeholder: 'FILE',
      description: 'Key of `push.cert`, in PEM.',
    }),
    replicas: count(1, 100).prefault(2).register(docs, {
      placeholder: 'N',
      description:
        'Nodes that are to have what was pushed to this one, itself among them; in different zones where these are known. The others get it over the way that pulls take, and only nodes with the same token are asked.',
    }),
    replicaWait: duration().prefault('30s').register(docs, {
      placeholder: 'DURATION',
      description:
        'How long the answer to a push waits for the copies; then it says (`Warning`) that they are on their way.',
    }),
    repairAfter: duration().prefault('5m').register(docs, {
      placeholder: 'DURATION',
      description: 'After so long without a node that had a copy, another one gets it.',
    }),
    uploads: count(1, 65_536).prefault(128).register(docs, {
      placeholder: 'N',
      description: 'Uploads that may be under way at a time; more are answered 503.',
    }),
    uploadsPerClient: count(1, 65_536).prefault(64).register(docs, {
      placeholder: 'N',
      description: 'Those of one address; all clients of `listen.local` are one.',
    }),
    uploadBytes: capacity().prefault('50GiB').register(docs, {
      placeholder: 'SIZE',
      description: 'Bytes that all uploads under way may have together.',
    }),
    uploadExpiry: duration().prefault('1h').register(docs, {
      placeholder: 'DURATION',
      description: 'An upload that gets no byte for so long is thrown away.',
    }),
    keepUntagged: count(0, 3650).prefault(0).register(docs, {
      placeholder: 'DAYS',
      description:
        'For so many days a manifest of the home registry stays on all nodes to which no tag leads any more, such as what a tag meant that was pushed again; then it is deleted. What was pinned stays, and so does what says something about a manifest that stays. 0: nothing goes that is not deleted by somebody.',
    }),
  }).prefault({}),
  registries: autoPath().prefault('auto').register(docs, {
    placeholder: 'FILE',
    description:
      "K3s' registries.yaml, from which `shoal mirror` and the daemon have registries, their endpoints, credentials and certificates. The daemon takes up changes within a second. `auto` is what K3s' configuration names as `private-registry`, else `/etc/rancher/k3s/registries.yaml`. It may be missing.",
  }),
  k3s: section({
    config: absolutePath().prefault(K3S_CONFIG_FILE).register(docs, {
      placeholder: 'FILE',
      env: 'K3S_CONFIG_FILE',
      description:
        "K3s' own configuration, with the drop-ins in `<file>.d`: its `embedded-registry`, `private-registry`, `data-dir` and `disable-default-registry-endpoint` hold here too, changes within a second, but for `data-dir`, which is read when the daemon starts. It may be missing.",
    }),
    latest: choice(['on', 'off']).prefault('off').register(docs, {
      placeholder: 'MODE',
      description:
        'Whether nodes of K3s tell each other what the tag `latest` of a registry elsewhere means, as its `K3S_P2P_ENABLE_LATEST` does. Without K3s they always do, and the content itself is shared with either.',
    }),
  }).prefault({}),
  sharing: choice(['auto', 'on', 'off']).prefault('auto').register(docs, {
    placeholder: 'MODE',
    description:
      "Whether this node gives what it holds to the other nodes, and asks them: `on`, `off`, or `auto`. `auto` is on without K3s; on a K3s server it is what K3s' `embedded-registry` says, and a K3s agent, where that key cannot be set, follows the nodes that were told: on when one of them is on, and so it stays while none of them is there. `--embedded-registry[=BOOL]` is another name for it.",
  }),
  upstream: choice(['on', 'off']).prefault('on').register(docs, {
    placeholder: 'MODE',
    description:
      'Whether this node itself goes to the registries when no node has what was asked for: `on` or `off`. It goes where registries.yaml says, with the credentials and certificates there (or those of `credentials`), else to the registry itself; proxies are those of the environment (`HTTPS_PROXY`, `NO_PROXY`). What needs a login that is not there is answered 404, so that containerd goes itself.',
  }),
  credentials: z
    .array(absolutePath(), { error: 'expected a list of absolute paths' })
    .prefault([])
    .register(docs, {
      placeholder: 'FILE',
      description:
        'Files with logins for registries of which registries.yaml has none: such as `docker login` writes (`/root/.docker/config.json`: `auths`, with password or identity token), or what a credential helper has printed (`ServerURL`, `Username`, `Secret`). The first file that names a registry counts; changes hold at once. Helpers themselves are not run.',
    }),
  private: z
    .array(privateRule(), { error: 'expected a list of rules' })
    .prefault(['*=open'])
    .register(docs, {
      placeholder: 'PATTERN=POLICY',
      description:
        "Who may have images of a registry, as `{registry: PATTERN, policy: POLICY}` or `PATTERN=POLICY`; the first rule that matches counts. A pattern is a registry or a name such as `ghcr.io/acme/app`, in which `*` stands for anything. `open`: whoever may pull on this node. `upstream`: containerd asks the registry itself for every manifest, with the login of the pod, and only blobs, by digest, come from nodes. `verify`: containerd shows the login of the pod to this node, which asks the registry whether it lets it in; while the registry cannot be reached, who was let in before may still pull. It needs `tokenFile`, and containerd's store. Content of registries that are not `open` is not given out under the name of another registry.",
    }),
  prefetch: z
    .array(absolutePath(), { error: 'expected a list of absolute paths' })
    .prefault([])
    .register(docs, {
      placeholder: 'PATH',
      description:
        "Lists of images that this node gets before they are needed, at its start and when a list changes: files with a name in each line (`#` begins a comment), as K3s' `images.txt`, or directories, of which every `*.txt` is one. Of an image for several platforms the node gets its own. What cannot be got is tried again, ever less often. It is followed while the node runs.",
    }),
  verify: section({
    offline: duration().prefault('24h').register(docs, {
      placeholder: 'DURATION',
      description:
        'How long under `private: verify` a login that its registry has let in is good while the registry cannot be reached. It is forgotten when the daemon ends.',
    }),
  }).prefault({}),
  tags: z
    .array(tagRule(), { error: 'expected a list of rules' })
    .prefault(['*:latest=always', '*=never'])
    .register(docs, {
      placeholder: 'PATTERN=WHEN',
      description:
        "When the upstream is asked again what a tag means, as `{match: PATTERN, revalidate: WHEN}` or `PATTERN=WHEN`; the first rule that matches counts. A pattern is a full name such as `docker.io/library/alpine:3.20`, in which `*` stands for anything; WHEN is `always`, `never` or a duration for which its last answer is good. If it answers within `uplink.revalidate` its digest wins; else what the nodes know is served. Tags of the home registry are nobody else's.",
    }),
  uplink: section({
    dial: duration().prefault('3s').register(docs, {
      placeholder: 'DURATION',
      description: 'How long connecting to an upstream may take.',
    }),
    firstByte: duration().prefault('10s').register(docs, {
      placeholder: 'DURATION',
      description: 'How long a connected upstream may take to begin its answer.',
    }),
    progress: duration().prefault('10s').register(docs, {
      placeholder: 'DURATION',
      description: 'How long a transfer from an upstream may stand still before it is resumed.',
    }),
    connections: count(1, 64).prefault(8).register(docs, {
      placeholder: 'NUMBER',
      description:
        'Connections at most over which one blob is read, where each of them is slower than the uplink. More than one are used only where that is a gain, and 64 MiB of memory at most.',
    }),
    revalidate: duration().prefault('500ms').register(docs, {
      placeholder: 'DURATION',
      description:
        'How long an upstream is waited for that is asked what a tag means. One that is known to be down is not waited for.',
    }),
  }).prefault({}),
  tiers: section({
    zone: duration().prefault('2s').register(docs, {
      placeholder: 'DURATION',
      description:
        'How long a request may wait for the first byte from nodes of the same zone, all of them together; then it goes on to the next tier: nodes of the same region, all other nodes, the mirrors of registries.yaml, the registry itself. Each has its time, which begins when it is asked first.',
    }),
    region: duration().prefault('3s').register(docs, {
      placeholder: 'DURATION',
      description: 'The same for nodes of other zones of the same region.',
    }),
    elsewhere: duration().prefault('5s').register(docs, {
      placeholder: 'DURATION',
      description: 'The same for all other nodes; without zones and regions they all are.',
    }),
    mirrors: duration().prefault('15s').register(docs, {
      placeholder: 'DURATION',
      description: 'The same for the endpoints that registries.yaml names for a registry.',
    }),
    origin: duration().prefault('15s').register(docs, {
      placeholder: 'DURATION',
      description: 'The same for the registry itself.',
    }),
  }).prefault({}),
  certsDir: autoPath().prefault('auto').register(docs, {
    placeholder: 'DIRECTORY',
    description:
      "containerd's directory of hosts.toml files, where `shoal mirror` writes. `auto` is `agent/etc/containerd/certs.d` in K3s' data directory if K3s is installed, else `/etc/containerd/certs.d`.",
  }),
  mirror: section({
    withdrawAfter: duration().prefault('30s').register(docs, {
      placeholder: 'DURATION',
      description:
        "How long this node's registry may fail to answer, or to be ready, before its entries are taken out of the hosts.toml files that `shoal mirror apply` wrote; they are put back when it answers again.",
    }),
  }).prefault({}),
  dashboard: section({
    gigabytePrice: z
      .number({ error: 'expected a number from 0 on' })
      .min(0)
      .max(1_000_000)
      .prefault(0)
      .register(docs, {
        placeholder: 'N',
        description:
          'What a gigabyte (10^9 bytes) over the uplink costs, in any currency: the dashboard then says what the nodes have saved. Whoever looks at it may put in another.',
      }),
  }).prefault({}),
  log: section({
    level: choice(['error', 'warn', 'info', 'debug', 'trace', 'silent'])
      .prefault('info')
      .register(docs, {
        placeholder: 'LEVEL',
        description: 'How much is logged: `error`, `warn`, `info`, `debug`, `trace`, `silent`.',
      }),
  }).prefault({}),
  limits: section({
    requests: count(1, 65_536).prefault(512).register(docs, {
      placeholder: 'N',
      description:
        'Requests in work at a time on each listener; what comes beyond is answered 503 with `Retry-After`, and 429 to clients other than containerd and nodes: containerd would ask five times over.',
    }),
    connections: count(16, 65_536).prefault(4096).register(docs, {
      placeholder: 'N',
      description:
        'Connections on each listener at a time, those too on which nothing was said yet; what comes beyond is closed.',
    }),
    connectionsPerClient: count(16, 65_536).prefault(256).register(docs, {
      placeholder: 'N',
      description:
        'The same from one address, on `listen.peer` and `listen.push`. A node uses a connection for each request that it makes at a time.',
    }),
    uploadSlots: count(1, 65_536).prefault(128).register(docs, {
      placeholder: 'N',
      description:
        'Blobs that are given to other nodes at a time. Who asks for more is told to come again, and does so, or asks another node.',
    }),
    upload: rates().prefault('unlimited').register(docs, {
      placeholder: 'RATES',
      description:
        'What all blobs together that are given to other machines may take of the link, as a rate such as `50MB`, `20MiB` (bytes) or `200Mbit` (bits) in a second, `unlimited`, or a list of these with days and hours by the clock of the node: `5Mbit mon-fri 07:00-19:00, 50Mbit`; the first that holds now counts, and without one there is no limit. Transfers share it evenly; what nobody waits for has what the others leave, and 5 % in any case. It is followed while the node runs.',
    }),
    download: rates().prefault('unlimited').register(docs, {
      placeholder: 'RATES',
      description:
        'The same of all blobs that this node gets from other nodes and from registries. Also without a limit, what nobody waits for yields to what is pulled, of whose pace it gets a fortieth.',
    }),
    wan: rates().prefault('unlimited').register(docs, {
      placeholder: 'RATES',
      description:
        'The same, in addition, of those among them that come from registries and from nodes of another region (or of another zone, where regions are not known).',
    }),
    uploadRate: rates().optional().register(docs, {
      placeholder: 'RATES',
      description: 'Older name of `limits.upload`.',
    }),
    spool: anySize().prefault('4GiB').register(docs, {
      placeholder: 'SIZE',
      description:
        "Bytes of blobs on their way to a client that `spool` in `dataDir` takes at a time, so that other nodes can read them while they come. It is needed only where containerd's content directory cannot be read, for clients that are not containerd, and where containerd fetches parts of a layer at the same time.",
    }),
    meshSize: count(0, 2_000)
      .prefault(500)
      .register(docs, {
        placeholder: 'N',
        description:
          'Up to so many other nodes, each is connected with each and knows what all of them hold, at some 20 bytes ' +
          'for every digest of each; beyond it the DHT answers what these do not. The same on all nodes.',
      }),
    records: count(1000, 10_000_000)
      .prefault(500_000)
      .register(docs, {
        placeholder: 'N',
        description:
          'Records that are kept for other nodes in the DHT, at some 56 to 112 bytes each. What comes beyond takes the place of ' +
          'the oldest, or is not kept if it comes from a node that has its even share already. 5,000 nodes of 20,000 digests each need 400,000.',
      }),
    recordsPerPeer: count(100, 10_000_000).prefault(50_000).register(docs, {
      placeholder: 'N',
      description: 'Records of one other node among them.',
    }),
    requestsPerClient: count(1, 65_536).prefault(128).register(docs, {
      placeholder: 'N',
      description:
        'Requests in work at a time from one address, on `listen.peer` and `listen.push`; of `listen.local` all clients are one. What comes beyond is answered as beyond `limits.requests`.',
    }),
    headers: size('1KiB', '1MiB').prefault('16KiB').register(docs, {
      placeholder: 'SIZE',
      description: 'Request line and headers of a request together; more is answered 431.',
    }),
    url: size('256B', '1MiB').prefault('8KiB').register(docs, {
      placeholder: 'SIZE',
      description: 'Path and query of a request; more is answered 414.',
    }),
    headersTimeout: duration().prefault('10s').register(docs, {
      placeholder: 'DURATION',
      description:
        'How long a request may take to send its headers; then its connection is closed.',
    }),
    idleTimeout: duration().prefault('72s').register(docs, {
      placeholder: 'DURATION',
      description: 'How long a connection is kept on which nothing is asked.',
    }),
    stallTimeout: duration().prefault('2m').register(docs, {
      placeholder: 'DURATION',
      description:
        'How long a client may neither send a byte of what it pushes nor take one of what it is given; then it is gone.',
    }),
    p2pConnections: autoCount(16, 65_536).prefault('auto').register(docs, {
      placeholder: 'N',
      description:
        'Connections of libp2p that are kept; 100 more may come for some seconds, to learn of others that have room. `auto` is twice `limits.meshSize` and 100.',
    }),
    p2pStreams: count(16, 65_536).prefault(256).register(docs, {
      placeholder: 'N',
      description:
        'Streams that another node may have open on a connection of libp2p; what comes beyond is reset.',
    }),
    p2pMessage: size('256KiB', '1MiB').prefault('256KiB').register(docs, {
      placeholder: 'SIZE',
      description:
        'Longest message of the protocol between nodes; whoever sends a longer one is cut off.',
    }),
    p2pMessages: count(300, 10_000_000)
      .prefault(15_000)
      .register(docs, {
        placeholder: 'N',
        description:
          'Messages of each of the two protocols between nodes that go to one other node in any minute; a record of the DHT is one. What is to be told beyond waits, ' +
          'and changes that gather meanwhile are told together. Questions of lookups do not wait. Four times as many of the protocol for what nodes hold are read of one other node, of which long ones ' +
          'count once for each 4 KiB; what it says beyond is read later. The same on all nodes, or about.',
      }),
    cache: size('0B', '16GiB').prefault('16MiB').register(docs, {
      placeholder: 'SIZE',
      description:
        'Manifests and other small documents in memory: so much of what this node holds, and as much of what it has just asked others for.',
    }),
    slow: size('0B', '16GiB').prefault('32MiB').register(docs, {
      placeholder: 'SIZE',
      description:
        'In memory of blobs that pass slower than 2 MB a second, up to 1.5 MiB of each: other nodes are given that before containerd has written it down. Without room they wait for the file.',
    }),
    pullEntries: count(1000, 10_000_000).prefault(65_536).register(docs, {
      placeholder: 'N',
      description:
        'Entries on the lists that this node keeps of who is getting what, by which it comes once for all: one for each node and blob, at some 0.8 kB. Beyond it the list is forgotten about which nobody has said anything for longest; whoever is on it says so anew.',
    }),
    logLines: count(10, 1_000_000).prefault(1000).register(docs, {
      placeholder: 'N',
      description:
        'Lines that are logged in a second on average, and five times as many at once. What comes beyond is left out, and the next line tells how many these were.',
    }),
  }).prefault({}),
  peers: section({
    lookup: duration().prefault('1s').register(docs, {
      placeholder: 'DURATION',
      description: 'How long a pull looks for holders before it answers that there are none.',
    }),
    dial: duration().prefault('500ms').register(docs, {
      placeholder: 'DURATION',
      description: 'How long connecting to a peer may take.',
    }),
    firstByte: duration().prefault('1s').register(docs, {
      placeholder: 'DURATION',
      description: 'How long a connected peer may take to begin its answer.',
    }),
    progress: duration().prefault('1s').register(docs, {
      placeholder: 'DURATION',
      description: 'How long a transfer may stand still before it goes on with another peer.',
    }),
    busy: duration().prefault('30s').register(docs, {
      placeholder: 'DURATION',
      description:
        'How long a pull comes again when all that have the content are busy, or have told so, before it goes on without them.',
    }),
    hedge: duration().prefault('250ms').register(docs, {
      placeholder: 'DURATION',
      description: 'How long the first peer is waited for before a second one is asked as well.',
    }),
  }).prefault({}),
  shutdownTimeout: duration().prefault('10s').register(docs, {
    placeholder: 'DURATION',
    description: 'How long transfers may go on after the signal to end.',
  }),
})

/** The configuration as it was asked for: `auto` is still `auto`, durations are milliseconds, sizes bytes. */
export type Config = z.output<typeof configSchema>

/** One key of the configuration, flat. */
export interface ConfigKey extends KeyDoc {
  /** e.g. `['listen', 'local']` */
  readonly path: readonly string[]
  /** e.g. `listen.local` */
  readonly name: string
  /** e.g. `--listen-local` */
  readonly flag: string
  readonly type: 'text' | 'number' | 'list'
  /** As it would be written in a file; empty if there is none */
  readonly default: string
  /** A value of the configuration as it would be written in a file */
  readonly encode: (value: unknown) => unknown
}

function listKeys(schema: z.ZodObject, prefix: readonly string[]): ConfigKey[] {
  return Object.entries(schema.shape).flatMap(([segment, field]) => {
    const path = [...prefix, segment]
    const inner =
      field instanceof z.ZodPrefault || field instanceof z.ZodOptional ? field.unwrap() : field
    if (inner instanceof z.ZodObject) return listKeys(inner, path)
    const doc = field instanceof z.ZodType ? docs.get(field) : undefined
    if (doc === undefined || !(field instanceof z.ZodType))
      throw new TypeError(`${path.join('.')} has no description`)
    const name = path.join('.')
    return {
      ...doc,
      path,
      name,
      flag: `--${name.replaceAll('.', '-').replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`,
      type: inner instanceof z.ZodArray ? 'list' : inner instanceof z.ZodNumber ? 'number' : 'text',
      default: field instanceof z.ZodPrefault ? [field.def.defaultValue].flat().join(', ') : '',
      encode: (value) => z.encode(field, value),
    }
  })
}

/** Every key, in the order of the schema. */
export const configKeys: readonly ConfigKey[] = listKeys(configSchema, [])
