import { routerSuite } from '../../compliance/router.ts'
import { LoopbackMesh } from './nodes.ts'

routerSuite('Libp2pRouter', () => new LoopbackMesh())
