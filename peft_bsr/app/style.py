"""CSS of the app: colours of the light and the dark theme, one column on a phone."""

from __future__ import annotations

CSS = """
.gradio-container { --c0: #2563a8; --c1: #c2571a; --c2: #2f7d4f; --c3: #7b4ea3; --c4: #8a6d00; --c5: #586274;
  --quiet: #586274;
  --rule: #d9dde4; --wrong: #a61b1b; --light: 38%; width: 100% !important;
  max-width: 1180px !important; margin: 0 auto !important; }
.dark .gradio-container, .gradio-container.dark { --c0: #6ea8e6; --c1: #ef9a62; --c2: #74c295; --c3: #bb96df;
  --c4: #d8b94a; --c5: #a3adbb; --quiet: #a3adbb; --rule: #3a4452; --wrong: #ff9b9b; --light: 68%; }
.gradio-container > main { width: 100%; }
.quiet { color: var(--quiet); font-size: .875rem; }
.wrong { color: var(--wrong); white-space: pre-wrap; overflow-wrap: anywhere; }
.k0 { --c: var(--c0); } .k1 { --c: var(--c1); } .k2 { --c: var(--c2); } .k3 { --c: var(--c3); } .k4 { --c: var(--c4); }
.k5 { --c: var(--c5); }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 10px; padding: 0; list-style: none;
  color: var(--quiet); font-size: .875rem; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  background: var(--c); }
ol.plans { list-style: none; margin: 0; padding: 0; }
ol.plans li { padding: 10px 0; border-top: 1px solid var(--rule); }
ol.plans h3 { font-size: 1rem; margin: 0 0 4px; overflow-wrap: anywhere; }
ol.plans p { display: block; margin: 4px 0 0; }
.bar { display: flex; height: 14px; border-radius: 3px; overflow: hidden; background: var(--rule); }
.bar span { background: var(--c); min-width: 0; }
.kept { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(min(150px, 45%), 1fr)); }
.kept figure { margin: 0; } .kept img { display: block; width: 100%; border-radius: 4px; }
.kept figcaption { font-size: .875rem; line-height: 1.35; margin-top: 4px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0 0 12px; }
.chart { position: relative; height: 560px; --x0: 46px; --x1: 16px; --high: 380px; margin-top: 8px; }
.chart svg { position: absolute; left: var(--x0); right: var(--x1); top: 10px; height: var(--high); overflow: visible;
  width: calc(100% - var(--x0) - var(--x1)); border-left: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }
.chart polyline { fill: none; stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 5 4;
  vector-effect: non-scaling-stroke; }
.at { position: absolute; left: calc(var(--x0) + (100% - var(--x0) - var(--x1)) * var(--x));
  top: calc(10px + var(--high) * (1 - var(--y))); }
.tick { color: var(--quiet); font-size: .75rem; line-height: 1; white-space: nowrap; }
.tick.x { transform: translate(-50%, 8px); } .tick.y { transform: translate(calc(-100% - 6px), -50%); }
.axis { position: absolute; right: var(--x1); top: calc(36px + var(--high)); color: var(--quiet); font-size: .875rem; }
.point { width: 24px; height: 24px; margin: -12px; padding: 0; border: 0; background: none; cursor: pointer;
  border-radius: 50%; }
.point::before { content: ""; position: absolute; inset: 8px; border-radius: 50%; background: var(--c); opacity: .55; }
.point.front::before { opacity: 1; inset: 5px; }
.point:focus { outline: 2px solid var(--c); z-index: 2; }
.about { position: absolute; top: calc(62px + var(--high)); left: 0; right: 0; bottom: 0; overflow: auto; display: none;
  background: var(--body-background-fill); font-size: .875rem; }
.about.first, .point:focus + .about, .point:hover + .about, .about:hover { display: block; }
.point:focus + .about { z-index: 1; } .point:hover + .about { z-index: 3; }
.about p { margin: 0 0 4px; } .about code { overflow-wrap: anywhere; white-space: pre-wrap; }
.scroll { overflow-x: auto; } .scroll table { border-collapse: collapse; width: 100%; font-size: .875rem; }
.scroll th, .scroll td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
.scroll th:first-child, .scroll td:first-child, .scroll td:last-child, .scroll th:last-child { text-align: left; }
.front-row td { font-weight: 600; }
"""

__all__ = ["CSS"]
