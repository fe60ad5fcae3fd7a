"""The style sheet of the report: plain CSS, no fonts or scripts from elsewhere."""

CSS = """
:root { --ink: #24292f; --soft: #57606a; --line: #d8dee4; --wash: #f6f8fa; --accent: #0072b2;
  --alarm: #b3400a; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { border-bottom: 3px solid var(--accent); margin-bottom: 1.25rem; }
.kicker { margin: 0; color: var(--accent); font-weight: 600; letter-spacing: .02em; }
h1 { margin: 0 0 .6rem; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.4rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1.1rem; }
h4 { margin: 1.1rem 0 .25rem; font-size: 1rem; }
ul { margin: .25rem 0; padding-left: 1.2rem; }
li { margin: .3rem 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-size: .88em; }
.banner { margin: .5rem 0; padding: .6rem .9rem; border-left: 4px solid var(--alarm); background: #fdf1ea; }
.finding { font-size: 1.08rem; margin: .4rem 0; }
.note, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .9rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .9rem; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; }
td { white-space: nowrap; }
figure { margin: 1rem 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .2rem; max-width: 46rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap:
  .5rem 2rem; }
.statement { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 0 2.5rem;
  align-items: start; }
.statement h4:first-child { margin-top: .6rem; }
.statement .scroll { background: var(--wash); border-radius: 8px; padding: .25rem 1rem; }
.statement table { width: 100%; font-size: .9rem; }
.statement tbody th { font-weight: 400; }
.statement td { white-space: normal; padding-right: 0; }
.nonprivate { margin-top: 2.75rem; padding: .1rem 1.25rem 1rem; border: 2px solid var(--alarm);
  border-radius: 8px; }
.nonprivate h2 { margin-top: 1rem; }
details { margin: .6rem 0; border: 1px solid var(--line); border-radius: 8px; }
summary { padding: .5rem .9rem; cursor: pointer; font-weight: 600; }
pre { margin: 0; padding: .75rem .9rem; background: var(--wash); overflow-x: auto; line-height: 1.4; }
@media (max-width: 760px) { .statement { grid-template-columns: minmax(0, 1fr); } h1 { font-size:
  1.6rem; } }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
