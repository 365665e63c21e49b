"""A machine comes up, the packages go in, the service runs and is as confined as it says."""

from machine import Failed

from . import step
from .apps import view


@step(core=True)
def boots(vm):
    """systemd comes up with nothing failed; there are cgroup v2 with memory, PSI and zram."""
    vm.wait_for_boot()
    vm.run("grep -qw memory /sys/fs/cgroup/cgroup.controllers && test -e /proc/pressure/memory")
    vm.run("grep -q ^/dev/zram0 /proc/swaps")
    vm.run("test -e /payload/nightporter.deb")
    return vm.run("systemctl show -P Id dbus.service; systemctl --version | head -1; uname -r").replace("\n", ", ").rstrip(", ")


@step(boots, core=True)
def installs(vm):
    """dpkg installs both packages; the service is up, enabled and complete."""
    vm.run("dpkg -i /payload/nightporter.deb /payload/nightporter-relay.deb", limit=600)
    vm.run("systemctl is-active nightporterd nightporter-relay && systemctl is-enabled nightporterd")
    state = vm.run("systemctl is-system-running --wait", check=False).strip()
    if state != "running":
        raise Failed(f"the system is {state}:\n{vm.run('systemctl --failed --plain')}")
    # What is not as it was packed, but for the conffiles.
    if damage := vm.run("dpkg --verify nightporter nightporter-relay | grep -v /usr/share/", check=False):
        raise Failed(f"dpkg --verify: {damage}")
    vm.run("nightporter --version && nightporterd --check-config && nightporter --system status")
    # The user unit is there and nobody's: the system service serves every session.
    vm.run("test -e /usr/lib/systemd/user/nightporterd.service")
    if "enabled" in vm.run("systemctl --global is-enabled nightporterd.service", check=False).split():
        raise Failed("the user unit is enabled")


@step(installs, core=True)
def is_confined(vm):
    """systemd-analyze finds nothing wrong in the units and rates the service 3.0 or better."""
    vm.run("systemd-analyze verify --man=no nightporterd.service nightporter-relay.service 2>&1 | grep . && exit 1 || :")
    vm.run("systemd-analyze verify --man=no --user /usr/lib/systemd/user/nightporterd.service 2>&1 | grep nightporter && exit 1 || :")
    vm.run("systemd-analyze security --no-pager --threshold=30 nightporterd.service")
    vm.run("systemd-analyze security --no-pager --threshold=15 nightporter-relay.service")
    # Seven capabilities of root's forty, and none that the list in the unit does not name.
    status = vm.run("cat /proc/$(systemctl show -p MainPID --value nightporterd)/status")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    # CAP_DAC_OVERRIDE 1, CAP_KILL 5, CAP_SETGID 6, CAP_SETUID 7, CAP_SYS_PTRACE 19, CAP_SYS_NICE 23,
    # CAP_SYS_RESOURCE 24.
    wanted = sum(1 << bit for bit in (1, 5, 6, 7, 19, 23, 24))
    for field in ("CapEff", "CapBnd"):
        if int(fields[field], 16) != wanted:
            raise Failed(f"{field} is {fields[field].strip()}, not {wanted:016x}")
    if fields["NoNewPrivs"].strip() != "1" or fields["Seccomp"].strip() != "2":
        raise Failed("no NoNewPrivs or no seccomp filter")
    modes = vm.run("stat -c '%a %U %n' /var/lib/nightporter /run/nightporter").splitlines()
    if modes != ["700 root /var/lib/nightporter", "700 root /run/nightporter"]:
        raise Failed(f"state directories: {modes}")
    if errors := vm.run("journalctl --no-pager -q -b -u nightporterd -p err"):
        raise Failed(f"errors in the journal:\n{errors}")


@step(installs)
def guards_its_bus(vm):
    """On the system bus nobody but root has the daemon's names or orders other apps about."""
    own = "busctl --system call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus RequestName su {} 4"
    for name in ("org.nightporter1", "org.unifiedpush.Distributor.nightporter"):
        status, _, stderr = vm.try_run(f"runuser -u alice -- {own.format(name)}")
        if status == 0 or "not allowed to own" not in stderr and "denied" not in stderr.lower():
            raise Failed(f"alice may own {name}: {status} {stderr}")
    for method, argument in (("Apps", ""), ("Freeze", "s org.example.App"), ("Kill", "s org.example.App")):
        call = f"busctl --system call org.nightporter1 /org/nightporter1 org.nightporter1.Manager {method} {argument}"
        status, stdout, stderr = vm.try_run(f"runuser -u alice -- {call}")
        if status == 0 or "administrator" not in stderr:
            raise Failed(f"alice may call {method}: {status} {stdout}{stderr}")
    # A connector is called by the daemon only.
    call = "busctl --system call org.nightporter1 /org/nightporter1 org.unifiedpush.Connector2 Message 'a{sv}' 0"
    status, _, stderr = vm.try_run(f"runuser -u alice -- {call}")
    if status == 0 or "denied" not in stderr.lower():
        raise Failed(f"alice may call a connector: {status} {stderr}")


@step(installs, core=True)
def is_configured(vm):
    """The daemon takes a configuration of its own: a relay on the same machine, and profile "tombstone"."""
    vm.run("cp /payload/sample-reports.service /etc/systemd/system/ && systemctl --quiet enable --now sample-reports")
    vm.run("cp /payload/nightporter.toml /etc/nightporter/nightporter.toml && nightporterd --check-config")
    vm.run("systemctl restart nightporterd")
    status = view(vm, "status")
    if status["profile"] != "tombstone" or [one["name"] for one in status["upstreams"]] != ["relay"]:
        raise Failed(f"it does not go by its configuration: {status}")
    vm.wait_for("the reports' socket", "test -S /run/sample-reports")
