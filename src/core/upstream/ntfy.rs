//! ntfy over its WebSocket stream (push.md §3b).
