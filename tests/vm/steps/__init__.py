"""The steps, in the order they run. Each takes the machine as the steps before it left it, looks, and raises `Failed`.
It may give back a text with what it measured. Steps that register apps put them into `vm.apps`; those that follow look
after all that are in there, be it none.

A new step is a function with `@step` in one of the modules below, and its module in the list at the end. `needs` names
the steps whose doing (not only whose looking) it stands on, for `--only`.
"""

import pathlib
import subprocess

ALL = []


def step(*needs, core=False):
    """Registers a step. `core`: what `--core` runs."""

    def register(function):
        function.needs = needs
        function.core = core
        ALL.append(function)
        return function

    return register


def choose(names, core):
    """The steps to run for `--only NAMES` and `--core`: all without either, else those and what they need."""
    names = [*names, *(step.__name__ for step in ALL if core and step.core)]
    if not names:
        return ALL
    known = {step.__name__: step for step in ALL}
    for name in names:
        if name not in known:
            raise SystemExit(f"tests/vm/run: no step is called {name}; --list names them")
    wanted = set()

    def want(step):
        wanted.add(step)
        for need in step.needs:
            want(need)

    for name in names:
        want(known[name])
    return [step for step in ALL if step in wanted]


def payload(debs, work):
    """What is on the disk /payload: the packages, each in a next version too, and the files of tests/vm/apps."""
    files = {}
    for deb in debs:
        name = deb.name.split("_")[0]
        files[f"{name}.deb"] = deb
        files[f"{name}-next.deb"] = _next_version(deb, work)
    for path in (pathlib.Path(__file__).parent.parent / "apps").iterdir():
        files[path.name] = path
    return files


def _next_version(deb, work):
    """The same package with a higher version."""
    tree, new = work / "next", work / f"next-{deb.name}"
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    control = tree / "DEBIAN" / "control"
    lines = control.read_text().splitlines(keepends=True)
    control.write_text("".join(l.rstrip("\n") + "+1\n" if l.startswith("Version:") else l for l in lines))
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", tree, new], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(["rm", "-r", tree], check=True)
    return new


from . import installing, sessions, serving, units, pressure, lasting, leaving, usermode  # noqa: E402, F401
