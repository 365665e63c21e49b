//! App processes: identity, freezing, paging out, killing, measuring.
