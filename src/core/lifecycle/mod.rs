//! Per-app lifecycle: states, vetoes, verdicts with their reasons.
