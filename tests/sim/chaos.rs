//! What goes wrong, and what people do meanwhile.

use std::sync::Arc;

use nightporter::{
    config::UpstreamKind,
    event::{BusEvent, Command, LinkError, LinkEvent, Query, Request},
    model::{LeaseId, LeaseKind, Urgency},
};

use crate::{
    clock::{At, MS, SEC},
    reference::Sent,
    server::{Post, body},
    world::{Due, LinkKey, What, World, tool},
};

const TOPICS: [&str; 2] = ["news", "weather"];

impl World {
    pub(crate) fn publish(&mut self) {
        if self.calm {
            return;
        }
        let burst = if self.rng.chance(500) { self.rng.between(2, 25) } else { 1 };
        for _ in 0..burst {
            self.publish_one();
        }
        let at = self.soon(50 * MS, self.plan.publish);
        self.agenda.add(at, Due::Publish);
    }

    fn publish_one(&mut self) {
        let known: Vec<(usize, usize)> = self
            .apps
            .iter()
            .enumerate()
            .flat_map(|(a, app)| {
                app.wishes.iter().enumerate().filter(|(_, w)| w.endpoint.is_some()).map(move |(w, _)| (a, w))
            })
            .collect();
        let Some((app, wish)) = self.rng.pick(&known).copied() else { return };
        let wish = &self.apps[app].wishes[wish];
        let stale = self.rng.chance(500);
        let endpoint = match wish.before.last() {
            Some(before) if stale => Arc::clone(before),
            _ => wish.endpoint.clone().expect("it has one"),
        };
        let (key, token) = (self.apps[app].key.clone(), Arc::clone(&wish.token));
        let number = self.reference.next_number();
        let unusable = self.rng.chance(150);
        let body: Arc<[u8]> = match unusable {
            true if self.rng.chance(5000) => Arc::from([]),
            true => vec![7; 4097].into(),
            false => body(number, &mut self.rng),
        };
        let mut deeds = Vec::new();
        let (mut expires, mut topic) = (None, None);
        let urgency;
        let (channel, id): (Arc<str>, Arc<str>) = if let Some(name) = endpoint.strip_prefix("https://ntfy.sim/") {
            if self.servers_down.contains(UpstreamKind::Ntfy.as_str()) {
                return;
            }
            let name = name.strip_suffix("?up=1").expect("an endpoint for UnifiedPush");
            // As the daemon reads them: 3, the default, says nothing.
            let priorities = [(1, Urgency::VeryLow), (2, Urgency::Low), (4, Urgency::High), (5, Urgency::High)];
            let said = if self.rng.chance(5000) { self.rng.pick(&priorities).copied() } else { None };
            urgency = said.map(|(_, urgency)| urgency);
            let (id, frame, links) = self.ntfy.publish(name, number, &body, said.map(|(n, _)| n), self.at);
            for link in links {
                self.send_down(link, LinkEvent::Text(frame.clone()), Some(number));
            }
            (name.into(), id)
        } else {
            if self.servers_down.contains(UpstreamKind::Autopush.as_str()) {
                return;
            }
            let ttl = self.rng.chance(1500).then(|| self.rng.between(1, 40));
            topic = if self.rng.chance(1500) { self.rng.pick(&TOPICS).copied() } else { None };
            let any = [Urgency::VeryLow, Urgency::Low, Urgency::Normal, Urgency::High];
            urgency = if self.rng.chance(5000) { self.rng.pick(&any).copied() } else { None };
            let post = Post { number, body: &body, ttl, topic, urgency };
            let Some((channel, version)) = self.autopush.publish(&endpoint, &post, self.at, &mut deeds) else {
                self.count("senders told that an endpoint is gone");
                return;
            };
            expires = ttl.map(|ttl| self.at + ttl * SEC);
            (channel.into(), version.into())
        };
        self.count("messages sent");
        self.note(|| format!("published {id} ({number}) for {key} {token}"));
        self.reference.accept(Sent {
            app: key,
            token,
            channel,
            id,
            body,
            at: self.at,
            expires,
            topic,
            urgency,
            unusable,
            server_dropped: false,
            accepted: false,
            ended: None,
            processed: None,
            times: 0,
        });
        self.carry_out(deeds);
    }

    pub(crate) fn chaos(&mut self) {
        if self.calm {
            return;
        }
        let at = self.soon(10 * MS, self.plan.chaos);
        self.agenda.add(at, Due::Chaos);
        let dice = self.rng.below(1000);
        match dice {
            0..60 => self.break_a_link(false),
            60..110 => self.break_a_link(true),
            110..150 => self.restart_server(UpstreamKind::Autopush),
            150..190 => self.restart_server(UpstreamKind::Ntfy),
            190..215 => self.server_forgets(),
            215..270 => {
                let mut deeds = Vec::new();
                self.autopush.repeat(&mut self.rng, &mut deeds);
                self.carry_out(deeds);
            }
            270..310 => self.network_goes(),
            310..330 => {
                let length = self.rng.between(1, 900) * SEC;
                self.count("suspends");
                self.falls_asleep(length);
            }
            330..400 => self.any_instance(|world, n| world.die(n, "is killed from outside")),
            400..440 => self.any_instance(|world, n| {
                if world.plan.slow_apps
                    && let Some(instance) = world.instances.get_mut(&n)
                {
                    instance.stopped = true;
                    let at = world.soon(SEC, 60 * SEC);
                    world.agenda.add(at, Due::Continue(n));
                    world.count("apps stopped from outside");
                }
            }),
            440..520 => {
                let app = self.rng.below(self.apps.len() as u64) as usize;
                self.spawn(app, false);
            }
            520..545 => self.any_wish(|world, app, wish| {
                if world.apps[app].wishes[wish].registered {
                    world.app_unregisters(app, wish);
                }
            }),
            545..580 => self.any_wish(|world, app, wish| {
                world.apps[app].wishes[wish].wanted = true;
                if let Some(n) = world.apps[app].instance {
                    world.app_registers(app, n, wish);
                }
            }),
            580..600 => self.any_wish(|world, app, wish| {
                if world.apps[app].wishes[wish].registered {
                    world.app_changes_key(app, wish);
                }
            }),
            600..740 => self.any_instance(Self::app_declares),
            740..765 => self.user_acts(),
            765..780 => self.any_instance(Self::app_transfers),
            780..800 => self.lease_comes_or_goes(),
            800..815 => self.bus_goes(),
            815..850 => {
                self.store.full = true;
                self.count("disks full");
                self.note(|| "disk full".to_owned());
                let at = self.soon(SEC, 60 * SEC);
                self.agenda.add(at, Due::DiskFree);
            }
            850..870 => {
                self.note(|| "crash".to_owned());
                self.crash();
            }
            870..880 => self.shutdown(),
            880..900 => self.trim_ntfy(),
            900..945 => {
                let query = match self.rng.below(5) {
                    0 => Query::Apps,
                    1 => Query::Status,
                    2 => Query::History { hours: 1 },
                    3 => Query::WhatIf { hours: 1 },
                    _ => Query::Report,
                };
                self.call(tool(), Request::Query(query), What::Json);
            }
            945..960 => self.memory_gets_short(),
            960..980 => self.user_moves(),
            980..1000 => self.surroundings_change(),
            _ => {}
        }
        self.check_answers();
    }

    fn any_instance(&mut self, act: impl FnOnce(&mut Self, u64)) {
        let running: Vec<u64> = self.instances.keys().copied().collect();
        if let Some(n) = self.rng.pick(&running).copied() {
            act(self, n);
        }
    }

    fn any_wish(&mut self, act: impl FnOnce(&mut Self, usize, usize)) {
        let app = self.rng.below(self.apps.len() as u64) as usize;
        let wish = self.rng.below(self.apps[app].wishes.len() as u64) as usize;
        act(self, app, wish);
    }

    fn break_a_link(&mut self, silently: bool) {
        let links: Vec<LinkKey> = self.links.iter().filter(|(_, link)| !link.hung_up).map(|(key, _)| *key).collect();
        let Some(key) = self.rng.pick(&links).copied() else { return };
        self.note(|| format!("link {} {}", key.1, if silently { "dies" } else { "breaks" }));
        if silently {
            self.count("links that died silently");
            if let Some(link) = self.links.get_mut(&key) {
                link.dead = true;
            }
            return;
        }
        self.count("links broken");
        let event = match self.rng.below(4) {
            0 => LinkEvent::Closed { code: Some(1000), reason: String::new() },
            1 => LinkEvent::Closed { code: None, reason: String::new() },
            2 => LinkEvent::Closed { code: Some(1011), reason: "pong late".into() },
            _ => LinkEvent::Failed(LinkError::Io("connection reset by peer".into())),
        };
        self.end_link(key, event);
    }

    fn restart_server(&mut self, kind: UpstreamKind) {
        self.note(|| format!("server {} restarts", kind.as_str()));
        self.count("server restarts");
        self.servers_down.insert(kind.as_str());
        let links = match kind {
            UpstreamKind::Autopush => self.autopush.links(),
            UpstreamKind::Ntfy => self.ntfy.links(),
            UpstreamKind::Mqtt | UpstreamKind::NextPush | UpstreamKind::Gotify => unreachable!(),
        };
        for link in links {
            let event = LinkEvent::Failed(LinkError::Io("connection reset by peer".into()));
            self.end_link(link, event);
        }
        let at = self.soon(SEC, 30 * SEC);
        self.agenda.add(at, Due::ServerUp(kind));
    }

    fn server_forgets(&mut self) {
        self.count("devices forgotten by the server");
        let told = self.rng.chance(5000);
        self.note(|| format!("the server forgets the device, told: {told}"));
        let mut deeds = Vec::new();
        self.autopush.forget(told, &mut deeds);
        self.carry_out(deeds);
        if !told {
            // It is found out at the next hello.
            for link in self.autopush.links() {
                self.end_link(link, LinkEvent::Closed { code: Some(1011), reason: String::new() });
            }
        }
    }

    fn network_goes(&mut self) {
        if self.network_down {
            return;
        }
        self.note(|| "network down".to_owned());
        self.count("network losses");
        self.network_down = true;
        let keys: Vec<LinkKey> = self.links.keys().copied().collect();
        for key in keys {
            if self.rng.chance(7000) {
                if let Some(link) = self.links.get_mut(&key) {
                    link.dead = true;
                }
            } else if self.links.get(&key).is_some_and(|link| !link.hung_up) {
                self.end_link(key, LinkEvent::Failed(LinkError::Io("network unreachable".into())));
            }
        }
        let at: At = self.soon(SEC, 60 * SEC);
        self.agenda.add(at, Due::NetworkUp);
    }

    fn user_acts(&mut self) {
        let app = self.rng.below(self.apps.len() as u64) as usize;
        let command = *self.rng.pick(&[Command::Freeze, Command::Freeze, Command::Thaw, Command::Kill]).expect("four");
        self.count("commands");
        let service = Arc::clone(&self.apps[app].key.service);
        self.call(tool(), Request::Command { service, command }, What::Other);
    }

    fn lease_comes_or_goes(&mut self) {
        let life = self.life;
        let held = self.leases.iter().filter(|((of, _), given_back)| *of == life && !**given_back);
        let held: Vec<LeaseId> = held.map(|((_, lease), _)| *lease).collect();
        match self.rng.pick(&held).copied() {
            Some(lease) if self.rng.chance(6000) => {
                self.leases.insert((life, lease), true);
                self.count("leases given back");
                self.bus_event(BusEvent::LeaseClosed(lease));
            }
            Some(lease) if self.rng.chance(1000) => {
                self.call(tool(), Request::EndLease(lease), What::Other);
            }
            _ => {
                let app = self.rng.below(self.apps.len() as u64) as usize;
                let service = Some(Arc::clone(&self.apps[app].key.service));
                let kind = *self.rng.pick(&LeaseKind::ALL).expect("six");
                let seconds = self.rng.chance(3000).then(|| self.rng.between(1, 120) as u32);
                let request = Request::Lease { kind, reason: "chaos".into(), seconds, service };
                self.call(tool(), request, What::Other);
            }
        }
    }

    /// One app, or all of them, to another upstream.
    fn user_moves(&mut self) {
        let app = self.rng.below(self.apps.len() as u64) as usize;
        let service = (!self.rng.chance(2000)).then(|| Arc::clone(&self.apps[app].key.service));
        let upstream: Arc<str> = (*self.rng.pick(&["push", "ntfy"]).expect("two")).into();
        self.count("moves asked for");
        self.note(|| format!("the user moves {service:?} to {upstream}"));
        self.call(tool(), Request::Move { service, upstream }, What::Other);
    }

    /// The cache loses its old end: only what nobody waits for, so that a loss is never the server's.
    fn trim_ntfy(&mut self) {
        let done = |number: usize| {
            let sent = &self.reference.sent[number];
            sent.accepted || sent.ended.is_some() || sent.unusable
        };
        let most = self.ntfy.log.iter().take_while(|cached| done(cached.number)).count() as u64;
        let count = self.rng.below(most + 1) as usize;
        self.ntfy.log.drain(..count);
        self.count("ntfy caches trimmed");
    }
}
