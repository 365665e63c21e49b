//! Network return, by rtnetlink.
