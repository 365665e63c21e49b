"""What the document and its pictures look up in the results (measured.json). Sizes in MiB; None where there is nothing."""

from . import plan

# Within these the ledger's claim is as it should be, and still good enough to pass.
CLAIM_TARGET, CLAIM_LIMIT = 5.0, 10.0


def arm(run, name):
    """The figures of one arm."""
    return next((one for one in run["outcome"]["arms"] if one["arm"] == name), None)


def median(run, name, key, scale=1.0):
    """The median of one figure of one arm."""
    figures = arm(run, name)
    summary = figures and figures.get(key)
    return summary["median"] / scale if summary else None


def mib(run, name, key="cost"):
    """The same for a size."""
    return median(run, name, key, 1024.0)


def spread(run, name, key, scale=1.0):
    """Least and most of one figure of one arm."""
    figures = arm(run, name)
    summary = figures and figures.get(key)
    return (summary["min"] / scale, summary["max"] / scale) if summary else None


def wake(run, name, state):
    """Median and most of the time a push took to an app in that state, in milliseconds."""
    figures = arm(run, name)
    latency = figures and figures["wake_ms"].get(state)
    return (latency["p50"], latency["max"]) if latency else None


def of(results, experiment, gib=None):
    """The runs of one experiment, in all machines or one."""
    return [run for run in results["runs"] if run["experiment"] == experiment and gib in (None, run["gib"])]


def machines(results):
    """The sizes of machines in which kinds or the mixture were measured."""
    return sorted({run["gib"] for run in results["runs"] if run["experiment"] != plan.REACH})


def reach(run):
    """How many apps were kept reachable, by arm."""
    return {one["arm"]: one for one in run["outcome"]["reach"]}


def times(run):
    """Through the daemon how many times as many as resident."""
    counts = {name: one["apps"] for name, one in reach(run).items()}
    return counts["tombstone"] / counts["resident"] if counts.get("resident") and "tombstone" in counts else None


def expectation(run, key):
    """What was expected of one run by that key: wanted, measured, met. None where nothing was."""
    return next((one for one in run["outcome"]["expectations"] if one["key"] == key), None)


def servers_growth(run):
    """What the programs' own servers and display took at most beyond what they had."""
    return sum(max(0, one["peak"] - one["before"]["now"]) for one in run["servers_kib"].values()) / 1024.0
