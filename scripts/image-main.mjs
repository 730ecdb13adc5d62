#!/opt/shoal/node --max-semi-space-size=2
// What `shoal` is in the container image, which has no shell for bin/shoal.
import '/opt/shoal/dist/shoal.mjs'
