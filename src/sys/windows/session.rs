//! What is said to a compositor and what it says, byte for byte, without a socket: finding the protocol it tells its windows
//! by, and all of them.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    plasma::{self, Plasma},
    toplevels::{self, Toplevels},
    wire::{self, Arg, Args, Malformed, Requests},
};
use crate::model::Window;

/// A window, and the process id the compositor told of it.
pub(super) type Listed = (Window, Option<u32>);

/// Windows taken in at once; with more of them nothing is known.
pub(super) const WINDOWS: usize = 256;
/// Longest application id, in bytes; a longer one matches none.
const APP_ID: usize = 255;
/// Outputs known at once; beyond it, it is not concluded that a window is on none.
const OUTPUTS: usize = 16;

const DISPLAY: u32 = 1;
const REGISTRY: u32 = 2;
/// Requests.
const DISPLAY_SYNC: u16 = 0;
const DISPLAY_GET_REGISTRY: u16 = 1;
const REGISTRY_BIND: u16 = 0;
const OUTPUT_RELEASE: u16 = 0;
/// The version of wl_output that can be let go of.
const OUTPUT_VERSION: u32 = 3;
/// What only phoc offers, and where what is activated is raised.
const PHOC: [&str; 2] = ["phosh_private", "zphoc_layer_shell_effects_v1"];

/// Why a compositor is listened to no more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("what it says is not Wayland")]
    Malformed,
    #[error("it has more windows, or more of something else, than are taken in")]
    TooMany,
    #[error("it says that we made a mistake: {0}")]
    Refused(Box<str>),
}

impl From<Malformed> for Broken {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// A connection to a compositor.
#[derive(Debug)]
pub(super) struct Session {
    requests: Requests,
    /// What is not a whole message yet; less than one message.
    rest: Vec<u8>,
    globals: Globals,
    outputs: BTreeMap<u32, Output>,
    /// Outputs that were not bound.
    outputs_missing: bool,
    provider: Option<Provider>,
    /// The answer that is waited for.
    sync: Option<u32>,
    /// All globals have been told.
    looked: bool,
    /// All windows have been told.
    ready: bool,
    changed: bool,
}

#[derive(Debug, Default)]
struct Globals {
    toplevels: Option<(u32, u32)>,
    plasma: Option<(u32, u32)>,
    phoc: bool,
}

/// By its object.
#[derive(Debug)]
struct Output {
    global: u32,
    version: u32,
}

#[derive(Debug)]
enum Provider {
    Toplevels { global: u32, state: Toplevels },
    Plasma { global: u32, state: Plasma },
}

impl Session {
    /// Asks for what there is.
    pub(super) fn new() -> Self {
        let mut session = Self {
            requests: Requests::new(REGISTRY + 1),
            rest: Vec::new(),
            globals: Globals::default(),
            outputs: BTreeMap::new(),
            outputs_missing: false,
            provider: None,
            sync: None,
            looked: false,
            ready: false,
            changed: false,
        };
        session.requests.push(DISPLAY, DISPLAY_GET_REGISTRY, &[Arg::Uint(REGISTRY)]);
        session.sync();
        session
    }

    /// Takes in what has come.
    ///
    /// # Errors
    /// When there is no use in going on.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        let mut rest = std::mem::take(&mut self.rest);
        rest.extend_from_slice(bytes);
        let mut unread = &rest[..];
        while let Some((message, length)) = wire::message(unread)? {
            self.event(message.object, message.opcode, message.args)?;
            unread = unread.get(length..).unwrap_or_default();
        }
        let read = rest.len() - unread.len();
        rest.drain(..read);
        rest.shrink_to(bytes.len());
        self.rest = rest;
        Ok(())
    }

    /// What is to be sent.
    pub(super) fn outgoing(&mut self) -> Vec<u8> {
        self.requests.take()
    }

    /// All windows, if that may have changed since it was last asked for; within: nothing, where the compositor does not
    /// tell them.
    pub(super) fn news(&mut self) -> Option<Option<Vec<Listed>>> {
        std::mem::take(&mut self.changed).then(|| self.windows())
    }

    fn windows(&self) -> Option<Vec<Listed>> {
        match self.provider.as_ref().filter(|_| self.ready)? {
            Provider::Toplevels { state, .. } => {
                let outputs = !self.outputs.is_empty() && !self.outputs_missing;
                Some(state.list(self.globals.phoc, outputs))
            }
            Provider::Plasma { state, .. } => Some(state.list()),
        }
    }

    fn event(&mut self, object: u32, opcode: u16, mut args: Args<'_>) -> Result<(), Broken> {
        match (object, opcode) {
            (DISPLAY, 0) => {
                args.uint()?;
                args.uint()?;
                let text = String::from_utf8_lossy(args.string()?).chars().take(200).collect::<String>();
                return Err(Broken::Refused(text.into()));
            }
            (DISPLAY, 1) => self.requests.deleted(args.uint()?),
            (REGISTRY, 0) => {
                let (global, interface, version) = (args.uint()?, args.string()?, args.uint()?);
                self.global(global, interface, version);
            }
            (REGISTRY, 1) => self.global_gone(args.uint()?)?,
            (DISPLAY | REGISTRY, _) => {}
            _ if self.sync == Some(object) => {
                self.sync = None;
                self.requests.retire(object)?;
                self.synced();
            }
            _ if self.outputs.contains_key(&object) => {}
            _ => self.provided(object, opcode, args)?,
        }
        Ok(())
    }

    fn provided(&mut self, object: u32, opcode: u16, args: Args<'_>) -> Result<(), Broken> {
        match &mut self.provider {
            None => return Ok(()),
            Some(Provider::Toplevels { state, .. }) => {
                if !state.event(object, opcode, args, &mut self.requests)? {
                    self.provider = None;
                }
            }
            Some(Provider::Plasma { state, .. }) => state.event(object, opcode, args, &mut self.requests)?,
        }
        self.changed |= self.ready;
        // Windows announced meanwhile describe themselves a little later.
        if !self.ready && self.looked && self.sync.is_none() {
            self.synced();
        }
        Ok(())
    }

    fn global(&mut self, global: u32, interface: &[u8], version: u32) {
        let is = |name: &str| interface == name.as_bytes();
        if is("wl_output") {
            if self.outputs.len() >= OUTPUTS {
                self.outputs_missing = true;
                return;
            }
            let version = version.min(OUTPUT_VERSION);
            let id = self.bind(global, "wl_output", version);
            self.outputs.insert(id, Output { global, version });
        } else if is(toplevels::MANAGER.0) {
            self.globals.toplevels = Some((global, version));
        } else if is(plasma::MANAGER.0) && version >= plasma::OLDEST {
            self.globals.plasma = Some((global, version));
        } else if PHOC.iter().any(|name| is(name)) {
            self.globals.phoc = true;
        } else {
            return;
        }
        if self.looked {
            self.choose();
        }
    }

    fn global_gone(&mut self, gone: u32) -> Result<(), Broken> {
        for of in [&mut self.globals.toplevels, &mut self.globals.plasma] {
            of.take_if(|(global, _)| *global == gone);
        }
        if let Some(Provider::Toplevels { global, .. } | Provider::Plasma { global, .. }) = &self.provider
            && *global == gone
        {
            self.provider = None;
            self.changed |= self.ready;
        }
        let outputs: Vec<_> = self.outputs.extract_if(.., |_, output| output.global == gone).collect();
        for (id, output) in outputs {
            if output.version >= OUTPUT_VERSION {
                self.requests.push(id, OUTPUT_RELEASE, &[]);
            }
            // An older one is never let go of, and its id never used again.
            self.requests.retire(id)?;
            if let Some(Provider::Toplevels { state, .. }) = &mut self.provider {
                state.output_gone(id);
            }
            self.changed |= self.ready;
        }
        Ok(())
    }

    /// The compositor has answered all it was asked so far.
    fn synced(&mut self) {
        if !self.looked {
            self.looked = true;
            self.choose();
            // Said once even if there is nothing: it is there and does not tell.
            self.changed = true;
            return;
        }
        self.ready = match &self.provider {
            Some(Provider::Plasma { state, .. }) => state.complete(),
            Some(Provider::Toplevels { .. }) => true,
            None => false,
        };
        self.changed |= self.ready;
    }

    /// Begins to listen to windows, if that can be: by the protocol that tells more.
    fn choose(&mut self) {
        if self.provider.is_some() {
            return;
        }
        self.provider = if let Some((global, version)) = self.globals.plasma {
            let id = self.bind(global, plasma::MANAGER.0, version.min(plasma::MANAGER.1));
            Some(Provider::Plasma { global, state: Plasma::new(id) })
        } else if let Some((global, version)) = self.globals.toplevels {
            let id = self.bind(global, toplevels::MANAGER.0, version.min(toplevels::MANAGER.1));
            Some(Provider::Toplevels { global, state: Toplevels::new(id) })
        } else {
            None
        };
        self.ready = false;
        if self.provider.is_some() {
            self.sync();
        }
    }

    fn bind(&mut self, global: u32, interface: &str, version: u32) -> u32 {
        let id = self.requests.id();
        let args = [Arg::Uint(global), Arg::Str(interface), Arg::Uint(version), Arg::Uint(id)];
        self.requests.push(REGISTRY, REGISTRY_BIND, &args);
        id
    }

    fn sync(&mut self) {
        let id = self.requests.id();
        self.requests.push(DISPLAY, DISPLAY_SYNC, &[Arg::Uint(id)]);
        self.sync = Some(id);
    }
}

/// An application id as it is kept.
pub(super) fn app_id(told: &[u8]) -> Arc<str> {
    std::str::from_utf8(told).ok().filter(|id| id.len() <= APP_ID).unwrap_or_default().into()
}

/// A window, as far as a compositor knows it.
pub(super) fn listed(app_id: Arc<str>, pid: Option<u32>, active: bool, hidden: bool) -> Listed {
    (Window { app_id, target: None, told_pid: pid.is_some(), active, hidden: hidden && !active }, pid)
}

#[cfg(test)]
mod tests {
    use super::{super::wire::tests::event, *};

    /// Hands a session events and returns what it says.
    fn say(session: &mut Session, events: &[Vec<u8>]) -> Vec<u8> {
        session.take(&events.concat()).unwrap();
        session.outgoing()
    }

    fn global(name: u32, interface: &str, version: u32) -> Vec<u8> {
        event(REGISTRY, 0, &[Arg::Uint(name), Arg::Str(interface), Arg::Uint(version)])
    }

    fn bind(name: u32, interface: &str, version: u32, id: u32) -> Vec<u8> {
        event(REGISTRY, REGISTRY_BIND, &[Arg::Uint(name), Arg::Str(interface), Arg::Uint(version), Arg::Uint(id)])
    }

    fn sync(id: u32) -> Vec<u8> {
        event(DISPLAY, DISPLAY_SYNC, &[Arg::Uint(id)])
    }

    fn done(id: u32) -> Vec<u8> {
        event(id, 0, &[Arg::Uint(0)])
    }

    fn begun() -> Session {
        let mut session = Session::new();
        let asked = [event(DISPLAY, DISPLAY_GET_REGISTRY, &[Arg::Uint(REGISTRY)]), sync(3)].concat();
        assert_eq!(session.outgoing(), asked);
        session
    }

    #[test]
    fn windows_are_told_when_all_are_known_and_again_after_each_change() {
        let mut session = begun();
        let toplevels = toplevels::MANAGER.0;
        let said = say(&mut session, &[global(7, "wl_output", 4), global(8, toplevels, 9), global(9, "wl_seat", 7)]);
        assert_eq!(said, bind(7, "wl_output", 3, 4));
        let said = say(&mut session, &[done(3), event(DISPLAY, 1, &[Arg::Uint(3)])]);
        assert_eq!(said, [bind(8, toplevels, 3, 5), sync(6)].concat());
        assert_eq!(session.news(), Some(None), "it is there");
        let window = 0xff00_0000;
        let opened = [
            event(5, 0, &[Arg::Uint(window)]),
            event(window, 1, &[Arg::Str("a")]),
            event(window, 2, &[Arg::Uint(4)]),
            event(window, 5, &[]),
        ];
        say(&mut session, &opened);
        assert_eq!(session.news(), None);
        say(&mut session, &[done(6)]);
        assert_eq!(session.news(), Some(Some(vec![listed("a".into(), None, false, false)])));
        assert_eq!(session.news(), None);
        // Byte by byte.
        for byte in [event(window, 4, &[Arg::Uint(4), Arg::Uint(2)]), event(window, 5, &[])].concat() {
            say(&mut session, &[vec![byte]]);
        }
        assert_eq!(session.news(), Some(Some(vec![listed("a".into(), None, true, false)])));
        // The output goes, another one comes under the id that is free by then.
        let said = say(&mut session, &[event(REGISTRY, 1, &[Arg::Uint(7)])]);
        assert_eq!(said, event(4, OUTPUT_RELEASE, &[]));
        let said = say(&mut session, &[event(DISPLAY, 1, &[Arg::Uint(4)]), global(10, "wl_output", 2)]);
        assert_eq!(said, bind(10, "wl_output", 2, 4));
        say(&mut session, &[event(REGISTRY, 1, &[Arg::Uint(8)])]);
        assert_eq!(session.news(), Some(None));
        // Back again.
        let said = say(&mut session, &[global(11, toplevels, 2)]);
        assert_eq!(said, [bind(11, toplevels, 2, 3), sync(7)].concat());
        say(&mut session, &[done(7)]);
        assert_eq!(session.news(), Some(Some(vec![])));
    }

    #[test]
    fn plasma_is_preferred_and_waited_for() {
        let mut session = begun();
        let (toplevels, plasma) = (toplevels::MANAGER.0, plasma::MANAGER.0);
        let said = say(&mut session, &[global(1, toplevels, 3), global(2, plasma, 18), done(3)]);
        assert_eq!(said, [bind(2, plasma, 16, 4), sync(5)].concat());
        let said = say(&mut session, &[event(4, 4, &[Arg::Uint(0), Arg::Str("{u}")]), done(5)]);
        assert_eq!(said, event(4, 2, &[Arg::Uint(6), Arg::Str("{u}")]));
        assert_eq!(session.news(), Some(None));
        say(&mut session, &[event(6, 10, &[Arg::Uint(77)])]);
        assert_eq!(session.news(), None);
        say(&mut session, &[event(6, 6, &[])]);
        assert_eq!(session.news(), Some(Some(vec![listed("".into(), Some(77), false, false)])));
    }

    /// What KWin 5.27.5 (Debian 12, `--virtual`) said to a client that asks what this one does, byte for byte: weston-flower
    /// comes, weston-terminal over it, maximized, and both go.
    #[test]
    fn kwin_is_understood() {
        let mut said = &include_bytes!("../../../tests/windows/kwin-5.27.5.bin")[..];
        let mut session = begun();
        let mut told: Vec<Option<Vec<(String, bool, bool)>>> = Vec::new();
        while let Some((_, length)) = wire::message(said).unwrap() {
            session.take(&said[..length]).unwrap();
            said = &said[length..];
            let Some(windows) = session.news() else { continue };
            let windows = windows.map(|windows| {
                assert!(windows.iter().all(|(window, pid)| window.told_pid && pid.is_some_and(|pid| pid > 1)));
                let short = |window: &Window| window.app_id.rsplit('.').next().unwrap().to_owned();
                windows.iter().map(|(window, _)| (short(window), window.active, window.hidden)).collect()
            });
            if told.last() != Some(&windows) {
                told.push(windows);
            }
        }
        assert_eq!(said, b"");
        let flower = |active, hidden| ("flower".to_owned(), active, hidden);
        let terminal = |active| ("wayland-terminal".to_owned(), active, false);
        told.iter_mut().flatten().for_each(|list| list.sort());
        let expected = [
            None,
            Some(vec![]),
            Some(vec![flower(true, false)]),
            Some(vec![flower(true, false), terminal(false)]),
            Some(vec![flower(false, false), terminal(false)]),
            Some(vec![flower(false, true), terminal(true)]),
            // For a moment KWin says of both that they are active.
            Some(vec![flower(true, false), terminal(true)]),
            Some(vec![flower(true, false)]),
            Some(vec![]),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn who_tells_nothing_is_known_to() {
        let mut session = begun();
        assert_eq!(say(&mut session, &[global(1, "wl_seat", 3), global(2, plasma::MANAGER.0, 3), done(3)]), b"");
        assert_eq!(session.news(), Some(None));
    }

    #[test]
    fn what_is_wrong_ends_it() {
        let end = |events: &[Vec<u8>]| begun().take(&events.concat()).unwrap_err();
        assert_eq!(end(&[b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()]), Broken::Malformed);
        let error = |text: &str| event(DISPLAY, 0, &[Arg::Uint(4), Arg::Uint(1), Arg::Str(text)]);
        assert_eq!(end(&[error("no")]), Broken::Refused("no".into()));
        // A null string, at which wayland-backend panics.
        assert_eq!(end(&[event(DISPLAY, 0, &[Arg::Uint(4), Arg::Uint(1), Arg::Uint(0)])]), Broken::Refused("".into()));
        assert_eq!(end(&[event(DISPLAY, 0, &[])]), Broken::Malformed);
        assert_eq!(end(&[event(REGISTRY, 0, &[Arg::Uint(1), Arg::Uint(99)])]), Broken::Malformed);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(512))]

        /// Whatever comes, nothing panics, and no more than a message is kept.
        #[test]
        fn nothing_a_compositor_says_panics(
            events in proptest::collection::vec(
                (1_u32..9, 0_u16..9, proptest::collection::vec(0_u32..9, 0..6), proptest::bool::ANY), 0..200,
            ),
            plasma: bool,
        ) {
            let mut session = begun();
            let protocol = if plasma { plasma::MANAGER.0 } else { toplevels::MANAGER.0 };
            session.take(&[global(1, "wl_output", 3), global(2, protocol, 16), done(3)].concat()).unwrap();
            for (object, opcode, args, ours) in events {
                let object = if ours { object } else { object | 0xff00_0000 };
                let args: Vec<_> = args.into_iter().map(Arg::Uint).collect();
                if session.take(&event(object, opcode, &args)).is_err() {
                    break;
                }
                session.news();
                session.outgoing();
                assert!(session.rest.len() < 4096);
            }
        }
    }
}
