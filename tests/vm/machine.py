"""One virtual machine: QEMU without KVM, and the root shell in it (guest/usr/local/sbin/vm-agent)."""

import base64
import os
import pathlib
import queue
import shlex
import shutil
import socket
import subprocess
import threading
import time

QEMU = {
    "amd64": ["qemu-system-x86_64", "-machine", "q35", "-cpu", "max"],
    "arm64": ["qemu-system-aarch64", "-machine", "virt", "-cpu", "cortex-a72"],
}
CONSOLE = {"amd64": "ttyS0", "arm64": "ttyAMA0"}
# Everything is slow without KVM, and slower on a machine that compiles beside it.
BOOT_LIMIT = 480
COMMAND_LIMIT = 120
LOGIN_LIMIT = 240


class Failed(Exception):
    """A step did not find what it must find; the text says what instead."""


class Machine:
    """`run`, `wait_for`, `login`, `logout`, `as_user`, `reboot`; every one raises `Failed` when it is not so in time.

    `memory` in MiB; `words`: more of them for the kernel's command line."""

    def __init__(self, image, work, arch, *, bus="dbus-daemon", memory=1024, cpus=2, words=()):
        self.arch = arch
        self.work = pathlib.Path(work)
        self.boot_id = None
        # Those that have registered so far (steps/apps.py).
        self.apps = []
        self._number = 0
        self._lines = queue.Queue()
        disk = self.work / "disk.ext4"
        subprocess.run(["cp", "--sparse=always", image / "disk.ext4", disk], check=True)
        shutil.copy(image / "vmlinuz", self.work / "vmlinuz")
        self._command = self._qemu(disk, bus, memory, cpus, words)
        self._log = open(self.work / "qemu.log", "ab")
        self._start()

    def _qemu(self, disk, bus, memory, cpus, more):
        words = [
            f"console={CONSOLE[self.arch]}",
            "root=/dev/nvme0n1 rw psi=1 quiet systemd.show_status=1 panic=-1 mitigations=off audit=0",
            f"nightporter.bus={bus}",
            *more,
        ]
        return [
            *QEMU[self.arch],
            *("-accel", "tcg,thread=multi", "-smp", str(cpus), "-m", str(memory)),
            *("-nodefaults", "-nographic", "-nic", "none"),
            *("-kernel", str(self.work / "vmlinuz"), "-append", " ".join(words)),
            *("-chardev", f"socket,id=console,path={self.work}/console,server=on,wait=off,logfile={self.work}/console.log"),
            *("-serial", "chardev:console"),
            # The test is there before the machine is: nothing said in it is lost.
            *("-chardev", f"socket,id=agent,path={self.work}/agent,server=on,wait=on"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent"),
            # One controller, so that the kernel cannot name the disks the other way round.
            *("-device", "nvme,id=nvme,serial=vm"),
            *self._drive(disk, 1, ""),
            *self._drive(self.work / "payload.ext4", 2, ",readonly=on"),
        ]

    def _drive(self, path, number, more):
        # A disk that forgets is no part of the test; the host may keep what the guest has flushed in memory.
        yield from ("-drive", f"file={path},format=raw,if=none,id=disk{number},cache=unsafe{more}")
        yield from ("-device", f"nvme-ns,drive=disk{number},bus=nvme,nsid={number}")

    def _start(self):
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True
        )
        deadline = time.monotonic() + 30
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(str(self.work / "agent"))
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"QEMU does not start:\n{(self.work / 'qemu.log').read_text()}") from None
                time.sleep(0.05)
        threading.Thread(target=self._read, args=(self._socket,), daemon=True).start()

    def _read(self, connection):
        with connection.makefile("r", encoding="ascii", errors="replace") as lines:
            try:
                for line in lines:
                    self._lines.put(line.split())
            except OSError:
                pass

    def _line(self, deadline, doing):
        """The next words from the agent."""
        while True:
            try:
                return self._lines.get(timeout=0.5)
            except queue.Empty:
                if self._process.poll() is not None:
                    raise Failed(f"{doing}: the machine is gone (QEMU ended with {self._process.returncode})") from None
                if time.monotonic() > deadline:
                    raise Failed(f"{doing}: no answer in time") from None

    def wait_for_boot(self, limit=BOOT_LIMIT):
        """Waits for the agent of a boot not seen yet, then until systemd has nothing left to start."""
        deadline = time.monotonic() + limit
        while True:
            words = self._line(deadline, "boot")
            if words[:1] == ["ready"] and words[1:] != [self.boot_id]:
                self.boot_id = words[1]
                break
        state = self.run("systemctl is-system-running --wait", limit=limit, check=False).strip()
        if state != "running":
            raise Failed(f"the system is {state!r}:\n{self.run('systemctl --failed --plain; systemctl list-jobs')}")

    def run(self, command, *, limit=COMMAND_LIMIT, check=True):
        """What the shell command, run by root, says on standard output. `check`: its status must be 0."""
        status, stdout, stderr = self.try_run(command, limit=limit)
        if check and status != 0:
            reason = f"did not end within {limit} s" if status in (124, 137) else f"ended with {status}"
            raise Failed(f"{command.strip()}\n  {reason}\n{_indent(stdout)}{_indent(stderr)}")
        return stdout

    def try_run(self, command, *, limit=COMMAND_LIMIT):
        """Status, standard output and standard error of a shell command."""
        self._number += 1
        number = str(self._number)
        self._send(number, limit, command)
        # The agent ends the command in time by itself.
        deadline = time.monotonic() + limit + 30
        while True:
            words = self._line(deadline, command.strip())
            if words[:1] == ["ready"] and words[1:] != [self.boot_id]:
                raise Failed(f"{command.strip()}: the machine booted anew meanwhile")
            if words[:1] == [number] and len(words) == 4:
                stdout, stderr = (base64.b64decode(word[1:]).decode(errors="replace") for word in words[2:])
                return int(words[1]), stdout, stderr

    def _send(self, number, limit, command):
        text = base64.b64encode(command.encode()).decode()
        try:
            self._socket.sendall(f"{number} {limit} {text}\n".encode())
        except OSError as error:
            raise Failed(f"{command.strip()}: the machine is gone: {error}") from None

    def wait_for(self, what, command, *, until=None, limit=COMMAND_LIMIT):
        """Runs the command each half second until it succeeds (and `until(stdout)` is true). Gives its output."""
        deadline = time.monotonic() + limit
        while True:
            status, stdout, stderr = self.try_run(command, limit=limit)
            if status == 0 and (until is None or until(stdout)):
                return stdout
            if time.monotonic() > deadline:
                raise Failed(f"not within {limit} s: {what}\n  {command.strip()}\n{_indent(stdout)}{_indent(stderr)}")
            time.sleep(0.5)

    def write(self, path, text, mode="644"):
        """Makes a file, and the directories it is in."""
        quoted = shlex.quote(str(path))
        data = base64.b64encode(text.encode()).decode()
        self.run(f'mkdir -p "$(dirname {quoted})" && echo {data} | base64 -d >{quoted} && chmod {mode} {quoted}')

    def login(self, user):
        """Opens a session of the user as logind knows it, with the user's own systemd and bus."""
        self.start_login(user)
        self.wait_for_login(user)

    def start_login(self, user):
        """Begins with that, so that several can come at a time."""
        self.run(f"systemctl start --no-block session@{user}.service")

    def wait_for_login(self, user):
        """Waits for the end of it."""
        self.wait_for(f"{user}'s bus", f"test -S /run/user/$(id -u {user})/bus", limit=LOGIN_LIMIT)
        session = f"loginctl list-sessions --no-legend | awk '$3 == \"{user}\" && $6 == \"user\"' | grep ."
        self.wait_for(f"{user}'s session", session, limit=LOGIN_LIMIT)

    def logout(self, user):
        """Ends that session; the user's systemd ends with it."""
        self.run(f"systemctl stop session@{user}.service")
        self.wait_for(f"the end of {user}'s systemd", f"! systemctl is-active --quiet user@$(id -u {user}).service", limit=LOGIN_LIMIT)

    def as_user(self, user, command, *, limit=COMMAND_LIMIT, check=True):
        """Like `run`, as the user and within reach of the user's bus and systemd. The user must be logged in."""
        return self.run(self.in_session(user, command), limit=limit, check=check)

    @staticmethod
    def in_session(user, command):
        """The command for `run` that does so."""
        environment = 'XDG_RUNTIME_DIR="/run/user/$(id -u)" DBUS_SESSION_BUS_ADDRESS="unix:path=/run/user/$(id -u)/bus"'
        inner = f"cd; export {environment}; {command}"
        return f"runuser -u {user} -- bash -c {shlex.quote(inner)}"

    def reboot(self):
        """Shuts down in order and boots again."""
        # Not waited for: the agent may be gone before it has answered.
        self._send("0", COMMAND_LIMIT, "systemctl reboot --no-block")
        self.wait_for_boot()

    def power_cut(self):
        """Takes the power away and gives it back: what the guest had not written to its disk is lost."""
        self._end()
        self._start()
        self.wait_for_boot()

    def save_logs(self, directory):
        """Everything that helps to find out what happened. Never fails."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("console.log", "qemu.log"):
            if (self.work / name).exists():
                shutil.copy(self.work / name, directory / name)
        for name, command in {
            "journal.log": "journalctl --no-pager --all --output=short-monotonic --boot=all | tail -n 20000",
            "units.log": "systemctl status --no-pager --full --all nightporterd nightporter-relay; systemctl --failed",
            "processes.log": "systemd-cgls --no-pager --all; cat /proc/meminfo /proc/swaps",
            "nightporter.log": "nightporter --system status; nightporter --system apps; nightporter --system report",
        }.items():
            try:
                _, stdout, stderr = self.try_run(command, limit=30)
            except Failed as error:
                stdout, stderr = "", str(error)
            (directory / name).write_text(stdout + stderr)

    def stop(self):
        """Ends the machine at once."""
        self._end()
        self._log.close()

    def _end(self):
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close()
        for name in ("agent", "console"):
            (self.work / name).unlink(missing_ok=True)

    @property
    def pid(self):
        """Of QEMU."""
        return self._process.pid


def payload(path, files):
    """Makes the read-only disk that is /payload in the machine: names in it, and where they come from."""
    tree = pathlib.Path(f"{path}.d")
    tree.mkdir()
    for name, source in files.items():
        shutil.copy(source, tree / name)
    size = sum(os.path.getsize(source) for source in files.values()) // 1024 * 5 // 4 + 8192
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, path, f"{size}k"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)


def _indent(text):
    return "".join(f"  | {line}\n" for line in text.splitlines()[-60:])
