//! Who is looked at, by the windows of a session: from what its compositor tells to what is certain of one app.
//!
//! Unknown is foreground (design.md, invariant 2), and so is whatever could be. A window is an app's when its process is the
//! app's; where the compositor tells no processes, when it goes by a name of the app. Names are what apps say of themselves,
//! so they prove that a window *is* an app's and never that one is not: an app that no window was ever matched to may be
//! behind any of them.
//!
//! Lock screens, home screens, launchers and keyboards are no windows to most compositors (layer surfaces): while one of them
//! has the input, no window is active. Then the last active one is still in front: behind a lock screen that is put away with
//! a swipe everything is to be as it was. On Plasma the home screen is a window, and is active itself.

use std::{borrow::Cow, sync::Arc};

use crate::model::{TargetId, Window};

/// What is certain of an app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// It is used now.
    InFront,
    /// Some of it may be on the screen.
    Visible,
    /// It has windows, and nothing of them can be seen.
    Hidden,
    /// It has none.
    NoWindow,
    /// Not known: to be treated as in front.
    Unknown,
}

impl Seen {
    /// Whether it is certain that nobody looks at it.
    pub const fn is_background(self) -> bool {
        matches!(self, Self::Hidden | Self::NoWindow)
    }
}

/// What is certain of an app, and a sentence part with it as the subject that says why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// What is certain.
    pub seen: Seen,
    /// Why: "its window is the active one".
    pub reason: Cow<'static, str>,
}

/// An app, as far as it matters for its windows.
#[derive(Clone, Copy, Debug)]
pub struct App<'a> {
    /// Its name on the bus.
    pub service: &'a str,
    /// Other names it may go by: the application id in its unit's name, the `StartupWMClass` of its desktop file.
    pub aliases: &'a [Arc<str>],
    /// Its process, if it is known.
    pub target: Option<TargetId>,
    /// Whether a window was ever its own ([`Windows::has_of`]), as long as its process is the same.
    pub had_window: bool,
}

/// The windows of one session.
#[derive(Clone, Debug, Default)]
pub struct Windows {
    list: Option<Vec<Window>>,
    /// What was active when last anything was.
    last: Vec<(Arc<str>, Option<TargetId>)>,
}

impl Windows {
    /// `Event::Windows`.
    pub fn told(&mut self, list: Option<Vec<Window>>) {
        let active = || list.iter().flatten().filter(|window| window.active);
        if list.is_none() || active().next().is_some() {
            self.last = active().map(|window| (Arc::clone(&window.app_id), window.target)).collect();
        }
        self.list = list;
    }

    /// Whether a window is this app's: from then on it is known by its windows.
    pub fn has_of(&self, app: &App<'_>) -> bool {
        self.list.iter().flatten().any(|window| is_of(window, app))
    }

    /// What is certain of this app.
    pub fn look(&self, app: &App<'_>) -> Sight {
        let Some(list) = &self.list else {
            return sight(Seen::Unknown, "no compositor tells which windows there are");
        };
        let own = || list.iter().filter(|window| is_of(window, app));
        let with = |name: &Window| if name.app_id.is_empty() { String::new() } else { format!(" ({})", name.app_id) };
        if let Some(window) = own().find(|window| window.active) {
            return sight(Seen::InFront, format!("its window is the active one{}", with(window)));
        }
        if let Some(window) = own().find(|window| !window.hidden) {
            return if !list.iter().any(|window| window.active) && self.was_last(window) {
                sight(Seen::InFront, format!("its window was the last active one, and no other is now{}", with(window)))
            } else {
                sight(Seen::Visible, format!("a window of it may be on the screen{}", with(window)))
            };
        }
        if own().next().is_some() {
            return sight(Seen::Hidden, "nothing can be seen of its windows");
        }
        if app.had_window {
            sight(Seen::NoWindow, "its last window is closed")
        } else if list.iter().all(|window| window.told_pid) {
            sight(Seen::NoWindow, "no window is its own")
        } else {
            let reason = "no window was ever known to be its own, and the compositor does not tell whose each is";
            sight(Seen::Unknown, reason)
        }
    }

    fn was_last(&self, window: &Window) -> bool {
        self.last.iter().any(|(app_id, target)| *app_id == window.app_id && *target == window.target)
    }
}

fn sight(seen: Seen, reason: impl Into<Cow<'static, str>>) -> Sight {
    Sight { seen, reason: reason.into() }
}

/// By the process where both are known, else by name: a window may be made by a process the app has started.
fn is_of(window: &Window, app: &App<'_>) -> bool {
    match (window.target, app.target) {
        (Some(of), Some(target)) => of == target,
        (Some(_), None) | (None, _) => goes_by(&window.app_id, app),
    }
}

fn goes_by(app_id: &str, app: &App<'_>) -> bool {
    let names = || std::iter::once(app.service).chain(app.aliases.iter().map(|alias| &**alias));
    let is = |name: &str| name.eq_ignore_ascii_case(app_id);
    // Some say the name of their desktop file with its ending.
    let file = |name: &str| app_id.strip_suffix(".desktop").is_some_and(|app_id| name.eq_ignore_ascii_case(app_id));
    // `chatty` is sm.puri.Chatty, and `Signal` org.signal.Signal.
    let short = |name: &str| name.rsplit_once('.').is_some_and(|(_, last)| is(last)) && !is_common(app_id);
    !app_id.is_empty() && names().any(|name| is(name) || file(name) || short(name))
}

/// What more than one app has as the last part of its name, and what runtimes say in place of a name.
fn is_common(app_id: &str) -> bool {
    const COMMON: [&str; 16] = [
        "app",
        "application",
        "chrome",
        "chromium",
        "client",
        "daemon",
        "desktop",
        "electron",
        "gtk",
        "java",
        "main",
        "mobile",
        "python",
        "python3",
        "qt",
        "service",
    ];
    COMMON.iter().any(|common| common.eq_ignore_ascii_case(app_id))
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: TargetId = TargetId(1);
    const OTHER: TargetId = TargetId(2);

    fn app(service: &str) -> App<'_> {
        App { service, aliases: &[], target: Some(US), had_window: false }
    }

    /// A window of which the compositor tells no process.
    fn named(app_id: &str) -> Window {
        Window { app_id: app_id.into(), target: None, told_pid: false, active: false, hidden: false }
    }

    /// A window of which it does.
    fn owned(app_id: &str, target: Option<TargetId>) -> Window {
        Window { target, told_pid: true, ..named(app_id) }
    }

    fn active(window: Window) -> Window {
        Window { active: true, ..window }
    }

    fn hidden(window: Window) -> Window {
        Window { hidden: true, ..window }
    }

    fn seen(list: &[Window], app: &App<'_>) -> Seen {
        let mut windows = Windows::default();
        windows.told(Some(list.to_vec()));
        windows.look(app).seen
    }

    #[test]
    fn windows_with_processes() {
        let it = app("org.a.B");
        for (list, expected) in [
            (vec![], Seen::NoWindow),
            (vec![active(owned("x", Some(US)))], Seen::InFront),
            (vec![owned("x", Some(US))], Seen::Visible),
            (vec![hidden(owned("x", Some(US)))], Seen::Hidden),
            (vec![hidden(owned("x", Some(US))), owned("x", Some(US))], Seen::Visible),
            (vec![hidden(owned("x", Some(US))), active(owned("x", Some(US)))], Seen::InFront),
            // Somebody else's, who says it is ours.
            (vec![active(owned("org.a.B", Some(OTHER)))], Seen::NoWindow),
            // Of a process that is none of the apps', by our name: one we have started.
            (vec![active(owned("org.a.B", None))], Seen::InFront),
            (vec![active(owned("org.c.D", None))], Seen::NoWindow),
            // One that tells no process may be anybody's.
            (vec![owned("x", Some(OTHER)), named("y")], Seen::Unknown),
        ] {
            assert_eq!(seen(&list, &it), expected, "{list:?}");
        }
    }

    #[test]
    fn windows_with_names() {
        let it = app("org.a.B");
        let with_window = App { had_window: true, ..it };
        for (list, at_first, later) in [
            (vec![], Seen::NoWindow, Seen::NoWindow),
            (vec![active(named("org.a.B"))], Seen::InFront, Seen::InFront),
            (vec![named("org.a.b")], Seen::Visible, Seen::Visible),
            (vec![hidden(named("org.a.B")), active(named("org.c.D"))], Seen::Hidden, Seen::Hidden),
            (vec![active(named("org.c.D"))], Seen::Unknown, Seen::NoWindow),
            (vec![hidden(named("org.c.D"))], Seen::Unknown, Seen::NoWindow),
            (vec![active(named(""))], Seen::Unknown, Seen::NoWindow),
        ] {
            assert_eq!((seen(&list, &it), seen(&list, &with_window)), (at_first, later), "{list:?}");
        }
        assert_eq!(Windows::default().look(&with_window).seen, Seen::Unknown);
    }

    #[test]
    fn names() {
        let aliases = ["discord".into(), "Element".into()];
        for (app_id, service, expected) in [
            ("sm.puri.Chatty", "sm.puri.Chatty", true),
            ("SM.Puri.chatty", "sm.puri.Chatty", true),
            ("chatty", "sm.puri.Chatty", true),
            ("sm.puri.Chatty.desktop", "sm.puri.Chatty", true),
            ("org.telegram.desktop", "org.telegram.desktop", true),
            ("Discord", "com.x.Y", true),
            ("element", "com.x.Y", true),
            ("org.puri.Chatty", "sm.puri.Chatty", false),
            ("puri.Chatty", "sm.puri.Chatty", false),
            ("Chatty2", "sm.puri.Chatty", false),
            ("desktop", "org.telegram.desktop", false),
            ("electron", "chat.delta.desktop.electron", false),
            ("", "sm.puri.Chatty", false),
            (".desktop", "org.telegram.desktop", false),
        ] {
            let it = App { aliases: &aliases, target: None, ..app(service) };
            let mut windows = Windows::default();
            windows.told(Some(vec![named(app_id)]));
            assert_eq!(windows.has_of(&it), expected, "{app_id} {service}");
        }
    }

    #[test]
    fn the_last_active_one_stays_in_front_while_none_is() {
        let (it, other) = (app("org.a.B"), app("org.c.D"));
        let mut windows = Windows::default();
        let mut tell = |list: Vec<Window>| {
            windows.told(Some(list));
            (windows.look(&it).seen, windows.look(&other).seen)
        };
        let (a, b) = (|| named("org.a.B"), || named("org.c.D"));
        assert_eq!(tell(vec![a(), b()]), (Seen::Visible, Seen::Visible), "none was yet");
        assert_eq!(tell(vec![active(a()), hidden(b())]), (Seen::InFront, Seen::Hidden));
        for _ in 0..2 {
            assert_eq!(tell(vec![a(), hidden(b())]), (Seen::InFront, Seen::Hidden), "locked");
        }
        assert_eq!(tell(vec![a(), b()]), (Seen::InFront, Seen::Visible));
        assert_eq!(tell(vec![hidden(a()), b()]), (Seen::Hidden, Seen::Visible), "minimized");
        assert_eq!(tell(vec![a(), active(b())]), (Seen::Visible, Seen::InFront));
        assert_eq!(tell(vec![a()]), (Seen::Visible, Seen::Unknown), "closed");
        windows.told(None);
        windows.told(Some(vec![a(), b()]));
        assert_eq!(windows.look(&other).seen, Seen::Visible, "another compositor");
    }

    #[test]
    fn every_answer_says_why() {
        let lists = [
            None,
            Some(vec![]),
            Some(vec![active(named("org.a.B"))]),
            Some(vec![hidden(named("org.a.B"))]),
            Some(vec![named("org.a.B")]),
            Some(vec![named("x")]),
        ];
        let mut reasons: Vec<String> = lists
            .into_iter()
            .map(|list| {
                let mut windows = Windows::default();
                windows.told(list);
                windows.look(&app("org.a.B")).reason.into_owned()
            })
            .collect();
        reasons.sort();
        reasons.dedup();
        assert_eq!(reasons.len(), 6, "{reasons:?}");
        assert!(reasons.iter().all(|reason| !reason.ends_with('.') && reason.len() > 10), "{reasons:?}");
    }
}
