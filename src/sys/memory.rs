//! Allocator settings and trimming for a small resident set.

/// To be called first thing in `main`, before any thread exists.
///
/// glibc gives each thread an arena of its own, and [`trim`] finds little to give back in many: after three trust
/// stores read and dropped on workers, 420 KiB stayed with the default and 48 KiB with one arena.
pub fn tune() {
    #[cfg(target_env = "gnu")]
    gnu::tune();
}

/// Gives freed memory back to the kernel; about a millisecond. Worth it after a burst, a handshake or a report.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    gnu::trim();
}

#[cfg(target_env = "gnu")]
mod gnu {
    /// glibc's own first value for both; setting it stops glibc from raising it with each large block that is freed,
    /// after which no large block would be given back any more (mallopt(3)).
    const THRESHOLD: libc::c_int = 128 * 1024;

    #[expect(unsafe_code, reason = "mallopt has no safe wrapper")]
    pub(super) fn tune() {
        for (parameter, value) in
            [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, THRESHOLD), (libc::M_TRIM_THRESHOLD, THRESHOLD)]
        {
            // SAFETY: mallopt(3) takes two integers and locks what it changes.
            let done = unsafe { libc::mallopt(parameter, value) };
            if done != 1 {
                log::debug!("mallopt({parameter}, {value}) was refused");
            }
        }
    }

    #[expect(unsafe_code, reason = "malloc_trim has no safe wrapper")]
    pub(super) fn trim() {
        // SAFETY: malloc_trim(3) touches free memory only, and locks each arena.
        unsafe { libc::malloc_trim(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_env = "gnu")]
    #[test]
    fn trimming_gives_freed_blocks_back() {
        fn resident() -> usize {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        }
        tune();
        // Small blocks, each second one freed, so that the end of the heap stays in use.
        let mut blocks: Vec<Option<Vec<u8>>> = (0..2000).map(|_| Some(vec![1; 32 * 1024])).collect();
        let last = blocks.pop();
        blocks.clear();
        let before = resident();
        trim();
        let after = resident();
        assert!(last.is_some());
        assert!(before < 32 << 20 || after + (16 << 20) < before, "{before} → {after}");
    }
}
