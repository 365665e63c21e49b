//! Mozilla autopush (push.md §3a).
