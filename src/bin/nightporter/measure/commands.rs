//! From the experiment's words to what a shell runs, and from an address to its port.

use std::path::Path;

use crate::lab::{scripts::quoted, world::beside};

/// A shell's line that runs these words. A program of ours is the one beside this one.
pub(super) fn line(words: &[String]) -> String {
    let word = |(index, word): (usize, &String)| match (index, word.as_str()) {
        (0, "nightporter-sample") => {
            let path = beside(word).ok();
            quoted(path.as_deref().and_then(Path::to_str).unwrap_or(word))
        }
        _ => quoted(word),
    };
    words.iter().enumerate().map(word).collect::<Vec<_>>().join(" ")
}

/// The port of a `ws://host:port/` address.
pub(super) fn port_of(url: &str) -> Option<u16> {
    let rest = url.strip_prefix("ws://").or_else(|| url.strip_prefix("wss://"))?;
    let (host, port) = rest.split_once('/').map_or(rest, |(authority, _)| authority).rsplit_once(':')?;
    port.parse().ok().filter(|port| *port > 0 && !host.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_words() {
        let words = ["a".to_owned(), "b c".into(), "$(d)".into(), "it's".into()];
        assert_eq!(line(&words), r"'a' 'b c' '$(d)' 'it'\''s'");
    }

    #[test]
    fn a_port_is_found_where_there_is_one() {
        assert_eq!(port_of("ws://127.0.0.1:8030/"), Some(8030));
        assert_eq!(port_of("wss://[::1]:443"), Some(443));
        for wrong in ["ws://host/", "http://host:80/", "ws://:1/", "ws://host:0/", "ws://host:x/"] {
            assert_eq!(port_of(wrong), None, "{wrong}");
        }
    }
}
