//! Allocator settings and trimming for a small resident set.
