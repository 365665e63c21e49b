//! What is seen of processes all the time (PipeWire, MPRIS, logind, the compositor), told by process id, becomes what the
//! core knows: targets.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    event::Event,
    model::{Bus, TargetId, Veto, Window},
    sys::process::Targets,
};

/// Vetoes told of one target at most.
const VETOES: usize = 16;

/// The latest word of each source, and what of it the core has been told.
#[derive(Debug, Default)]
pub(super) struct Sightings {
    vetoes: BTreeMap<(&'static str, u32), Vec<(u32, Veto)>>,
    windows: BTreeMap<u32, Vec<(Window, Option<u32>)>>,
    told: BTreeMap<TargetId, Vec<Veto>>,
}

impl Sightings {
    /// A source says what it sees of the processes of a session.
    pub(super) fn seen(
        &mut self,
        source: &'static str,
        uid: u32,
        vetoes: Vec<(u32, Veto)>,
        targets: &Targets,
        out: &mut impl Extend<Event>,
    ) {
        if vetoes.is_empty() {
            self.vetoes.remove(&(source, uid));
        } else {
            self.vetoes.insert((source, uid), vetoes);
        }
        self.tell(targets, out);
    }

    /// A compositor says which windows there are.
    pub(super) fn windows(
        &mut self,
        uid: u32,
        windows: Option<Vec<(Window, Option<u32>)>>,
        targets: &Targets,
        out: &mut impl Extend<Event>,
    ) {
        match windows {
            Some(windows) => {
                out.extend([Event::Windows(Bus::Session(uid), Some(resolved(uid, &windows, targets)))]);
                self.windows.insert(uid, windows);
            }
            None => {
                self.windows.remove(&uid);
                out.extend([Event::Windows(Bus::Session(uid), None)]);
            }
        }
    }

    /// A process has become a target, which may have been seen before.
    pub(super) fn adopted(&mut self, targets: &Targets, out: &mut impl Extend<Event>) {
        self.tell(targets, out);
        for (uid, windows) in &self.windows {
            if windows.iter().any(|(_, pid)| pid.is_some()) {
                out.extend([Event::Windows(Bus::Session(*uid), Some(resolved(*uid, windows, targets)))]);
            }
        }
    }

    /// A target is no more.
    pub(super) fn forget(&mut self, target: TargetId) {
        self.told.remove(&target);
    }

    fn tell(&mut self, targets: &Targets, out: &mut impl Extend<Event>) {
        let mut now: BTreeMap<TargetId, BTreeSet<Veto>> = BTreeMap::new();
        for ((_, uid), vetoes) in &self.vetoes {
            for (pid, veto) in vetoes {
                if let Some(target) = targets.of_pid_told_by(*pid, *uid) {
                    now.entry(target).or_default().insert(veto.clone());
                }
            }
        }
        let over: Vec<TargetId> = self.told.keys().filter(|target| !now.contains_key(target)).copied().collect();
        for target in over {
            self.told.remove(&target);
            out.extend([Event::Vetoes(target, Vec::new())]);
        }
        for (target, vetoes) in now {
            let vetoes: Vec<Veto> = vetoes.into_iter().take(VETOES).collect();
            if self.told.get(&target) != Some(&vetoes) {
                out.extend([Event::Vetoes(target, vetoes.clone())]);
                self.told.insert(target, vetoes);
            }
        }
    }
}

fn resolved(uid: u32, windows: &[(Window, Option<u32>)], targets: &Targets) -> Vec<Window> {
    let of = |(window, pid): &(Window, Option<u32>)| Window {
        target: pid.and_then(|pid| targets.of_pid_told_by(pid, uid)),
        told_pid: pid.is_some(),
        ..window.clone()
    };
    windows.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use mio::{Poll, Token};

    use super::*;
    use crate::{
        model::{AppKey, VetoKind},
        sys::{
            inbox::{self, Process},
            jobs::Jobs,
            process::Options,
        },
    };

    /// Ends with this.
    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = (self.0.kill(), self.0.wait());
        }
    }

    fn windows(events: &[Event]) -> Vec<Option<TargetId>> {
        let of = |event: &Event| -> Vec<_> {
            match event {
                Event::Windows(_, Some(windows)) => windows.iter().map(|window| window.target).collect(),
                other => panic!("{other:?}"),
            }
        };
        events.iter().flat_map(of).collect()
    }

    #[test]
    fn what_children_do_is_their_apps_and_nobody_speaks_for_another_user() {
        let poll = Poll::new().unwrap();
        let (sender, _inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let registry = poll.registry().try_clone().unwrap();
        let options = Options { signals_only: true, ..Options::default() };
        let mut targets = Targets::new(registry, 1, sender, Jobs::new(1), dir.path().into(), options).unwrap();
        let app = Running(
            Command::new("sh")
                .args(["-c", "sleep 30 & wait"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        let pid = app.0.id();
        let children = format!("/proc/{pid}/task/{pid}/children");
        let child: u32 = loop {
            if let Ok(child) = std::fs::read_to_string(&children).unwrap().trim().parse() {
                break child;
            }
        };
        let uid = nix::unistd::getuid().as_raw();
        let pidfd = rustix::process::pidfd_open(
            rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(),
            rustix::process::PidfdFlags::empty(),
        );
        let mut sightings = Sightings::default();
        let veto = Veto { kind: VetoKind::Playback, reason: "it plays".into() };
        let window = Window { app_id: "x".into(), target: None, told_pid: true, active: true, hidden: false };
        let mut out = Vec::new();

        // Before there is a target, and for another user.
        sightings.seen("pipewire", uid, vec![(child, veto.clone())], &targets, &mut out);
        sightings.seen("pipewire", uid + 1, vec![(child, veto.clone())], &targets, &mut out);
        assert!(out.is_empty(), "{out:?}");
        for user in [uid, uid + 1] {
            sightings.windows(user, Some(vec![(window.clone(), Some(child))]), &targets, &mut out);
        }
        assert_eq!(windows(&out), [None, None]);

        out.clear();
        let key = AppKey::new(Bus::Session(uid), "org.example.App");
        let (target, _) = targets.adopt(&key, Process { pid, uid, pidfd: pidfd.unwrap() }).unwrap();
        sightings.adopted(&targets, &mut out);
        assert_eq!(out.remove(0), Event::Vetoes(target, vec![veto.clone()]));
        assert_eq!(windows(&out), [Some(target), None]);

        // Only the other user's word is left.
        out.clear();
        sightings.seen("pipewire", uid, Vec::new(), &targets, &mut out);
        assert_eq!(out, [Event::Vetoes(target, Vec::new())]);

        // The child ends, and what was said of it is nobody's.
        out.clear();
        sightings.seen("pipewire", uid, vec![(child, veto)], &targets, &mut out);
        assert_eq!(out.len(), 1);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.cast_signed()), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        while std::path::Path::new(&format!("/proc/{child}")).exists() {
            std::thread::yield_now();
        }
        out.clear();
        sightings.seen("logind", uid, Vec::new(), &targets, &mut out);
        assert_eq!(out, [Event::Vetoes(target, Vec::new())]);
    }
}
