/** Whether it is an error that has one of these codes, as those of the system have: `ENOENT`, `EACCES`. */
export function hasCode(error: unknown, ...codes: string[]): error is Error {
  return error instanceof Error && 'code' in error && codes.includes(String(error.code))
}
