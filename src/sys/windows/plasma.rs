//! Windows by org_kde_plasma_window_management: Plasma's compositor, KWin. It tells process ids and what lies above what.
//!
//! KWin offers it only to programs whose desktop file names it in `X-KDE-Wayland-Interfaces`, found by `/proc/PID/exe` of
//! whoever connected; a user's KWin cannot read that of root's daemon. So it serves `nightporterd --user` where such a file
//! is installed, and for the system's daemon there is the KWin script (`config/kwin/nightporter`).

use std::{collections::BTreeMap, sync::Arc};

use super::{
    session::{Broken, Listed, WINDOWS, app_id, listed},
    wire::{Arg, Args, Requests},
};

/// The manager's interface and the newest version of use here: from 17 on the stacking order must be asked for.
pub(super) const MANAGER: (&str, u32) = ("org_kde_plasma_window_management", 16);
/// The oldest of use: it says when all of a window has been told, and lets go of windows.
pub(super) const OLDEST: u32 = 4;

/// Requests of the manager.
const GET_WINDOW: u16 = 1;
const GET_WINDOW_BY_UUID: u16 = 2;
/// Events of the manager.
const WINDOW: u16 = 1;
const STACKING_ORDER: u16 = 3;
const WINDOW_WITH_UUID: u16 = 4;
/// Events of a window.
const APP_ID: u16 = 1;
const STATE: u16 = 2;
const UNMAPPED: u16 = 5;
const INITIAL_STATE: u16 = 6;
const GEOMETRY: u16 = 8;
const PID: u16 = 10;
/// A window's request.
const DESTROY: u16 = 7;
/// States of a window.
const ACTIVE: u32 = 0x1;
const MINIMIZED: u32 = 0x2;
const COVERS: u32 = 0x4 | 0x8;

/// KWin's are 38 bytes long.
const UUID: usize = 64;

/// All windows of a KWin.
#[derive(Debug)]
pub(super) struct Plasma {
    manager: u32,
    windows: BTreeMap<u32, PlasmaWindow>,
    /// Which layer from the bottom each window is, by its UUID; some have not been announced yet. Of one message.
    layers: BTreeMap<Box<[u8]>, usize>,
}

#[derive(Debug, Default)]
struct PlasmaWindow {
    uuid: Box<str>,
    app_id: Arc<str>,
    pid: Option<u32>,
    state: u32,
    /// Left, top, right, bottom.
    place: Option<[i64; 4]>,
    /// All of it has been told.
    complete: bool,
}

impl Plasma {
    pub(super) fn new(manager: u32) -> Self {
        Self { manager, windows: BTreeMap::new(), layers: BTreeMap::new() }
    }

    /// Whether all windows that were announced have been described.
    pub(super) fn complete(&self) -> bool {
        self.windows.values().all(|window| window.complete)
    }

    /// Takes an event of the manager or a window.
    pub(super) fn event(
        &mut self,
        object: u32,
        opcode: u16,
        mut args: Args<'_>,
        requests: &mut Requests,
    ) -> Result<(), Broken> {
        if object == self.manager {
            match opcode {
                WINDOW => {
                    let number = args.uint()?;
                    self.open("", GET_WINDOW, Arg::Uint(number), requests)?;
                }
                WINDOW_WITH_UUID => {
                    args.uint()?;
                    let uuid = std::str::from_utf8(args.string()?).unwrap_or_default();
                    if uuid.is_empty() || uuid.len() > UUID {
                        return Err(Broken::Malformed);
                    }
                    self.open(uuid, GET_WINDOW_BY_UUID, Arg::Str(uuid), requests)?;
                }
                STACKING_ORDER => {
                    let order = args.string()?.split(|byte| *byte == b';');
                    self.layers = order.filter(|uuid| !uuid.is_empty()).map(Box::from).zip(0..).collect();
                }
                _ => {}
            }
            return Ok(());
        }
        let Some(window) = self.windows.get_mut(&object) else { return Ok(()) };
        match opcode {
            APP_ID => window.app_id = app_id(args.string()?),
            STATE => window.state = args.uint()?,
            INITIAL_STATE => window.complete = true,
            GEOMETRY => {
                let (x, y) = (i64::from(args.int()?), i64::from(args.int()?));
                let (width, height) = (i64::from(args.uint()?), i64::from(args.uint()?));
                window.place = Some([x, y, x + width, y + height]);
            }
            PID => window.pid = Some(args.uint()?).filter(|pid| *pid != 0),
            UNMAPPED => {
                requests.push(object, DESTROY, &[]);
                requests.retire(object)?;
                self.windows.remove(&object);
            }
            _ => {}
        }
        Ok(())
    }

    /// All windows.
    pub(super) fn list(&self) -> Vec<Listed> {
        let shown = || self.windows.iter().filter(|(_, window)| window.complete);
        let active = |window: &PlasmaWindow| window.state & ACTIVE != 0 && window.state & MINIMIZED == 0;
        // What is active is on the desktop that is shown.
        let cover = shown().find(|(_, window)| active(window) && window.state & COVERS != 0);
        let layer = |window: &PlasmaWindow| self.layers.get(window.uuid.as_bytes());
        let hidden = |id: u32, window: &PlasmaWindow| {
            let covered = cover.is_some_and(|(top, over)| {
                let below = layer(window).is_some_and(|below| layer(over).is_some_and(|above| above > below));
                id != *top && below && within(window.place, over.place)
            });
            window.state & MINIMIZED != 0 || covered && !active(window)
        };
        let told = |(id, window): (&u32, &PlasmaWindow)| {
            listed(Arc::clone(&window.app_id), window.pid, window.state & ACTIVE != 0, hidden(*id, window))
        };
        shown().map(told).collect()
    }

    fn open(&mut self, uuid: &str, opcode: u16, which: Arg<'_>, requests: &mut Requests) -> Result<(), Broken> {
        if self.windows.len() >= WINDOWS {
            return Err(Broken::TooMany);
        }
        let id = requests.id();
        requests.push(self.manager, opcode, &[Arg::Uint(id), which]);
        self.windows.insert(id, PlasmaWindow { uuid: uuid.into(), ..PlasmaWindow::default() });
        Ok(())
    }
}

fn within(inner: Option<[i64; 4]>, outer: Option<[i64; 4]>) -> bool {
    match (inner, outer) {
        (Some([left, top, right, bottom]), Some(outer)) => {
            left >= outer[0] && top >= outer[1] && right <= outer[2] && bottom <= outer[3]
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::wire::{message, tests::event},
        *,
    };

    const MANAGER: u32 = 5;

    fn tell(plasma: &mut Plasma, requests: &mut Requests, object: u32, opcode: u16, args: &[Arg<'_>]) {
        let bytes = event(object, opcode, args);
        let (message, _) = message(&bytes).unwrap().unwrap();
        plasma.event(message.object, message.opcode, message.args, requests).unwrap();
    }

    /// Windows as (state, place), stacked in this order from the bottom.
    fn told(windows: &[(u32, [i32; 4])]) -> Vec<bool> {
        let (mut plasma, mut requests) = (Plasma::new(MANAGER), Requests::new(6));
        let order: Vec<String> = (0..windows.len()).map(|n| format!("u{n}")).collect();
        tell(&mut plasma, &mut requests, MANAGER, STACKING_ORDER, &[Arg::Str(&order.join(";"))]);
        for (n, (state, [x, y, width, height])) in windows.iter().enumerate() {
            tell(&mut plasma, &mut requests, MANAGER, WINDOW_WITH_UUID, &[Arg::Uint(0), Arg::Str(&format!("u{n}"))]);
            let id = 6 + u32::try_from(n).unwrap();
            tell(&mut plasma, &mut requests, id, STATE, &[Arg::Uint(*state)]);
            let place = [x, y, width, height].map(|n| Arg::Uint(n.cast_unsigned()));
            tell(&mut plasma, &mut requests, id, GEOMETRY, &place);
            tell(&mut plasma, &mut requests, id, INITIAL_STATE, &[]);
        }
        plasma.list().iter().map(|(window, _)| window.hidden).collect()
    }

    #[test]
    fn hidden_is_what_is_minimized_or_below_an_active_window_that_covers_all_of_it() {
        const SCREEN: [i32; 4] = [0, 0, 360, 720];
        const FULL: u32 = ACTIVE | 0x4;
        for (windows, expected) in [
            (vec![(0, SCREEN), (FULL, SCREEN)], vec![true, false]),
            (vec![(0, SCREEN), (ACTIVE | 0x8, SCREEN)], vec![true, false]),
            // Above it; not all of it below; the upper one neither active, nor large, nor there.
            (vec![(FULL, SCREEN), (0, [50, 50, 9, 9])], vec![false, false]),
            (vec![(0, [-9, 0, 60, 60]), (FULL, SCREEN)], vec![false, false]),
            (vec![(0, SCREEN), (0x4, SCREEN)], vec![false, false]),
            (vec![(0, SCREEN), (ACTIVE, SCREEN)], vec![false, false]),
            (vec![(0, SCREEN), (FULL | MINIMIZED, SCREEN)], vec![false, false]),
            (vec![(MINIMIZED, SCREEN), (0, SCREEN)], vec![true, false]),
        ] {
            assert_eq!(told(&windows), expected, "{windows:?}");
        }
    }

    #[test]
    fn an_old_kwin_names_windows_by_number_and_is_asked_so() {
        let (mut plasma, mut requests) = (Plasma::new(MANAGER), Requests::new(6));
        tell(&mut plasma, &mut requests, MANAGER, WINDOW, &[Arg::Uint(77)]);
        assert_eq!(requests.take(), event(MANAGER, GET_WINDOW, &[Arg::Uint(6), Arg::Uint(77)]));
        assert!(!plasma.complete());
        tell(&mut plasma, &mut requests, 6, APP_ID, &[Arg::Str("org.kde.a")]);
        tell(&mut plasma, &mut requests, 6, PID, &[Arg::Uint(4711)]);
        assert_eq!(plasma.list(), []);
        tell(&mut plasma, &mut requests, 6, INITIAL_STATE, &[]);
        assert_eq!(plasma.list(), [listed("org.kde.a".into(), Some(4711), false, false)]);
        tell(&mut plasma, &mut requests, 6, UNMAPPED, &[]);
        assert_eq!((plasma.list(), requests.take()), (vec![], event(6, DESTROY, &[])));
        assert_eq!(requests.id(), 7, "KWin has not let go of it yet");
    }

    #[test]
    fn windows_are_bounded() {
        let (mut plasma, mut requests) = (Plasma::new(MANAGER), Requests::new(6));
        let bytes = event(MANAGER, WINDOW, &[Arg::Uint(1)]);
        let mut open = || {
            let (message, _) = message(&bytes).unwrap().unwrap();
            plasma.event(message.object, message.opcode, message.args, &mut requests)
        };
        assert!((0..WINDOWS).all(|_| open() == Ok(())));
        assert_eq!(open(), Err(Broken::TooMany));
    }
}
