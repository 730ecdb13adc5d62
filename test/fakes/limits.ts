import { configSchema } from '../../src/config/schema.ts'

/** The limits that a node has if nothing is said. */
export const LIMITS = configSchema.parse({}).limits
