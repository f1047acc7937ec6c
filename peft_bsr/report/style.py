"""CSS of the page: light and dark themes, one column on a phone."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f5f6f8; --ink: #1c2430; --quiet: #586274;
  --rule: #d9dde4; --c0: #2563a8; --c1: #c2571a; --c2: #2f7d4f; --c3: #7b4ea3; --c4: #8a6d00; --rest: #b9c0cc;
  --hot: 37, 99, 168; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --raised: #1b212a; --ink: #e6e9ee; --quiet: #a3adbb;
  --rule: #323b48; --c0: #6ea8e6; --c1: #ef9a62; --c2: #74c295; --c3: #bb96df; --c4: #d8b94a; --rest: #566173;
  --hot: 110, 168, 230; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 40px; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 10px; }
h3 { font-size: 1rem; margin: 14px 0 4px; } h2 + h3 { margin-top: 0; }
p, ul { margin: 0 0 10px; } ul { padding-left: 20px; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0 0 16px; }
.headline div { background: var(--raised); border-radius: 8px; padding: 10px 14px; }
.headline dt { color: var(--quiet); font-size: .875rem; } .headline dd { margin: 0; font-size: 1.3rem; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px; }
section { background: var(--raised); border-radius: 8px; padding: 16px; min-width: 0; }
section.wide { grid-column: 1 / -1; }
.stack { display: grid; gap: 16px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 16px; }
svg { display: block; width: 100%; max-width: 560px; height: auto; }
svg text { font-size: 12px; fill: var(--quiet); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .mark { stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 4 4; } .mark { --c: var(--quiet); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); } .s4 { --c: var(--c4); }
.frozen { --c: var(--rest); }
svg .mark { stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 4 4; } .mark { --c: var(--quiet); }
svg .line { stroke: var(--c); } svg .bar, svg .dot { fill: var(--c); }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 0; padding: 0; list-style: none;
  color: var(--quiet); font-size: .875rem; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; background: var(--c);
  vertical-align: -1px; }
.scroll { overflow-x: auto; margin: 0 0 8px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 8px; border-bottom: 1px solid var(--rule); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--quiet); font-weight: 600; }
.facts td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.facts td:first-child { white-space: nowrap; overflow-wrap: normal; padding-right: 16px; width: 1%; }
.kept { display: grid; gap: 6px; max-width: 760px; }
.kept figure { margin: 0; min-width: 0; } .kept img { display: block; width: 100%; border-radius: 4px; }
.kept figcaption { line-height: 1.25; margin-bottom: 4px; }
.gallery { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.gallery figure { margin: 0; min-width: 0; display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.gallery img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px; }
.gallery figcaption { line-height: 1.3; margin-top: 4px; overflow-wrap: anywhere; white-space: pre-line; }
img.chart { display: block; width: 100%; max-width: 720px; border-radius: 4px; background: #ffffff; }
pre { margin: 0 0 12px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .8125rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 480px) { body { padding: 16px 12px 32px; } section { padding: 12px; }
  svg text { font-size: 13.5px; } .kept figcaption { font-size: .6875rem; }
  .headline { grid-template-columns: repeat(2, 1fr); }
  .headline dd { font-size: 1.1rem; } th, td { padding: 6px 4px; } }
"""

__all__ = ["STYLE"]
