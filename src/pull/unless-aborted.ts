/** What `promise` gives. @throws why `signal` was aborted, if that comes first; what `promise` stands for goes on */
export async function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  const gone = Promise.withResolvers<never>()
  const onAbort = (): void => gone.reject(signal.reason)
  // Also then somebody must hear that `promise` fails.
  if (signal.aborted) onAbort()
  else signal.addEventListener('abort', onAbort, { once: true })
  try {
    return await Promise.race([promise, gone.promise])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}
