//! Upstream sessions: one protocol each, sans-IO, behind one enum.
