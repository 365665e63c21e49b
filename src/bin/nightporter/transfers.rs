//! `nightporter transfers`: what is downloaded and uploaded for apps, and how far it has come.

use nightporter::{transfer::Direction, view::Transfer};

use crate::render::{Style, Table, mib};

/// A bar this wide, for eyes.
const BAR: u64 = 12;

/// As a table.
pub(crate) fn list(transfers: &[Transfer], style: Style) -> String {
    if transfers.is_empty() {
        return "There are no transfers.\n".into();
    }
    let mut table = Table::new(["ID", "APP", "", "STATE", "PROGRESS", "WHAT", ""]).right(&[0]);
    for transfer in transfers {
        table.row([
            transfer.id.to_string(),
            transfer.app.clone(),
            match transfer.direction {
                Direction::Download => "down".into(),
                Direction::Upload => "up".into(),
            },
            transfer.state.clone(),
            progress(transfer, style),
            if transfer.title.is_empty() { transfer.place.clone() } else { transfer.title.clone() },
            transfer.reason.clone().unwrap_or_default(),
        ]);
    }
    table.to_text()
}

fn progress(transfer: &Transfer, style: Style) -> String {
    let sizes = |total| format!("{} of {}", size(transfer.bytes), size(total));
    match transfer.total.filter(|total| *total > 0 && transfer.told.is_none()) {
        Some(total) if style.bars => {
            format!("{} {}", bar(transfer.bytes, total), sizes(total))
        }
        Some(total) => sizes(total),
        None => size(transfer.bytes),
    }
}

fn bar(bytes: u64, total: u64) -> String {
    // Not beyond what fits: a server may send more than it has said.
    let full = (u128::from(bytes.min(total)) * u128::from(BAR) / u128::from(total.max(1))) as usize;
    "█".repeat(full) + &"░".repeat(BAR as usize - full)
}

fn size(bytes: u64) -> String {
    mib(bytes / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_drawn_for_eyes_alone() {
        let transfer = Transfer {
            id: 7,
            app: "org.example.App".into(),
            direction: Direction::Download,
            title: "Map of Bavaria".into(),
            place: "maps.example/by".into(),
            state: "running".into(),
            reason: None,
            bytes: 3 << 20,
            total: Some(6 << 20),
            retry_in_secs: None,
            begun: String::new(),
            told: None,
        };
        let of = |transfer: &Transfer, bars| list(std::slice::from_ref(transfer), Style { bars, width: None });
        let text = of(&transfer, false);
        assert!(text.contains("3.0 MiB of 6.0 MiB") && text.contains("Map of Bavaria"), "{text}");
        assert!(of(&transfer, true).contains("██████░░░░░░ 3.0 MiB"), "{}", of(&transfer, true));
        let done = Transfer { state: "done".into(), told: Some(false), title: String::new(), ..transfer };
        let text = of(&done, true);
        assert!(!text.contains('█') && text.contains("maps.example/by"), "{text}");
        assert_eq!(list(&[], Style { bars: true, width: None }), "There are no transfers.\n");
    }
}
