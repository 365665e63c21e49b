"""`docs/measured.md`: everything in it is from measured.json, and each table names the command that makes it."""

from . import figures, picture, plan

SAID = {
    "claim-within": "the ledger's claim against the measured truth, 20 mixed apps",
    "returned-at-least": "memory of 20 mixed apps returned by tombstones",
    "frozen-returned-at-least": "memory of 20 mixed apps returned by freezing and paging out alone",
    "daemon-at-most": "the daemon's own memory, of what it saves, by PSS",
    "lost-at-most": "messages lost",
    "times-as-many-at-least": "apps reachable, through the daemon against resident",
    "apps-at-least": "apps reachable through the daemon",
}
# Of the project, where an experiment does not fail at once.
ASIDE = {"claim-within": f"within {figures.CLAIM_TARGET:.0f} % (fails beyond {figures.CLAIM_LIMIT:.0f} %)"}
ROWS = [
    ("Memory used", "cost", 1024.0, "MiB"),
    ("… by MemAvailable as it is", "cost_unavailable", 1024.0, "MiB"),
    ("Memory occupied: with files that are mapped", "cost_occupied", 1024.0, "MiB"),
    ("Saved against resident", "saved", 1024.0, "MiB"),
    ("Returned", "returned_percent", 1.0, "%"),
    ("More can be allocated beside them", "ballast", 1024.0, "MiB"),
    ("… than beside resident ones", "ballast_gained", 1024.0, "MiB"),
    ("The ledger's claim", "claim", 1024.0, "MiB"),
    ("… its error, by what is used", "claim_error_percent", 1.0, "%"),
    ("… its error, by what is occupied", "claim_error_occupied_percent", 1.0, "%"),
    ("Apps' PSS", "apps_pss", 1024.0, "MiB"),
    ("Daemon's PSS", "daemon_pss", 1024.0, "MiB"),
    ("zram's own memory", "zram", 1024.0, "MiB"),
    ("… for pages of", "swap", 1024.0, "MiB"),
    ("Connections", "connections", 1.0, ""),
    ("Apps a push reached at the end", "reachable", 1.0, ""),
    ("CPU time of the apps", "apps_cpu", 1.0, "s"),
    ("CPU time of the daemon", "daemon_cpu", 1.0, "s"),
]
STATES = ["running", "frozen", "paged out", "tombstone"]


def files(results):
    """measured.md and its pictures: text by name."""
    found = {f"measured-{gib}gib.svg": picture.memory(results, gib) for gib in figures.machines(results)}
    if figures.of(results, plan.REACH):
        found["measured-reach.svg"] = picture.reach(results)
    found["measured.md"] = "\n".join(_page(results)) + "\n"
    return found


def missed(results):
    """What was expected and did not come, a line each."""
    found = []
    for run in results["runs"]:
        for one in run["outcome"]["expectations"]:
            if not one["met"]:
                found.append(f"{run['gib']} GiB, {run['experiment']}: {one['key']}: {one['measured']}, wanted {one['wanted']}")
    return found


def glance(outcome):
    """An outcome in one line."""
    if outcome["reach"]:
        return "; ".join(f"{one['arm']} {one['apps']} ({one['because']})" for one in outcome["reach"])
    costs = [f"{one['arm']} {one['cost']['median'] / 1024:.0f} MiB" for one in outcome["arms"] if one["cost"]]
    return ", ".join(costs)


def _page(results):
    yield "# What is saved, with real programs"
    yield ""
    yield "<!-- Made by `tests/vm/measure`; do not edit. -->"
    yield ""
    yield (
        "The same programs from Debian, each holding a connection of its own and staying, against the same programs reached through "
        "the one connection of Night Porter, which freezes them, pages them out and ends them when nobody looks at them. "
        "Primary figure: how much more memory the whole machine uses (MemTotal − MemAvailable, without the kernel's caution; what zram "
        "takes is in it)."
    )
    yield ""
    for gib in figures.machines(results)[:1]:
        yield f"![Memory of apps, resident and through Night Porter, {gib} GiB](measured-{gib}gib.svg)"
        yield ""
    if figures.of(results, plan.REACH):
        yield "![Apps reachable, resident and through Night Porter](measured-reach.svg)"
        yield ""
    yield from _targets(results)
    for gib in figures.machines(results):
        yield from _kinds(results, gib)
        for run in figures.of(results, plan.MIXED, gib):
            yield from _mixed(run)
    yield from _reaches(results)
    yield from _conditions(results)


def _targets(results):
    rows = []
    for run in results["runs"]:
        for one in run["outcome"]["expectations"]:
            verdict = "met" if one["met"] else "**missed**"
            if one["key"] == "claim-within" and one["met"]:
                error = figures.median(run, "tombstone", "claim_error_percent")
                verdict = "met" if abs(error) <= figures.CLAIM_TARGET else "**missed**, by less than fails"
            said = SAID.get(one["key"], one["key"])
            rows.append(f"| {said}, {run['gib']} GiB | {wanted(one)} | {one['measured'] or '–'} | {verdict} |")
    if rows:
        yield "## Targets"
        yield ""
        yield "| | wanted | measured | |"
        yield "|---|---|---|---|"
        yield from sorted(rows)
        yield ""


def wanted(expectation):
    """What the project wants there."""
    return ASIDE.get(expectation["key"], expectation["wanted"])


def times_said(run):
    """How many times as many are reachable; None where that was not measured."""
    if (found := figures.times(run)) is None:
        return None
    # Where none were too many, more were not tried.
    return f"{'at least ' if figures.reach(run)['tombstone']['too_many'] is None else ''}{found:.1f}"


def _kinds(results, gib):
    runs = [run for kind in plan.KINDS for run in figures.of(results, kind, gib)]
    if not runs:
        return
    yield f"## One kind at a time, {gib} GiB"
    yield ""
    yield f"`tests/vm/measure {' '.join(_only(gib, runs))}`; {runs_said(runs)}."
    yield ""
    if gib != figures.machines(results)[0]:
        yield f"![Memory of apps, resident and through Night Porter, {gib} GiB](measured-{gib}gib.svg)"
        yield ""
    yield "| app | number | resident | through Night Porter | saved | returned | connections | push to a tombstone, median / most |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for run in runs:
        connections = " → ".join(_figure(figures.median(run, arm, "connections"), "") for arm in ("resident", "tombstone"))
        yield (
            f"| {plan.KINDS[run['experiment']][1]} | {run['apps']} | {_figure(figures.mib(run, 'resident'), 'MiB')} "
            f"| {_figure(figures.mib(run, 'tombstone'), 'MiB')} | {_figure(figures.mib(run, 'tombstone', 'saved'), 'MiB')} "
            f"| {_figure(figures.median(run, 'tombstone', 'returned_percent'), '%')} | {connections} "
            f"| {_wake(figures.wake(run, 'tombstone', 'tombstone'))} |"
        )
    yield ""
    yield "What is left of it through Night Porter is the daemon itself, which is there once for all apps."
    yield ""


def _mixed(run):
    arms = [one["arm"] for one in run["outcome"]["arms"]]
    yield f"## {run['apps']} mixed apps, {run['gib']} GiB"
    yield ""
    yield f"`tests/vm/measure {' '.join(only_of([run]))}`; {kinds_said(run)}; {runs_said([run])}."
    yield ""
    yield f"| | {' | '.join(picture.ARMS[arm] for arm in arms)} |"
    yield f"|---|{'--:|' * len(arms)}"
    for said, key, scale, unit in ROWS:
        cells = [spread(run, arm, key, scale, unit) for arm in arms]
        if any(cell != "–" for cell in cells):
            yield f"| {said} | {' | '.join(cells)} |"
    for state in STATES:
        cells = [_wake(figures.wake(run, arm, state)) for arm in arms]
        if any(cell != "–" for cell in cells):
            yield f"| Push to an app that is {'a ' if state == 'tombstone' else ''}{state}, median / most | {' | '.join(cells)} |"
    counts = [figures.arm(run, arm)["messages"] for arm in arms]
    cells = [f"{one['sent']}: {one['late']}, {one['lost']}, {one['duplicated']}" for one in counts]
    yield f"| Messages: late, lost, twice | {' | '.join(cells)} |"
    yield ""
    yield (
        f"The programs' servers and the display took at most {figures.servers_growth(run):.0f} MiB more during this; a phone has the display, "
        "not the servers, and they are counted in every arm."
    )
    yield ""
    for one in run["outcome"]["arms"]:
        for note in one["notes"]:
            yield f"- {picture.ARMS[one['arm']]}: {note}"
    yield ""


def _reaches(results):
    runs = figures.of(results, plan.REACH)
    if not runs:
        return
    yield "## How many apps one phone keeps reachable"
    yield ""
    yield (
        f"`tests/vm/measure {' '.join(only_of(runs))}`. The kinds in turn; a number is too many when tasks wait for memory more than "
        "10 % of 10 s once it has settled (or half of 30 s before), a push takes over 10 s, an app is not ready within 5 min, or one is ended "
        "for want of memory."
    )
    yield ""
    yield "| memory | | kept reachable | too many | because | connections |"
    yield "|---|---|--:|--:|---|--:|"
    for run in runs:
        for name, one in figures.reach(run).items():
            too_many = one["too_many"] or "–"
            yield f"| {run['gib']} GiB | {picture.ARMS[name]} | {one['apps']} | {too_many} | {one['because']} | {one['connections']} |"
    yield ""
    for run in runs:
        if (times := times_said(run)) is not None:
            yield f"- {run['gib']} GiB: {times} times as many."
    yield ""
    for run in runs:
        for name, one in figures.reach(run).items():
            for note in one["notes"]:
                yield f"- {run['gib']} GiB, {picture.ARMS[name]}: {note}"
    yield ""


def _conditions(results):
    machine = results["runs"][0]["outcome"]["machine"] if results["runs"] else {}
    packages = results["packages"]
    programs = ", ".join(
        f"{said} ({package} {packages.get(package, '?')})" for package, said in dict(plan.KINDS.values()).items()
    )
    yield "## Conditions"
    yield ""
    yield "- All of it by `tests/vm/measure` as root and nothing else, all raw figures: `measured.json`. Each of it:"
    for told, whats in _made(results["runs"]).items():
        yield f"  - {', '.join(whats)}: {told}."
    qemus = ", ".join(sorted({run["host"]["qemu"] for run in results["runs"]}))
    yield (
        f"- {qemus} without KVM. Everything takes many times as long as on hardware: memory is real, **times are not a phone's**."
    )
    yield (
        f"- Debian 13, Linux {machine.get('kernel')}, zram of half the memory ({' '.join(machine.get('zram_algorithms', []))}), huge pages "
        f"{machine.get('transparent_hugepages')}, swappiness {machine.get('swappiness')}."
    )
    yield f"- Programs: {programs}. Each instance has a profile and an account of its own."
    yield (
        "- Dino is logged in to Prosody, with its window on a Wayland display that is off (Weston without frames, software rendering); "
        "OfflineIMAP holds an IDLE connection to Dovecot; MQTT.js is subscribed at Mosquitto. All of these servers run in the same machine. "
        "The accounts are empty: lived-in ones cost more."
    )
    yield (
        "- Through Night Porter a program is run by `nightporter-sample --exec`, which holds its bus name and takes its pushes, in "
        "both halves alike. It is there and takes a message before the program itself has started anew: latencies are of the message."
    )
    yield (
        "- *Used* is all memory but what is free, or page cache and slab that the kernel can drop. MemAvailable is that less a reserve, "
        "which is up to half of a page cache as small as it is after dropping caches, and so no measure of differences. "
        "*Used* leaves out what the kernel thinks it could drop, and so program files that are mapped, which a running program would "
        "read again at once. *Occupied* counts them. The ledger claims what *used* shows: what each program holds (PSS) but for its "
        "files, and the kernel's memory for it."
    )
    yield "- A push to a tombstone pays for the start of its program; that is what the memory is exchanged for."
    yield ""


def _made(runs):
    """When, from what and where the results were made, and which were made so."""
    found = {}
    for run in runs:
        host = run["host"]
        machines = "the only machine" if host["at_once"] == 1 else f"one of {host['at_once']} machines at a time"
        told = (
            f"{run['made']} from {run['commit']}, built by {host['built']}; in {machines}, with {host['cpus_each']} processors on "
            f"{host['cpus']} of the host"
        )
        what = f"{run['gib']}/{run['label']}"
        if what not in found.setdefault(told, []):
            found[told].append(what)
    return found


def _only(gib, runs):
    return [f"--only {gib}/{label}" for label in sorted({run["label"] for run in runs}, key=int)] + _as_often(runs)


def kinds_said(run):
    """How many of which programs."""
    return ", ".join(f"{count} × {plan.KINDS[name][1]}" for name, count in sorted(run["outcome"]["kinds"].items()))


def only_of(runs):
    """What of `tests/vm/measure` makes these."""
    return [f"--only {run['gib']}/{run['label']}" for run in runs] + _as_often(runs)


def _as_often(runs):
    """What makes as many runs, where that is not what the experiment says."""
    done = {run["outcome"]["runs"] for run in runs if plan.runs_of(run["experiment"]) not in (None, run["outcome"]["runs"])}
    return [f"--runs {number}" for number in sorted(done)]


def runs_said(runs):
    """How many runs, as a sentence part."""
    numbers = sorted({run["outcome"]["runs"] for run in runs})
    several = numbers[-1] > 1
    return f"{'/'.join(map(str, numbers))} run{'s' if several else ''} of each{', median (least to most)' if several else ''}"


def _figure(value, unit):
    """As a reader has it."""
    if value is None:
        return "–"
    return f"{_number(value, unit)} {unit}".rstrip()


def _number(value, unit):
    digits = 0 if abs(value) >= 100 or unit == "" else 1
    return f"{value:.{digits}f}"


def spread(run, arm, key, scale, unit):
    """The median of a figure, with least and most where there were several runs."""
    value = figures.median(run, arm, key, scale)
    if value is None:
        return "–"
    least, most = figures.spread(run, arm, key, scale)
    if run["outcome"]["runs"] == 1 or least == most:
        return _figure(value, unit)
    return f"{_figure(value, unit)} ({_number(least, unit)} to {_number(most, unit)})"


def _wake(latency):
    if latency is None:
        return "–"
    return " / ".join(f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms" for ms in latency)
