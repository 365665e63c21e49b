//! What the ledger says over the bus of what has been and of what would have been.

use nightporter::{model::Profile, view};

use crate::support::{Behaviour, Setup, World, wait};

const APP: &str = "org.example.App";
const OTHER: &str = "org.example.Other";
const BRISK: &str =
    "grace = \"100ms\"\npage-out-after = \"100ms\"\ntombstone-after = \"500ms\"\nawake-window = \"100ms\"\n";

#[test]
fn what_would_have_been_done_is_told_and_to_nobody_but_who_may_read() {
    let world = World::new(Setup { lifecycle: BRISK, ..Setup::default() });
    world.samples(&[(APP, "")]);
    let ended = wait("it would be a tombstone for a second", || {
        let shown: view::WhatIf = world.ask_hours("WhatIf", 24);
        let of_it = shown.apps.iter().find(|app| app.name == APP)?;
        of_it.spans.iter().any(|span| span.state == "tombstone").then_some(shown)
    });
    let span = ended.apps[0].spans.iter().find(|span| span.state == "tombstone").unwrap();
    assert!(span.saved > 0 && span.secs >= 1 && span.reason.contains("without a message"), "{span:?}");
    assert_eq!(ended.profile, Profile::Observe);
    assert!(ended.hours > 0.0 && ended.hours < 1.0 && ended.saved_mib_hours > 0.0, "{ended:?}");
    let show = world.show(APP);
    assert!(show.memory.conditions.as_deref().unwrap().contains("in the background"), "{:?}", show.memory);

    // It gets its message while it runs, as it always does under this profile.
    world.post(APP, "as ever");
    world.expect(APP, &["as ever"]);
    let history = wait("the message in the history", || {
        let history: view::History = world.ask_hours("History", 1);
        (!history.wakes.is_empty()).then_some(history)
    });
    assert_eq!(history.wakes[0].name, APP);
    assert!(["background", "awake"].contains(&&*history.wakes[0].from), "{:?}", history.wakes);
    assert!(history.apps.iter().any(|app| app.name == APP && !app.points.is_empty()), "{history:?}");
    let report: view::Report = world.ask("Report", None);
    let account = report.account.unwrap();
    assert_eq!(account.wakes.iter().map(|stats| (&*stats.from, stats.count)).next(), Some(("running", 1)));
    assert_eq!((account.connections, account.connections_replaced), (1, 1));

    let other = world.client(OTHER, Behaviour::Accept);
    other.endpoint("t");
    let refused = Err("org.nightporter1.Error.NotAuthorized".to_owned());
    for member in ["History", "WhatIf"] {
        assert_eq!(other.porter_hours(member, 24), refused, "{member}");
    }
    let nameless = world.nameless();
    assert!(nameless.porter_hours("WhatIf", 24).is_ok());
}
