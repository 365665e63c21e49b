//! The loop's alarm on CLOCK_BOOTTIME, and notice of a resume.
