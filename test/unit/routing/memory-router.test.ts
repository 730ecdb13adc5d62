import { routerSuite } from '../../compliance/router.ts'
import { MemoryRouter, type MemoryMesh } from '../../fakes/memory-router.ts'

routerSuite('MemoryRouter', () => {
  const mesh: MemoryMesh = new Set()
  let count = 0
  return {
    async add(options = {}) {
      const id = `node-${(count += 1)}`
      const router = new MemoryRouter(mesh, { id, name: id, origins: [], ...options })
      await router.start()
      return { router, id }
    },
    async [Symbol.asyncDispose]() {
      mesh.clear()
    },
  }
})
