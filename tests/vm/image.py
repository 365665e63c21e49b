"""The disk of the virtual machine: a small Debian 13, made once and kept, by a hash of what it is made from."""

import concurrent.futures
import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import kde

HERE = pathlib.Path(__file__).parent
SUITE = "trixie"
MIRROR = os.environ.get("NIGHTPORTER_TEST_MIRROR", "http://deb.debian.org/debian")
KERNEL = {"amd64": "linux-image-cloud-amd64", "arm64": "linux-image-cloud-arm64"}
# What a phone has and the steps use. No initrd: the cloud kernel has NVMe and ext4 built in.
PACKAGES = [
    "ca-certificates",
    "dbus",
    "dbus-broker",
    "dbus-user-session",
    "kmod",
    "libpam-systemd",
    "polkitd",
    "python3",
    "python3-dbus",
    "python3-gi",
    "systemd-sysv",
    "systemd-zram-generator",
    "udev",
]
USERS = ["alice", "bob"]
SIZE = "2G"
# Nothing of it is used, and what is not unpacked is not packed into the disk either.
LEFT_OUT = [
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/lib/modules/*/kernel/drivers/gpu/*",
    "/usr/lib/modules/*/kernel/drivers/infiniband/*",
    "/usr/lib/modules/*/kernel/drivers/net/*",
]
# They would only make noise in a machine that lives for minutes.
MASKED = [
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "getty@tty1.service",
    "kmod-static-nodes.service",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-networkd.service",
    "systemd-pstore.service",
    "systemd-timesyncd.service",
    "systemd-udev-load-credentials.service",
]
# Images nobody has used for this long are removed.
KEPT_DAYS = 14


def prepare(arch, extra, say, *, size=SIZE):
    """The directory with `disk.ext4`, of that size, and `vmlinuz` for `arch`, with the packages `extra` on top."""
    cache = pathlib.Path(os.environ.get("NIGHTPORTER_TEST_CACHE", "/var/cache/nightporter-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    packages = sorted({*PACKAGES, *extra, KERNEL[arch]})
    image = cache / f"vm-{arch}-{_key(packages, size)}"
    # Two runs at a time make it once.
    with open(cache / f".vm-{arch}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (image / "disk.ext4").exists():
            _make(image, arch, packages, size, say)
        os.utime(image)
        _prune(cache)
    return image


def _key(packages, size):
    digest = hashlib.sha256()
    digest.update(pathlib.Path(__file__).read_bytes())
    digest.update("\0".join([size, *packages]).encode())
    digest.update(pathlib.Path(kde.__file__).read_bytes())
    for path in sorted([*(HERE / "guest").rglob("*"), *kde.SOURCES]):
        digest.update(str(path.relative_to(HERE)).encode())
        if path.is_file():
            digest.update(oct(path.stat().st_mode).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _make(image, arch, packages, size, say):
    start = time.monotonic()
    for left in image.parent.glob(f".vm-image-{arch}.*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=image.parent, prefix=f".vm-image-{arch}.") as new:
        new = pathlib.Path(new)
        root = new / "root"
        hooks = [f'cp -r --preserve=mode "{HERE}/guest/." "$1/"', f'chroot "$1" systemctl --quiet mask {" ".join(MASKED)}']
        hooks += [f'chroot "$1" useradd --create-home --shell /bin/bash {user}' for user in USERS]
        hooks += [f'chroot "$1" passwd --quiet --delete {user}' for user in ["root", *USERS]]
        hooks += [
            'echo vm >"$1/etc/hostname"',
            'echo "/dev/nvme0n2 /payload ext4 ro,nofail 0 0" >"$1/etc/fstab"',
            'mkdir -p "$1/payload" "$1/var/log/journal"',
            # The machine is known by the same id at each boot.
            'chroot "$1" systemd-machine-id-setup >/dev/null',
            # dbus-broker's package has made it the one; guest/usr/lib/systemd chooses at boot instead.
            'chroot "$1" systemctl --quiet disable dbus-broker.service',
            'chroot "$1" systemctl --quiet --global disable dbus-broker.service',
            'cp -L "$1/vmlinuz" "$1/../vmlinuz"',
            # What systemd would do at the first boot after an update (ldconfig and the like), dpkg has done.
            'touch "$1/etc/.updated" "$1/var/.updated"',
        ]
        command = ["mmdebstrap", "--quiet", "--variant=apt", f"--architectures={arch}", f"--include={','.join(packages)}"]
        command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
        # Here and in the machine: what a power cut leaves of dpkg's own files is no part of the test.
        command += ["--dpkgopt=force-unsafe-io"]
        command += [f"--customize-hook={hook}" for hook in hooks]
        command += [SUITE, str(root), MIRROR]
        say(f"making an image of Debian {SUITE} for {arch}")
        # INITRD=No is what the kernel's maintainer script asks before it makes an initrd.
        with concurrent.futures.ThreadPoolExecutor() as together:
            library = together.submit(kde.make, new / "kde", arch, MIRROR)
            subprocess.run(command, check=True, env={**os.environ, "INITRD": "No"})
            library.result()
        shutil.move(new / "kde", f"{root}{kde.WHERE}")
        subprocess.run(["mkfs.ext4", "-q", "-q", "-d", str(root), str(new / "disk.ext4"), size], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(root)
        image.mkdir(exist_ok=True)
        os.rename(new / "vmlinuz", image / "vmlinuz")
        os.rename(new / "disk.ext4", image / "disk.ext4")
    say(f"made in {time.monotonic() - start:.0f} s: {image}")


def _prune(cache):
    for image in cache.glob("vm-*-*"):
        if time.time() - image.stat().st_mtime > KEPT_DAYS * 86400:
            shutil.rmtree(image)
