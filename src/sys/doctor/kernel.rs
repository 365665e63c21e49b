//! What the kernel can do.

use std::io;

use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::Root;
use crate::doctor::facts::{Kernel, Seen};

/// What only a system call tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// pidfd_open(2) works.
    pub pidfd: bool,
    /// process_madvise(2) is there.
    pub process_madvise: bool,
}

impl Abilities {
    /// Tried on this machine, to no effect.
    pub fn of_this_kernel() -> Self {
        Self { pidfd: pidfd_open(getpid(), PidfdFlags::empty()).is_ok(), process_madvise: has_process_madvise() }
    }
}

pub(super) fn look(root: &Root, abilities: Abilities) -> Seen<Kernel> {
    let release = root.line("proc/sys/kernel/osrelease").ok_or("/proc/sys/kernel/osrelease cannot be read")?;
    let clocks = root.list("sys/class/rtc");
    // The attribute is there only for a clock with an alarm that can wake (rtc_does_wakealarm in drivers/rtc/sysfs.c).
    let (wake_clocks, other_clocks) =
        clocks.into_iter().partition(|clock| root.exists(format!("sys/class/rtc/{clock}/wakealarm")));
    let states = root.words("sys/power/state");
    Ok(Kernel {
        pidfd: abilities.pidfd,
        process_madvise: abilities.process_madvise,
        // It is there and cannot be read where it is off (older kernels), or not there.
        psi: root.line("proc/pressure/memory").is_some(),
        psi_built: root.read(format!("boot/config-{release}")).and_then(|text| psi_built(&text)),
        wake_clocks,
        other_clocks,
        suspends: states.iter().any(|state| matches!(state.as_str(), "mem" | "freeze" | "standby")),
        release,
    })
}

fn psi_built(config: &str) -> Option<bool> {
    config.lines().find_map(|line| match line.trim() {
        "CONFIG_PSI=y" => Some(true),
        "# CONFIG_PSI is not set" => Some(false),
        _ => None,
    })
}

#[expect(unsafe_code, reason = "neither nix nor rustix wraps process_madvise")]
fn has_process_madvise() -> bool {
    // SAFETY: no pidfd is -1 and no vector is given, so nothing is read, written or advised: a kernel that knows the call
    // refuses it with EBADF.
    let result = unsafe {
        libc::syscall(libc::SYS_process_madvise, -1, std::ptr::null::<libc::iovec>(), 0, libc::MADV_PAGEOUT, 0)
    };
    result != -1 || !matches!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS | libc::EPERM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_what_the_tests_of_the_daemon_need() {
        assert_eq!(Abilities::of_this_kernel(), Abilities { pidfd: true, process_madvise: true });
    }

    #[test]
    fn the_configuration_says_whether_pressure_was_built_in() {
        assert_eq!(psi_built("CONFIG_A=y\nCONFIG_PSI=y\nCONFIG_PSI_DEFAULT_DISABLED=y\n"), Some(true));
        assert_eq!(psi_built("# CONFIG_PSI is not set\n"), Some(false));
        assert_eq!(psi_built("CONFIG_PSI_X=y\n"), None);
    }
}
