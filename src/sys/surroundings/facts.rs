//! What others say about themselves on the bus: their properties, checked for type and size as they come in.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use zbus::{ObjectPath, Variant};

/// A service on the system bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Service {
    Logind,
    UPower,
    NetworkManager,
    ModemManager,
}

impl Service {
    pub(super) const ALL: [Self; 4] = [Self::Logind, Self::UPower, Self::NetworkManager, Self::ModemManager];

    /// Its well-known name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Logind => "org.freedesktop.login1",
            Self::UPower => "org.freedesktop.UPower",
            Self::NetworkManager => "org.freedesktop.NetworkManager",
            Self::ModemManager => "org.freedesktop.ModemManager1",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|service| service.name() == name)
    }
}

/// Which interface of an object is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// UPower itself.
    Power,
    /// UPower's device that stands for all batteries.
    Battery,
    /// NetworkManager itself.
    Network,
    /// An active connection.
    Connection,
    /// A Wi-Fi access point.
    AccessPoint,
    /// A network device.
    Device,
    /// A network device that is a modem.
    Modem,
    /// A modem's registration in a GSM, UMTS, LTE or 5G network.
    Registration3gpp,
    /// A modem's registration in a CDMA network.
    RegistrationCdma,
}

impl Kind {
    /// Who has objects of this kind.
    pub(super) const fn service(self) -> Service {
        match self {
            Self::Power | Self::Battery => Service::UPower,
            Self::Network | Self::Connection | Self::AccessPoint | Self::Device | Self::Modem => {
                Service::NetworkManager
            }
            Self::Registration3gpp | Self::RegistrationCdma => Service::ModemManager,
        }
    }

    /// The D-Bus interface.
    pub(super) const fn interface(self) -> &'static str {
        match self {
            Self::Power => "org.freedesktop.UPower",
            Self::Battery => "org.freedesktop.UPower.Device",
            Self::Network => "org.freedesktop.NetworkManager",
            Self::Connection => "org.freedesktop.NetworkManager.Connection.Active",
            Self::AccessPoint => "org.freedesktop.NetworkManager.AccessPoint",
            Self::Device => "org.freedesktop.NetworkManager.Device",
            Self::Modem => "org.freedesktop.NetworkManager.Device.Modem",
            Self::Registration3gpp => "org.freedesktop.ModemManager1.Modem.Modem3gpp",
            Self::RegistrationCdma => "org.freedesktop.ModemManager1.Modem.ModemCdma",
        }
    }

    /// The properties that are of use here; no other is kept.
    const fn properties(self) -> &'static [&'static str] {
        match self {
            Self::Power => &["OnBattery"],
            Self::Battery => &["Type", "IsPresent", "Percentage"],
            Self::Network => &["Startup", "State", "Connectivity", "Metered", "PrimaryConnection"],
            Self::Connection => &["Type", "Id", "Uuid", "SpecificObject", "Devices"],
            Self::AccessPoint => &["Ssid"],
            Self::Device => &["Udi"],
            Self::Modem => &["OperatorCode", "Apn"],
            Self::Registration3gpp => &["RegistrationState", "OperatorCode"],
            Self::RegistrationCdma => &["Cdma1xRegistrationState", "EvdoRegistrationState"],
        }
    }

    /// Whether its changes are listened to. An access point tells of its strength all the time and its name never
    /// changes; a device is what it is.
    pub(super) const fn changes(self) -> bool {
        !matches!(self, Self::AccessPoint | Self::Device)
    }
}

/// One interface of one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Object {
    pub(super) kind: Kind,
    pub(super) path: Arc<str>,
}

impl Object {
    /// The object at `path`; `None` for what is no path, or the root, which stands for none.
    pub(super) fn new(kind: Kind, path: &str) -> Option<Self> {
        (path != "/" && ObjectPath::try_from(path).is_ok()).then(|| Self { kind, path: path.into() })
    }
}

/// What is kept of a property.
#[derive(Clone, Debug, PartialEq)]
enum Fact {
    Bool(bool),
    Number(u32),
    Real(f64),
    /// A string, a path, or the first of several paths.
    Text(Arc<str>),
    Bytes(Arc<[u8]>),
}

/// A longer text is a lie, and dropped.
const LONGEST_TEXT: usize = 1024;
/// `struct iw_point`'s IW_ESSID_MAX_SIZE, the only bytes read here.
const LONGEST_BYTES: usize = 32;

/// The properties of one object. What is missing, or of another type than documented, is not there.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Facts(BTreeMap<&'static str, Fact>);

impl Facts {
    /// Takes in what has changed, and forgets what `kind` has no use for.
    pub(super) fn take(&mut self, kind: Kind, changed: &HashMap<&str, Variant<'_>>) {
        for name in kind.properties() {
            match changed.get(name).map(fact) {
                None => {}
                Some(Some(fact)) => {
                    self.0.insert(name, fact);
                }
                Some(None) => {
                    log::debug!("{}.{name} is not what it should be; ignored", kind.interface());
                    self.0.remove(name);
                }
            }
        }
    }

    /// Whether one of `names` is of use to `kind`.
    pub(super) fn concern(kind: Kind, names: &[&str]) -> bool {
        names.iter().any(|name| kind.properties().contains(name))
    }

    pub(super) fn bool(&self, name: &str) -> Option<bool> {
        let Some(Fact::Bool(value)) = self.0.get(name) else { return None };
        Some(*value)
    }

    pub(super) fn number(&self, name: &str) -> Option<u32> {
        let Some(Fact::Number(value)) = self.0.get(name) else { return None };
        Some(*value)
    }

    pub(super) fn real(&self, name: &str) -> Option<f64> {
        let Some(Fact::Real(value)) = self.0.get(name) else { return None };
        Some(*value)
    }

    /// A text that is not empty.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        let Some(Fact::Text(value)) = self.0.get(name) else { return None };
        (!value.is_empty()).then_some(value)
    }

    /// Bytes, at least one.
    pub(super) fn bytes(&self, name: &str) -> Option<&[u8]> {
        let Some(Fact::Bytes(value)) = self.0.get(name) else { return None };
        (!value.is_empty()).then_some(value)
    }
}

fn fact(value: &Variant<'_>) -> Option<Fact> {
    let text = |text: &str| (text.len() <= LONGEST_TEXT).then(|| Fact::Text(text.into()));
    match value {
        Variant::Bool(value) => Some(Fact::Bool(*value)),
        Variant::U32(value) => Some(Fact::Number(*value)),
        Variant::F64(value) => Some(Fact::Real(*value)),
        Variant::Str(value) => text(value.as_str()),
        Variant::ObjectPath(value) => text(value.as_str()),
        Variant::Array(values) => match values.inner() {
            [Variant::ObjectPath(first), ..] => text(first.as_str()),
            values if values.len() <= LONGEST_BYTES => {
                let bytes = values.iter().map(|value| if let Variant::U8(byte) = value { Some(*byte) } else { None });
                bytes.collect::<Option<Arc<[u8]>>>().map(Fact::Bytes)
            }
            _ => None,
        },
        _ => None,
    }
}

/// All that is known.
#[derive(Clone, Debug, Default)]
pub(super) struct Known(pub(super) BTreeMap<Object, Facts>);

impl Known {
    /// What is known of the only object of a kind there is.
    pub(super) fn only(&self, kind: Kind) -> Option<&Facts> {
        self.0.iter().find_map(|(object, facts)| (object.kind == kind).then_some(facts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_another_type_or_too_large_is_not_there() {
        let mut facts = Facts::default();
        let good: HashMap<&str, Variant<'_>> = [
            ("Type", 2_u32.into()),
            ("IsPresent", true.into()),
            ("Percentage", 55.5_f64.into()),
            ("Vendor", "x".into()),
        ]
        .into();
        facts.take(Kind::Battery, &good);
        assert_eq!(
            (facts.number("Type"), facts.bool("IsPresent"), facts.real("Percentage")),
            (Some(2), Some(true), Some(55.5))
        );
        assert_eq!(facts.text("Vendor"), None, "of no use, so not kept");
        facts.take(Kind::Battery, &[("Percentage", "55.5".into()), ("Type", 7_i32.into())].into());
        assert_eq!((facts.number("Type"), facts.real("Percentage"), facts.bool("IsPresent")), (None, None, Some(true)));

        let mut facts = Facts::default();
        facts.take(Kind::Connection, &[("Id", "x".repeat(LONGEST_TEXT + 1).into()), ("Type", "".into())].into());
        assert_eq!((facts.text("Id"), facts.text("Type")), (None, None));
        facts.take(Kind::AccessPoint, &[("Ssid", Variant::from(vec![0_u8; LONGEST_BYTES + 1]))].into());
        assert_eq!(facts.bytes("Ssid"), None);
        facts.take(Kind::AccessPoint, &[("Ssid", Variant::from(vec![0_u8, 255]))].into());
        assert_eq!(facts.bytes("Ssid"), Some(&[0, 255][..]));
        facts.take(Kind::AccessPoint, &[("Ssid", Variant::from(vec!["a"]))].into());
        assert_eq!(facts.bytes("Ssid"), None);
    }

    #[test]
    fn the_root_and_what_is_no_path_are_no_object() {
        for path in ["", "/", "relative", "/a'b", "/a/", "/a//b"] {
            assert_eq!(Object::new(Kind::Device, path), None, "{path}");
        }
        assert!(Object::new(Kind::Device, "/org/freedesktop/NetworkManager/Devices/3").is_some());
    }
}
