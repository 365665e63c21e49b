//! A message bus of our own: no service is found on it, nothing is started by it.

use std::{fs, path::Path, process::Command};

use super::{Result, child::Child};

const CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=SOCKET</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"#;

/// A running dbus-daemon; ends when dropped.
pub(crate) struct PrivateBus {
    _daemon: Child,
    /// What clients connect to.
    pub(crate) address: String,
}

impl PrivateBus {
    /// Starts one with its socket and configuration in `dir`.
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let socket = dir.join("bus");
        let config = dir.join("bus.conf");
        fs::write(&config, CONFIG.replace("SOCKET", &socket.to_string_lossy()))?;
        let mut command = Command::new("dbus-daemon");
        command.arg("--nofork").arg("--print-address=1").arg(format!("--config-file={}", config.display()));
        let daemon = Child::start(&mut command, true)?;
        let address = daemon.first_line.clone();
        Ok(Self { _daemon: daemon, address })
    }
}
