"""A service on the system bus as an app: registered, frozen, paged out, started by a message."""

from machine import Failed

from . import step
from .apps import MIB, App, view
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


@step(a_system_service_registers)
def a_push_starts_a_system_service(vm):
    """Ended, it is started by the next message, in the cgroup of its own unit."""
    app = sample(vm)
    app.tool(vm, f"kill {SAMPLE}")
    app.is_gone(vm)
    app.pushed(vm, "while it is a tombstone")
    vm.run(f'grep -qx "$(systemctl show -p MainPID --value sample1)" {UNIT_CGROUP}/cgroup.procs')
