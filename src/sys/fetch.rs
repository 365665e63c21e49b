//! Downloads attachments on a worker thread.
