//! Windows by wlr-foreign-toplevel-management-unstable-v1: phosh (phoc), sway, labwc and others that stand on wlroots.
//!
//! It tells no process ids. What it tells of visibility was looked up and tried:
//!
//! - `output_leave` is "emitted whenever the toplevel stops being visible on the given output" (the protocol). Compositors
//!   that stand on wlroots' scene graph send it for windows on another workspace and for those behind an opaque one
//!   (`wlr_scene_buffer.events.outputs_update`; sway since 1.10). Others send it only when the window's place is outside of
//!   the output (sway 1.7, tried in `tests/windows.rs`: nothing comes when the workspace is switched; phoc 0.24, labwc): those
//!   call too little hidden, never too much. So a window that has left every output is hidden.
//! - Nothing is told of what lies above what. phoc raises what it activates (`phoc_seat_set_focus_view`), so there a maximized or
//!   fullscreen window that is active covers the others on its output, except its own dialogues. Elsewhere focus may follow the
//!   pointer to a window that lies below, and nothing is concluded.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    session::{Broken, Listed, WINDOWS, app_id, listed},
    wire::{Args, Requests, numbers},
};

/// The manager's interface and the newest version known here.
pub(super) const MANAGER: (&str, u32) = ("zwlr_foreign_toplevel_manager_v1", 3);
/// Outputs a window is on at most.
const OUTPUTS: usize = 16;

/// Events of the manager.
const TOPLEVEL: u16 = 0;
const FINISHED: u16 = 1;
/// Events of a window.
const APP_ID: u16 = 1;
const OUTPUT_ENTER: u16 = 2;
const OUTPUT_LEAVE: u16 = 3;
const STATE: u16 = 4;
const DONE: u16 = 5;
const CLOSED: u16 = 6;
const PARENT: u16 = 7;
/// A window's request.
const DESTROY: u16 = 7;
/// States of a window.
const MAXIMIZED: u32 = 0;
const MINIMIZED: u32 = 1;
const ACTIVATED: u32 = 2;
const FULLSCREEN: u32 = 3;

/// All windows of a compositor.
#[derive(Debug)]
pub(super) struct Toplevels {
    manager: u32,
    windows: BTreeMap<u32, Toplevel>,
}

/// What is told of one, and what counts since `done`.
#[derive(Debug, Default)]
struct Toplevel {
    told: State,
    now: Option<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    app_id: Arc<str>,
    outputs: BTreeSet<u32>,
    /// It was on an output at some time.
    was_shown: bool,
    active: bool,
    minimized: bool,
    covers: bool,
    parent: Option<u32>,
}

impl Toplevels {
    pub(super) fn new(manager: u32) -> Self {
        Self { manager, windows: BTreeMap::new() }
    }

    /// Takes an event of the manager or a window. False when nothing more will be told.
    pub(super) fn event(
        &mut self,
        object: u32,
        opcode: u16,
        mut args: Args<'_>,
        requests: &mut Requests,
    ) -> Result<bool, Broken> {
        if object == self.manager {
            match opcode {
                TOPLEVEL => {
                    if self.windows.len() >= WINDOWS {
                        return Err(Broken::TooMany);
                    }
                    self.windows.insert(args.uint()?, Toplevel::default());
                }
                FINISHED => return Ok(false),
                _ => {}
            }
            return Ok(true);
        }
        let Some(window) = self.windows.get_mut(&object) else { return Ok(true) };
        let told = &mut window.told;
        match opcode {
            APP_ID => told.app_id = app_id(args.string()?),
            OUTPUT_ENTER => {
                told.outputs.insert(args.uint()?);
                told.was_shown = true;
                if told.outputs.len() > OUTPUTS {
                    return Err(Broken::TooMany);
                }
            }
            OUTPUT_LEAVE => {
                told.outputs.remove(&args.uint()?);
            }
            STATE => {
                (told.active, told.minimized, told.covers) = (false, false, false);
                for state in numbers(args.array()?) {
                    match state {
                        MAXIMIZED | FULLSCREEN => told.covers = true,
                        MINIMIZED => told.minimized = true,
                        ACTIVATED => told.active = true,
                        _ => {}
                    }
                }
            }
            PARENT => told.parent = Some(args.uint()?).filter(|parent| *parent != 0),
            DONE => window.now = Some(told.clone()),
            CLOSED => {
                // Its id is the compositor's, to be used again at once.
                requests.push(object, DESTROY, &[]);
                self.windows.remove(&object);
                for other in self.windows.values_mut() {
                    other.told.parent.take_if(|parent| *parent == object);
                    other.now.as_mut().and_then(|now| now.parent.take_if(|parent| *parent == object));
                }
            }
            _ => {}
        }
        Ok(true)
    }

    /// An output is gone. Compositors do not say so of each window.
    pub(super) fn output_gone(&mut self, output: u32) {
        for window in self.windows.values_mut() {
            window.told.outputs.remove(&output);
            if let Some(now) = &mut window.now {
                now.outputs.remove(&output);
            }
        }
    }

    /// All windows. `raises`: what is activated is on top. `outputs`: some are known.
    pub(super) fn list(&self, raises: bool, outputs: bool) -> Vec<Listed> {
        let shown = || self.windows.iter().filter_map(|(id, window)| Some((*id, window.now.as_ref()?)));
        let covering = |now: &State| raises && now.active && now.covers && !now.minimized && now.outputs.len() == 1;
        let cover = shown().find(|(_, now)| covering(now));
        let hidden = |id: u32, now: &State| {
            let left = outputs && now.was_shown && now.outputs.is_empty();
            let covered = cover.is_some_and(|(top, over)| {
                id != top && over.outputs == now.outputs && !now.active && !self.descends(now, top)
            });
            now.minimized || left || covered
        };
        shown().map(|(id, now)| listed(Arc::clone(&now.app_id), None, now.active, hidden(id, now))).collect()
    }

    /// Whether it is a dialogue of `ancestor`, or of a dialogue of it.
    fn descends(&self, from: &State, ancestor: u32) -> bool {
        let mut parent = from.parent;
        // The compositor may say that windows descend from one another.
        for _ in 0..self.windows.len() {
            match parent {
                None => return false,
                Some(one) if one == ancestor => return true,
                Some(one) => parent = self.windows.get(&one).and_then(|window| window.told.parent),
            }
        }
        parent.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::wire::{Arg, message, tests::event},
        *,
    };

    const MANAGER: u32 = 5;
    const BASE: u32 = 0xff00_0000;

    fn tell(toplevels: &mut Toplevels, object: u32, opcode: u16, args: &[Arg<'_>]) -> Result<bool, Broken> {
        let bytes = event(object, opcode, args);
        let (message, _) = message(&bytes).unwrap().unwrap();
        toplevels.event(message.object, message.opcode, message.args, &mut Requests::new(2))
    }

    fn state(toplevels: &mut Toplevels, window: u32, states: &[u32]) {
        let mut args = vec![Arg::Uint(u32::try_from(states.len() * 4).unwrap())];
        args.extend(states.iter().map(|state| Arg::Uint(*state)));
        tell(toplevels, window, STATE, &args).unwrap();
    }

    /// A window on these outputs.
    fn open(toplevels: &mut Toplevels, window: u32, name: &str, outputs: &[u32], states: &[u32]) {
        tell(toplevels, MANAGER, TOPLEVEL, &[Arg::Uint(window)]).unwrap();
        tell(toplevels, window, APP_ID, &[Arg::Str(name)]).unwrap();
        for output in outputs {
            tell(toplevels, window, OUTPUT_ENTER, &[Arg::Uint(*output)]).unwrap();
        }
        state(toplevels, window, states);
        tell(toplevels, window, DONE, &[]).unwrap();
    }

    fn hidden(toplevels: &Toplevels, raises: bool) -> Vec<String> {
        let list = toplevels.list(raises, true);
        list.iter().filter(|(window, _)| window.hidden).map(|(window, _)| window.app_id.to_string()).collect()
    }

    #[test]
    fn a_window_counts_as_it_was_at_its_last_done() {
        let mut toplevels = Toplevels::new(MANAGER);
        tell(&mut toplevels, MANAGER, TOPLEVEL, &[Arg::Uint(BASE)]).unwrap();
        tell(&mut toplevels, BASE, APP_ID, &[Arg::Str("a")]).unwrap();
        assert_eq!(toplevels.list(true, true), []);
        tell(&mut toplevels, BASE, DONE, &[]).unwrap();
        state(&mut toplevels, BASE, &[ACTIVATED]);
        assert_eq!(toplevels.list(true, true), [listed("a".into(), None, false, false)]);
        tell(&mut toplevels, BASE, DONE, &[]).unwrap();
        assert_eq!(toplevels.list(true, true), [listed("a".into(), None, true, false)]);
        state(&mut toplevels, BASE, &[]);
        tell(&mut toplevels, BASE, DONE, &[]).unwrap();
        assert_eq!(toplevels.list(true, true), [listed("a".into(), None, false, false)]);
        tell(&mut toplevels, BASE, CLOSED, &[]).unwrap();
        assert_eq!(toplevels.list(true, true), []);
        assert_eq!(tell(&mut toplevels, MANAGER, FINISHED, &[]), Ok(false));
    }

    #[test]
    fn hidden_is_only_what_certainly_is() {
        let case = |windows: &[(&str, &[u32], &[u32])]| {
            let mut toplevels = Toplevels::new(MANAGER);
            for (n, (name, outputs, states)) in (0..).zip(windows) {
                open(&mut toplevels, BASE + n, name, outputs, states);
            }
            (hidden(&toplevels, true), hidden(&toplevels, false))
        };
        let nothing = || (vec![], vec![]);
        let only_if_raised = || (vec!["b".to_owned()], vec![]);
        // Minimized: everywhere.
        assert_eq!(case(&[("a", &[1], &[MINIMIZED])]), (vec!["a".into()], vec!["a".into()]));
        // Covered, where what is active is on top.
        assert_eq!(case(&[("a", &[1], &[ACTIVATED, MAXIMIZED]), ("b", &[1], &[])]), only_if_raised());
        assert_eq!(case(&[("a", &[1], &[ACTIVATED, FULLSCREEN]), ("b", &[1], &[MAXIMIZED])]), only_if_raised());
        // Not covered: another output, both outputs, no outputs yet, a small window, one that is not active.
        assert_eq!(case(&[("a", &[1], &[ACTIVATED, MAXIMIZED]), ("b", &[2], &[])]), nothing());
        assert_eq!(case(&[("a", &[1], &[ACTIVATED, MAXIMIZED]), ("b", &[1, 2], &[])]), nothing());
        assert_eq!(case(&[("a", &[1], &[ACTIVATED, MAXIMIZED]), ("b", &[], &[])]), nothing());
        assert_eq!(case(&[("a", &[1], &[ACTIVATED]), ("b", &[1], &[])]), nothing());
        assert_eq!(case(&[("a", &[1], &[MAXIMIZED]), ("b", &[1], &[])]), nothing());
        assert_eq!(case(&[("a", &[], &[ACTIVATED, MAXIMIZED]), ("b", &[], &[])]), nothing());
    }

    #[test]
    fn dialogues_lie_above_their_parent() {
        let mut toplevels = Toplevels::new(MANAGER);
        open(&mut toplevels, BASE, "top", &[1], &[ACTIVATED, MAXIMIZED]);
        for n in 1..4 {
            open(&mut toplevels, BASE + n, &n.to_string(), &[1], &[]);
        }
        let parent = |toplevels: &mut Toplevels, window: u32, parent: u32| {
            tell(toplevels, window, PARENT, &[Arg::Uint(parent)]).unwrap();
            tell(toplevels, window, DONE, &[]).unwrap();
        };
        parent(&mut toplevels, BASE + 1, BASE);
        parent(&mut toplevels, BASE + 2, BASE + 1);
        assert_eq!(hidden(&toplevels, true), ["3"]);
        // A circle is nonsense; nothing is concluded from it.
        parent(&mut toplevels, BASE + 1, BASE + 2);
        assert_eq!(hidden(&toplevels, true), ["3"]);
        parent(&mut toplevels, BASE + 1, 0);
        assert_eq!(hidden(&toplevels, true), ["1", "2", "3"]);
        parent(&mut toplevels, BASE + 1, BASE);
        tell(&mut toplevels, BASE, CLOSED, &[]).unwrap();
        assert_eq!(hidden(&toplevels, true), Vec::<String>::new());
    }

    #[test]
    fn who_has_left_every_output_is_hidden_unless_there_is_none() {
        let mut toplevels = Toplevels::new(MANAGER);
        open(&mut toplevels, BASE, "a", &[1, 2], &[]);
        toplevels.output_gone(1);
        assert_eq!(hidden(&toplevels, false), Vec::<String>::new());
        tell(&mut toplevels, BASE, OUTPUT_LEAVE, &[Arg::Uint(2)]).unwrap();
        assert_eq!(hidden(&toplevels, false), Vec::<String>::new(), "not before done");
        tell(&mut toplevels, BASE, DONE, &[]).unwrap();
        assert_eq!(hidden(&toplevels, false), ["a"]);
        assert!(!toplevels.list(false, false)[0].0.hidden);
    }

    #[test]
    fn windows_and_names_are_bounded() {
        let mut toplevels = Toplevels::new(MANAGER);
        open(&mut toplevels, BASE, &"x".repeat(256), &[1], &[]);
        assert_eq!(&*toplevels.list(false, true)[0].0.app_id, "");
        for n in 1..WINDOWS {
            open(&mut toplevels, BASE + u32::try_from(n).unwrap(), "x", &[1], &[]);
        }
        assert_eq!(tell(&mut toplevels, MANAGER, TOPLEVEL, &[Arg::Uint(BASE + 999)]), Err(Broken::TooMany));
        assert!((0..99).any(|n| tell(&mut toplevels, BASE, OUTPUT_ENTER, &[Arg::Uint(n)]) == Err(Broken::TooMany)));
    }
}
