//! Per-registration queues: duplicates, order, Topic, TTL, bounds, retries.
