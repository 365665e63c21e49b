//! What a payload helper must not do, made sure of between fork and exec. Everything here is system calls: after a fork in a
//! process with threads no lock may be taken and nothing allocated.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::write,
    process::{Gid, Resource, Rlimit, Signal, Uid, set_parent_process_death_signal, setrlimit, setsid},
    thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

/// Who it is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Open files at most.
const FILES: u64 = 64;

/// All of it, prepared before the fork.
pub(super) struct Confinement {
    identity: Option<Identity>,
    /// `cgroup.procs` of its own cgroup.
    entrance: Option<OwnedFd>,
    memory: u64,
    seconds: u64,
    /// Without: it has no network.
    filter: Option<Filter>,
}

impl Confinement {
    /// # Errors
    /// As a sentence part: this machine cannot keep it from the network.
    pub(super) fn new(
        identity: Option<Identity>,
        entrance: Option<io::Result<OwnedFd>>,
        memory: u64,
        time: Duration,
        network: bool,
    ) -> Result<Self, String> {
        let entrance = entrance.transpose().map_err(|error| format!("its cgroup cannot be entered: {error}"))?;
        let filter = match network {
            true => None,
            false => Some(no_network().ok_or(
                "this machine's system calls are not known, so that it cannot be kept from the network \
                 (payload-helper-network)",
            )?),
        };
        Ok(Self { identity, entrance, memory, seconds: time.as_secs() + 1, filter })
    }

    /// Enters it: in the child, right before exec.
    pub(super) fn enter(&self) -> io::Result<()> {
        setsid()?;
        if let Some(entrance) = &self.entrance {
            write(entrance, b"0")?;
        }
        // It is to go before the apps are, and not to be spared like the daemon.
        if let Ok(score) = openat(CWD, c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
            let _ = write(&score, b"900");
        }
        let both = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(Resource::Data, both(self.memory))?;
        setrlimit(Resource::Cpu, both(self.seconds))?;
        setrlimit(Resource::Core, both(0))?;
        setrlimit(Resource::Nofile, both(FILES))?;
        if let Some(Identity { uid, gid }) = self.identity {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            set_thread_groups(&[gid])?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
        }
        // After the change of user, which would undo it.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        set_no_new_privs(true)?;
        match &self.filter {
            Some(filter) => install(filter),
            None => Ok(()),
        }
    }
}

type Filter = [libc::sock_filter; 10];

/// AUDIT_ARCH_* of linux/audit.h, where a socket is made by socket(2) alone.
const ARCH: Option<u32> = if cfg!(all(target_arch = "x86_64", target_pointer_width = "64")) {
    Some(0xC000_003E)
} else if cfg!(all(target_arch = "aarch64", target_endian = "little")) {
    Some(0xC000_00B7)
} else if cfg!(all(target_arch = "arm", target_endian = "little")) {
    Some(0x4000_0028)
} else if cfg!(target_arch = "riscv64") {
    Some(0xC000_00F3)
} else {
    None
};

/// A seccomp filter that leaves it no sockets but those of AF_UNIX, io_uring neither, by which others could be made. `None`
/// where the system calls are not known. System calls of another architecture fail altogether.
fn no_network() -> Option<Filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    // Offsets in struct seccomp_data; the low half of the first argument of these little-endian machines.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const FIRST: u32 = 16;
    /// Numbers from here on are x32's (x86-64), which names the same calls once more.
    const X32: u32 = 0x4000_0000;
    let arch = ARCH?;
    let call = |number: libc::c_long| u32::try_from(number).ok();
    let [socket, ring] = [call(libc::SYS_socket)?, call(libc::SYS_io_uring_setup)?];
    let step =
        |code: u32, jt: u8, jf: u8, k: u32| Some(libc::sock_filter { code: u16::try_from(code).ok()?, jt, jf, k });
    Some([
        step(LOAD, 0, 0, ARCHITECTURE)?,
        step(EQUAL, 0, 6, arch)?,
        step(LOAD, 0, 0, NUMBER)?,
        step(AT_LEAST, 4, 0, X32)?,
        step(EQUAL, 3, 0, ring)?,
        step(EQUAL, 0, 3, socket)?,
        step(LOAD, 0, 0, FIRST)?,
        step(EQUAL, 1, 0, u32::try_from(libc::AF_UNIX).ok()?)?,
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EACCES).ok()?)?,
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW)?,
    ])
}

#[expect(unsafe_code, reason = "neither nix nor rustix installs seccomp filters")]
fn install(filter: &Filter) -> io::Result<()> {
    let length = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program and what it points to live until the call is over, and the kernel only reads them.
    let done = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::c_ulong::from(libc::SECCOMP_MODE_FILTER), std::ptr::from_ref(&program))
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
