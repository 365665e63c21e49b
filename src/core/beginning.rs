//! From what the store holds to a daemon that goes on where an earlier life ended.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use rand_chacha::{
    ChaCha12Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    Core, Upstream,
    control::Commands,
    delivery::Delivery,
    demotion::Demotion,
    leases::Leases,
    ledger::{Account, Journal, Ledger, Shadows},
    lifecycle::Lifecycle,
    panel,
    pressure::Pressure,
    recent::Recent,
    registry::Registry,
    routes::Routes,
    sleep::Sleep,
    stand_in::StandIn,
    states::States,
    surroundings::Told,
    transfers::Transfers,
    unsaved::Unsaved,
    upstream::{Beginning, Channel, LinkIds, Session},
    wakes::Wakes,
};
use crate::{
    action::{Action, StoreOp},
    config::{NetworkSettings, Settings, UpstreamSettings},
    model::{AppKey, AppRecord, Bus, FormerRoute, RegistrationId, Rules, Snapshot, StoredMessage},
    time::Now,
};

impl Core {
    /// A daemon that has `snapshot` in its store. `seed` feeds channel names and jitter and must be unpredictable.
    pub fn new(settings: Settings, seed: [u8; 32], mut snapshot: Snapshot, now: Now) -> Self {
        let mut known: Vec<(UpstreamSettings, Option<Bus>)> =
            settings.upstreams.iter().map(|upstream| (upstream.clone(), None)).collect();
        let (set_up, given_up) = set_up_by_users(&snapshot);
        known.extend(set_up.iter().map(|(upstream, bus)| (upstream.clone(), Some(*bus))));
        adopt_orphans(&known, &mut snapshot);
        let replaced = take_replaced(&mut snapshot);
        let lost = take_lost_routes(&known, &mut snapshot);
        let mut seeds = ChaCha12Rng::from_seed(seed);
        let upstreams = known
            .into_iter()
            .zip(0..)
            .map(|((upstream, owner), index)| Upstream {
                owner,
                told: Told::default(),
                session: new_session(&upstream, &settings.network, &snapshot, &mut seeds, LinkIds::new(index), now),
                settings: upstream,
            })
            .collect();
        let mut core = Self {
            upstreams,
            delivery: Delivery::new(&settings, snapshot.next_message),
            lifecycle: Lifecycle::new(
                Rules::new(settings.profile, settings.lifecycle),
                own_rules(&settings),
                &snapshot.apps,
            ),
            pressure: Pressure::new(settings.pressure, now.boot),
            leases: Leases::default(),
            transfers: Transfers::new(
                settings.transfers,
                settings.limits.attempts,
                std::mem::take(&mut snapshot.transfers),
                snapshot.next_transfer,
                now,
            ),
            ledger: Ledger::new(&snapshot.apps),
            account: Account::new(now),
            journal: Journal::new(now.boot),
            shadows: Shadows::default(),
            readers: BTreeMap::new(),
            totals_asked: false,
            apps: BTreeMap::new(),
            buses: Vec::new(),
            commands: Commands::default(),
            farewells: Vec::new(),
            report: None,
            samples: BTreeMap::new(),
            stores: BTreeMap::new(),
            next_store: 1,
            unsaved: Unsaved::default(),
            states: States::new(std::mem::take(&mut snapshot.states)),
            next_notice: 1,
            routes: Routes::new(&snapshot),
            seeds,
            messages: BTreeMap::new(),
            damaged: snapshot.damaged,
            store_trouble: None,
            surroundings: None,
            sleep: Sleep::default(),
            windows: BTreeMap::new(),
            recent: Recent::default(),
            wakes: Wakes::default(),
            demotion: Demotion::default(),
            stand_in: StandIn::default(),
            watched: BTreeMap::new(),
            swept: now.boot,
            ending: None,
            answers_until: None,
            exited: false,
            actions: VecDeque::new(),
            registry: Registry::new(snapshot.next_registration, snapshot.registrations),
            settings,
        };
        for (upstream, _) in set_up {
            core.actions.push_back(Action::Configure(Box::new(upstream)));
        }
        for id in replaced {
            core.store(StoreOp::DeleteRegistration(id), None);
        }
        for FormerRoute { registration, upstream, .. } in lost {
            core.store_surely(StoreOp::DeleteFormer(registration, upstream));
        }
        for (upstream, key) in given_up {
            core.store(StoreOp::PutUpstream { upstream, key, value: "".into() }, None);
        }
        core.restore(snapshot.messages, &snapshot.seen, &snapshot.apps, &snapshot.upstreams, now);
        core
    }

    fn restore(
        &mut self,
        messages: Vec<StoredMessage>,
        seen: &[(RegistrationId, Arc<str>)],
        records: &[AppRecord],
        remembered: &[(Arc<str>, Arc<str>, Arc<str>)],
        now: Now,
    ) {
        for registration in self.registry.iter() {
            self.delivery.add(registration);
            self.lifecycle.add_app(&registration.app, now);
            self.apps.entry(registration.app.clone()).or_default();
            if !registration.told && !registration.endpoint.is_empty() {
                self.delivery.endpoint_due(registration.id, &registration.endpoint, now);
            }
        }
        for record in records {
            if let Some(presence) = self.apps.get_mut(&record.app) {
                presence.declares = record.declares;
            }
        }
        self.restore_shown(remembered, now);
        self.restore_parts(remembered);
        for (registration, id) in seen {
            self.delivery.restore_seen(*registration, id);
        }
        self.restore_stand_in(remembered, &messages, now);
        for message in messages {
            self.delivery.restore(message, now);
        }
        self.delivery.sweep(now);
        self.transfers.beginning(now);
        self.pump(now);
    }
}

/// Upstreams users have set up and still use; and what those remember that nobody uses any more, by upstream and key.
#[expect(clippy::type_complexity, reason = "two lists, taken apart at once")]
fn set_up_by_users(snapshot: &Snapshot) -> (Vec<(UpstreamSettings, Bus)>, Vec<(Arc<str>, Arc<str>)>) {
    let used: BTreeSet<&str> = snapshot
        .registrations
        .iter()
        .map(|registration| &*registration.upstream)
        .chain(snapshot.former.iter().map(|route| &*route.upstream))
        .chain(snapshot.preferences.iter().map(|preference| &*preference.upstream))
        .collect();
    let mut set_up = panel::stored_upstreams(&snapshot.upstreams);
    set_up.retain(|(upstream, _)| used.contains(&*upstream.name));
    let unused = |name: &str| name.starts_with(panel::PREFIX) && !used.contains(name);
    let given_up = snapshot.upstreams.iter().filter(|(name, ..)| unused(name));
    (set_up, given_up.map(|(name, key, _)| (Arc::clone(name), Arc::clone(key))).collect())
}

/// Registrations of an upstream that is not configured any more go to the default one, which makes them anew: without a
/// channel there, and told to the app when it has an endpoint again.
fn adopt_orphans(known: &[(UpstreamSettings, Option<Bus>)], snapshot: &mut Snapshot) {
    let Some((default, _)) = known.first() else { return };
    for registration in &mut snapshot.registrations {
        if !known.iter().any(|(upstream, _)| upstream.name == registration.upstream) {
            log::warn!(
                "{}: upstream \"{}\" is not configured any more; it moves to \"{}\"",
                registration.app,
                registration.upstream,
                default.name
            );
            registration.upstream = Arc::clone(&default.name);
            registration.channel = "".into();
            registration.endpoint = "".into();
        }
    }
}

/// Former routes over an upstream that is not configured any more, or that a crash has left beside the same route in use.
fn take_lost_routes(known: &[(UpstreamSettings, Option<Bus>)], snapshot: &mut Snapshot) -> Vec<FormerRoute> {
    let leads = |route: &FormerRoute| {
        let registration = snapshot.registrations.iter().find(|registration| registration.id == route.registration);
        registration.is_some_and(|registration| registration.upstream != route.upstream)
            && known.iter().any(|(upstream, _)| upstream.name == route.upstream)
    };
    snapshot.former.extract_if(.., |route| !leads(route)).collect()
}

/// A registration made anew is written before the one it replaces is deleted; a crash between the two leaves both.
fn take_replaced(snapshot: &mut Snapshot) -> Vec<RegistrationId> {
    let mut latest: BTreeMap<(&AppKey, &str), RegistrationId> = BTreeMap::new();
    for registration in &snapshot.registrations {
        let latest = latest.entry((&registration.app, &registration.token)).or_insert(registration.id);
        *latest = registration.id.max(*latest);
    }
    let kept: BTreeSet<RegistrationId> = latest.into_values().collect();
    snapshot.registrations.extract_if(.., |registration| !kept.contains(&registration.id)).map(|r| r.id).collect()
}

fn new_session(
    settings: &UpstreamSettings,
    network: &NetworkSettings,
    snapshot: &Snapshot,
    seeds: &mut ChaCha12Rng,
    links: LinkIds,
    now: Now,
) -> Session {
    let remembered = snapshot
        .upstreams
        .iter()
        .filter(|(upstream, _, value)| *upstream == settings.name && !value.is_empty())
        .map(|(_, key, value)| (Arc::clone(key), Arc::clone(value)))
        .collect();
    let channels = snapshot
        .registrations
        .iter()
        .filter(|registration| registration.upstream == settings.name)
        .map(|registration| Channel {
            registration: registration.id,
            channel: Arc::clone(&registration.channel),
            vapid: registration.vapid.clone(),
            endpoint: Arc::clone(&registration.endpoint),
        })
        .chain(snapshot.former.iter().filter(|route| route.upstream == settings.name).map(|route| Channel {
            registration: route.registration,
            channel: Arc::clone(&route.channel),
            vapid: None,
            endpoint: Arc::clone(&route.endpoint),
        }))
        .collect();
    let mut seed = [0; 32];
    seeds.fill_bytes(&mut seed);
    Session::new(Beginning { settings, network, remembered, channels, seed, links }, now)
}

fn own_rules(settings: &Settings) -> BTreeMap<Arc<str>, Rules> {
    settings.apps.iter().filter_map(|app| Some((Arc::clone(&app.name), app.rules.clone()?))).collect()
}
