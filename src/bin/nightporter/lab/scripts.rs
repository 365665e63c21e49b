//! The files a world is started by: a script for each app, and the private bus's configuration.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use crate::exit::{Exit, Failure};

/// One app.
#[derive(Clone, Debug)]
pub(crate) struct AppSpec {
    pub(crate) name: String,
    /// The shell's words that start it on its own.
    pub(crate) resident: String,
    /// The shell's words that start it behind the daemon.
    pub(crate) shared: String,
    /// Those that start it behind the daemon the first time, if they are others.
    pub(crate) registering: Option<String>,
    /// What it gets into its environment beside the contract.
    pub(crate) env: Vec<(String, String)>,
    /// The cgroup it is to live in.
    pub(crate) cgroup: Option<PathBuf>,
}

/// Stands for a directory of the app's own in its command and its environment.
pub(crate) const DIR_MARK: &str = "{dir}";

/// Where they are written, and what all apps get.
pub(super) struct Place<'a> {
    pub(super) dir: &'a Path,
    pub(super) report_socket: &'a str,
}

/// Writes the script that starts an app: the same contract however it starts.
pub(super) fn start(
    place: &Place<'_>,
    app: &AppSpec,
    how: &str,
    command: &str,
    more: &[(&str, &str)],
) -> Result<PathBuf, Failure> {
    let mode = if how == "resident" { how } else { "shared" };
    let mut script = String::new();
    if let Some(cgroup) = &app.cgroup {
        script.push_str(&format!("echo $$ >{} || exit\n", quoted(&text(&cgroup.join("cgroup.procs"))?)));
        // Of all there is on the machine, an app of ours is to go first.
        script.push_str("echo 200 2>/dev/null >/proc/self/oom_score_adj\n");
    }
    if let Ok(dir) = env::current_dir() {
        script.push_str(&format!("cd {} || exit\n", quoted(&text(&dir)?)));
    }
    let home = place.dir.join(format!("home-{}", app.name));
    let dir = text(&home)?;
    if command.contains(DIR_MARK) || app.env.iter().any(|(_, value)| value.contains(DIR_MARK)) {
        fs::create_dir_all(&home).map_err(|error| cannot_write(&home, &error))?;
    }
    let own = [
        ("NIGHTPORTER_SAMPLE_NAME", app.name.as_str()),
        ("NIGHTPORTER_SAMPLE_MODE", mode),
        ("NIGHTPORTER_SAMPLE_REPORT", place.report_socket),
    ];
    let env = app.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in env.chain(own).chain(more.iter().copied()) {
        script.push_str(&format!("export {name}={}\n", quoted(&value.replace(DIR_MARK, &dir))));
    }
    // The log is given here because the bus starts apps with its own.
    script.push_str(&format!(
        "exec {} >>{1} 2>&1\n",
        command.replace(DIR_MARK, &dir),
        quoted(&text(&place.dir.join("apps.log"))?)
    ));
    let path = place.dir.join(format!("{}.{how}.sh", app.name));
    fs::write(&path, script).map_err(|error| cannot_write(&path, &error))?;
    Ok(path)
}

/// Writes the script that does `first` once and `then` from then on.
pub(super) fn first(place: &Place<'_>, app: &AppSpec, first: &Path, then: &Path) -> Result<PathBuf, Failure> {
    let mark = place.dir.join(format!("{}.registered", app.name));
    let [mark, first, then] = [&mark, first, then].map(|path| text(path).map(|path| quoted(&path)));
    let (mark, first, then) = (mark?, first?, then?);
    let script = format!("[ -e {mark} ] && exec /bin/sh {then}\n: >{mark}\nexec /bin/sh {first}\n");
    let path = place.dir.join(format!("{}.sh", app.name));
    fs::write(&path, script).map_err(|error| cannot_write(&path, &error))?;
    Ok(path)
}

/// The configuration of a private bus at this address that starts what the directory's files say.
pub(super) fn bus(address: &str, services: &str) -> String {
    format!(
        r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>{}</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{}</servicedir>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
  <limit name="max_connections_per_user">4096</limit>
  <limit name="max_pending_service_starts">4096</limit>
</busconfig>
"#,
        xml(address),
        xml(services)
    )
}

pub(super) fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::new(Exit::CannotCreate, format!("cannot write {}: {error}", path.display()))
}

pub(crate) fn text(path: &Path) -> Result<String, Failure> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::new(Exit::Data, format!("the path {} is not UTF-8", path.display())))
}

/// Quoted for sh, and for the bus, which splits `Exec=` the same way.
pub(crate) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_gets_stays_one_word() {
        assert_eq!(quoted("/tmp/it's here"), r"'/tmp/it'\''s here'");
        assert_eq!(xml("a<b>&c"), "a&lt;b&gt;&amp;c");
    }
}
