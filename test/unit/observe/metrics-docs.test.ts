import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { before, suite, test } from 'node:test'
import { parse } from 'yaml'
import { metricsOfANode } from '../../../scripts/metrics-of-a-node.ts'

const read = (path: string) => readFileSync(new URL(`../../../${path}`, import.meta.url), 'utf8')

/** What is asked of Prometheus: names and label values that a node does not tell would show nothing, and nobody would notice. */
suite('what Grafana and Prometheus ask for', () => {
  let names: Set<string>
  let labels: Map<string, readonly string[]>
  before(async () => {
    const metrics = await metricsOfANode()
    names = new Set(
      metrics.flatMap(({ name, type }) =>
        type === 'histogram' ? ['_bucket', '_sum', '_count'].map((end) => name + end) : [name],
      ),
    )
    labels = new Map(metrics.map((each) => [each.name, each.labels]))
    assert.ok(names.size > 25)
  })

  function assertKnown(expression: string): void {
    const asked = [...expression.matchAll(/\b(shoal_\w+)(?:\{([^}]*)\})?/g)]
    for (const [, name = '', filter = ''] of asked) {
      assert.ok(names.has(name), `${name} in ${expression}`)
      const own = [
        ...(labels.get(name.replace(/_(bucket|sum|count)$/, '')) ?? []),
        'instance',
        'le',
      ]
      for (const [, label = ''] of filter.matchAll(/(\w+)(?==)/g))
        assert.ok(own.includes(label), `${label} of ${name} in ${expression}`)
    }
    for (const [open, close] of [
      ['(', ')'],
      ['{', '}'],
      ['[', ']'],
    ] as const)
      assert.equal(expression.split(open).length, expression.split(close).length, expression)
  }

  test('of the dashboard is told by a node', () => {
    const { panels } = JSON.parse(read('deploy/grafana/shoal.json')) as {
      panels: { id: number; title: string; targets: { expr: string }[] }[]
    }
    assert.ok(panels.length >= 12)
    assert.equal(new Set(panels.map(({ id }) => id)).size, panels.length)
    for (const { expr } of panels.flatMap(({ targets }) => targets)) assertKnown(expr)
  })

  test('of the alert rules is told by a node, and each says what to do', () => {
    const { groups } = parse(read('deploy/prometheus/alerts.yaml')) as {
      groups: {
        rules: {
          alert: string
          expr: string
          labels: { severity: string }
          annotations: { summary: string; description: string }
        }[]
      }[]
    }
    const rules = groups.flatMap((group) => group.rules)
    assert.ok(rules.length >= 6)
    for (const rule of rules) {
      assertKnown(rule.expr)
      assert.match(rule.alert, /^Shoal[A-Z]/)
      assert.match(rule.labels.severity, /^(?:warning|critical)$/)
      assert.ok(rule.annotations.summary.length > 0 && rule.annotations.description.length > 0)
    }
  })

  test('would be noticed if it were not', () => {
    assert.throws(() => assertKnown('rate(shoal_gone_total[5m])'))
    assert.throws(() => assertKnown('shoal_bytes_total{peer="a"}'))
  })
})
