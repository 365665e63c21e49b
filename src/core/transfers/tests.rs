use super::*;
use crate::{
    event::{CallOutcome, StartOutcome},
    model::Bus,
};

const SECOND: u64 = 1_000_000_000;

struct World {
    transfers: Transfers,
    now: Now,
    calls: u64,
}

fn app(n: u32) -> AppKey {
    AppKey::new(Bus::Session(1000), format!("org.example.App{n}"))
}

fn owner() -> Owner {
    Owner(":1.1".into())
}

fn download() -> Wish {
    Wish {
        direction: Direction::Download,
        url: "https://files.example/map?token=secret".into(),
        method: "GET".into(),
        headers: Vec::new(),
        size: None,
        title: "".into(),
        metered: None,
        sha256: None,
        most: None,
    }
}

fn upload(size: u64) -> Wish {
    Wish { direction: Direction::Upload, method: "PUT".into(), size: Some(size), ..download() }
}

impl World {
    fn new() -> Self {
        Self::with(TransferSettings::default(), Vec::new())
    }

    fn with(settings: TransferSettings, stored: Vec<Transfer>) -> Self {
        let now = Now { boot: Instant::from_nanos(1000 * SECOND), wall: UnixTime::from_secs(2_000_000_000) };
        Self { transfers: Transfers::new(settings, 3, stored, 1, now), now, calls: 0 }
    }

    fn out(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.transfers.poll_output()).collect()
    }

    /// Everything that comes of it, with a store that does as it is told.
    fn settled(&mut self) -> Vec<Output> {
        let mut all = Vec::new();
        loop {
            let out = self.out();
            if out.is_empty() {
                return all;
            }
            for output in &out {
                if let Output::Save(transfer) = output {
                    self.transfers.saved(transfer.id, true, self.now);
                }
            }
            all.extend(out);
        }
    }

    fn begin(&mut self, n: u32, wish: Wish) -> Result<Vec<Output>, Refusal> {
        self.calls += 1;
        self.transfers.begin(&app(n), CallId(self.calls), wish, self.now)?;
        Ok(self.settled())
    }

    fn happen(&mut self, id: u64, event: TransferEvent) -> Vec<Output> {
        self.transfers.happened(TransferId(id), event, self.now);
        self.settled()
    }

    fn ends(&mut self, id: u64, attempted: Attempted) -> Vec<Output> {
        self.happen(id, TransferEvent::Ended(attempted))
    }

    fn done(&mut self, id: u64) -> Vec<Output> {
        self.ends(id, Attempted::Done { bytes: 5, text: "200 OK".into() })
    }

    fn around(&mut self, conditions: Conditions) -> Vec<Output> {
        self.transfers.set_conditions(conditions, true, false, self.now);
        self.settled()
    }

    fn pass(&mut self, secs: u64) -> Vec<Output> {
        let end = self.now.boot + Duration::from_secs(secs);
        let mut all = Vec::new();
        while let Some(at) = self.transfers.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.now.boot, "a deadline in the past");
            self.now.wall = self.now.wall + at.since(self.now.boot);
            self.now.boot = at;
            self.transfers.handle_timeout(self.now);
            all.extend(self.settled());
        }
        self.now.wall = self.now.wall + end.since(self.now.boot);
        self.now.boot = end;
        all
    }

    fn ready(&mut self, n: u32) -> Vec<Output> {
        self.transfers.ready(&app(n), owner(), self.now);
        self.settled()
    }

    fn told(&mut self, ticket: TransferTicket, outcome: &CallOutcome) -> Vec<Output> {
        self.transfers.told(ticket, outcome, self.now);
        self.settled()
    }

    fn waits(&self, id: u64) -> Option<Wait> {
        self.transfers.waits_for(TransferId(id))
    }
}

fn started(out: &[Output]) -> Vec<u64> {
    let started = |output: &Output| match output {
        Output::Order(TransferOrder::Start(attempt)) => Some(attempt.id.0),
        _ => None,
    };
    out.iter().filter_map(started).collect()
}

fn stopped(out: &[Output]) -> Vec<u64> {
    let stopped = |output: &Output| match output {
        Output::Order(TransferOrder::Stop(id)) => Some(id.0),
        _ => None,
    };
    out.iter().filter_map(stopped).collect()
}

fn told(out: &[Output]) -> Vec<(TransferTicket, u64, &'static str)> {
    let told = |output: &Output| match output {
        Output::Tell { ticket, id, status, .. } => Some((*ticket, id.0, *status)),
        _ => None,
    };
    out.iter().filter_map(told).collect()
}

fn later(bytes: u64, after: Option<u64>) -> Attempted {
    Attempted::Later { bytes, after: after.map(Duration::from_secs), text: "the connection broke".into() }
}

const METERED: Conditions = Conditions { network: true, metered: true, low: false };
const FINE: Conditions = Conditions { network: true, metered: false, low: false };

#[test]
fn it_is_durable_before_it_is_taken_over_and_before_its_end_is_told() {
    let mut world = World::new();
    world.transfers.begin(&app(1), CallId(7), download(), world.now).unwrap();
    let first = world.out();
    assert!(matches!(&first[..], [Output::Save(transfer)] if transfer.id == TransferId(1)), "{first:?}");
    world.transfers.saved(TransferId(1), true, world.now);
    let out = world.out();
    assert!(out.contains(&Output::Began(CallId(7), TransferId(1))) && started(&out) == [1], "{out:?}");
    world.transfers.ready(&app(1), owner(), world.now);
    world.transfers.happened(TransferId(1), TransferEvent::Ended(Attempted::Failed("404".into())), world.now);
    assert_eq!(told(&world.out()), [], "not yet durable");
    world.transfers.saved(TransferId(1), false, world.now);
    assert_eq!(told(&world.out()), []);
    assert_eq!(told(&world.pass(31)), [(TransferTicket(1), 1, "failed")]);
}

#[test]
fn what_cannot_be_written_down_is_not_taken_over() {
    let mut world = World::new();
    world.transfers.begin(&app(1), CallId(7), upload(5), world.now).unwrap();
    world.out();
    world.transfers.saved(TransferId(1), false, world.now);
    assert_eq!(world.out(), [Output::Refused(CallId(7))]);
    assert_eq!(world.transfers.shown().count(), 0);
}

#[test]
fn two_run_at_a_time_and_every_app_has_its_turn() {
    let mut world = World::new();
    let first: Vec<u64> = (0..4).flat_map(|_| started(&world.begin(1, download()).unwrap())).collect();
    assert_eq!(first, [1, 2]);
    assert_eq!(started(&world.begin(2, download()).unwrap()), [0_u64; 0]);
    assert_eq!((world.waits(1), world.waits(3)), (None, Some(Wait::Turn)));
    assert_eq!(started(&world.done(1)), [5], "the other app's goes before the first one's third");
    assert_eq!(started(&world.done(2)), [3]);
    assert_eq!(started(&world.done(5)), [4]);
}

#[test]
fn a_long_one_gives_way_only_if_it_can_go_on_and_somebody_else_waits() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    world.begin(1, upload(5)).unwrap();
    world.happen(2, TransferEvent::Spooled(Ok(())));
    assert_eq!(stopped(&world.pass(3600)), [0_u64; 0]);
    world.begin(1, download()).unwrap();
    world.happen(1, TransferEvent::Begun { total: Some(100), validator: Some("\"v\"".into()) });
    assert_eq!(stopped(&world.pass(3600)), [0_u64; 0], "it is the same app that waits");
    let out = world.begin(2, download()).unwrap();
    assert_eq!(stopped(&out), [1]);
    let out = world.ends(1, Attempted::Stopped { bytes: 50 });
    assert_eq!(started(&out), [4]);
}

#[test]
fn what_is_metered_is_left_to_those_who_may() {
    let mut world = World::new();
    world.around(METERED);
    let never = Wish { metered: Some(Metered::Never), ..download() };
    assert_eq!(started(&world.begin(1, never.clone()).unwrap()), [0_u64; 0]);
    assert_eq!(world.waits(1), Some(Wait::Unmetered));
    let out = world.begin(1, download()).unwrap();
    let Some(Output::Order(TransferOrder::Start(attempt))) = out.last() else { panic!("{out:?}") };
    assert_eq!(attempt.metered, Some(SMALL), "its size is to be seen");
    world.ends(2, Attempted::Metered);
    assert_eq!(world.waits(2), Some(Wait::Unmetered));
    let allow = Wish { metered: Some(Metered::Allow), ..download() };
    assert_eq!(started(&world.begin(1, allow.clone()).unwrap()), [3]);
    world.begin(1, upload(SMALL + 1)).unwrap();
    world.happen(4, TransferEvent::Spooled(Ok(())));
    assert_eq!(world.waits(4), Some(Wait::Unmetered));
    let out = world.around(FINE);
    assert_eq!(started(&out), [1]);
    // It becomes one under way.
    assert_eq!(stopped(&world.around(METERED)), [1]);
    let settings = TransferSettings { metered: Metered::Never, ..TransferSettings::default() };
    let mut world = World::with(settings, Vec::new());
    world.around(METERED);
    assert_eq!(started(&world.begin(1, allow).unwrap()), [0_u64; 0], "the user's word is the last");
    let settings = TransferSettings { metered: Metered::Allow, ..TransferSettings::default() };
    let mut world = World::with(settings, Vec::new());
    world.around(METERED);
    assert_eq!(started(&world.begin(1, download()).unwrap()), [1]);
    assert_eq!(started(&world.begin(1, never).unwrap()), [0_u64; 0]);
}

#[test]
fn no_network_a_low_battery_and_sleep_stop_everything() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    for (conditions, wait) in
        [(Conditions { network: false, ..FINE }, Wait::Network), (Conditions { low: true, ..FINE }, Wait::Power)]
    {
        assert_eq!(stopped(&world.around(conditions)), [1]);
        assert_eq!(started(&world.ends(1, Attempted::Stopped { bytes: 5 })), [0_u64; 0]);
        assert_eq!((world.waits(1), world.transfers.poll_timeout()), (Some(wait), None), "no timer for nothing");
        assert_eq!(started(&world.around(FINE)), [1]);
    }
    world.transfers.sleep(true, world.now);
    assert_eq!(stopped(&world.settled()), [1]);
    world.ends(1, Attempted::Stopped { bytes: 5 });
    world.transfers.sleep(false, world.now);
    assert_eq!(started(&world.settled()), [1]);
    // A sleep that never came.
    world.transfers.sleep(true, world.now);
    world.settled();
    world.ends(1, Attempted::Stopped { bytes: 5 });
    assert_eq!(started(&world.pass(61)), [1]);
}

#[test]
fn it_is_tried_again_later_and_later_and_at_once_when_the_network_returns() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    let pauses: Vec<u64> = (0..6)
        .map(|_| {
            world.ends(1, later(0, None));
            let at = world.transfers.poll_timeout().unwrap();
            let pause = at.since(world.now.boot).as_secs();
            assert_eq!(started(&world.pass(pause + 1)), [1]);
            pause
        })
        .collect();
    assert!(pauses.windows(2).all(|two| two[1] >= two[0] * 2 - 2) && pauses[0] < 8, "{pauses:?}");
    world.ends(1, later(10, None));
    assert!(world.transfers.poll_timeout().unwrap().since(world.now.boot).as_secs() < 8, "something came of it");
    world.transfers.network_returned(world.now);
    assert_eq!(started(&world.settled()), [1]);
    // What a server has asked for holds.
    world.ends(1, later(10, Some(3000)));
    world.transfers.network_returned(world.now);
    assert_eq!(started(&world.settled()), [0_u64; 0]);
    assert_eq!(started(&world.pass(2990)), [0_u64; 0]);
    assert_eq!(started(&world.pass(20)), [1]);
}

#[test]
fn an_app_is_woken_told_once_and_its_file_kept_until_it_is_fetched() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    let out = world.done(1);
    assert!(out.contains(&Output::Wake(app(1))) && out.contains(&Output::Pending(app(1), true)), "{out:?}");
    assert_eq!(world.transfers.collectable(&app(1), TransferId(1)), Ok(Direction::Download));
    assert!(world.transfers.collectable(&app(2), TransferId(1)).is_err(), "nobody else's");
    let out = world.ready(1);
    assert_eq!(told(&out), [(TransferTicket(1), 1, "done")]);
    assert_eq!(told(&world.ready(1)), [], "it has one call at a time");
    let out = world.told(TransferTicket(1), &CallOutcome::Accepted);
    assert!(out.contains(&Output::Heard(app(1))) && out.contains(&Output::Pending(app(1), false)), "{out:?}");
    assert_eq!((told(&world.ready(1)), world.transfers.shown().count()), (Vec::new(), 1));
    let out = world.happen(1, TransferEvent::Collected(false));
    assert_eq!(out, [], "it did not get it");
    let out = world.happen(1, TransferEvent::Collected(true));
    assert!(out.contains(&Output::Delete(TransferId(1))), "{out:?}");
    assert_eq!(world.transfers.shown().count(), 0);
}

#[test]
fn who_fetches_before_it_answers_is_done_with_the_answer() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    world.done(1);
    let ticket = told(&world.ready(1))[0].0;
    world.happen(1, TransferEvent::Collected(true));
    assert_eq!(world.transfers.shown().count(), 1);
    let out = world.told(ticket, &CallOutcome::Accepted);
    assert!(out.contains(&Output::Order(TransferOrder::Remove(TransferId(1)))), "{out:?}");
    assert_eq!((world.transfers.shown().count(), world.transfers.poll_timeout()), (0, None));
}

#[test]
fn an_app_that_does_not_take_the_news_is_asked_again_then_left_and_told_when_it_starts_anew() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    world.ends(1, Attempted::Failed("404".into()));
    let mut tickets = told(&world.ready(1));
    for _ in 0..3 {
        let (ticket, ..) = tickets.pop().unwrap();
        world.told(ticket, &CallOutcome::Refused("not now".into()));
        tickets = told(&world.pass(60));
    }
    assert_eq!((tickets, world.transfers.poll_timeout()), (Vec::new(), None), "given up");
    world.transfers.moved(&app(1), false, world.now);
    assert!(!world.settled().contains(&Output::Wake(app(1))));
    world.transfers.moved(&app(1), true, world.now);
    assert!(world.settled().contains(&Output::Wake(app(1))));
    assert_eq!(told(&world.ready(1)).len(), 1);
}

#[test]
fn who_dies_with_the_news_or_cannot_be_started_hears_it_later() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    world.ends(1, Attempted::Failed("404".into()));
    let ticket = told(&world.ready(1))[0].0;
    world.transfers.moved(&app(1), false, world.now);
    world.settled();
    world.told(ticket, &CallOutcome::Vanished);
    assert!(world.pass(5).contains(&Output::Wake(app(1))));
    world.transfers.start_failed(&app(1), &StartOutcome::Failed("exit 1".into()), world.now);
    assert!(!world.settled().contains(&Output::Wake(app(1))));
    assert!(world.pass(30).contains(&Output::Wake(app(1))));
    world.transfers.start_failed(&app(1), &StartOutcome::NotActivatable, world.now);
    world.settled();
    assert_eq!(world.transfers.poll_timeout(), None, "nothing can be done");
    world.transfers.moved(&app(1), true, world.now);
    assert!(world.settled().contains(&Output::Wake(app(1))));
}

#[test]
fn a_silent_app_may_sleep_after_a_while_and_its_late_answer_counts() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    world.done(1);
    let ticket = told(&world.ready(1))[0].0;
    assert!(world.pass(31).contains(&Output::Pending(app(1), false)));
    assert!(world.told(ticket, &CallOutcome::Accepted).contains(&Output::Heard(app(1))));
}

#[test]
fn what_may_not_wake_an_app_now_waits_until_it_may() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    world.transfers.set_conditions(FINE, false, false, world.now);
    let out = world.done(1);
    assert!(!out.contains(&Output::Wake(app(1))), "{out:?}");
    assert_eq!(world.transfers.holding().collect::<Vec<_>>(), [&app(1)], "who runs anyway can hear it");
    assert!(world.around(FINE).contains(&Output::Wake(app(1))));
}

#[test]
fn the_user_cancels_and_the_app_hears_of_it_and_what_the_app_cancels_is_gone() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    world.begin(1, download()).unwrap();
    world.transfers.cancel(TransferId(1), false, "the user", world.now);
    let out = world.settled();
    assert!(out.contains(&Output::Order(TransferOrder::Remove(TransferId(1)))), "{out:?}");
    assert_eq!(told(&world.ready(1)), [(TransferTicket(1), 1, "cancelled")]);
    assert_eq!(world.done(1), [], "what was under way is not heard any more");
    world.transfers.cancel(TransferId(2), true, "the app", world.now);
    let out = world.settled();
    assert!(out.contains(&Output::Delete(TransferId(2))), "{out:?}");
    world.told(TransferTicket(1), &CallOutcome::Accepted);
    assert_eq!((world.transfers.shown().count(), told(&world.ready(1))), (0, Vec::new()));
}

#[test]
fn an_upload_whose_content_does_not_come_fails_and_one_cut_off_by_a_crash_as_well() {
    let mut world = World::new();
    let out = world.begin(1, upload(9)).unwrap();
    let id = TransferId(1);
    assert!(out.contains(&Output::Order(TransferOrder::Take { call: CallId(1), id, size: 9 })), "{out:?}");
    assert!(out.contains(&Output::Pending(app(1), true)), "it is not held still meanwhile: {out:?}");
    let stored: Vec<Transfer> = world.transfers.shown().map(|shown| shown.transfer.clone()).collect();
    let out = world.happen(1, TransferEvent::Spooled(Err("its content ended early".into())));
    assert!(started(&out).is_empty() && out.contains(&Output::Wake(app(1))), "{out:?}");

    let mut world = World::with(TransferSettings::default(), stored);
    let out = world.settled();
    assert!(started(&out).is_empty(), "{out:?}");
    world.transfers.moved(&app(1), true, world.now);
    world.settled();
    assert_eq!(told(&world.ready(1)), [(TransferTicket(1), 1, "failed")]);
}

#[test]
fn limits_hold_and_make_room_of_what_nobody_fetches() {
    let settings = TransferSettings { max_size: 100, spool_quota: 250, ..TransferSettings::default() };
    let mut world = World::with(settings, Vec::new());
    assert_eq!(world.begin(1, upload(101)).unwrap_err(), Refusal::TooLarge { size: 101, most: 100 });
    world.begin(1, upload(100)).unwrap();
    world.begin(1, upload(100)).unwrap();
    assert_eq!(world.begin(1, upload(51)).unwrap_err(), Refusal::NoRoom { used: 200, quota: 250 });
    assert!(world.begin(2, upload(51)).is_ok(), "each app has its own");
    let mut world = World::with(settings, Vec::new());
    for id in 1..=2 {
        world.begin(1, download()).unwrap();
        let mut out = world.ends(id, Attempted::Done { bytes: 100, text: "200 OK".into() });
        out.extend(world.ready(1));
        let ticket = told(&out)[0].0;
        world.told(ticket, &CallOutcome::Accepted);
    }
    assert_eq!(world.transfers.shown().count(), 2);
    let out = world.begin(1, upload(100)).unwrap();
    assert!(out.contains(&Output::Delete(TransferId(1))), "the oldest makes room: {out:?}");
    let out = world.begin(3, Wish { most: Some(7), ..download() }).unwrap();
    assert!(matches!(out.last(), Some(Output::Order(TransferOrder::Start(a))) if a.most == 7), "{out:?}");
    let mut world = World::new();
    let taken = (0..99).take_while(|_| world.begin(1, download()).is_ok()).count();
    assert_eq!(taken, PER_APP);
    assert!(world.begin(2, download()).is_ok());
}

#[test]
fn nothing_is_kept_for_ever() {
    let mut world = World::new();
    world.around(Conditions { network: false, ..FINE });
    world.begin(1, download()).unwrap();
    world.pass(8 * 24 * 3600);
    world.transfers.sweep(world.now);
    world.settled();
    let (ticket, _, status) = told(&world.ready(1))[0];
    assert_eq!(status, "failed");
    world.told(ticket, &CallOutcome::Accepted);
    world.around(FINE);
    world.begin(1, download()).unwrap();
    world.done(2);
    world.pass(8 * 24 * 3600);
    world.transfers.sweep(world.now);
    assert!(world.settled().contains(&Output::Delete(TransferId(2))));
}

#[test]
fn a_later_life_goes_on_where_this_one_was_and_never_uses_a_number_again() {
    let mut world = World::new();
    world.begin(1, download()).unwrap();
    world.happen(1, TransferEvent::Begun { total: Some(100), validator: Some("\"v\"".into()) });
    world.happen(1, TransferEvent::Progress { bytes: 60, good: 50 });
    let stored: Vec<Transfer> = world.transfers.shown().map(|shown| shown.transfer.clone()).collect();
    let mut world = World::with(TransferSettings::default(), stored);
    world.transfers.beginning(world.now);
    assert_eq!(started(&world.settled()), [0_u64; 0], "the network may be a metered one");
    let out = world.pass(4);
    let Some(Output::Order(TransferOrder::Start(attempt))) = out.last() else { panic!("{out:?}") };
    assert_eq!((attempt.progress.good, attempt.progress.validator.as_deref()), (50, Some("\"v\"")));
    world.begin(1, download()).unwrap();
    assert!(world.transfers.app_of(TransferId(2)).is_some());
}

#[test]
fn no_secret_is_shown() {
    for (url, shown) in [
        ("https://files.example/map?token=secret", "files.example/map"),
        ("https://me:secret@files.example:8443/a/b#c", "files.example:8443/a/b"),
        ("http://files.example", "files.example"),
        ("https://files.example/a@b", "files.example/a@b"),
    ] {
        assert_eq!(place(url), shown);
    }
    let mut world = World::new();
    let out = world.begin(1, download()).unwrap();
    let text = format!("{:?}", out.iter().filter(|o| matches!(o, Output::Decided(..))).collect::<Vec<_>>());
    assert!(text.contains("files.example/map") && !text.contains("secret"), "{text}");
}
