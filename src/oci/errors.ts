/**
 * The registry's error codes that Shoal answers with, and their HTTP status. `UNAVAILABLE` and `UNKNOWN` are
 * distribution's extensions of the spec's table.
 * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#error-codes
 */
const STATUS = {
  NAME_INVALID: 400,
  NAME_UNKNOWN: 404,
  DIGEST_INVALID: 400,
  SIZE_INVALID: 400,
  MANIFEST_INVALID: 400,
  MANIFEST_UNKNOWN: 404,
  MANIFEST_BLOB_UNKNOWN: 404,
  BLOB_UNKNOWN: 404,
  BLOB_UPLOAD_INVALID: 400,
  BLOB_UPLOAD_UNKNOWN: 404,
  UNAUTHORIZED: 401,
  DENIED: 403,
  UNSUPPORTED: 405,
  TOOMANYREQUESTS: 429,
  UNAVAILABLE: 503,
  UNKNOWN: 500,
} as const

export type ErrorCode = keyof typeof STATUS

/** An error as a client of the registry sees it. */
export class DistributionError extends Error {
  override readonly name = 'DistributionError'
  readonly code: ErrorCode
  readonly status: number
  /** Headers that belong to this answer, e.g. `Retry-After` */
  readonly headers: Readonly<Record<string, string>>

  constructor(
    code: ErrorCode,
    message: string,
    options: ErrorOptions & { status?: number; headers?: Record<string, string> } = {},
  ) {
    super(message, options)
    this.code = code
    this.status = options.status ?? STATUS[code]
    this.headers = options.headers ?? {}
  }

  /** @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#error-codes */
  body(): string {
    return JSON.stringify({ errors: [{ code: this.code, message: this.message }] })
  }
}

/**
 * The answer to a method that is not for this path: it names those that are.
 * @see https://www.rfc-editor.org/rfc/rfc9110.html#section-15.5.6
 */
export function methodNotAllowed(
  allowed: readonly string[],
  why = 'method is not supported',
): DistributionError {
  return new DistributionError('UNSUPPORTED', why, { headers: { allow: allowed.join(', ') } })
}

/**
 * What a client is told about a failure. Only messages written for clients get out; of anything unknown it learns no
 * more than that.
 */
export function toDistributionError(error: unknown, kind?: string): DistributionError {
  if (error instanceof DistributionError) return error
  if (!(error instanceof Error))
    return new DistributionError('UNKNOWN', 'internal error', { cause: error })
  const options = { cause: error }
  switch ('code' in error ? error.code : undefined) {
    case 'ERR_REFERENCE_INVALID':
      return new DistributionError('NAME_INVALID', error.message, options)
    case 'ERR_DIGEST_INVALID':
      return new DistributionError('DIGEST_INVALID', error.message, options)
    case 'ERR_DIGEST_UNSUPPORTED':
      return new DistributionError('UNSUPPORTED', error.message, { ...options, status: 400 })
    case 'ERR_MANIFEST_INVALID':
      return new DistributionError('MANIFEST_INVALID', error.message, options)
    case 'ERR_UPLOAD_UNKNOWN':
      return new DistributionError('BLOB_UPLOAD_UNKNOWN', error.message, options)
    case 'ERR_UPLOAD_RANGE':
      return new DistributionError('BLOB_UPLOAD_INVALID', error.message, {
        ...options,
        status: 416,
      })
    case 'ERR_CLIENT_GONE':
      return new DistributionError('BLOB_UPLOAD_INVALID', 'the request broke off', options)
    case 'ERR_UPLOAD_SIZE':
      return new DistributionError('SIZE_INVALID', error.message, options)
    case 'ERR_TOO_MANY_UPLOADS':
      return new DistributionError('TOOMANYREQUESTS', error.message, {
        ...options,
        headers: { 'retry-after': '5' },
      })
    case 'ERR_MANIFEST_BLOB_UNKNOWN':
      return new DistributionError('MANIFEST_BLOB_UNKNOWN', error.message, options)
    case 'ERR_NAME_UNKNOWN':
      return new DistributionError('NAME_UNKNOWN', error.message, options)
    case 'ERR_STORE_FULL':
      return new DistributionError('UNAVAILABLE', 'no space is left on this node', {
        ...options,
        status: 507,
      })
    case 'ERR_ROUTE_UNKNOWN':
      return new DistributionError('UNSUPPORTED', error.message, { ...options, status: 404 })
    case 'ERR_NOT_HELD':
    case 'ERR_CONTENT_NOT_FOUND':
      return kind === 'blob'
        ? new DistributionError('BLOB_UNKNOWN', 'blob is held by no node that answers', options)
        : new DistributionError(
            'MANIFEST_UNKNOWN',
            'manifest is held by no node that answers',
            options,
          )
    case 'ERR_STORE_UNAVAILABLE':
      // Nobody knows when; peers do not wait for it.
      return new DistributionError(
        'UNAVAILABLE',
        'the content store of this node cannot be reached',
        options,
      )
    default:
      return new DistributionError('UNKNOWN', 'internal error', options)
  }
}
