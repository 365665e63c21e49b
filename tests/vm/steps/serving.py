"""A service on the system bus as an app: registered, frozen, paged out, started by a message."""

import json

from machine import Failed

from . import step
from .apps import LIMIT, MIB, App, view
from .installing import is_configured

SAMPLE = "org.nightporter.Sample1"
UNIT_CGROUP = "/sys/fs/cgroup/system.slice/sample1.service"
# NIGHTPORTER_SAMPLE_BALLAST_KIB of apps/sample1.service.
BALLAST = 16 * MIB


def sample(vm):
    """The app of these steps."""
    return next(app for app in vm.apps if app.name == SAMPLE)


@step(is_configured)
def a_system_service_registers(vm):
    """A system service registers, the daemon connects for it, and a message comes while it runs."""
    vm.run("cp /payload/sample.conf /etc/dbus-1/system.d/ && cp /payload/sample1.service /etc/systemd/system/")
    vm.run(f"cp /payload/{SAMPLE}.service /usr/share/dbus-1/system-services/")
    vm.run("systemctl daemon-reload && systemctl reload dbus")
    app = App(SAMPLE, start="systemctl start sample1")
    app.launch(vm)
    app.pushed(vm, "while it runs")
    (upstream,) = view(vm, "status")["upstreams"]
    if (upstream["state"], upstream["registrations"]) != ("online", len(vm.apps)):
        raise Failed(f"not {len(vm.apps)} registrations on a live connection: {upstream}")


@step(a_system_service_registers)
def a_system_service_is_paged_out(vm):
    """Left alone it is frozen, then its memory goes to zram for real; a push thaws it and it loses nothing."""
    app = sample(vm)
    before = int(vm.run(f"cat {UNIT_CGROUP}/memory.current"))
    app.freezes(vm)
    app.pages_out(vm, UNIT_CGROUP, int(BALLAST * 0.7))
    after = int(vm.run(f"cat {UNIT_CGROUP}/memory.current"))
    figures = f"{before / MIB:.1f} MiB of memory became {after / MIB:.1f} MiB"
    if before - after < BALLAST * 0.7:
        raise Failed(f"{figures}\n{app.why(vm)}")
    if "page-out" not in app.why(vm):
        raise Failed(f"why does not tell of it:\n{app.why(vm)}")
    app.pushed(vm, "while it is paged out")
    app.freezes(vm)
    return figures


# What the app's helper holds beside it, so that it is one app with much memory of one kind.
HELPER = """
import os, sys, time
size = 32 << 20
if sys.argv[1] == "random":
    held = os.urandom(size)
else:
    held = b"".join(b"%d: did you see what %d wrote about it? " % (n, n % 97) for n in range(size // 40))
time.sleep(1e9)
"""
HELPED = """[Service]
ExecStart=
ExecStart=/bin/sh -c 'python3 /run/helper.py {kind} & exec /usr/bin/nightporter-sample'
Environment=NIGHTPORTER_SAMPLE_BALLAST_KIB=512
"""


@step(a_system_service_registers)
def incompressible_memory_is_not_saved(vm):
    """Random bytes and text, both paged out: the report counts the former as costing what they did, and moves nothing."""
    app = sample(vm)
    vm.write("/run/helper.py", HELPER)
    drop_in = "/run/systemd/system/sample1.service.d/helped.conf"
    shares = {}
    for kind in ["random", "text"]:
        vm.write(drop_in, HELPED.format(kind=kind))
        vm.run("systemctl daemon-reload")
        app.tool(vm, f"kill {SAMPLE}")
        app.is_gone(vm)
        app.pushed(vm, f"with {kind}")
        # Else it may be held still before they are all there.
        app.is_looked_at(vm)
        app.wait_for(vm, f"{kind} bytes", f'[ "$(cat {UNIT_CGROUP}/memory.current)" -ge {30 * MIB} ]')
        app.freezes(vm)
        app.pages_out(vm, UNIT_CGROUP, 28 * MIB)

        def reclaimed(text):
            rows = [row for row in json.loads(text)["apps"] if row["name"].startswith(SAMPLE) and row["zram"]]
            return next((row for row in rows if row["state"] == "reclaimed" and row["now"]["swap"] > 28 * 1024), None)

        report = "nightporter --system report --json"
        row = reclaimed(vm.wait_for(f"{kind} in the report", report, until=reclaimed, limit=LIMIT))
        swapped = int(vm.run(f"cat {UNIT_CGROUP}/memory.swap.current"))
        vm.run(f"{report} && {report} && {report}")
        if (after := int(vm.run(f"cat {UNIT_CGROUP}/memory.swap.current"))) < swapped:
            raise Failed(f"reporting brought {swapped - after} bytes back")
        put_out = row["resident"]["pss"] - row["now"]["pss"]
        # What its cgroup is charged beside may count as well, but not as much as this.
        if abs(row["saved"] - (put_out - row["zram"])) > 1024:
            raise Failed(f"saved is not what was put out less what that costs of zram: {row}")
        shares[kind] = (row["saved"] / put_out, row)
    vm.run(f"rm {drop_in} && systemctl daemon-reload")
    app.tool(vm, f"kill {SAMPLE}")
    app.is_gone(vm)
    app.pushed(vm, "without a helper")
    said = ", ".join(
        f"{kind}: {share:.0%} of {(row['resident']['pss'] - row['now']['pss']) / 1024:.0f} MiB saved ({row['zram_source']})"
        for kind, (share, row) in shares.items()
    )
    # Python itself and the app compress as ever.
    if shares["random"][0] > 0.3 or shares["text"][0] < 0.6:
        raise Failed(f"{said}\n{shares}\n{app.why(vm)}")
    return said


@step(a_system_service_registers)
def a_push_starts_a_system_service(vm):
    """Ended, it is started by the next message, in the cgroup of its own unit."""
    app = sample(vm)
    app.tool(vm, f"kill {SAMPLE}")
    app.is_gone(vm)
    app.pushed(vm, "while it is a tombstone")
    vm.run(f'grep -qx "$(systemctl show -p MainPID --value sample1)" {UNIT_CGROUP}/cgroup.procs')
