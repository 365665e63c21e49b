use proptest::prelude::*;

use super::*;
use crate::model::Charged;

const NOW: Now = Now { boot: Instant::from_nanos(0), wall: UnixTime::from_secs(1_795_311_549) };

fn key(name: &str) -> AppKey {
    AppKey::new(Bus::Session(1000), name)
}

fn memory(pss: u64, swap: u64) -> Memory {
    Memory { pss, uss: pss / 2, swap }
}

fn report(ledger: &Ledger, states: &[(&AppKey, &'static str)]) -> Report {
    ledger.report(NOW, Profile::Tombstone, states.iter().copied(), |_, _| {})
}

#[test]
fn saved_is_resident_less_now_less_zram_less_the_daemon() {
    let (a, b) = (key("org.a"), key("org.b"));
    let mut ledger = Ledger::default();
    ledger.sampled(&a, Phase::Resident, &memory(50_000, 0).into(), "", NOW);
    ledger.sampled(&a, Phase::Frozen, &memory(49_000, 0).into(), "", NOW);
    ledger.paged_out(&a, 30_000, 9_000, ZramSource::Measured);
    ledger.sampled(&a, Phase::PagedOut, &memory(19_000, 30_000).into(), "", NOW);
    ledger.sampled(&b, Phase::Resident, &memory(20_000, 0).into(), "", NOW);
    ledger.gone(&b);
    ledger.daemon(
        SelfSample { memory: memory(3_000, 0), ..SelfSample::default() },
        Zram { used: 100_000, stored: 300_000 },
    );

    let report = report(&ledger, &[(&b, "tombstone"), (&a, "reclaimed")]);
    assert_eq!((report.resident, report.now, report.zram, report.unmeasured), (70_000, 19_000, 9_000, 0));
    assert_eq!(report.saved, 70_000 - 19_000 - 9_000 - 3_000);
    assert_eq!(report.at, "2026-11-22T01:39:09Z");
    assert_eq!(report.apps.iter().map(|row| &*row.name).collect::<Vec<_>>(), ["org.a", "org.b"]);
    let a = &report.apps[0];
    assert_eq!(a.frozen.map(|m| m.pss), Some(49_000));
    assert_eq!(a.paged_out.map(|m| m.pss), Some(19_000));
    assert_eq!((a.saved, a.measured.as_deref()), (Some(22_000), Some("2026-11-22T01:39:09Z")));
    assert_eq!((report.apps[1].now, report.apps[1].saved), (Some(Memory::default()), Some(20_000)));
}

#[test]
fn who_is_still_starting_does_not_lower_the_baseline() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    let seen = |pss, cpu, age| Sample {
        cpu: Duration::from_secs(cpu),
        age: Duration::from_secs(age),
        ..Sample::from(memory(pss, 0))
    };
    let resident = |ledger: &Ledger| ledger.record(&a).map(|(memory, ..)| memory.pss);
    // Of one never measured that is the best there is.
    assert!(ledger.sampled(&a, Phase::Resident, &seen(10_000, 2, 3), "", NOW));
    assert!(ledger.sampled(&a, Phase::Resident, &seen(50_000, 20, 60), "", NOW), "it is at least that");
    assert!(!ledger.sampled(&a, Phase::Resident, &seen(12_000, 2, 3), "", NOW));
    assert!(!ledger.sampled(&a, Phase::Frozen, &seen(12_000, 2, 3), "", NOW));
    assert_eq!(resident(&ledger), Some(50_000));
    // It has come up, and shows nothing.
    assert!(ledger.sampled(&a, Phase::Resident, &seen(30_000, 2, 30), "", NOW));
    assert_eq!(resident(&ledger), Some(30_000));
    // One that works all the time is not starting for ever.
    assert!(ledger.sampled(&a, Phase::Frozen, &seen(20_000, 100, 130), "", NOW));
    assert_eq!(resident(&ledger), Some(20_000));
}

#[test]
fn a_daemon_that_costs_more_than_it_saves_says_so() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    ledger.sampled(&a, Phase::Resident, &memory(1_000, 0).into(), "", NOW);
    ledger.sampled(&a, Phase::Now, &memory(1_200, 0).into(), "", NOW);
    ledger.daemon(SelfSample { memory: memory(3_000, 0), ..SelfSample::default() }, Zram { used: 0, stored: 0 });
    let report = report(&ledger, &[(&a, "foreground")]);
    assert_eq!((report.saved, report.drift), (-3_000, -200), "that it has grown is its own doing");
    assert_eq!((report.apps[0].saved, report.apps[0].drift), (Some(0), -200));
    assert_eq!(Ledger::default().report(NOW, Profile::Observe, std::iter::empty(), |_, _| {}).saved, 0);
}

#[test]
fn an_app_without_a_baseline_or_a_figure_counts_neither_way() {
    let (a, b, c) = (key("org.a"), key("org.b"), key("org.c"));
    let mut ledger = Ledger::default();
    ledger.sampled(&a, Phase::Now, &memory(7_000, 0).into(), "", NOW);
    ledger.sampled(&b, Phase::Resident, &memory(5_000, 0).into(), "", NOW);
    ledger.unmeasured(&b);
    let report = report(&ledger, &[(&a, "frozen"), (&b, "background"), (&c, "gone")]);
    assert_eq!((report.resident, report.now, report.saved, report.unmeasured), (0, 0, 0, 3));
    assert!(report.apps.iter().all(|row| row.saved.is_none()));
}

#[test]
fn an_app_started_again_is_not_taken_for_gone() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    ledger.sampled(&a, Phase::Resident, &memory(5_000, 0).into(), "", NOW);
    ledger.gone(&a);
    assert_eq!(ledger.row(&a, "gone").now, Some(Memory::default()));
    assert_eq!(ledger.row(&a, "awake").now, None);
    assert_eq!(report(&ledger, &[(&a, "awake")]).saved, 0);
}

#[test]
fn the_share_of_zram_shrinks_as_pages_come_back_and_ends_with_the_app() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    let zram = |ledger: &Ledger| report(ledger, &[(&a, "background")]).zram;
    ledger.sampled(&a, Phase::Frozen, &memory(50_000, 0).into(), "", NOW);
    ledger.paged_out(&a, 40_000, 10_000, ZramSource::Measured);
    assert_eq!(ledger.row(&a, "frozen").now.map(|m| m.pss), Some(10_000));
    ledger.sampled(&a, Phase::PagedOut, &memory(11_000, 40_000).into(), "", NOW);
    ledger.thawed(&a);
    assert_eq!(zram(&ledger), 10_000);
    ledger.sampled(&a, Phase::Now, &memory(31_000, 20_000).into(), "", NOW);
    assert_eq!(zram(&ledger), 5_000);
    ledger.paged_out(&a, 20_000, 4_000, ZramSource::Measured);
    ledger.sampled(&a, Phase::PagedOut, &memory(11_000, 40_000).into(), "", NOW);
    assert_eq!(zram(&ledger), 9_000);
    ledger.sampled(&a, Phase::Now, &memory(51_000, 0).into(), "", NOW);
    assert_eq!(zram(&ledger), 0);
    ledger.paged_out(&a, 1_000, 500, ZramSource::Measured);
    ledger.gone(&a);
    assert_eq!(zram(&ledger), 0);
}

#[test]
fn an_unmeasured_page_out_costs_until_the_thaw_and_never_more_than_all_of_zram() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    ledger.paged_out(&a, 40_000, 10_000, ZramSource::Measured);
    ledger.daemon(
        SelfSample { memory: Memory::default(), ..SelfSample::default() },
        Zram { used: 6_000, stored: 18_000 },
    );
    assert_eq!(report(&ledger, &[(&a, "frozen")]).zram, 6_000);
    assert_eq!(ledger.ratio(), Some(3.0));
    ledger.thawed(&a);
    assert_eq!(report(&ledger, &[(&a, "background")]).zram, 0);
}

#[test]
fn baselines_outlive_the_daemon() {
    let (a, b) = (key("org.a"), key("org.b"));
    let at = UnixTime::from_secs(951_782_400);
    let record = |app: &AppKey, resident: Option<Memory>| AppRecord {
        app: app.clone(),
        declares: true,
        resident,
        measured: resident.map(|_| at),
        conditions: None,
    };
    let mut ledger = Ledger::new(&[record(&a, Some(memory(5_000, 0))), record(&b, None)]);
    assert_eq!(ledger.record(&a), Some((memory(5_000, 0), at, None)));
    assert_eq!(ledger.record(&b), None);
    assert_eq!(ledger.row(&a, "gone").measured.as_deref(), Some("2000-02-29T00:00:00Z"));
    ledger.sampled(&a, Phase::Resident, &memory(6_000, 0).into(), "", NOW);
    assert_eq!(ledger.record(&a), Some((memory(6_000, 0), NOW.wall, Some("".into()))));
    ledger.remove(&a);
    assert_eq!(ledger.record(&a), None);
}

#[test]
fn absurd_figures_saturate() {
    let (a, b) = (key("org.a"), key("org.b"));
    let mut ledger = Ledger::default();
    for app in [&a, &b] {
        ledger.sampled(app, Phase::Resident, &memory(u64::MAX, 0).into(), "", NOW);
        ledger.paged_out(app, u64::MAX, u64::MAX, ZramSource::Measured);
        ledger.sampled(app, Phase::PagedOut, &memory(u64::MAX, u64::MAX).into(), "", NOW);
        ledger.sampled(app, Phase::Now, &memory(u64::MAX, u64::MAX - 1).into(), "", NOW);
    }
    ledger.daemon(
        SelfSample { memory: memory(u64::MAX, 0), ..SelfSample::default() },
        Zram { used: u64::MAX, stored: 1 },
    );
    assert_eq!(report(&ledger, &[(&a, "frozen"), (&b, "frozen")]).saved, -i64::MAX);
    assert_eq!(report(&ledger, &[(&a, "gone"), (&b, "gone")]).saved, 0);
    assert_eq!(report(&ledger, &[]).saved, -i64::MAX);
}

/// Anonymous memory of its own, program text shared with others, and a cgroup of its own.
fn sample(anon: u64, file: u64, swap: u64, kernel: u64) -> Sample {
    Sample {
        anon,
        file,
        charged: Some(Charged { kernel, ..Charged::default() }),
        ..Memory { pss: anon + file, uss: anon, swap }.into()
    }
}

fn zram(used: u64, stored: u64) -> (SelfSample, Zram) {
    (SelfSample { memory: memory(3_000, 0), sockets: 100, ..SelfSample::default() }, Zram { used, stored })
}

fn tell_zram(ledger: &mut Ledger, used: u64, stored: u64) {
    let (daemon, zram) = zram(used, stored);
    ledger.daemon(daemon, zram);
}

#[test]
fn twenty_copies_of_a_program_save_their_own_memory_and_no_library_twice() {
    // Measured one after the other as the ones before are gone already: the last has all of the library to itself.
    let (anon, library, kernel) = (20_000, 30_000, 900);
    let mut ledger = Ledger::default();
    let apps: Vec<AppKey> = (0..20).map(|n| key(&format!("org.app{n:02}"))).collect();
    for (gone, app) in apps.iter().enumerate() {
        ledger.sampled(app, Phase::Resident, &sample(anon, library / (20 - gone as u64), 0, kernel), "", NOW);
        ledger.gone(app);
    }
    tell_zram(&mut ledger, 0, 0);
    let states: Vec<_> = apps.iter().map(|app| (app, "tombstone")).collect();
    let report = report(&ledger, &states);
    let truth = 20 * (anon + kernel) as i64 - 3_100;
    assert_eq!(report.saved, truth);
    assert!(report.resident as i64 - 3_100 > truth + truth / 20, "what PSS alone would claim: {report:?}");
    assert_eq!((report.cache, report.kernel), (report.resident as i64 - 20 * anon as i64, 20 * kernel as i64));
}

#[test]
fn what_does_not_compress_is_not_saved() {
    let a = key("org.a");
    for (taken, saved) in [(64_000, 0), (16_000, 48_000), (66_000, -2_000)] {
        let mut ledger = Ledger::default();
        ledger.sampled(&a, Phase::Resident, &sample(80_000, 9_000, 0, 700), "", NOW);
        ledger.paged_out(&a, 70_000, taken, ZramSource::Measured);
        // Six more went than were anonymous: text, which comes back when it is needed.
        ledger.sampled(&a, Phase::PagedOut, &sample(16_000, 3_000, 64_000, 700), "", NOW);
        tell_zram(&mut ledger, 100_000, 200_000);
        let row = ledger.row(&a, "reclaimed");
        assert_eq!((row.saved, row.zram, row.cache, row.kernel), (Some(saved), taken, 6_000, 0));
        assert_eq!(row.zram_source, Some(ZramSource::Measured));
        let report = report(&ledger, &[(&a, "reclaimed")]);
        assert_eq!((report.saved, report.zram_source), (saved - 3_100, Some(ZramSource::Measured)));
    }
}

#[test]
fn what_the_kernel_paged_out_by_itself_costs_as_well() {
    let (a, b) = (key("org.a"), key("org.b"));
    let mut ledger = Ledger::default();
    // 8 MiB were in swap before there was anything to claim.
    ledger.sampled(&a, Phase::Resident, &sample(50_000, 0, 8_000, 0), "", NOW);
    ledger.sampled(&a, Phase::Now, &sample(20_000, 0, 38_000, 0), "", NOW);
    assert_eq!(ledger.row(&a, "frozen").saved, Some(30_000), "zram was not looked at: perhaps the swap is a disk's");
    tell_zram(&mut ledger, 40_000, 120_000);
    let row = ledger.row(&a, "frozen");
    assert_eq!((row.saved, row.zram, row.zram_source), (Some(20_000), 10_000, Some(ZramSource::Ratio)));
    let row = ledger.row(&a, "background");
    assert_eq!((row.saved, row.zram, row.drift), (Some(0), 10_000, 20_000), "while it runs that is no doing of ours");
    // Ours is known, what came on top of it is not.
    ledger.sampled(&b, Phase::Resident, &sample(50_000, 0, 0, 0), "", NOW);
    ledger.paged_out(&b, 40_000, 5_000, ZramSource::Measured);
    ledger.sampled(&b, Phase::PagedOut, &sample(10_000, 0, 40_000, 0), "", NOW);
    ledger.sampled(&b, Phase::Now, &sample(7_000, 0, 43_000, 0), "", NOW);
    let row = ledger.row(&b, "frozen");
    assert_eq!((row.zram, row.zram_source), (6_000, Some(ZramSource::Ratio)));
    assert_eq!(report(&ledger, &[(&a, "background"), (&b, "frozen")]).zram_source, Some(ZramSource::Ratio));
    tell_zram(&mut ledger, 0, 0);
    assert_eq!(ledger.row(&a, "frozen").saved, Some(30_000));
}

#[test]
fn a_page_out_that_cost_nothing_costs_nothing() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    ledger.sampled(&a, Phase::Resident, &sample(50_000, 0, 0, 0), "", NOW);
    ledger.paged_out(&a, 40_000, 0, ZramSource::Measured);
    ledger.sampled(&a, Phase::PagedOut, &sample(10_000, 0, 40_000, 0), "", NOW);
    tell_zram(&mut ledger, 40_000, 120_000);
    assert_eq!(ledger.row(&a, "reclaimed").saved, Some(40_000), "pages of zeroes");
}

#[test]
fn a_baseline_is_taken_anew_at_a_freeze_when_it_is_old_or_wrong() {
    let a = key("org.a");
    let later = |hours: u64| Now { wall: NOW.wall + Duration::from_secs(hours * 3600), ..NOW };
    let mut ledger = Ledger::default();
    assert!(
        !ledger.sampled(&a, Phase::Frozen, &sample(1_000, 0, 0, 0), "frozen by hand", NOW),
        "nobody says it is at rest"
    );
    assert!(ledger.sampled(&a, Phase::Resident, &sample(40_000, 5_000, 0, 0), "first", NOW));
    let resident = |ledger: &Ledger| {
        let (memory, at, conditions) = ledger.record(&a).unwrap();
        (memory.pss, at, conditions.unwrap().to_string())
    };
    assert!(!ledger.sampled(&a, Phase::Frozen, &sample(41_900, 1, 0, 0), "much the same", later(23)));
    assert!(ledger.sampled(&a, Phase::Frozen, &sample(42_100, 1, 0, 0), "grown", later(23)));
    assert_eq!(resident(&ledger), (42_101, later(23).wall, "grown".into()));
    assert!(ledger.sampled(&a, Phase::Frozen, &sample(20_000, 1, 0, 0), "smaller", later(24)));
    assert!(!ledger.sampled(&a, Phase::Frozen, &sample(20_000, 1, 0, 0), "the same", later(47)));
    assert!(ledger.sampled(&a, Phase::Frozen, &sample(20_000, 1, 0, 0), "old", later(48)));
    // Paged out by us: resident it would have that in memory.
    ledger.paged_out(&a, 15_000, 5_000, ZramSource::Measured);
    ledger.sampled(&a, Phase::PagedOut, &sample(5_000, 1, 15_000, 0), "", later(48));
    ledger.thawed(&a);
    assert_eq!(ledger.row(&a, "awake").now, None, "its pages are coming back");
    assert!(!ledger.sampled(&a, Phase::Frozen, &sample(11_000, 1, 9_000, 0), "part is back", later(49)));
    assert!(ledger.sampled(&a, Phase::Frozen, &sample(21_000, 1, 9_000, 0), "grown again", later(49)));
    assert_eq!(resident(&ledger), (30_001, later(49).wall, "grown again, 8 MiB of it paged out before".into()));
    // A page-out that nobody measured: nothing to go by.
    ledger.paged_out(&a, 15_000, 5_000, ZramSource::Measured);
    assert!(!ledger.sampled(&a, Phase::Frozen, &sample(90_000, 1, 9_000, 0), "who knows", later(90)));
}

#[test]
fn what_a_page_out_without_an_end_left_in_swap_makes_no_baseline() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    let resident = |ledger: &Ledger| ledger.record(&a).map(|(memory, ..)| memory.pss);
    ledger.sampled(&a, Phase::Resident, &sample(30_000, 0, 0, 0), "", NOW);
    // A message came before it was through.
    ledger.page_out_failed(&a);
    ledger.thawed(&a);
    assert!(!ledger.sampled(&a, Phase::Frozen, &sample(4_000, 0, 26_000, 0), "", NOW));
    assert!(!ledger.sampled(&a, Phase::Resident, &sample(4_000, 0, 26_000, 0), "", NOW));
    assert_eq!(resident(&ledger), Some(30_000));
    assert!(ledger.sampled(&a, Phase::Resident, &sample(35_000, 0, 1_000, 0), "", NOW), "it is at least that");
    // The next one is measured: that much was ours.
    ledger.paged_out(&a, 30_000, 0, ZramSource::Measured);
    ledger.sampled(&a, Phase::PagedOut, &sample(4_000, 0, 31_000, 0), "", NOW);
    ledger.thawed(&a);
    assert!(ledger.sampled(&a, Phase::Frozen, &sample(20_000, 0, 20_000, 0), "", NOW));
    assert_eq!(resident(&ledger), Some(40_000));
    // One that ended well but nobody measured after.
    ledger.paged_out(&a, 30_000, 0, ZramSource::Measured);
    ledger.thawed(&a);
    assert!(!ledger.sampled(&a, Phase::Frozen, &sample(4_000, 0, 36_000, 0), "", NOW));
    // All of it is back, or it is another process.
    assert!(ledger.sampled(&a, Phase::Frozen, &sample(25_000, 0, 0, 0), "", NOW));
    ledger.page_out_failed(&a);
    ledger.gone(&a);
    assert!(
        ledger.sampled(&a, Phase::Resident, &sample(9_000, 0, 100, 0), "", NOW),
        "swapped by the kernel's own choice"
    );
    assert_eq!(resident(&ledger), Some(9_000));
}

#[test]
fn conditions_are_said_as_far_as_they_are_known() {
    let mut ledger = Ledger::default();
    let at = |secs: u64| Instant::from_nanos(secs * 1_000_000_000);
    assert_eq!(ledger.conditions(None, 0, at(0)), "no other app running");
    assert!(ledger.wants_machine(at(100)) && !ledger.wants_machine(at(101)), "it is on its way");
    let reading = Pressure { available: 812 * 1024, total: 2048 * 1024, ..Pressure::default() };
    ledger.machine(&reading, at(102));
    assert!(!ledger.wants_machine(at(160)) && ledger.wants_machine(at(162)));
    let said = ledger.conditions(Some(Duration::from_secs(9)), 3, at(103));
    assert_eq!(said, "9 s in the background, 3 other apps running, 812 of 2048 MiB available");
    let said = ledger.conditions(Some(Duration::from_secs(600)), 1, at(400));
    assert_eq!(said, "10 min in the background, 1 other app running");
    let a = key("org.a");
    ledger.sampled(&a, Phase::Resident, &sample(1, 1, 0, 0), &said, NOW);
    assert_eq!(ledger.row(&a, "frozen").conditions.as_deref(), Some(&*said));
}

#[test]
fn what_an_app_record_has_no_room_for_outlives_the_daemon_beside_it() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    ledger.sampled(&a, Phase::Resident, &sample(40_000, 5_000, 0, 600), "here", NOW);
    let (resident, at, conditions) = ledger.record(&a).unwrap();
    let record = AppRecord { app: a.clone(), declares: true, resident: Some(resident), measured: Some(at), conditions };
    let saved = |parts: &str| {
        let mut next = Ledger::new(std::slice::from_ref(&record));
        next.restore_parts(&a, parts);
        assert_eq!(next.row(&a, "gone").conditions.as_deref(), Some("here"));
        next.row(&a, "gone").saved
    };
    assert_eq!(ledger.parts(&a).as_deref(), Some("5000 600"));
    assert_eq!(saved("5000 600"), ledger.row(&a, "gone").saved);
    assert_eq!(saved("5000 600"), Some(40_600));
    assert_eq!(saved("5000 -"), Some(40_000));
    for unusable in ["", "x", "- -", "-1 -1", "99999999999999999999 7x"] {
        assert_eq!(saved(unusable), Some(45_000), "{unusable:?}: as for a kernel that does not tell");
    }
    assert_eq!(saved("18446744073709551615 0"), Some(0), "more than all of it");
}

#[test]
fn an_app_that_runs_saves_nothing_until_it_is_held_again() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    ledger.sampled(&a, Phase::Resident, &sample(40_000, 0, 0, 0), "", NOW);
    ledger.sampled(&a, Phase::Now, &sample(10_000, 0, 0, 0), "", NOW);
    let rates = |ledger: &Ledger| ["foreground", "awake", "frozen", "tombstone"].map(|state| ledger.rate(&a, state));
    assert_eq!(rates(&ledger), [Some(0), Some(0), Some(30_000), Some(40_000)]);
    ledger.sampled(&a, Phase::Now, &sample(50_000, 0, 0, 0), "", NOW);
    assert_eq!(rates(&ledger), [Some(0), Some(0), Some(-10_000), Some(40_000)]);
    assert_eq!(ledger.rate(&key("org.b"), "gone"), None);
}

#[test]
fn of_one_that_runs_only_what_is_still_paged_out_is_saved() {
    let a = key("org.a");
    let mut ledger = Ledger::default();
    ledger.sampled(&a, Phase::Resident, &sample(50_000, 0, 0, 0), "", NOW);
    ledger.paged_out(&a, 40_000, 10_000, ZramSource::Measured);
    ledger.sampled(&a, Phase::PagedOut, &sample(10_000, 0, 40_000, 0), "", NOW);
    ledger.thawed(&a);
    // Half of it is back, and 5 MB it has given back by itself.
    ledger.sampled(&a, Phase::Now, &sample(25_000, 0, 20_000, 0), "", NOW);
    let row = ledger.row(&a, "awake");
    assert_eq!((row.zram, row.saved, row.drift), (5_000, Some(15_000), 5_000));
    assert_eq!(ledger.rate(&a, "awake"), Some(0), "it will get the rest back, too");
}

#[test]
fn totals_are_those_of_one_bus() {
    let (a, b) = (key("org.a"), AppKey::new(Bus::Session(1001), "org.b"));
    let mut ledger = Ledger::default();
    for app in [&a, &b] {
        ledger.sampled(app, Phase::Resident, &sample(40_000, 1_000, 0, 0), "", NOW);
    }
    ledger.thawed(&a);
    tell_zram(&mut ledger, 10, 20);
    let states = [(&a, "awake"), (&b, "tombstone")];
    let total = ledger.total(a.bus, states.iter().copied());
    assert_eq!((total.apps, total.running, total.resident, total.now, total.daemon), (1, 1, 41_000, 41_000, 3_100));
    let total = ledger.total(b.bus, states.iter().copied());
    assert_eq!((total.apps, total.running, total.resident, total.now), (1, 0, 41_000, 0));
}

/// What may happen to an app, with figures of any size.
fn any_step() -> impl Strategy<Value = (usize, u8, u64, u64, u64, u64)> {
    let size = || prop_oneof![0u64..200_000, Just(u64::MAX / 2)];
    (0..4usize, 0..8u8, size(), size(), size(), size())
}

proptest! {
    /// Each byte has one owner, whatever is measured in whatever order: the rows and the daemon make up the report, zram's
    /// shares are no more than zram has, and nothing is claimed beyond what the apps cost resident.
    #[test]
    fn no_byte_is_counted_twice(steps in prop::collection::vec(any_step(), 0..60), held in 0u64..100_000) {
        let apps: Vec<AppKey> = (0..4).map(|n| key(&format!("org.app{n}"))).collect();
        let mut states = ["background"; 4];
        let mut ledger = Ledger::default();
        for (n, what, first, second, third, fourth) in steps {
            let app = &apps[n];
            let sample = Sample {
                anon: first,
                file: second,
                charged: (third % 2 == 0).then_some(Charged { kernel: third / 7, ..Charged::default() }),
                ..Memory { pss: first.saturating_add(second), uss: first, swap: fourth }.into()
            };
            match what {
                0 => drop(ledger.sampled(app, Phase::Resident, &sample, "", NOW)),
                1 => drop(ledger.sampled(app, Phase::Frozen, &sample, "", NOW)),
                2 => {
                    ledger.paged_out(app, first, second, if third % 2 == 0 { ZramSource::Measured } else { ZramSource::Ratio });
                    ledger.sampled(app, Phase::PagedOut, &sample, "", NOW);
                }
                3 => drop(ledger.sampled(app, Phase::Now, &sample, "", NOW)),
                4 => ledger.thawed(app),
                5 => ledger.gone(app),
                6 => ledger.unmeasured(app),
                _ => ledger.paged_out(app, first, second, ZramSource::Measured),
            }
            states[n] = if what == 5 { "tombstone" } else { "frozen" };
        }
        tell_zram(&mut ledger, held, held * 3);
        let pairs: Vec<_> = apps.iter().zip(states).collect();
        let report = report(&ledger, &pairs);
        prop_assert!(report.zram <= held, "{report:?}");
        let counted: u64 = apps.iter().filter_map(|app| ledger.counted(app)).fold(0, u64::saturating_add);
        let claimed: i64 = report.apps.iter().filter_map(|row| row.saved).fold(0, i64::saturating_add);
        prop_assert!(claimed <= i64::try_from(counted).unwrap_or(i64::MAX), "{claimed} of {counted}: {report:?}");
        let small = |row: &LedgerRow| [row.resident, row.now, row.frozen].iter().flatten().all(|m| m.pss < 1 << 40);
        if report.apps.iter().all(|row| small(row) && row.saved.is_some()) && report.kernel.abs() < 1 << 40 {
            prop_assert_eq!(report.saved, claimed - report.daemon.pss as i64 - report.sockets as i64);
        }
    }
}
