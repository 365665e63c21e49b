//! Notifications in an app's stead on a real bus, with a notification server that is played.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "support/desk.rs"]
mod desk;
#[path = "support/patience.rs"]
#[expect(dead_code, reason = "shared; here less patience is enough")]
mod patience;
#[path = "bus/support.rs"]
#[expect(dead_code, reason = "made for the tests of the buses; shared")]
mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use desk::{Desk, Shown};
use nightporter::{
    action::Action,
    event::{BusEvent, Event},
    model::{AppKey, Bus, Priority},
    notification::{GENERIC, Notification, NotifyNews, NotifyOrder, Text},
    sys::inbox::Incoming,
};
use support::{BUS, Daemon, Loop};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn app_process() {
    support::be_app();
}

fn chat() -> AppKey {
    AppKey::new(BUS, "org.example.Chat")
}

fn generic(number: u64, count: usize) -> NotifyOrder {
    show(GENERIC, number, Text::Messages(count))
}

fn show(tag: &str, number: u64, text: Text) -> NotifyOrder {
    NotifyOrder::Show(Notification { tag: tag.into(), number, text, priority: Priority::Normal, category: None })
}

fn order(main: &Loop, order: NotifyOrder) {
    main.perform(Action::Notify(chat(), order));
}

fn news(main: &mut Loop) -> (Arc<str>, u64, NotifyNews) {
    main.expect_within(PATIENCE, |incoming| match incoming {
        Incoming::Event(Event::Bus(BusEvent::Notified { app, tag, number, news })) => {
            assert_eq!(*app, chat());
            Some((Arc::clone(tag), *number, news.clone()))
        }
        _ => None,
    })
    .expect("it is told")
}

fn wait<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    patience::wait_for(PATIENCE, look).unwrap_or_else(|| panic!("waited for {what}"))
}

fn nth(desk: &Desk, n: usize) -> Shown {
    wait("a notification", || desk.shown().get(n).cloned())
}

#[test]
fn it_says_how_many_messages_wait_is_replaced_and_closed() {
    let daemon = Daemon::new();
    let desk = Desk::start(&daemon.address());
    let main = Loop::up(&daemon);
    order(&main, generic(1, 1));
    let shown = nth(&desk, 0);
    let expected = Shown {
        id: 1,
        // No desktop file tells a better name.
        app: "org.example.Chat".into(),
        replaces: 0,
        icon: "".into(),
        summary: "org.example.Chat".into(),
        body: "New message".into(),
        actions: ["default", ""].map(str::to_owned).into(),
        urgency: 1,
        desktop_entry: "org.example.Chat".into(),
        category: None,
    };
    assert_eq!(shown, expected);
    order(&main, generic(2, 3));
    let shown = nth(&desk, 1);
    assert_eq!((shown.replaces, shown.id, &*shown.body), (1, 1, "3 new messages"));
    order(&main, NotifyOrder::CloseAll);
    wait("it to be closed", || (desk.closed() == [1]).then_some(()));
    // Anew, with another number.
    order(&main, generic(3, 1));
    assert_eq!((nth(&desk, 2).replaces, nth(&desk, 2).id), (0, 2));
    // Nobody would close it later.
    drop(main);
    wait("it to be closed at the end", || (desk.closed() == [1, 2]).then_some(()));
}

#[test]
fn each_urgency_and_what_a_helper_made() {
    let daemon = Daemon::new();
    let main = Loop::up(&daemon);
    for (capabilities, body) in [(&["body-markup", "actions"][..], "1 &lt; 2 &amp; 3"), (&[][..], "1 < 2 & 3")] {
        let desk = Desk::able(&daemon.address(), capabilities);
        let cases = [(Priority::Low, 0), (Priority::Normal, 1), (Priority::High, 2), (Priority::Call, 2)];
        for (n, (priority, urgency)) in cases.into_iter().enumerate() {
            let text = Text::Own { summary: "Ann".into(), body: "1 < 2 & 3".into(), icon: Some("mail".into()) };
            let category = Some("im.received".into());
            let tag = format!("room {n}").into();
            order(&main, NotifyOrder::Show(Notification { tag, number: 1, text, priority, category }));
            let shown = nth(&desk, n);
            assert_eq!((shown.urgency, &*shown.summary, &*shown.icon), (urgency, "Ann", "mail"));
            assert_eq!((&*shown.body, shown.category.as_deref()), (body, Some("im.received")));
            assert_eq!(shown.actions.is_empty(), capabilities.is_empty());
        }
        order(&main, NotifyOrder::Close("room 2".into()));
        wait("one to be closed", || (desk.closed() == [3]).then_some(()));
        order(&main, NotifyOrder::CloseAll);
        wait("all to be closed", || (desk.closed().len() == 4).then_some(()));
    }
}

#[test]
fn what_the_user_does_is_told_once() {
    let daemon = Daemon::new();
    let desk = Desk::start(&daemon.address());
    let mut main = Loop::up(&daemon);
    order(&main, generic(1, 1));
    nth(&desk, 0);
    // Others' numbers, other actions, and signals of whoever is not the server.
    desk.dismiss(77);
    let stranger = zbus::block_on(support::connect(&daemon.address()));
    let (path, interface) = ("/org/freedesktop/Notifications", "org.freedesktop.Notifications");
    zbus::block_on(stranger.emit_signal(None::<&str>, path, interface, "ActionInvoked", &(1_u32, "default"))).unwrap();
    desk.click(1, Some("token-1"));
    assert_eq!(news(&mut main), (GENERIC.into(), 1, NotifyNews::Clicked(Some("token-1".into()))));
    wait("it to be closed", || (desk.closed() == [1]).then_some(()));
    desk.dismiss(1);
    order(&main, generic(2, 1));
    desk.dismiss(nth(&desk, 1).id);
    assert_eq!(news(&mut main), (GENERIC.into(), 2, NotifyNews::Gone));
}

#[test]
fn a_server_that_comes_later_or_is_another_is_told_anew() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    order(&main, generic(1, 1));
    let (_, number, NotifyNews::NotShown(why)) = news(&mut main) else { panic!("nobody shows it") };
    assert!(number == 1 && why.contains("no notification server"), "{why}");
    let desk = Desk::start(&daemon.address());
    assert_eq!(nth(&desk, 0).replaces, 0);
    drop(desk);
    let desk = Desk::start(&daemon.address());
    assert_eq!(nth(&desk, 0).replaces, 0, "this one knows nothing of the old one's numbers");
    order(&main, NotifyOrder::CloseAll);
    wait("it to be closed", || (desk.closed() == [1]).then_some(()));
}

#[test]
fn a_server_that_does_not_answer_holds_up_nobody() {
    let daemon = Daemon::new();
    let desk = Desk::start(&daemon.address());
    let mut main = Loop::up(&daemon);
    order(&main, generic(1, 1));
    nth(&desk, 0);
    desk.silent.store(true, Ordering::Relaxed);
    order(&main, generic(2, 2));
    assert_eq!(nth(&desk, 1).replaces, 1);
    // Dismissed is what was seen, not what is still to be shown.
    desk.dismiss(1);
    // The bus goes on meanwhile.
    main.perform(Action::Watch(chat()));
    assert_eq!(main.owner(&chat()), None);
    let (_, 2, NotifyNews::NotShown(why)) = news(&mut main) else { panic!("it is not answered") };
    assert!(why.contains("does not answer"), "{why}");
    desk.silent.store(false, Ordering::Relaxed);
    order(&main, generic(3, 3));
    assert_eq!(nth(&desk, 2).replaces, 0);
}

#[test]
fn a_flood_of_signals_is_of_no_matter() {
    let daemon = Daemon::new();
    let desk = Desk::start(&daemon.address());
    let mut main = Loop::up(&daemon);
    order(&main, generic(1, 1));
    nth(&desk, 0);
    for id in 1000..4000 {
        desk.dismiss(id);
    }
    desk.click(1, None);
    assert_eq!(news(&mut main), (GENERIC.into(), 1, NotifyNews::Clicked(None)));
}

#[test]
fn nobody_is_notified_on_a_bus_that_is_not_there_nor_on_the_systems() {
    let daemon = Daemon::new();
    let desk = Desk::start(&daemon.address());
    let main = Loop::up(&daemon);
    main.perform(Action::Notify(AppKey::new(Bus::Session(1), "org.example.Chat"), generic(1, 1)));
    main.perform(Action::Notify(AppKey::new(Bus::System, "org.example.Chat"), generic(1, 1)));
    order(&main, generic(2, 2));
    assert_eq!(nth(&desk, 0).body, "2 new messages");
}

#[test]
fn an_app_that_runs_is_asked_to_show_itself() {
    let daemon = Daemon::new();
    let main = Loop::up(&daemon);
    let app = AppKey::new(BUS, "org.example.My-Chat");
    let connection = zbus::block_on(support::connect(&daemon.address()));
    let mut stream = zbus::MessageStream::from(&connection);
    let owner = nightporter::model::Owner(connection.unique_name().unwrap().as_str().into());
    main.perform(Action::Activate { app, owner: Some(owner), token: Some("token-1".into()) });
    let call = zbus::block_on(async {
        loop {
            let next = std::future::poll_fn(|c| futures_core::Stream::poll_next(std::pin::Pin::new(&mut stream), c));
            let message = next.await.unwrap().unwrap();
            if message.header().member().is_some_and(|member| member.as_str() == "Activate") {
                return message;
            }
        }
    });
    let header = call.header();
    assert_eq!(header.path().unwrap().as_str(), "/org/example/My_Chat");
    assert_eq!(header.interface().unwrap().as_str(), "org.freedesktop.Application");
    let platform: std::collections::HashMap<String, zbus::OwnedVariant> = call.body().deserialize().unwrap();
    assert_eq!(<&str>::try_from(&platform["activation-token"]).unwrap(), "token-1");
}
