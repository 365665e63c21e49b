"""The figures of the README that are from measured.json, between two marks in it."""

import textwrap

from . import document, figures, plan

BEGIN = "<!-- tests/vm/measure writes this from docs/measured.json. -->\n"
END = "<!-- Here ends what it writes. -->\n"
# The machine that targets are for.
GIB = 2


def merged(results, text):
    """The README's text with the figures in it. As it is, where the mixture was not measured."""
    mixed, reached = figures.of(results, plan.MIXED, GIB), figures.of(results, plan.REACH)
    if not mixed:
        return text
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"tests/vm/measure: the README has no place for the figures: {BEGIN.strip()} and {END.strip()}")
    lines = [*_mixed(mixed[0]), *(_reached(reached) if reached else [])]
    return before + begin + "\n".join(lines) + "\n" + end + after


def _mixed(run):
    yield from _paragraph(
        f"`tests/vm/measure {' '.join(document.only_of([run]))}`: {run['apps']} real programs from Debian ({document.kinds_said(run)}) in "
        f"a virtual machine of {run['gib']} GiB with zram, each with a connection of its own and staying, or through Night Porter; [all "
        f"figures and conditions](docs/measured.md), other machines and numbers too; {document.runs_said([run])}:"
    )
    yield ""
    yield "| | each on its own | the same, frozen and paged out | through Night Porter | wanted |"
    yield "|---|--:|--:|--:|---|"

    def row(said, cells, *expected):
        wanted = [document.wanted(one) for key in expected if (one := figures.expectation(run, key))]
        return f"| {said} | {' | '.join(cells)} | {', '.join(wanted)} |"

    def of(key, unit, *arms, scale=1.0):
        return [document.spread(run, arm, key, scale, unit) if arm else "" for arm in arms]

    three = ("resident", "resident-frozen", "tombstone")
    yield row("memory used", of("cost", "MiB", *three, scale=1024.0))
    yield row("returned", of("returned_percent", "%", None, *three[1:]), "frozen-returned-at-least", "returned-at-least")
    yield row("the ledger's claim", of("claim", "MiB", None, None, "tombstone", scale=1024.0))
    yield row("its error", of("claim_error_percent", "%", None, None, "tombstone"), "claim-within")
    daemon = figures.expectation(run, "daemon-at-most")
    yield row("the daemon's PSS, of what it saves", ["", "", daemon["measured"] if daemon else "–"], "daemon-at-most")
    yield row("connections", of("connections", "", *three))
    yield row("apps that a push reaches", of("reachable", "", *three))
    yield ""
    yield f"![Memory of {run['apps']} apps, resident and through Night Porter](docs/measured-{run['gib']}gib.svg)"


def _reached(runs):
    yield ""
    yield from _paragraph(
        f"`tests/vm/measure {' '.join(document.only_of(runs))}`, the same kinds added until the machine has too many (at least: more were not "
        "tried). Of those through Night Porter as many as on their own were started in full; the others had only registered, as after a reboot."
    )
    yield ""
    yield "| | each on its own | through Night Porter | times as many |"
    yield "|---|--:|--:|--:|"
    for run in runs:
        if (times := document.times_said(run)) is not None:
            found = figures.reach(run)
            yield f"| {run['gib']} GiB | {found['resident']['apps']} | {found['tombstone']['apps']} | {times} |"
    yield ""
    yield "![Apps reachable, each on its own and through Night Porter](docs/measured-reach.svg)"


def _paragraph(text):
    return textwrap.wrap(text, 130, break_long_words=False, break_on_hyphens=False)
