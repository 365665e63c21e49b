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

/// [`trim`], and unmaps the program text that was used so far: what start-up, a burst or a registration ran stays in the
/// page cache, where the kernel may drop it, and only what is run again comes back. For when it has become quiet.
pub fn rest() {
    trim();
    text::unmap();
}

mod text {
    use std::{ffi::c_void, ptr};

    /// Unmaps the pages of every read-only segment of the program and its libraries.
    #[expect(unsafe_code, reason = "only the dynamic linker knows the segments, and unmapping has no safe wrapper")]
    pub(super) fn unmap() {
        // SAFETY: the callback has the signature dl_iterate_phdr(3) asks for and keeps nothing of what it is given.
        unsafe { libc::dl_iterate_phdr(Some(of_object), ptr::null_mut()) };
    }

    #[expect(unsafe_code, reason = "see unmap")]
    unsafe extern "C" fn of_object(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> libc::c_int {
        // SAFETY: dl_iterate_phdr(3) gives a valid pointer for the time of the call.
        let info = unsafe { &*info };
        if info.dlpi_phdr.is_null() {
            return 0;
        }
        // SAFETY: `dlpi_phdr` points to `dlpi_phnum` program headers, which are never written to.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
        for header in headers {
            if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
                continue;
            }
            let Some((start, length)) = whole_pages(info.dlpi_addr.wrapping_add(header.p_vaddr), header.p_memsz) else {
                continue;
            };
            // SAFETY: the range is whole pages of a segment that is mapped from a file and never written to (relocated
            // data lies in the writable segment), so whatever is read or run there next comes from the file as before.
            unsafe { libc::madvise(start as *mut c_void, length, libc::MADV_DONTNEED) };
        }
        0
    }

    /// The whole pages within a range; `None` when there is none. 64 KiB is the largest page size of the targets.
    fn whole_pages(address: u64, length: u64) -> Option<(usize, usize)> {
        const PAGE: u64 = 65_536;
        let start = address.checked_next_multiple_of(PAGE)?;
        let end = address.checked_add(length)? / PAGE * PAGE;
        let length = end.checked_sub(start).filter(|length| *length > 0)?;
        Some((usize::try_from(start).ok()?, usize::try_from(length).ok()?))
    }
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

    #[test]
    fn a_rest_takes_the_text_out_and_the_program_goes_on() {
        fn text() -> u64 {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let exe = std::env::current_exe().unwrap();
            let (mut ours, mut sum) = (false, 0);
            for line in smaps.lines() {
                if line.split(' ').nth(1).is_some_and(|perms| perms.len() == 4 && perms.ends_with('p')) {
                    ours = line.contains(" r-xp ") && line.ends_with(exe.to_str().unwrap());
                } else if let (true, Some(rest)) = (ours, line.strip_prefix("Rss:")) {
                    sum += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
                }
            }
            sum
        }
        let words: Vec<String> = (0..1000).map(|n| format!("{n:?}")).collect();
        let before = text();
        rest();
        let after = text();
        assert!(after < before, "{before} → {after} KiB of text");
        assert_eq!(words.iter().map(String::len).sum::<usize>(), 2890);
    }

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
