"""STYLE: how a report page looks, light and dark, on screen and on paper.

Colours of series follow Okabe and Ito's, which people with any colour vision tell apart.
"""

STYLE = (
    """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1c2025; --soft: #5a6370; --rule: #d9dde3; --grid: #e8ebef;
  --s0: #0072b2; --s1: #c65a00; --s2: #008a64; --s3: #b0568a; --s4: #b97f00; --s5: #2f95cf; --s6: #6b6f76;
  --good: #d8efe4; --fair: #fbeecb; --bad: #f8d9cf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1d2126; --ink: #e8eaed; --soft: #a2abb7; --rule: #3a414a; --grid: #2a3037;
    --s0: #4ba7e0; --s1: #f0803c; --s2: #2fbf93; --s3: #dd8fbb; --s4: #e6b032; --s5: #8ccdf2; --s6: #a9aeb6;
    --good: #1d4435; --fair: #4a3d14; --bad: #54291d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 48px 0 6px; padding-top: 10px; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 22px 0 2px; }
p { margin: 6px 0 10px; max-width: 72ch; }
.lead-in, .note { color: var(--soft); }
.note { font-size: 0.88rem; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 14px 0 0; font-size: 0.9rem; }
a { color: var(--s0); }
code {
  font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
}
.verdicts { display: grid; gap: 10px; margin: 14px 0; }
.verdict { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 16px; }
.verdict header { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: baseline; }
.verdict header code { font-weight: 600; font-size: 1rem; }
.verdict p { margin: 6px 0 0; max-width: none; }
.interval { display: block; white-space: nowrap; color: var(--soft); font-size: 0.92em; }
.grade { border-radius: 99px; padding: 1px 11px; font-size: 0.86rem; font-weight: 600; }
.good { background: var(--good); } .fair { background: var(--fair); } .bad { background: var(--bad); }
.figures { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child code { white-space: nowrap; }
.words td { text-align: left; }
.words td:nth-child(n+2) { text-align: right; white-space: nowrap; }
.facts th, .facts td { text-align: left; }
.facts td { overflow-wrap: anywhere; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 20px; padding: 0; margin: 10px 0 2px; }
.legend { font-size: 0.86rem; }
.legend li { display: flex; align-items: center; gap: 7px; }
.chart { display: block; width: 100%; min-width: 560px; height: auto; }
.chart text { font-size: 12px; fill: var(--ink); }
.chart .tick { fill: var(--soft); font-size: 11.5px; }
.chart .label { fill: var(--soft); font-size: 12.5px; }
.chart .name { font-size: 12px; font-weight: 600; }
.axis { stroke: var(--soft); stroke-width: 1; }
.grid { stroke: var(--grid); stroke-width: 1; }
.lead { stroke: var(--soft); stroke-width: 0.7; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.whisker { stroke-width: 1.4; opacity: 0.75; }
.mark { stroke: var(--paper); stroke-width: 1; }
.pixels { image-rendering: pixelated; }
"""
    + "".join(
        f".line.s{n}, .whisker.s{n}, .open.s{n} {{ stroke: var(--s{n}); }} .mark.s{n} {{ fill: var(--s{n}); }} "
        f".t{n} {{ fill: var(--s{n}) !important; }}\n"
        for n in range(7)
    )
    + """
.open { fill: none !important; stroke-width: 2.4; }
@media print {
  body { font-size: 11pt; } main { max-width: none; padding: 0; } nav { display: none; }
  .verdict, .chart, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""
)
