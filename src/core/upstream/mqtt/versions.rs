//! Which version of the protocol to speak.

use std::time::Duration;

use crate::{config::MqttVersion, time::UnixTime};

/// After this a broker that had no version 5 is asked for it again: one more connection.
const LOOK_AGAIN: Duration = Duration::from_secs(24 * 3600);
/// A broker that has spoken 5 before hangs up for another reason, such as a restart, at first.
const MUTE_ENDS: u32 = 3;

/// What is known of the broker.
#[derive(Debug)]
pub(super) struct Versions {
    /// The only one to speak.
    wanted: Option<MqttVersion>,
    /// What worked last.
    works: Option<MqttVersion>,
    next: MqttVersion,
    /// When 5 was refused last.
    refused: Option<UnixTime>,
    /// Links in a row that ended on CONNECT without a word.
    mute: u32,
    remembered: Option<String>,
}

impl Versions {
    /// As the user wants it, else as an earlier life remembered it.
    pub(super) fn new(wanted: Option<MqttVersion>, remembered: Option<&str>) -> Self {
        let (works, refused) = match remembered.and_then(|text| text.split_once('@').or(Some((text, "")))) {
            Some(("5", _)) => (Some(MqttVersion::V5), None),
            Some(("3.1.1", at)) => (Some(MqttVersion::V3), at.parse().ok().map(UnixTime::from_secs)),
            _ => (None, None),
        };
        let next = wanted.or(works).unwrap_or(MqttVersion::V5);
        Self { wanted, works, next, refused, mute: 0, remembered: remembered.map(str::to_owned) }
    }

    /// The one to try now.
    pub(super) fn pick(&self, wall: UnixTime) -> MqttVersion {
        let look = self.refused.is_none_or(|at| wall.since(at) >= LOOK_AGAIN);
        match self.wanted {
            Some(version) => version,
            None if self.next == MqttVersion::V3 && look => MqttVersion::V5,
            None => self.next,
        }
    }

    /// The broker speaks it. Gives what to remember, if that is new.
    pub(super) fn works(&mut self, version: MqttVersion) -> Option<String> {
        self.mute = 0;
        self.works = Some(version);
        self.next = version;
        let text = match (version, self.refused) {
            (MqttVersion::V5, _) => {
                self.refused = None;
                "5".to_owned()
            }
            (MqttVersion::V3, Some(at)) => format!("3.1.1@{}", at.as_millis() / 1000),
            (MqttVersion::V3, None) => "3.1.1".to_owned(),
        };
        if self.wanted.is_some() || self.remembered.as_deref() == Some(&*text) {
            return None;
        }
        self.remembered = Some(text.clone());
        Some(text)
    }

    /// The broker says that it does not speak it. Gives whether there is another to try.
    pub(super) fn refused(&mut self, version: MqttVersion, wall: UnixTime) -> bool {
        self.mute = 0;
        match (self.wanted, version) {
            (Some(_), _) => false,
            (None, MqttVersion::V5) => {
                self.refused = Some(wall);
                self.next = MqttVersion::V3;
                true
            }
            (None, MqttVersion::V3) => {
                self.next = MqttVersion::V5;
                false
            }
        }
    }

    /// The broker hung up on CONNECT without a word. Gives whether there is another to try.
    pub(super) fn mute(&mut self, version: MqttVersion, wall: UnixTime) -> bool {
        if self.wanted.is_some() {
            return false;
        }
        self.mute += 1;
        match version {
            MqttVersion::V5 if self.mute >= MUTE_ENDS || self.works != Some(MqttVersion::V5) => {
                self.refused = Some(wall);
                self.next = MqttVersion::V3;
                true
            }
            MqttVersion::V5 => false,
            MqttVersion::V3 => {
                // Nothing to be learnt from a broker that hangs up on everybody.
                self.next = self.works.unwrap_or(MqttVersion::V5);
                self.refused = self.refused.filter(|_| self.works == Some(MqttVersion::V3));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: UnixTime = UnixTime::from_secs(1_800_000_000);

    #[test]
    fn five_comes_first_and_again_after_a_day() {
        let mut versions = Versions::new(None, None);
        assert_eq!(versions.pick(START), MqttVersion::V5);
        assert!(versions.refused(MqttVersion::V5, START));
        assert_eq!(versions.pick(START), MqttVersion::V3);
        let text = versions.works(MqttVersion::V3).unwrap();
        assert_eq!(versions.works(MqttVersion::V3), None);
        let mut versions = Versions::new(None, Some(&text));
        assert_eq!(versions.pick(START + LOOK_AGAIN / 2), MqttVersion::V3);
        assert_eq!(versions.pick(START + LOOK_AGAIN), MqttVersion::V5);
        assert_eq!(versions.works(MqttVersion::V5).as_deref(), Some("5"));
        assert_eq!(versions.pick(START + LOOK_AGAIN), MqttVersion::V5);
    }

    #[test]
    fn a_broker_that_hangs_up_is_asked_for_both_in_turn() {
        let mut versions = Versions::new(None, None);
        assert!(versions.mute(MqttVersion::V5, START));
        assert_eq!(versions.pick(START), MqttVersion::V3);
        assert!(!versions.mute(MqttVersion::V3, START));
        assert_eq!(versions.pick(START), MqttVersion::V5);
    }

    #[test]
    fn a_broker_that_has_spoken_five_may_restart() {
        let mut versions = Versions::new(None, Some("5"));
        assert!(!versions.mute(MqttVersion::V5, START));
        assert!(!versions.mute(MqttVersion::V5, START));
        assert_eq!(versions.pick(START), MqttVersion::V5);
        assert!(versions.mute(MqttVersion::V5, START));
        assert_eq!(versions.pick(START), MqttVersion::V3);
        // It was the broker, not the version.
        versions.mute(MqttVersion::V3, START);
        assert_eq!(versions.pick(START), MqttVersion::V5);
    }

    #[test]
    fn what_the_user_wants_is_all_there_is() {
        let mut versions = Versions::new(Some(MqttVersion::V3), Some("5"));
        assert_eq!(versions.pick(START), MqttVersion::V3);
        assert!(!versions.refused(MqttVersion::V3, START));
        assert_eq!(versions.pick(START), MqttVersion::V3);
        assert_eq!(versions.works(MqttVersion::V3), None);
    }
}
