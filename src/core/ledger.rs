//! What each app cost while resident, what it costs now, and what that saves.
