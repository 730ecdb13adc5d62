import { compareSync } from 'bcryptjs'
import { parentPort } from 'node:worker_threads'

/** What the thread is asked: whether a password is that of a bcrypt hash. */
export interface PasswordQuestion {
  readonly id: number
  readonly password: string
  readonly hash: string
}

export interface PasswordAnswer {
  readonly id: number
  readonly right: boolean
}

parentPort?.on('message', ({ id, password, hash }: PasswordQuestion) => {
  let right = false
  try {
    right = compareSync(password, hash)
  } catch {
    // A hash that is none fits no password.
  }
  parentPort?.postMessage({ id, right } satisfies PasswordAnswer)
})
