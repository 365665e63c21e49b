//! The network in use, from NetworkManager; whether it is another operator's, from ModemManager.
//!
//! NetworkManager's D-Bus API: org.freedesktop.NetworkManager, .Connection.Active, .AccessPoint, .Device, .Device.Modem;
//! ModemManager's: .Modem.Modem3gpp, .Modem.ModemCdma. Its name for a network device that is a modem (`Udi`) is
//! ModemManager's path of that modem.

use std::{fmt::Write, sync::Arc};

use super::facts::{Facts, Kind, Known, Object};
use crate::model::{Network, NetworkKind, Reach};

/// What is to be read, as far as is known by now; `modems`: whether there is a ModemManager.
pub(super) fn wanted(known: &Known, modems: bool) -> Vec<Object> {
    let mut wanted: Vec<Object> = Object::new(Kind::Network, "/org/freedesktop/NetworkManager").into_iter().collect();
    let mut want = |kind, path: Option<&str>| wanted.extend(path.and_then(|path| Object::new(kind, path)));
    want(Kind::Connection, known.only(Kind::Network).and_then(|network| network.text("PrimaryConnection")));
    let Some(connection) = known.only(Kind::Connection) else { return wanted };
    match kind(connection) {
        NetworkKind::Wifi => want(Kind::AccessPoint, connection.text("SpecificObject")),
        NetworkKind::Mobile => {
            let device = connection.text("Devices");
            want(Kind::Device, device);
            want(Kind::Modem, device);
            let registration =
                if connection.text("Type") == Some("cdma") { Kind::RegistrationCdma } else { Kind::Registration3gpp };
            // It may be oFono's modem as well, which has none of this.
            let modem = known.only(Kind::Device).and_then(|device| device.text("Udi"));
            want(registration, modem.filter(|path| modems && path.starts_with("/org/freedesktop/ModemManager1/")));
        }
        NetworkKind::Unknown | NetworkKind::Wired => {}
    }
    wanted
}

/// The network in use, as far as is known.
pub(super) fn read(known: &Known) -> Network {
    let Some(network) = known.only(Kind::Network) else { return Network::default() };
    let connection = known.only(Kind::Connection);
    let kind = connection.map(kind).unwrap_or_default();
    Network {
        kind,
        id: connection.and_then(|connection| id(known, kind, connection)),
        metered: matches!(network.number("Metered"), Some(METERED_YES | METERED_GUESS_YES)),
        roaming: kind == NetworkKind::Mobile && roaming(known),
        reach: reach(network),
    }
}

/// Whether NetworkManager has not yet tried every connection it has: after a restart there seems to be no network.
pub(super) fn starting(known: &Known) -> bool {
    known.only(Kind::Network).and_then(|network| network.bool("Startup")) == Some(true)
}

// NMMetered.
const METERED_YES: u32 = 1;
const METERED_GUESS_YES: u32 = 3;

fn kind(connection: &Facts) -> NetworkKind {
    match connection.text("Type") {
        Some("802-11-wireless") => NetworkKind::Wifi,
        Some("gsm" | "cdma") => NetworkKind::Mobile,
        Some("802-3-ethernet" | "bridge" | "bond" | "team" | "vlan" | "infiniband" | "pppoe" | "adsl") => {
            NetworkKind::Wired
        }
        _ => NetworkKind::Unknown,
    }
}

/// NMState and NMConnectivityState. The second is not known where its check is switched off.
fn reach(network: &Facts) -> Reach {
    match (network.number("State"), network.number("Connectivity")) {
        // Asleep, disconnected, disconnecting, connecting.
        (Some(10..=40), _) | (_, Some(1)) => Reach::None,
        (_, Some(2)) => Reach::Portal,
        (_, Some(3)) => Reach::Limited,
        (_, Some(4)) => Reach::Full,
        // Connected, but without a default route.
        (Some(50), _) => Reach::Limited,
        _ => Reach::Unknown,
    }
}

fn roaming(known: &Known) -> bool {
    let gsm = known.only(Kind::Registration3gpp).and_then(|modem| modem.number("RegistrationState"));
    // Roaming; for SMS only; circuit-switched fallback not preferred.
    if matches!(gsm, Some(5 | 7 | 10)) {
        return true;
    }
    let cdma = known.only(Kind::RegistrationCdma);
    ["Cdma1xRegistrationState", "EvdoRegistrationState"]
        .into_iter()
        .any(|name| cdma.and_then(|modem| modem.number(name)) == Some(3))
}

fn id(known: &Known, kind: NetworkKind, connection: &Facts) -> Option<Arc<str>> {
    // A name nobody would type is replaced by what names the connection for good.
    let name = || {
        let id = connection.text("Id").filter(|id| id.len() <= LONGEST_NAME);
        id.or_else(|| connection.text("Uuid").filter(|uuid| uuid.len() <= LONGEST_NAME)).map(|id| escape(id.as_bytes()))
    };
    let named = |kind: &str| name().map(|name| format!("{kind}/{name}"));
    let id = match kind {
        NetworkKind::Wifi => {
            let ssid = known.only(Kind::AccessPoint).and_then(|point| point.bytes("Ssid"));
            ssid.map(|ssid| format!("wifi/{}", escape(ssid))).or_else(|| named("wifi"))
        }
        NetworkKind::Mobile => {
            let text = |kind, name| {
                known.only(kind).and_then(|facts| facts.text(name)).filter(|text| text.len() <= LONGEST_NAME)
            };
            let operator = text(Kind::Modem, "OperatorCode").or_else(|| text(Kind::Registration3gpp, "OperatorCode"));
            let apn = text(Kind::Modem, "Apn");
            if operator.is_some() || apn.is_some() {
                let part = |part: Option<&str>| escape(part.unwrap_or_default().as_bytes());
                Some(format!("mobile/{}/{}", part(operator), part(apn)))
            } else {
                named("mobile")
            }
        }
        NetworkKind::Wired => named("wired"),
        NetworkKind::Unknown => {
            let kind = connection.text("Type").filter(|kind| kind.len() <= LONGEST_NAME)?;
            named(&escape(kind.as_bytes()))
        }
    };
    id.map(Arc::from)
}

/// More bytes are no name; an APN may have 100 (3GPP TS 23.003 §9.1).
const LONGEST_NAME: usize = 128;

/// Readable and without loss: what is not printable text, and what has a meaning in an id, as `%XX`.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let byte = |text: &mut String, byte: u8| {
        let _ = write!(text, "%{byte:02X}");
    };
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() || matches!(character, '%' | '/') {
                let mut buffer = [0; 4];
                character.encode_utf8(&mut buffer).bytes().for_each(|one| byte(&mut text, one));
            } else {
                text.push(character);
            }
        }
        chunk.invalid().iter().for_each(|one| byte(&mut text, *one));
    }
    text
}

#[cfg(test)]
mod tests {
    use zbus::Variant;

    use super::*;

    type Properties = Vec<(&'static str, Variant<'static>)>;

    fn known(objects: Vec<(Kind, &str, Properties)>) -> Known {
        let mut known = Known::default();
        for (kind, path, properties) in objects {
            let mut facts = Facts::default();
            facts.take(kind, &properties.into_iter().collect());
            known.0.insert(Object::new(kind, path).unwrap(), facts);
        }
        known
    }

    fn manager(state: u32, connectivity: u32, metered: u32) -> (Kind, &'static str, Properties) {
        let primary = zbus::ObjectPath::try_from("/active/1").unwrap();
        let properties = vec![
            ("State", state.into()),
            ("Connectivity", connectivity.into()),
            ("Metered", metered.into()),
            ("PrimaryConnection", Variant::from(primary)),
        ];
        (Kind::Network, "/org/freedesktop/NetworkManager", properties)
    }

    fn active(kind: &'static str, id: &str) -> (Kind, &'static str, Properties) {
        let devices = vec![zbus::ObjectPath::try_from("/device/1").unwrap()];
        let properties = vec![
            ("Type", kind.into()),
            ("Id", id.to_owned().into()),
            ("Uuid", "0a1b".into()),
            ("Devices", Variant::from(devices)),
            ("SpecificObject", Variant::from(zbus::ObjectPath::try_from("/ap/1").unwrap())),
        ];
        (Kind::Connection, "/active/1", properties)
    }

    fn id_of(objects: Vec<(Kind, &str, Properties)>) -> Option<String> {
        read(&known(objects)).id.map(|id| id.to_string())
    }

    #[test]
    fn how_far_the_network_reaches() {
        for (state, connectivity, expected) in [
            (70, 4, Reach::Full),
            (70, 0, Reach::Unknown),
            (60, 3, Reach::Limited),
            (60, 2, Reach::Portal),
            (50, 0, Reach::Limited),
            (40, 4, Reach::None),
            (20, 0, Reach::None),
            (10, 1, Reach::None),
            (0, 0, Reach::Unknown),
            (0, 4, Reach::Full),
            (4711, 4711, Reach::Unknown),
        ] {
            assert_eq!(read(&known(vec![manager(state, connectivity, 0)])).reach, expected, "{state} {connectivity}");
        }
        assert_eq!(read(&Known::default()), Network::default());
    }

    #[test]
    fn metered_where_it_is_said_or_guessed() {
        for (metered, expected) in [(0, false), (1, true), (2, false), (3, true), (4, false), (99, false)] {
            assert_eq!(read(&known(vec![manager(70, 4, metered)])).metered, expected, "{metered}");
        }
    }

    #[test]
    fn networks_are_named_by_what_carries_them() {
        let with = |more: Vec<(Kind, &'static str, Properties)>| {
            let mut all = vec![manager(70, 4, 0)];
            all.extend(more);
            id_of(all)
        };
        let point = |ssid: &[u8]| (Kind::AccessPoint, "/ap/1", vec![("Ssid", Variant::from(ssid.to_vec()))]);
        let wifi = |ssid: &[u8]| with(vec![active("802-11-wireless", "Home profile"), point(ssid)]);
        assert_eq!(with(vec![active("802-3-ethernet", "Wired connection 1")]).unwrap(), "wired/Wired connection 1");
        assert_eq!(wifi(b"Caf\xC3\xA9 5G").unwrap(), "wifi/Café 5G");
        assert_eq!(wifi(b"50%/\xFF\0\xE2\x82").unwrap(), "wifi/50%25%2F%FF%00%E2%82");
        assert_ne!(wifi(b"\xFF"), wifi(b"%FF"));
        // Hidden, or the access point says nothing.
        assert_eq!(wifi(b"").unwrap(), "wifi/Home profile");
        assert_eq!(with(vec![active("802-11-wireless", "Home profile")]).unwrap(), "wifi/Home profile");
        let modem = |operator: &'static str, apn: &'static str| {
            (Kind::Modem, "/device/1", vec![("OperatorCode", operator.into()), ("Apn", apn.into())])
        };
        let gsm = |more| with(vec![active("gsm", "T/Mobile"), more]);
        assert_eq!(gsm(modem("26201", "internet.telekom")).unwrap(), "mobile/26201/internet.telekom");
        assert_eq!(gsm(modem("", "internet")).unwrap(), "mobile//internet");
        assert_eq!(gsm(modem("", "")).unwrap(), "mobile/T%2FMobile");
        let registration = (Kind::Registration3gpp, "/modem/1", vec![("OperatorCode", "26202".into())]);
        assert_eq!(with(vec![active("gsm", "x"), modem("", "web"), registration]).unwrap(), "mobile/26202/web");
        assert_eq!(with(vec![active("wireguard", "home")]).unwrap(), "wireguard/home");
        assert_eq!(with(vec![active("", "home")]), None);
        assert_eq!(with(vec![active("802-3-ethernet", &"x".repeat(129))]).unwrap(), "wired/0a1b");
        assert_eq!(with(vec![]), None);
    }

    #[test]
    fn roaming_is_what_the_registration_says_of_a_mobile_network() {
        let roaming = |kind, registration: Kind, properties: Properties| {
            read(&known(vec![manager(70, 4, 0), active(kind, "x"), (registration, "/modem/1", properties)])).roaming
        };
        for (state, expected) in [(0_u32, false), (1, false), (5, true), (7, true), (9, false), (10, true), (11, false)]
        {
            let properties: Properties = vec![("RegistrationState", Variant::from(state))];
            assert_eq!(roaming("gsm", Kind::Registration3gpp, properties), expected, "{state}");
        }
        assert!(!roaming("802-11-wireless", Kind::Registration3gpp, vec![("RegistrationState", 5_u32.into())]));
        assert!(!roaming("gsm", Kind::Registration3gpp, vec![("RegistrationState", "roaming".into())]));
        assert!(roaming("cdma", Kind::RegistrationCdma, vec![("EvdoRegistrationState", 3_u32.into())]));
        assert!(!roaming("cdma", Kind::RegistrationCdma, vec![("Cdma1xRegistrationState", 2_u32.into())]));
    }

    #[test]
    fn only_what_matters_for_the_kind_of_network_is_read() {
        let wanted = |objects, modems| {
            wanted(&known(objects), modems).into_iter().map(|object| (object.kind, object.path.to_string())).collect()
        };
        let kinds = |wanted: Vec<(Kind, String)>| wanted.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>();
        assert_eq!(kinds(wanted(vec![], true)), [Kind::Network]);
        assert_eq!(kinds(wanted(vec![manager(70, 4, 0)], true)), [Kind::Network, Kind::Connection]);
        let wired = vec![manager(70, 4, 0), active("802-3-ethernet", "x")];
        assert_eq!(kinds(wanted(wired, true)), [Kind::Network, Kind::Connection]);
        let wifi: Vec<_> = wanted(vec![manager(70, 4, 0), active("802-11-wireless", "x")], true);
        assert_eq!(wifi.last().unwrap(), &(Kind::AccessPoint, "/ap/1".to_owned()));
        let gsm = |udi: &'static str| {
            vec![manager(70, 4, 0), active("gsm", "x"), (Kind::Device, "/device/1", vec![("Udi", udi.into())])]
        };
        let path = "/org/freedesktop/ModemManager1/Modem/0";
        let all: Vec<_> = wanted(gsm(path), true);
        assert_eq!(all.last().unwrap(), &(Kind::Registration3gpp, path.to_owned()));
        assert_eq!(kinds(wanted(gsm(path), false)), [Kind::Network, Kind::Connection, Kind::Device, Kind::Modem]);
        assert_eq!(kinds(wanted(gsm("/ril_0"), true)), [Kind::Network, Kind::Connection, Kind::Device, Kind::Modem]);
    }
}
