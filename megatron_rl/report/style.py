"""The look and the one script of report.html: nothing is fetched, light and dark follow the reader's system.

Classes `c0`..`c7` in all their forms are one palette: lines `s`, fills `f`, bars `b`, weight versions `v`.
"""

_LIGHT = ("#2f6fde", "#e8833a", "#229a6f", "#a355c8", "#cfa21b", "#22a3b8", "#dc4c6b", "#8a919c")
_DARK = ("#6ea0ff", "#f2a065", "#4cc79a", "#c98be6", "#e3c355", "#58c6d8", "#f27d96", "#9aa2ae")
NUM_COLOURS = len(_LIGHT)

_VARIABLES = """
:root {
    color-scheme: light dark;
    --page: #f5f6f8; --card: #fff; --ink: #1b2130; --soft: #636c7c; --line: #e3e6eb; --good: #178a5c; --bad: #c63a55; LIGHT
}
@media (prefers-color-scheme: dark) {
    :root {
        --page: #11141a; --card: #1a1e27; --ink: #e6e9ef; --soft: #98a1b1; --line: #2b313d; --good: #4cc79a; --bad: #f27d96; DARK
    }
}
"""

_RULES = """
* { box-sizing: border-box }
body {
    margin: 0; background: var(--page); color: var(--ink);
    font: 15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 64px }
header { margin-bottom: 20px }
.kind { color: var(--soft); font-size: 12px; font-weight: 600; letter-spacing: .09em; text-transform: uppercase }
h1 { font-size: 28px; line-height: 1.2; margin: 2px 0 4px; letter-spacing: -.01em }
h2 { font-size: 15px; margin: 0 0 2px }
h3 { font-size: 13px; margin: 18px 0 4px; color: var(--soft); font-weight: 600 }
.sub,.note { color: var(--soft); margin: 0 }
.note { font-size: 13px; margin-bottom: 8px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit,minmax(165px,1fr)); gap: 12px; margin: 20px 0 }
.tile,.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: 12px 14px }
.tile b { display: block; font-size: 23px; line-height: 1.25; font-weight: 650; letter-spacing: -.01em }
.tile > span { color: var(--soft); font-size: 12.5px }
.tile em { font-style: normal; color: var(--soft); font-weight: 450 }
.up { color: var(--good) }
.down { color: var(--bad) }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit,minmax(min(100%,480px),1fr)); gap: 14px }
.card { padding: 16px 18px; min-width: 0; margin: 0 }
.wide { grid-column: 1/-1 }
svg { display: block; width: 100%; height: auto; overflow: visible; font-family: inherit }
svg.cell { width: 160px; height: 16px }
.grid { stroke: var(--line) }
.axis { fill: var(--soft); font-size: 11px }
.label { fill: var(--ink); font-size: 12px }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round }
.faint { opacity: .3; stroke-width: 1.2 }
.band { opacity: .15 }
.join { stroke: var(--c0); stroke-width: 3; opacity: .35; stroke-linecap: round }
.hollow { fill: var(--card); stroke: var(--c0); stroke-width: 2 }
.hit { fill: transparent }
rect.hit:hover { fill: var(--ink); opacity: .06 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft); margin-top: 6px }
.mark { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; vertical-align: -1px }
.mark.ring { border: 2px solid var(--c0); border-radius: 50% }
.nothing { color: var(--soft); text-align: center; padding: 36px 0; margin: 0 }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th { color: var(--soft); font-weight: 550; text-align: left; font-size: 12.5px }
td,th { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: middle }
tr:last-child td { border-bottom: 0 }
.n { text-align: right; font-variant-numeric: tabular-nums }
.share { display: flex; height: 14px; border-radius: 5px; overflow: hidden; gap: 1px; margin: 8px 0 10px }
code,pre,.tokens,.text { font-family: ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace }
code { font-size: 12.5px }
pre { font-size: 12px; overflow: auto; margin: 8px 0 0 }
summary { cursor: pointer; color: var(--soft); font-size: 13px }
.scroll { overflow-x: auto }
.sample { border-top: 1px solid var(--line); padding: 14px 0 4px }
.sample:first-of-type { border-top: 0 }
.head { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: baseline; font-size: 13px; color: var(--soft) }
.head b { color: var(--ink); font-size: 14px }
.chip {
    border-radius: 99px; padding: 1px 9px; font-size: 12px; font-weight: 600;
    background: color-mix(in srgb,var(--soft) 16%,transparent); color: var(--ink);
}
.chip.up { background: color-mix(in srgb,var(--good) 16%,transparent); color: var(--good) }
.chip.down { background: color-mix(in srgb,var(--bad) 14%,transparent); color: var(--bad) }
.text { font-size: 12.5px; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); margin: 6px 0 }
.tokens { font-size: 13px; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 10px }
.tokens i { font-style: normal; border-radius: 2px }
.tokens i:hover { outline: 1.5px solid var(--ink) }
.tokens .u { text-decoration: underline dotted; text-underline-offset: 3px }
.tokens .tool { opacity: .55 }
.end {
    font: 600 11px/1 system-ui,sans-serif; color: var(--soft); border: 1px solid var(--line);
    border-radius: 4px; padding: 1px 5px; margin: 0 5px;
}
#tip {
    position: fixed; pointer-events: none; display: none; white-space: pre; background: var(--ink);
    color: var(--card); font-size: 12px; line-height: 1.45; padding: 6px 9px; border-radius: 6px; z-index: 9;
    font-variant-numeric: tabular-nums;
}
.prompt { margin: 6px 0 }
.prompt summary { color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere }
table.settings td { overflow-wrap: anywhere }
"""

SCRIPT = """
const tip = document.getElementById('tip');
function said(element) {
  const target = element.closest('[data-t], [data-p]');
  if (!target) return '';
  if (target.dataset.t) return target.dataset.t;
  const segment = target.closest('[data-v]').dataset, logProb = +target.dataset.p;
  return `weight version ${segment.v}, iteration ${segment.i}`
    + `\\nlog-prob ${logProb.toFixed(3)} (p = ${Math.exp(logProb).toFixed(3)})`
    + (target.dataset.k ? `\\non KV of version ${target.dataset.k}` : '');
}
document.addEventListener('mousemove', event => {
  const text = said(event.target);
  tip.style.display = text ? 'block' : 'none';
  if (!text) return;
  tip.textContent = text;
  const below = event.clientY + 18 + tip.offsetHeight <= innerHeight;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
  tip.style.top = (below ? event.clientY + 18 : event.clientY - tip.offsetHeight - 10) + 'px';
});
"""


def style() -> str:
    """The style sheet, palette filled in."""
    variables = _VARIABLES.replace("LIGHT", _palette(_LIGHT)).replace("DARK", _palette(_DARK))
    return variables + _RULES + "".join(_colour(i) for i in range(NUM_COLOURS))


def _palette(colours: tuple[str, ...]) -> str:
    return ";".join(f"--c{i}:{colour}" for i, colour in enumerate(colours))


def _colour(i: int) -> str:
    return (
        f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.b{i}{{background:var(--c{i})}}"
        f".v{i}{{background:color-mix(in srgb,var(--c{i}) 24%,transparent)}}\n"
    )
