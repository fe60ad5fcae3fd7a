"""The style sheet of the report: plain CSS, one type size, no fonts or scripts from elsewhere."""

CSS = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --line: #d8dee4; --wash: #f6f8fa;
  --paper: #fff; --accent: #0072b2; --alarm: #b3400a; --alarm-wash: #fdf1ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #a5afba; --line: #30363d;
  --wash: #161b22; --paper: #0d1117; --accent: #6cb6ff; --alarm: #f0883e; --alarm-wash: #2b1d12; }
  .inverts img { filter: invert(1) hue-rotate(180deg); } }
* { box-sizing: border-box; font-size: 1rem; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; font-family: system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
header { border-bottom: 3px solid var(--accent); margin-bottom: 1.25rem; padding-bottom: .75rem; }
.kicker { margin: 0; color: var(--accent); font-weight: 600; }
h1, h2, h3 { line-height: 1.3; overflow-wrap: anywhere; }
h1 { margin: 0 0 .5rem; font-weight: 800; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line);
  color: var(--accent); font-weight: 700; }
h3 { margin: 1.1rem 0 .25rem; font-weight: 700; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: .25rem 0; padding-left: 1.2rem; }
li { margin: .3rem 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.banner { margin: .5rem 0; padding: .6rem .9rem; border-left: 4px solid var(--alarm);
  background: var(--alarm-wash); }
.finding { margin: .4rem 0; }
.note, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .9rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; }
td { white-space: nowrap; }
td[colspan] { text-align: center; }
figure { margin: 1rem 0; min-width: 0; }
figure img { display: block; height: auto; }
.inverts img { max-width: 100%; }
.light img { background: #fff; border-radius: 8px; }
figcaption { margin-top: .2rem; max-width: 46rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: .5rem 2rem; }
.statement { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 0 2rem;
  align-items: start; }
.statement .scroll { background: var(--wash); border-radius: 8px; padding: .25rem 1rem; }
.statement table { width: 100%; }
.statement tbody th { font-weight: 400; }
.statement td { white-space: normal; }
.nonprivate { margin-top: 2.5rem; padding: .1rem 1rem 1rem; border: 2px solid var(--alarm);
  border-radius: 8px; }
.nonprivate h2 { margin-top: 1rem; color: var(--alarm); }
details { margin: .6rem 0; border: 1px solid var(--line); border-radius: 8px; }
summary { padding: .5rem .9rem; cursor: pointer; font-weight: 600; }
pre { margin: 0; padding: .75rem .9rem; background: var(--wash); overflow-x: auto; line-height: 1.4; }
@media (max-width: 860px) { main { padding: 1rem .75rem 2rem; }
  .statement { grid-template-columns: minmax(0, 1fr); } th, td { padding: .4rem .5rem; } }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
