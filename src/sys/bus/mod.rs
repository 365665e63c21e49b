//! The D-Bus side: one thread for every bus, UnifiedPush towards apps, `org.nightporter1` towards everybody.
