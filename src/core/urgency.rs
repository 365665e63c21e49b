//! Which messages may wake an app in which surroundings (RFC 8030 §5.3; the table of push.md §0.1), and the sentences
//! for it.
//!
//! | power | network | wakes an app from |
//! |---|---|---|
//! | mains | Wi-Fi or cable | very low |
//! | one of the two | | low |
//! | battery | mobile or metered | normal |
//! | low battery | any | high |
//!
//! What nothing is known of counts as good: a board on a desk has neither UPower nor a modem.

use std::time::Duration;

use super::delivery::{BATCH, Release};
use crate::{
    config::UrgencySettings,
    model::{NetworkKind, Reach, Surroundings, Urgency},
};

/// What the surroundings ask of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Minimum {
    /// The least urgency that may wake an app.
    pub(super) urgency: Urgency,
    /// What they are: "running on battery, on a mobile network"; empty where nothing says so.
    pub(super) situation: String,
    /// Messages are held at all.
    enabled: bool,
}

/// What may wake an app now.
pub(super) fn minimum(surroundings: &Surroundings, settings: &UrgencySettings) -> Minimum {
    let mains = surroundings.on_mains.unwrap_or(true);
    let low = is_low(surroundings, settings);
    let urgency = match (mains, is_free(surroundings)) {
        _ if !settings.enabled => Urgency::VeryLow,
        _ if low => Urgency::High,
        (true, true) => Urgency::VeryLow,
        (true, false) | (false, true) => Urgency::Low,
        (false, false) => Urgency::Normal,
    };
    let parts = [power(surroundings, low), network(surroundings).map(str::to_owned)];
    let situation = parts.into_iter().flatten().collect::<Vec<_>>().join(", ");
    Minimum { urgency, situation, enabled: settings.enabled }
}

impl Minimum {
    /// For `status`.
    pub(super) fn sentence(&self) -> String {
        if !self.enabled {
            return "every message may wake its app: holding is switched off (urgency.enabled)".into();
        }
        let what = match self.urgency {
            Urgency::VeryLow => "every message may wake its app",
            Urgency::Low => "messages of low urgency or more may wake their apps",
            Urgency::Normal => "messages of normal urgency or more may wake their apps",
            Urgency::High => "only messages of high urgency may wake their apps",
        };
        format!("{what}: {}", self.told())
    }

    /// Why a message is held. `own` is the app's own minimum, where the configuration gives it one.
    pub(super) fn hold(&self, urgency: Urgency, by_policy: bool, own: Option<Urgency>, at_most: Duration) -> String {
        let name = urgency.as_str();
        let waits = match own {
            None => format!("waits for {} ({})", needs(urgency), self.told()),
            Some(own) => format!("waits: the configuration lets nothing below {} urgency wake this app", own.as_str()),
        };
        let policy = match by_policy {
            true => format!("; its server tells no urgency, and {name} is what this app's messages count as"),
            false => String::new(),
        };
        format!("a {name}-urgency message {waits}, for {} at most{policy}", human(at_most))
    }

    /// Why what was held goes now.
    pub(super) fn release(&self, why: Release, count: usize, at_most: Duration) -> String {
        let why = match why {
            Release::Allowed => format!("power and network allow it ({})", self.told()),
            Release::TimeUp => format!("a message has been held for {}, which is the longest", human(at_most)),
            Release::Crowded => "half of what is kept for one app waits".into(),
            Release::Company => "something else wakes it".into(),
            Release::Running => "it runs anyway".into(),
            Release::Batch => format!("{} are over", human(BATCH)),
        };
        match count {
            1 => format!("{why}: the held message goes to it"),
            _ => format!("{why}: {count} held messages go to it"),
        }
    }

    /// Why a message is held for want of nothing but a budget.
    pub(super) fn hold_for_budget(urgency: Urgency) -> String {
        format!(
            "a {}-urgency message waits: too many have woken this app; all come together within {}",
            urgency.as_str(),
            human(BATCH)
        )
    }

    fn told(&self) -> &str {
        if self.situation.is_empty() { "nothing says how power and network are" } else { &self.situation }
    }
}

/// Why a message may wake its app when only the configuration gives it its urgency.
pub(super) fn by_policy(urgency: Urgency) -> String {
    let name = urgency.as_str();
    format!("its server tells no urgency, and {name} is what this app's messages count as: one may wake it now")
}

/// What only a person can mend.
pub(super) fn trouble(surroundings: &Surroundings) -> Option<&'static str> {
    (surroundings.network.reach == Reach::Portal).then_some("the network wants you to log in on a web page first")
}

fn needs(urgency: Urgency) -> &'static str {
    match urgency {
        Urgency::VeryLow => "mains power and Wi-Fi",
        Urgency::Low => "mains power or Wi-Fi",
        Urgency::Normal | Urgency::High => "a charged battery or mains power",
    }
}

/// Whether the battery is nearly empty.
pub(super) fn is_low(surroundings: &Surroundings, settings: &UrgencySettings) -> bool {
    surroundings.on_mains == Some(false) && surroundings.battery.is_some_and(|charge| charge <= settings.low_battery)
}

/// Whether traffic costs neither money nor a modem's power.
fn is_free(surroundings: &Surroundings) -> bool {
    let network = &surroundings.network;
    let kind = match network.kind {
        NetworkKind::Unknown | NetworkKind::Wired | NetworkKind::Wifi => true,
        NetworkKind::Mobile => false,
    };
    kind && !network.metered && network.reach != Reach::None
}

fn power(surroundings: &Surroundings, low: bool) -> Option<String> {
    match (surroundings.on_mains?, surroundings.battery) {
        (true, _) => Some("on mains power".into()),
        (false, Some(charge)) if low => Some(format!("the battery is at {charge} %")),
        (false, _) => Some("running on battery".into()),
    }
}

fn network(surroundings: &Surroundings) -> Option<&'static str> {
    let network = &surroundings.network;
    match (network.kind, network.metered) {
        _ if network.reach == Reach::None => Some("without a network"),
        (NetworkKind::Unknown, false) => None,
        (NetworkKind::Unknown, true) => Some("on a metered network"),
        (NetworkKind::Wired, false) => Some("on a wired network"),
        (NetworkKind::Wired, true) => Some("on a metered wired network"),
        (NetworkKind::Wifi, false) => Some("on Wi-Fi"),
        (NetworkKind::Wifi, true) => Some("on metered Wi-Fi"),
        (NetworkKind::Mobile, _) if network.roaming => Some("on a foreign mobile network"),
        (NetworkKind::Mobile, _) => Some("on a mobile network"),
    }
}

fn human(time: Duration) -> String {
    match time.as_secs() {
        secs if secs >= 3600 && secs % 3600 == 0 => format!("{} h", secs / 3600),
        secs if secs >= 60 && secs % 60 == 0 => format!("{} min", secs / 60),
        secs => format!("{secs} s"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Network;

    fn around(on_mains: Option<bool>, battery: Option<u8>, kind: NetworkKind) -> Surroundings {
        Surroundings { on_mains, battery, network: Network { kind, ..Network::default() } }
    }

    fn urgency(surroundings: &Surroundings) -> Urgency {
        minimum(surroundings, &UrgencySettings::default()).urgency
    }

    #[test]
    fn the_table() {
        use NetworkKind::{Mobile, Unknown, Wifi, Wired};
        let cases = [
            (Some(true), Some(80), Wifi, Urgency::VeryLow),
            (Some(true), Some(80), Wired, Urgency::VeryLow),
            (Some(true), None, Mobile, Urgency::Low),
            (Some(false), Some(80), Wifi, Urgency::Low),
            (Some(false), Some(80), Mobile, Urgency::Normal),
            (Some(false), Some(16), Mobile, Urgency::Normal),
            (Some(false), Some(15), Mobile, Urgency::High),
            (Some(false), Some(15), Wifi, Urgency::High),
            // Charging: what is left does not matter.
            (Some(true), Some(3), Wifi, Urgency::VeryLow),
            (Some(true), Some(3), Mobile, Urgency::Low),
            // Boards: nothing says so.
            (None, None, Unknown, Urgency::VeryLow),
            (None, None, Mobile, Urgency::Low),
            (Some(false), None, Unknown, Urgency::Low),
        ];
        for (mains, battery, kind, least) in cases {
            assert_eq!(urgency(&around(mains, battery, kind)), least, "{mains:?} {battery:?} {kind:?}");
        }
    }

    #[test]
    fn metered_wifi_is_no_wifi_and_no_network_is_none() {
        let mut surroundings = around(Some(false), Some(80), NetworkKind::Wifi);
        surroundings.network.metered = true;
        assert_eq!(urgency(&surroundings), Urgency::Normal);
        let mut surroundings = around(Some(false), Some(80), NetworkKind::Unknown);
        surroundings.network.reach = Reach::None;
        assert_eq!(urgency(&surroundings), Urgency::Normal, "a phone in a tunnel must not wake all its apps");
    }

    #[test]
    fn switched_off_nothing_is_held() {
        let settings = UrgencySettings { enabled: false, ..UrgencySettings::default() };
        let least = minimum(&around(Some(false), Some(1), NetworkKind::Mobile), &settings);
        assert_eq!(least.urgency, Urgency::VeryLow);
        assert!(least.sentence().contains("urgency.enabled"));
    }

    #[test]
    fn reasons_are_sentences_a_user_can_read() {
        let least = minimum(&around(Some(false), Some(80), NetworkKind::Mobile), &UrgencySettings::default());
        assert_eq!(
            least.sentence(),
            "messages of normal urgency or more may wake their apps: running on battery, on a mobile network"
        );
        let day = Duration::from_secs(86_400);
        assert_eq!(
            least.hold(Urgency::Low, false, None, day),
            "a low-urgency message waits for mains power or Wi-Fi (running on battery, on a mobile network), for 24 h \
             at most"
        );
        assert_eq!(
            least.hold(Urgency::Low, true, Some(Urgency::High), day),
            "a low-urgency message waits: the configuration lets nothing below high urgency wake this app, for 24 h at \
             most; its server tells no urgency, and low is what this app's messages count as"
        );
        assert_eq!(
            least.release(Release::TimeUp, 3, Duration::from_secs(90 * 60)),
            "a message has been held for 90 min, which is the longest: 3 held messages go to it"
        );
        let unknown = minimum(&Surroundings::default(), &UrgencySettings::default());
        assert!(unknown.sentence().ends_with("nothing says how power and network are"));
    }

    fn any_surroundings() -> impl Strategy<Value = Surroundings> {
        let kind = prop_oneof![
            Just(NetworkKind::Unknown),
            Just(NetworkKind::Wired),
            Just(NetworkKind::Wifi),
            Just(NetworkKind::Mobile)
        ];
        (any::<Option<bool>>(), proptest::option::of(0_u8..=100), kind, any::<bool>()).prop_map(
            |(on_mains, battery, kind, metered)| {
                let network = Network { kind, metered, ..Network::default() };
                Surroundings { on_mains, battery, network }
            },
        )
    }

    proptest! {
        #[test]
        fn better_surroundings_never_hold_more(surroundings in any_surroundings(), charge in 0_u8..=100) {
            let before = urgency(&surroundings);
            let mains = Surroundings { on_mains: Some(true), ..surroundings.clone() };
            prop_assert!(urgency(&mains) <= before);
            let mut wifi = surroundings.clone();
            (wifi.network.kind, wifi.network.metered) = (NetworkKind::Wifi, false);
            prop_assert!(urgency(&wifi) <= before);
            let fuller = surroundings.battery.map(|now| now.max(charge));
            let fuller = Surroundings { battery: fuller, ..surroundings };
            prop_assert!(urgency(&fuller) <= before);
        }

        #[test]
        fn high_urgency_always_passes(surroundings in any_surroundings()) {
            prop_assert!(urgency(&surroundings) <= Urgency::High);
        }
    }
}
