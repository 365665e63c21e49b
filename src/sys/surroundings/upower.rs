//! Mains and battery, from UPower (its D-Bus API, org.freedesktop.UPower and .UPower.Device).

use super::facts::{Facts, Kind, Known, Object};

/// What is to be read.
pub(super) fn wanted() -> impl Iterator<Item = Object> {
    let power = Object::new(Kind::Power, "/org/freedesktop/UPower");
    let battery = Object::new(Kind::Battery, "/org/freedesktop/UPower/devices/DisplayDevice");
    power.into_iter().chain(battery)
}

/// Whether the machine is on mains, and its charge in whole percent, rounded down.
pub(super) fn read(known: &Known) -> (Option<bool>, Option<u8>) {
    let on_battery = known.only(Kind::Power).and_then(|power| power.bool("OnBattery"));
    let battery = known.only(Kind::Battery);
    // A board without a battery is on mains whatever else is said.
    if battery.and_then(|battery| battery.bool("IsPresent")) == Some(false) {
        return (Some(true), None);
    }
    (on_battery.map(|on_battery| !on_battery), battery.and_then(charge))
}

fn charge(battery: &Facts) -> Option<u8> {
    const BATTERY: u32 = 2;
    const UPS: u32 = 3;
    let supplies = battery.bool("IsPresent") == Some(true) && matches!(battery.number("Type"), Some(BATTERY | UPS));
    let percent = battery.real("Percentage").filter(|percent| supplies && percent.is_finite())?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is between 0 and 100")]
    Some(percent.clamp(0.0, 100.0) as u8)
}

#[cfg(test)]
mod tests {
    use zbus::Variant;

    use super::*;

    fn reading(
        on_battery: Option<Variant<'static>>,
        device: &[(&'static str, Variant<'static>)],
    ) -> (Option<bool>, Option<u8>) {
        let mut known = Known::default();
        for object in wanted() {
            let mut facts = Facts::default();
            if object.kind == Kind::Power {
                let value = on_battery.as_ref().map(|value| ("OnBattery", value.try_clone().unwrap()));
                facts.take(object.kind, &value.into_iter().collect());
            } else {
                let device = device.iter().map(|(name, value)| (*name, value.try_clone().unwrap()));
                facts.take(object.kind, &device.collect());
            }
            known.0.insert(object, facts);
        }
        read(&known)
    }

    fn battery(kind: u32, present: bool, percent: f64) -> [(&'static str, Variant<'static>); 3] {
        [("Type", kind.into()), ("IsPresent", present.into()), ("Percentage", percent.into())]
    }

    #[test]
    fn mains_and_charge() {
        for (on_battery, device, expected) in [
            (Some(true.into()), battery(2, true, 54.99), (Some(false), Some(54))),
            (Some(false.into()), battery(3, true, 100.0), (Some(true), Some(100))),
            // None there: UPower's stand-in has type 0 then. Never off mains.
            (Some(false.into()), battery(0, false, 0.0), (Some(true), None)),
            (Some(true.into()), battery(0, false, 0.0), (Some(true), None)),
            // A mouse's battery.
            (Some(false.into()), battery(5, true, 9.0), (Some(true), None)),
            // Lies.
            (Some(true.into()), battery(2, true, -3.0), (Some(false), Some(0))),
            (Some(true.into()), battery(2, true, 1e300), (Some(false), Some(100))),
            (Some(true.into()), battery(2, true, f64::NAN), (Some(false), None)),
            (Some("yes".into()), battery(2, true, 50.0), (None, Some(50))),
            (None, battery(2, true, 50.0), (None, Some(50))),
        ] {
            assert_eq!(reading(on_battery, &device), expected, "{device:?}");
        }
        assert_eq!(reading(Some(true.into()), &[]), (Some(false), None));
        assert_eq!(read(&Known::default()), (None, None));
    }
}
