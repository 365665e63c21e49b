//! Who is looked at: the windows of each session (`foreground`), told to the lifecycle.

use super::{
    Core,
    foreground::{App, Seen, Windows},
    lifecycle,
};
use crate::{
    model::{AppKey, Bus, Window},
    time::Now,
};

impl Core {
    /// The windows of a session have changed, or nothing tells of them any more.
    pub(super) fn windows_told(&mut self, bus: Bus, windows: Option<Vec<Window>>, now: Now) {
        match windows {
            Some(windows) => self.windows.entry(bus).or_default().told(Some(windows)),
            None => drop(self.windows.remove(&bus)),
        }
        let apps: Vec<AppKey> = self.apps.keys().filter(|app| app.bus == bus).cloned().collect();
        for app in apps {
            self.look_at(&app, now);
        }
    }

    /// Looks where the app's windows are, now that they, or its process, are others.
    pub(super) fn look_at(&mut self, key: &AppKey, now: Now) {
        let Some(presence) = self.apps.get_mut(key) else { return };
        let target = self.lifecycle.target_of(key);
        let app = App { service: &key.service, aliases: &[], target, had_window: presence.had_window };
        let seen = match self.windows.get(&key.bus) {
            None => lifecycle::Seen::Nothing,
            Some(windows) => {
                presence.had_window |= windows.has_of(&app);
                seen(windows, &App { had_window: presence.had_window, ..app })
            }
        };
        let in_front = matches!(seen, lifecycle::Seen::Front(_));
        self.lifecycle.seen(key, seen, now);
        if in_front {
            self.seen_in_front(key, now);
        }
    }
}

fn seen(windows: &Windows, app: &App<'_>) -> lifecycle::Seen {
    let sight = windows.look(app);
    match sight.seen {
        Seen::InFront | Seen::Visible => lifecycle::Seen::Front(sight.reason.into()),
        Seen::Hidden | Seen::NoWindow => lifecycle::Seen::Behind,
        Seen::Unknown => lifecycle::Seen::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        action::Action,
        config::Settings,
        core::fixtures::{NOW, kept, registration},
        event::{BusEvent, Event},
        model::{Freezer, Owner, ProcessFacts, Profile, TargetId},
    };

    const TARGET: TargetId = TargetId(7);

    fn key() -> AppKey {
        AppKey::new(Bus::Session(1000), "org.example.Chat")
    }

    fn window(app_id: &str, active: bool, hidden: bool) -> Window {
        Window { app_id: app_id.into(), target: None, told_pid: false, active, hidden }
    }

    struct World {
        core: Core,
        now: Now,
    }

    impl World {
        /// The app runs and is identified.
        fn new() -> Self {
            let settings = Settings { profile: Profile::Tombstone, ..Settings::default() };
            let snapshot = kept([registration(1, key(), "mozilla")]);
            let mut world = Self { core: Core::new(settings, [7; 32], snapshot, NOW), now: NOW };
            let facts = ProcessFacts { pid: 42, freezer: Freezer::Cgroup2, can_page_out: true, protected: None };
            let owner = Owner(":1.5".into());
            world.tell(Event::Bus(BusEvent::Up(key().bus)));
            world.tell(Event::Bus(BusEvent::OwnerChanged(key(), Some(owner.clone()))));
            world.tell(Event::Identified { app: key(), owner, process: Ok((TARGET, facts)) });
            world
        }

        fn tell(&mut self, event: Event) -> Vec<Action> {
            self.core.handle(event, self.now);
            std::iter::from_fn(|| self.core.poll_action()).collect()
        }

        fn windows(&mut self, windows: &[Window]) -> Vec<Action> {
            self.tell(Event::Windows(key().bus, Some(windows.to_vec())))
        }

        fn state(&self) -> &'static str {
            self.core.lifecycle.show(&key(), self.now).unwrap().state.as_str()
        }

        /// Passes time, and answers what is asked on the way to a freeze.
        fn pass(&mut self, secs: u64) -> BTreeSet<&'static str> {
            let mut done = BTreeSet::new();
            for _ in 0..secs {
                self.now.boot = self.now.boot + std::time::Duration::from_secs(1);
                let mut actions = self.tell(Event::Tick);
                while let Some(action) = actions.pop() {
                    actions.extend(match action {
                        Action::Sample(target) => self.tell(Event::Sampled(target, Err("not here".into()))),
                        Action::Inspect(target) => self.tell(Event::Inspected(target, Ok(Vec::new()))),
                        Action::Freeze(target) => {
                            done.insert("freeze");
                            let took = std::time::Duration::from_millis(1);
                            self.tell(Event::Outcome(target, crate::event::Outcome::Frozen { took }))
                        }
                        _ => Vec::new(),
                    });
                }
            }
            done
        }
    }

    #[test]
    fn an_app_that_says_nothing_is_frozen_when_its_window_is_hidden_and_thawed_with_it() {
        let mut world = World::new();
        assert_eq!(world.state(), "foreground");
        world.windows(&[window("org.example.Chat", true, false)]);
        assert!(world.pass(60).is_empty());
        world.windows(&[window("org.example.Chat", false, true), window("foot", true, false)]);
        assert_eq!(world.state(), "background");
        assert!(world.pass(12).contains("freeze"));
        let actions = world.windows(&[window("org.example.Chat", true, false), window("foot", false, true)]);
        assert!(actions.contains(&Action::Thaw(TARGET)), "{actions:?}");
    }

    #[test]
    fn a_compositor_that_goes_thaws_what_only_its_windows_spoke_for() {
        let mut world = World::new();
        world.windows(&[window("org.example.Chat", false, true)]);
        assert!(world.pass(12).contains("freeze"));
        let actions = world.tell(Event::Windows(key().bus, None));
        assert!(actions.contains(&Action::Thaw(TARGET)), "{actions:?}");
    }

    #[test]
    fn an_app_never_seen_with_a_window_may_be_behind_any_of_them() {
        let mut world = World::new();
        world.windows(&[window("mystery", true, false)]);
        assert!(world.pass(60).is_empty());
        world.windows(&[window("org.example.Chat", true, false)]);
        world.windows(&[]);
        assert!(world.pass(12).contains("freeze"), "its last window is closed");
    }

    #[test]
    fn windows_of_another_session_say_nothing_of_it() {
        let mut world = World::new();
        world.tell(Event::Windows(Bus::Session(1001), Some(vec![window("org.example.Chat", false, true)])));
        assert!(world.pass(60).is_empty());
    }
}
