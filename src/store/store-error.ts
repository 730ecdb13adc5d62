import { StoreFullError, StoreUnavailableError } from './store.ts'

/** What a failure of the file system at `path` means for the store; an error of another kind stays as it is. */
export function asStoreError(error: unknown, path: string): Error {
  if (error instanceof Error && !('syscall' in error)) return error
  const code = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error'
  return code === 'ENOSPC' || code === 'EDQUOT'
    ? new StoreFullError(`no space left for ${path}`, { cause: error })
    : new StoreUnavailableError(`${path} cannot be used: ${code}`, { cause: error })
}
