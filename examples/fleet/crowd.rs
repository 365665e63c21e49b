//! Who is in the crowd: the real session, and the models it is compared with.

use std::{error::Error, sync::Arc, time::Duration};

use nightporter::{
    config::{NetworkSettings, Settings, UpstreamSettings},
    core::upstream::{Beginning, Channel, LinkIds, Output, Session},
    event::{LinkEvent, LinkId},
    model::RegistrationId,
    time::{Instant, Now},
};

use crate::{
    dialect::Dialect,
    model::{Model, Policy},
    scenario::Scenario,
    world::{self, Daemon, Outcome},
};

/// Apps on each phone.
pub(crate) const REGISTRATIONS: u64 = 5;

/// One kind of client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crowd {
    /// `core::upstream::Session` as the daemon runs it.
    NightPorter,
    Former,
    Fixed,
    Kunifiedpush,
}

impl Crowd {
    /// The real one first.
    pub(crate) const ALL: [Self; 4] = [Self::NightPorter, Self::Former, Self::Fixed, Self::Kunifiedpush];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::NightPorter => "Night Porter",
            Self::Former => "its former backoff (model)",
            Self::Fixed => "every 5 s (model)",
            Self::Kunifiedpush => "kunifiedpush's policy (model)",
        }
    }

    /// Sends `phones` of this kind through `scenario`.
    pub(crate) fn run(self, scenario: &Scenario, upstream: &Upstream, phones: u32, seed: u64) -> Outcome {
        let policy = match self {
            Self::NightPorter => {
                return world::run(scenario, upstream.dialect, phones, seed, |phone, seed, now| {
                    upstream.session(phone, seed, now)
                });
            }
            Self::Former => FORMER,
            Self::Fixed => Policy::Fixed(Duration::from_secs(5)),
            Self::Kunifiedpush => {
                Policy::Growing { from: Duration::from_secs(15), to: Duration::from_secs(40), factor: 1.5 }
            }
        };
        world::run(scenario, Dialect::Mute, phones, seed, |_, seed, now| {
            let [a, b, c, d, e, f, g, h, ..] = seed;
            Model::new(policy, u64::from_le_bytes([a, b, c, d, e, f, g, h]), now)
        })
    }
}

/// `core::upstream::backoff` before this simulation.
const FORMER: Policy =
    Policy::Doubling { first: Duration::from_secs(2), ceiling: Duration::from_secs(600), from: 0.0, over: 0.1 };

/// What every phone has configured and stored.
pub(crate) struct Upstream {
    settings: UpstreamSettings,
    dialect: Dialect,
    /// The same for all, as nothing depends on the names.
    channels: Vec<Channel>,
}

impl Upstream {
    /// The upstream that a configuration file calls `kind`.
    pub(crate) fn new(kind: &str) -> Result<Self, Box<dyn Error>> {
        let text = format!("[[upstream]]\nname = \"fleet\"\nkind = \"{kind}\"\nurl = \"https://push.example/\"\n");
        let settings = Settings::parse(&text)?.upstreams.swap_remove(0);
        let dialect = Dialect::of(settings.kind).ok_or("the simulated server does not speak this protocol")?;
        let channels = (1..=REGISTRATIONS).map(|n| {
            let channel: Arc<str> = match dialect {
                Dialect::Ntfy => format!("up{n:032}").into(),
                Dialect::Autopush | Dialect::Mute => format!("00000000-0000-4000-8000-{n:012x}").into(),
            };
            let endpoint = format!("https://push.example/{channel}").into();
            Channel { registration: RegistrationId(n), channel, vapid: None, endpoint }
        });
        Ok(Self { dialect, channels: channels.collect(), settings })
    }

    /// A phone's session after a start of its daemon.
    fn session(&self, phone: u32, seed: [u8; 32], now: Now) -> Session {
        let remembered = [("uaid".into(), format!("{phone:031x}0").into())].into();
        let network = &NetworkSettings::default();
        let (settings, channels) = (&self.settings, self.channels.clone());
        let links = LinkIds::new(0);
        Session::new(Beginning { settings, network, remembered, channels, seed, links }, now)
    }
}

impl Daemon for Session {
    fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        Self::handle_link(self, link, event, now);
    }

    fn handle_timeout(&mut self, now: Now) {
        Self::handle_timeout(self, now);
    }

    fn handle_network(&mut self, now: Now) {
        Self::handle_network(self, now);
    }

    fn poll_output(&mut self) -> Option<Output> {
        Self::poll_output(self)
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Self::poll_timeout(self)
    }
}
