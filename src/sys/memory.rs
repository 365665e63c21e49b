//! Allocator settings and trimming for a small resident set.

/// To be called first thing in `main`, before any thread exists.
///
/// glibc gives each thread an arena of its own and lets its thresholds drift upwards with what is freed; a daemon that
/// works for a moment and then idles for minutes wants one heap that is given back.
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
    /// Blocks from here on are mapped on their own and so given back at once when freed: a trust store, an attachment,
    /// a large SQLite page cache. Set explicitly, it also stops glibc from raising it by itself.
    const MMAP_THRESHOLD: libc::c_int = 64 * 1024;
    /// Free memory at the end of the heap that is kept.
    const TRIM_THRESHOLD: libc::c_int = 64 * 1024;

    #[expect(unsafe_code, reason = "mallopt has no safe wrapper")]
    pub(super) fn tune() {
        for (parameter, value) in
            [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD), (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD)]
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
