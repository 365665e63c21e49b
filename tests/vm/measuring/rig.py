"""A machine to measure in: booted, with the packages, the programs' servers and nothing else at work."""

import base64
import contextlib
import gzip
import json
import os
import pathlib
import shlex
import shutil
import tempfile
import threading

import machine
from machine import Failed

GUEST = pathlib.Path(__file__).parent / "guest"
# Debian would start them as servers of a real host. The rest: huge pages where a program asks for them, as phones' kernels have it.
WORDS = [f"systemd.mask={unit}" for unit in ("prosody.service", "dovecot.service", "dovecot.socket")]
WORDS += ["transparent_hugepage=madvise"]
SERVERS = ["measuring-prosody", "measuring-dovecot", "mosquitto", "measuring-display"]
SETUP_LIMIT = 900
# Of `nightporter measure`: expectations were missed.
MISSED = 1
# Nothing of it is quick without KVM, and all that can hang has a limit of its own inside.
EXPERIMENT_LIMIT = 4 * 3600
# What a line of progress begins with.
TOLD = "nightporter measure:"


class Rig:
    """`with Rig(…) as rig: rig.measure(task)`."""

    def __init__(self, disk, debs, target, *, arch, gib, cpus):
        self._work = pathlib.Path(tempfile.mkdtemp(prefix=f"measure-{gib}.", dir=target))
        files = {path.name: path for path in GUEST.iterdir()}
        files |= {f"{deb.name.split('_')[0]}.deb": deb for deb in debs}
        try:
            machine.payload(self._work / "payload.ext4", files)
            self._vm = machine.Machine(disk, self._work, arch, memory=gib * 1024, cpus=cpus, words=WORDS)
        except BaseException:
            shutil.rmtree(self._work)
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._vm.stop()
        shutil.rmtree(self._work)

    def prepare(self):
        """Waits for the boot, installs the packages, starts what the programs need. Gives the versions of packages."""
        self._vm.wait_for_boot()
        self._vm.run("grep -q ^/dev/zram0 /proc/swaps && test -e /proc/pressure/memory")
        self._vm.run("dpkg -i /payload/nightporter.deb /payload/nightporter-relay.deb", limit=SETUP_LIMIT)
        # The experiments have a daemon and a push server of their own.
        self._vm.run("systemctl --quiet disable --now nightporterd nightporter-relay")
        self._vm.run("/payload/servers", limit=SETUP_LIMIT)
        self._vm.run("/payload/dino-tables", limit=SETUP_LIMIT)
        # Nothing but the experiment comes up and goes from here on.
        self._vm.run("systemctl stop '*.timer' systemd-udevd.service systemd-udevd-*.socket 2>/dev/null || :")
        self._vm.run("journalctl --flush && sync")
        versions = self._vm.run("dpkg-query -W -f '${Package} ${Version}\\n'")
        return dict(line.split() for line in versions.splitlines())

    def measure(self, task, say):
        """Does one experiment. Gives what `nightporter measure --json` wrote, and what the servers took meanwhile.

        `say` is called with each line it says of how far it is."""
        self._vm.write("/run/experiment.toml", task.text())
        self._vm.run("nightporter measure --check /run/experiment.toml")
        before = self._servers()
        flag = "--reach " if task.label == "reach" else ""
        with _told(self._work / "console.log", say):
            status, stdout, stderr = self._vm.try_run(
                "rm -f /run/outcome.json; "
                f"{{ nightporter measure {flag}--json /run/outcome.json /run/experiment.toml 2>&1 >&3 "
                "| tee /dev/console >&2; exit ${PIPESTATUS[0]}; } 3>&1",
                limit=EXPERIMENT_LIMIT,
            )
        # Missed expectations are an outcome. What is written before anything else went wrong is a part of one.
        if status not in (0, MISSED):
            raise Failed(f"nightporter measure ended with {status}\n{stdout}\n{stderr}\n{self._programs()}")
        packed = self._vm.run("gzip -c /run/outcome.json | base64 -w0")
        text = gzip.decompress(base64.b64decode(packed)).decode()
        after = self._servers()
        return json.loads(text), {name: {"before": before[name], **after[name]} for name in SERVERS}

    def _servers(self):
        """Memory of the servers now and at most so far, in KiB."""
        found = {}
        for name in SERVERS:
            shown = self._vm.run(f"systemctl show -p MemoryCurrent -p MemoryPeak {shlex.quote(name)}.service")
            values = dict(line.split("=", 1) for line in shown.splitlines())
            found[name] = {"now": int(values["MemoryCurrent"]) >> 10, "peak": int(values["MemoryPeak"]) >> 10}
        return found

    def _programs(self):
        """What the programs themselves said last."""
        return self._vm.run("tail -n 5 /var/lib/measuring/*/*/log", check=False)

    def save_logs(self, directory):
        """For a look at what went wrong."""
        self._vm.save_logs(directory)


@contextlib.contextmanager
def _told(console, say):
    """Gives to `say` what `nightporter measure` says on the machine's console meanwhile."""
    ended = threading.Event()

    def follow():
        with console.open(errors="replace") as lines:
            lines.seek(0, os.SEEK_END)
            begun = ""
            while True:
                begun += lines.readline()
                if begun.endswith("\n"):
                    if begun.startswith(TOLD):
                        say(begun.removeprefix(TOLD).strip())
                    begun = ""
                elif ended.wait(0.5):
                    return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
