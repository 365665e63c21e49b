"""The pictures of docs/measured.md, drawn from the same figures."""

from . import figures, plan

# Both colour schemes; the reader's browser chooses.
STYLE = """
  .paper { fill: #ffffff } .plot { fill: #f6f8fa }
  text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif; fill: #57606a; font-size: 12.5px }
  .title { font-size: 22px; font-weight: 650; fill: #1f2328 } .lead { font-size: 14px }
  .name { font-size: 14px; font-weight: 650; fill: #1f2328 } .end { text-anchor: end } .value { font-weight: 600; fill: #1f2328 }
  .line { stroke: #d0d7de; stroke-width: 1 }
  .resident { fill: #cf5b0a } .resident-frozen { fill: #e0a36f } .daemon { fill: #8250df } .tombstone { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .plot { fill: #161b22 } text { fill: #8b949e } .title, .name, .value { fill: #e6edf3 }
    .line { stroke: #30363d } .resident { fill: #f0883e } .resident-frozen { fill: #9c6a3f } .daemon { fill: #bc8cff }
    .tombstone { fill: #58a6ff }
  }"""
ARMS = {
    "resident": "resident",
    "resident-frozen": "resident, frozen and paged out",
    "daemon": "one connection, apps left running",
    "tombstone": "through Night Porter",
}
WIDTH, LEFT, RIGHT = 960, 256, 120
BAR, GAP = 15, 3


def memory(results, gib):
    """What apps cost, by kind and number, in a machine of that size."""
    runs = [run for name in plan.ORDER if name != plan.REACH for run in figures.of(results, name, gib)]
    rows = []
    for run in runs:
        bars = [(name, figures.mib(run, name)) for name in ARMS]
        bars = [(name, value, f"{value:.0f} MiB" if abs(value) >= 10 else f"{value:.1f} MiB") for name, value in bars if value is not None]
        title = "20 mixed" if run["experiment"] == plan.MIXED else f"{run['apps']} × {plan.KINDS[run['experiment']][1]}"
        rows.append((title, bars))
    lead = f"growth of used memory (zram included) in a machine of {gib} GiB"
    return _bars("What apps that can be reached cost", lead, rows)


def reach(results):
    """How many apps each machine keeps reachable."""
    rows = []
    for run in figures.of(results, plan.REACH):
        bars = []
        for name, one in figures.reach(run).items():
            more = "" if one["too_many"] else " or more"
            bars.append((name, one["apps"], f"{one['apps']}{more}"))
        rows.append((f"{run['gib']} GiB", bars))
    lead = "apps that were reachable by a push within 10 s, before memory was short"
    return _bars("How many apps one phone keeps reachable", lead, rows)


def _bars(title, lead, rows):
    """Groups of bars, each group with its name at the left; all on one scale."""
    names = list(dict.fromkeys(name for _, bars in rows for name, *_ in bars))
    top = max((value for _, bars in rows for _, value, _ in bars), default=1) or 1
    scale = (WIDTH - LEFT - RIGHT) / top
    body, y = [], 118
    for label, bars in rows:
        height = len(bars) * (BAR + GAP) - GAP
        body.append(f'<text class="name end" x="{LEFT - 14}" y="{y + height / 2 + 5:.0f}">{_escaped(label)}</text>')
        for name, value, told in bars:
            length = max(value * scale, 1.0)
            body.append(f'<rect class="{name}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>')
            body.append(f'<text class="value" x="{LEFT + length + 7:.1f}" y="{y + BAR - 3}">{_escaped(told)}</text>')
            y += BAR + GAP
        y += 17
    height = y + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{_escaped(title)}">',
        f"<style>{STYLE}\n</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="10"/>',
        f'<text class="title" x="28" y="40">{_escaped(title)}</text>',
        f'<text class="lead" x="28" y="63">{_escaped(lead)}</text>',
        f'<rect class="plot" x="{LEFT}" y="104" width="{WIDTH - LEFT - RIGHT}" height="{height - 122}"/>',
    ]
    x = 28
    for name in names:
        out.append(f'<rect class="{name}" x="{x}" y="78" width="12" height="12" rx="2"/>')
        out.append(f'<text x="{x + 18}" y="89">{_escaped(ARMS[name])}</text>')
        x += 44 + 6.9 * len(ARMS[name])
    out.append(f'<line class="line" x1="{LEFT}" y1="104" x2="{LEFT}" y2="{height - 18}"/>')
    return "\n".join([*out, *body, "</svg>"]) + "\n"


def _escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
