//! What apps that listen are told (`org.nightporter1.Client`): that they are about to be frozen, and that they run again.
//!
//! Who listens is a connection; it is over when that connection, or the app's name, is gone.

use std::time::Duration;

use super::Core;
use crate::{
    action::{Action, ClientCall, ErrorKind, Reply},
    event::{CallId, Caller, NoticeTicket},
    model::{AppKey, Owner},
    time::Now,
};

impl Core {
    pub(super) fn listen(&mut self, call: CallId, caller: &Caller, listens: bool, now: Now) {
        let Some(app) = self.app_of_caller(caller) else {
            let text = "only an app that is registered for push is told here; register first";
            return self.reply(call, Reply::Error(ErrorKind::NoSuchApp, text.into()));
        };
        if let Some(presence) = self.apps.get_mut(&app) {
            // What another connection was asked is none of this one's: it ends by its time.
            if presence.listener.as_ref() != Some(&caller.owner) || !listens {
                presence.notice = None;
            }
            presence.listener = listens.then(|| caller.owner.clone());
        }
        self.lifecycle.listens(&app, listens, now);
        self.reply(call, Reply::Done);
    }

    /// A call may overtake the news that the app has its name.
    pub(super) fn listener_appeared(&mut self, app: &AppKey, owner: &Owner, now: Now) {
        let Some(presence) = self.apps.get_mut(app) else { return };
        presence.notice = None;
        if presence.listener.as_ref() == Some(owner) {
            self.lifecycle.listens(app, true, now);
        } else {
            presence.listener = None;
        }
    }

    pub(super) fn will_suspend(&mut self, app: AppKey, within: Duration, now: Now) {
        let presence = self.apps.get_mut(&app);
        let Some((presence, owner)) = presence.and_then(|p| p.listener.clone().map(|owner| (p, owner))) else {
            return self.lifecycle.prepared(&app, now);
        };
        let ticket = NoticeTicket(self.next_notice);
        self.next_notice += 1;
        presence.notice = Some(ticket);
        self.actions.push_back(Action::CallClient { app, owner, call: ClientCall::WillSuspend { ticket, within } });
    }

    pub(super) fn resumed(&mut self, app: AppKey, frozen: Duration) {
        let Some(presence) = self.apps.get_mut(&app) else { return };
        presence.notice = None;
        if let Some(owner) = presence.listener.clone() {
            self.actions.push_back(Action::CallClient { app, owner, call: ClientCall::Resumed { frozen } });
        }
    }

    /// The notice with this ticket is over; an answer to an earlier one says nothing about this.
    pub(super) fn prepared(&mut self, app: &AppKey, ticket: NoticeTicket, now: Now) {
        if self.apps.get_mut(app).is_some_and(|presence| presence.notice.take_if(|open| *open == ticket).is_some()) {
            self.lifecycle.prepared(app, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        config::Settings,
        core::fixtures::{BROKER, NOW, at_the_broker, caller, kept},
        event::{BusEvent, Claim, Event, Request},
        model::{Bus, Freezer, Memory, ProcessFacts, TargetId},
    };

    const BUS: Bus = Bus::Session(1000);
    const TARGET: TargetId = TargetId(1);

    struct World {
        core: Core,
        now: Now,
    }

    impl World {
        /// With an app that listens.
        fn new() -> Self {
            let settings = Settings::parse(&format!("profile = \"tombstone\"\n{BROKER}")).unwrap();
            let core = Core::new(settings, [7; 32], kept([at_the_broker(1, app())]), NOW);
            let mut world = Self { core, now: NOW };
            world.bus(BusEvent::Up(BUS));
            world.bus(BusEvent::OwnerChanged(app(), Some(owner())));
            let facts = ProcessFacts { pid: 9, freezer: Freezer::Cgroup2, can_page_out: true, protected: None };
            world.tell(Event::Identified { app: app(), owner: owner(), process: Ok((TARGET, facts)) });
            world.ask(Request::Listen(true));
            world
        }

        fn tell(&mut self, event: Event) -> Vec<Action> {
            self.core.handle(event, self.now);
            let mut seen = Vec::new();
            while let Some(action) = self.core.poll_action() {
                match action {
                    Action::CallClient { .. } | Action::Inspect(_) | Action::Freeze(_) => seen.push(action),
                    Action::Sample(target) => {
                        let memory = Memory { pss: 20_000, uss: 19_000, swap: 0 };
                        seen.extend(self.tell(Event::Sampled(target, Ok(memory.into()))));
                    }
                    _ => {}
                }
            }
            seen
        }

        fn bus(&mut self, event: BusEvent) -> Vec<Action> {
            self.tell(Event::Bus(event))
        }

        fn ask(&mut self, request: Request) -> Vec<Action> {
            let caller = Caller { owns_service: true, ..caller(BUS, &owner().0) };
            self.bus(BusEvent::Call { call: CallId(1), caller, request })
        }

        fn pass(&mut self, time: Duration) -> Vec<Action> {
            self.now.boot = self.now.boot + time;
            self.tell(Event::Tick)
        }

        /// It goes to the background, and its grace is over.
        fn settle(&mut self) -> Vec<Action> {
            let mut seen = self.ask(Request::Declare { service: None, claim: Claim::Background });
            seen.extend(self.pass(Duration::from_secs(10)));
            seen
        }
    }

    fn app() -> AppKey {
        AppKey::new(BUS, "org.example.App")
    }

    fn owner() -> Owner {
        Owner(Arc::from(":1.5"))
    }

    fn call(call: ClientCall) -> Action {
        Action::CallClient { app: app(), owner: owner(), call }
    }

    fn will_suspend(ticket: u64) -> Action {
        call(ClientCall::WillSuspend { ticket: NoticeTicket(ticket), within: Duration::from_secs(5) })
    }

    #[test]
    fn an_answer_counts_for_its_own_notice_alone() {
        let mut world = World::new();
        assert_eq!(world.settle(), [will_suspend(1)]);
        let taken_back = world.ask(Request::Declare { service: None, claim: Claim::Foreground });
        assert_eq!(taken_back, [call(ClientCall::Resumed { frozen: Duration::ZERO })]);
        assert_eq!(world.settle(), [will_suspend(2)]);
        assert_eq!(world.bus(BusEvent::Prepared(app(), NoticeTicket(1))), []);
        assert_eq!(world.bus(BusEvent::Prepared(app(), NoticeTicket(2))), [Action::Inspect(TARGET)]);
        assert_eq!(world.bus(BusEvent::Prepared(app(), NoticeTicket(2))), [], "once");
    }

    #[test]
    fn without_an_answer_it_goes_on_after_five_seconds() {
        let mut world = World::new();
        assert_eq!(world.settle(), [will_suspend(1)]);
        assert_eq!(world.pass(Duration::from_millis(4999)), []);
        assert_eq!(world.pass(Duration::from_millis(1)), [Action::Inspect(TARGET)]);
    }

    #[test]
    fn who_listens_no_more_is_not_told() {
        let mut world = World::new();
        world.ask(Request::Listen(false));
        assert_eq!(world.settle(), [Action::Inspect(TARGET)]);
        // Nor another instance of it, which has not asked for it.
        let mut world = World::new();
        world.bus(BusEvent::OwnerChanged(app(), None));
        world.bus(BusEvent::OwnerChanged(app(), Some(Owner(Arc::from(":1.6")))));
        assert_eq!(world.core.apps[&app()].listener, None);
    }
}
