"""KDE's own client library in the machine: /opt/kde holds it from Debian testing, where alone it is packaged, with all it
stands on down to the C library, and a small program on top of it. Nothing else in the machine is from there."""

import pathlib
import shutil
import subprocess

HERE = pathlib.Path(__file__).parent
SUITE = "testing"
WHERE = "/opt/kde"
TRIPLET = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
LOADER = {"amd64": "ld-linux-x86-64.so.2", "arm64": "ld-linux-aarch64.so.1"}
# Headers only: their packages stand on half a desktop, of which the headers of QtCore need nothing.
HEADERS = ["qt6-base-dev", "libkunifiedpush-dev"]
SOURCES = sorted((HERE / "kde").iterdir())


def make(new, arch, mirror):
    """Makes the directory `new`, to become /opt/kde in the machine."""
    headers = new.with_name(f"{new.name}-headers")
    download = f'cd "{headers}" && APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq -o APT::Sandbox::User=root download'
    headers.mkdir()
    command = [
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=extract", f"--architectures={arch}"),
        "--include=libkunifiedpush1",
        # A mirror may be a picture of the past.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        f"--extract-hook={download} {' '.join(HEADERS)}",
    ]
    subprocess.run([*command, SUITE, str(new), mirror], check=True)
    for deb in headers.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", deb, headers], check=True)
    libraries = new / "usr" / "lib" / TRIPLET[arch]
    include = headers / "usr" / "include"
    qt = include / TRIPLET[arch] / "qt6"
    program = new / "usr" / "bin" / "connector"
    command = [
        *(f"{TRIPLET[arch]}-g++", "-std=c++17", "-fPIC", "-Wall", "-Werror"),
        *("-I", include / "KUnifiedPush", "-isystem", qt, "-isystem", qt / "QtCore", "-isystem", qt / "QtDBus"),
        *(HERE / "kde" / "connector.cpp", "-o", program),
        *("-L", libraries, "-l:libKUnifiedPush.so.1", "-l:libQt6DBus.so.6", "-l:libQt6Core.so.6"),
        # Its libraries are newer than this machine's compiler, and older than the libraries of the machine around them.
        *("-Wl,--allow-shlib-undefined", "-Wl,--disable-new-dtags", f"-Wl,-rpath,{WHERE}/usr/lib/{TRIPLET[arch]}"),
        f"-Wl,--dynamic-linker={WHERE}/usr/lib/{TRIPLET[arch]}/{LOADER[arch]}",
    ]
    subprocess.run(command, check=True)
    shutil.rmtree(headers)
    for name in ("dev", "etc", "tmp", "var", "usr/share", "usr/libexec", "usr/sbin"):
        shutil.rmtree(new / name, ignore_errors=True)
    return program
