//! The command line.

use std::{env, ffi::OsStr, io::Write, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use ::http::Uri;
use clap::{Args, Parser, error::ErrorKind};

/// sysexits.h: the command was used wrongly.
pub(crate) const EX_USAGE: u8 = 64;
/// sysexits.h: the address is taken, or another relay holds the state.
pub(crate) const EX_UNAVAILABLE: u8 = 69;
/// sysexits.h: the state directory cannot be made or written.
pub(crate) const EX_CANTCREAT: u8 = 73;
/// sysexits.h: the database failed.
pub(crate) const EX_IOERR: u8 = 74;
/// sysexits.h: the state is of a newer version.
pub(crate) const EX_CONFIG: u8 = 78;

const STATE_NAME: &str = "nightporter-relay";

/// The embedded push server of Night Porter: Web Push (RFC 8030) in, the autopush WebSocket out.
///
/// It speaks plain HTTP and knows no TLS. Leave it on loopback, or put a reverse proxy that ends TLS in front of it
/// and give its address with --public-url. One household, not a service: for more, run Mozilla autopush or ntfy.
#[derive(Clone, Debug, Parser)]
#[command(name = "nightporter-relay", version)]
pub(crate) struct Settings {
    /// Address to listen on; port 0 takes a free one. The first line of output names the address in use
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8030")]
    pub(crate) listen: SocketAddr,

    /// What endpoints begin with, as senders reach this server [default: http://ADDR]
    #[arg(long, value_name = "URL", value_parser = public_url)]
    pub(crate) public_url: Option<PublicUrl>,

    /// Where the database lives [default: $STATE_DIRECTORY, else $XDG_STATE_HOME/nightporter-relay, else
    /// ~/.local/state/nightporter-relay]
    #[arg(long, value_name = "DIR", conflicts_with = "memory")]
    pub(crate) state_dir: Option<PathBuf>,

    /// Keep everything in memory: nothing survives the end of the process
    #[arg(long)]
    pub(crate) memory: bool,

    /// Times of the connections to devices and senders
    #[command(flatten)]
    pub(crate) times: Times,

    /// Bounds
    #[command(flatten)]
    pub(crate) limits: Limits,
}

/// Times; written like 300s, 5min or 250ms.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Times")]
pub(crate) struct Times {
    /// From one WebSocket ping to the next, counted from the last pong
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = duration)]
    pub(crate) ping_interval: Duration,

    /// How long a device may take to answer a ping
    #[arg(long, value_name = "TIME", default_value = "4s", value_parser = duration)]
    pub(crate) pong_timeout: Duration,

    /// Pings a device sends itself ({}) may not be closer than this, the first one apart
    #[arg(long, value_name = "TIME", default_value = "45s", value_parser = duration)]
    pub(crate) min_client_ping: Duration,

    /// How long a new WebSocket may take to say hello
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub(crate) handshake_timeout: Duration,

    /// How long a request may take to arrive, and a kept-alive connection may say nothing
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) request_timeout: Duration,

    /// How long a device may take to read one frame before it is cut off; its messages stay stored
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) write_timeout: Duration,
}

/// Bounds; each has a rule for what happens beyond it (nightporter-relay(8), LIMITS).
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Limits")]
pub(crate) struct Limits {
    /// Connections at a time, devices and senders together; beyond it: 503
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) max_connections: u32,

    /// Devices with channels; beyond it: register answers 500
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) max_users: u32,

    /// Channels of one device; beyond it: register answers 500
    // As many as a daemon has registrations at most, unless it is told otherwise (limits.registrations).
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) max_channels: u32,

    /// Messages waiting for one device; beyond it: 429
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub(crate) max_messages: u32,

    /// Messages waiting for one channel; beyond it: 429
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) max_channel_messages: u32,

    /// Bytes waiting for one device; beyond it: 429
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
    pub(crate) max_bytes: u32,

    /// Size of one message; beyond it: 413. RFC 8030 demands at least 4096
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) max_body: u32,

    /// Size of a request's head; beyond it: 431
    #[arg(long, value_name = "BYTES", default_value_t = 16384, value_parser = clap::value_parser!(u32).range(8192..=1 << 20))]
    pub(crate) max_head: u32,

    /// Posts to one endpoint a minute, on average; beyond it: 429
    #[arg(long, value_name = "N", default_value_t = 6000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: u32,

    /// Posts to one endpoint at once; beyond it: 429
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) burst: u32,

    /// Stored messages a device may read before it has caught up; beyond it the device is forgotten and closed with
    /// 1000 "SM", as autopush does. The default is twice what may wait, so that only a runaway reaches it
    #[arg(long, value_name = "N", default_value_t = 4000)]
    pub(crate) message_limit: u32,

    /// Removed endpoints remembered for answering 410; beyond it the oldest answer 404
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub(crate) max_removed: u32,

    /// Size of the database; beyond it: 507
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20, value_parser = clap::value_parser!(u64).range(65536..))]
    pub(crate) max_database: u64,
}

/// The checked `--public-url`, without a trailing slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PublicUrl {
    /// What endpoints are made from.
    pub(crate) base: String,
    /// Scheme, host and port: what VAPID's `aud` must be.
    pub(crate) origin: String,
}

/// Read the command line. `Err` holds the exit code after help, version or a usage error has been shown.
pub(crate) fn parse() -> Result<Settings, ExitCode> {
    Settings::try_parse().map_err(|error| {
        // A closed stdout or stderr leaves nobody to tell.
        let _ = error.print();
        let shown = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
        if shown { ExitCode::SUCCESS } else { ExitCode::from(EX_USAGE) }
    })
}

impl Settings {
    /// The state directory of this run; `None` if none is given and the environment names none.
    pub(crate) fn state_dir(&self) -> Option<PathBuf> {
        self.state_dir.clone().or_else(|| default_state_dir(|name| env::var_os(name).map(PathBuf::from)))
    }
}

impl PublicUrl {
    /// For a server that is reached as it listens.
    pub(crate) fn of_address(address: SocketAddr) -> Self {
        let base = format!("http://{address}");
        Self { origin: base.clone(), base }
    }
}

/// Say something on stdout; the tests and the demo read the address there.
pub(crate) fn announce(line: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

fn default_state_dir(var: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let absolute = |name| var(name).filter(|path| path.is_absolute());
    // systemd joins several StateDirectory= with colons; ours is the first.
    let given = var("STATE_DIRECTORY").and_then(|joined| {
        let first = joined.as_os_str().to_str().map(|text| text.split(':').next().unwrap_or(text).to_owned());
        first.map(PathBuf::from).or(Some(joined)).filter(|path| path.as_os_str() != OsStr::new(""))
    });
    given
        .or_else(|| absolute("XDG_STATE_HOME").map(|path| path.join(STATE_NAME)))
        .or_else(|| absolute("HOME").map(|path| path.join(".local/state").join(STATE_NAME)))
}

fn public_url(text: &str) -> Result<PublicUrl, String> {
    let wrong = "must be like https://push.example.org or https://example.org/push";
    let uri: Uri = text.parse().map_err(|_| wrong.to_owned())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(wrong.to_owned()) };
    if !matches!(scheme, "http" | "https") || uri.query().is_some() || authority.as_str().contains('@') {
        return Err(wrong.to_owned());
    }
    // UnifiedPush lets an endpoint have 1000 bytes, and ours adds 40.
    if text.len() > 900 {
        return Err("is longer than 900 bytes".to_owned());
    }
    let default_port = if scheme == "http" { 80 } else { 443 };
    let host = match authority.port_u16() {
        Some(port) if port == default_port => authority.host(),
        _ => authority.as_str(),
    };
    let base = format!("{scheme}://{authority}{}", uri.path().trim_end_matches('/'));
    Ok(PublicUrl { base, origin: format!("{scheme}://{host}").to_ascii_lowercase() })
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if duration.is_zero() || duration > Duration::from_secs(24 * 60 * 60) {
        return Err("must be more than nothing and at most a day".to_owned());
    }
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Settings::command().debug_assert();
    }

    #[test]
    fn the_state_directory_follows_the_environment() {
        let with = |pairs: &'static [(&str, &str)]| {
            default_state_dir(move |name| {
                pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value))
            })
        };
        assert_eq!(with(&[("STATE_DIRECTORY", "/a:/b"), ("HOME", "/h")]), Some("/a".into()));
        assert_eq!(with(&[("XDG_STATE_HOME", "/x"), ("HOME", "/h")]), Some("/x/nightporter-relay".into()));
        assert_eq!(with(&[("XDG_STATE_HOME", "x"), ("HOME", "/h")]), Some("/h/.local/state/nightporter-relay".into()));
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn a_public_url_has_an_origin() {
        let url = public_url("https://Example.org:443/push/").unwrap();
        assert_eq!((&*url.base, &*url.origin), ("https://Example.org:443/push", "https://example.org"));
        let url = public_url("http://[::1]:8030").unwrap();
        assert_eq!((&*url.base, &*url.origin), ("http://[::1]:8030", "http://[::1]:8030"));
        for wrong in ["", "example.org", "ftp://example.org", "https://u@example.org", "https://example.org/?a=b"] {
            assert!(public_url(wrong).is_err(), "{wrong}");
        }
    }
}
