//! What machine it is, how it boots, and what runs it.

use super::Root;
use crate::doctor::facts::{Boot, Machine};

pub(super) fn look(root: &Root) -> Machine {
    let os = root.read("etc/os-release").or_else(|| root.read("usr/lib/os-release")).unwrap_or_default();
    let mut ids: Vec<String> = os_release(&os, "ID").into_iter().collect();
    ids.extend(os_release(&os, "ID_LIKE").unwrap_or_default().split_ascii_whitespace().map(str::to_owned));
    let model = model(root);
    let boot = boot(root, &ids, model.as_deref());
    Machine {
        os: os_release(&os, "PRETTY_NAME"),
        boot,
        model,
        ids,
        cmdline: root.line("proc/cmdline").unwrap_or_default(),
        init: root.line("proc/1/comm"),
        systemd: root.is_dir("run/systemd/system"),
        systemd_version: systemd_version(root),
        lomiri: process(root, "lomiri"),
        waydroid: root.read("var/lib/waydroid/waydroid.cfg").map(|text| suspend_action(&text)),
    }
}

fn model(root: &Root) -> Option<String> {
    let tree = ["proc/device-tree/model", "sys/firmware/devicetree/base/model"];
    tree.into_iter().find_map(|path| root.line(path)).or_else(|| {
        let dmi = |name: &str| root.line(format!("sys/class/dmi/id/{name}"));
        match (dmi("sys_vendor"), dmi("product_name")) {
            (Some(vendor), Some(name)) => Some(format!("{vendor} {name}")),
            (vendor, name) => vendor.or(name),
        }
    })
}

/// One value of os-release(5).
fn os_release(text: &str, key: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))?;
    let value = value.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then(|| value.to_owned())
}

fn boot(root: &Root, ids: &[String], model: Option<&str>) -> Boot {
    if model.is_some_and(|model| model.starts_with("Raspberry Pi")) {
        // Since Debian 12 the first; the second is then a note that it has moved.
        let files = ["/boot/firmware/cmdline.txt", "/boot/cmdline.txt"];
        if let Some(file) = files.into_iter().find(|file| root.exists(file)) {
            return Boot::RaspberryPi(file.to_owned());
        }
    }
    if ids.iter().any(|id| id == "postmarketos") {
        let fragments =
            ["usr/bin/generate-kernel-cmdline", "usr/sbin/generate-kernel-cmdline", "usr/lib/kernel-cmdline.d"];
        return Boot::PostmarketOs { fragments: fragments.into_iter().any(|path| root.exists(path)) };
    }
    if root.exists("boot/armbianEnv.txt") {
        return Boot::Armbian;
    }
    if root.exists("usr/sbin/u-boot-update") {
        return Boot::UBootMenu;
    }
    if root.exists("etc/default/grub") {
        return Boot::Grub {
            fragments: root.is_dir("etc/default/grub.d"),
            update: root.exists("usr/sbin/update-grub"),
        };
    }
    if root.exists("etc/kernel/cmdline") {
        return Boot::KernelInstall;
    }
    Boot::Unknown
}

/// Of `libsystemd-shared-252.so`, as each systemd brings its own.
fn systemd_version(root: &Root) -> Option<u32> {
    let libraries = root.list("usr/lib").into_iter().filter(|name| name.contains("-linux-"));
    let directories = libraries.map(|name| format!("usr/lib/{name}/systemd")).chain(["usr/lib/systemd".to_owned()]);
    directories.flat_map(|directory| root.list(directory)).find_map(|name| {
        let rest = name.strip_prefix("libsystemd-shared-")?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    })
}

fn process(root: &Root, comm: &str) -> Option<u32> {
    root.list("proc").iter().find_map(|name| {
        let pid = name.parse().ok()?;
        (root.line(format!("proc/{pid}/comm"))? == comm).then_some(pid)
    })
}

/// Waydroid's default is to freeze.
fn suspend_action(text: &str) -> String {
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        (key.trim() == "suspend_action").then(|| value.trim().to_owned())
    });
    value.unwrap_or_else(|| "freeze".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_is_read_with_and_without_quotes() {
        let text =
            "# comment\nNAME='x'\nID=debian\nID_LIKE=\"a b\"\nPRETTY_NAME=\"Debian GNU/Linux 13\"\nEMPTY=\nIDX=1\n";
        assert_eq!(os_release(text, "ID").as_deref(), Some("debian"));
        assert_eq!(os_release(text, "ID_LIKE").as_deref(), Some("a b"));
        assert_eq!(os_release(text, "PRETTY_NAME").as_deref(), Some("Debian GNU/Linux 13"));
        assert_eq!(os_release(text, "EMPTY"), None);
        assert_eq!(os_release("", "ID"), None);
    }

    #[test]
    fn waydroid_freezes_unless_it_says_otherwise() {
        assert_eq!(suspend_action("[waydroid]\nsuspend_action = none\n"), "none");
        assert_eq!(suspend_action("[waydroid]\narch = arm64\n"), "freeze");
    }
}
