//! What mends what a machine lacks, in the words of that very system.

use super::facts::{Boot, Facts, Machine};

/// Kernel parameters that are missing, all at once: who sets one and boots anew should not have to do it again.
pub(super) fn parameters(facts: &Facts) -> Vec<&'static str> {
    let mut missing = Vec::new();
    // Only the Raspberry Pi's kernels know how to undo what their firmware asks for.
    if is_raspberry_pi(facts) && facts.cgroups.as_ref().is_ok_and(|cgroups| cgroups.memory_enabled == Some(false)) {
        missing.extend(["cgroup_enable=memory", "cgroup_memory=1"]);
    }
    if facts.kernel.as_ref().is_ok_and(|kernel| !kernel.psi && kernel.psi_built != Some(false)) {
        missing.push("psi=1");
    }
    missing
}

fn is_raspberry_pi(facts: &Facts) -> bool {
    facts.machine.as_ref().is_ok_and(|machine| {
        matches!(machine.boot, Boot::RaspberryPi(_))
            || machine.model.as_ref().is_some_and(|model| model.starts_with("Raspberry Pi"))
    })
}

/// How `parameters` are added to the kernel's command line on this machine.
pub(super) fn kernel_command_line(facts: &Facts, parameters: &[&str]) -> Vec<String> {
    let words = parameters.join(" ");
    let unknown = Boot::Unknown;
    let boot = facts.machine.as_ref().map_or(&unknown, |machine| &machine.boot);
    let mut steps = match boot {
        Boot::RaspberryPi(path) => vec![format!("sudo sed -i '1 s/$/ {words}/' {path}")],
        Boot::Grub { fragments: true, update } => vec![
            format!(
                "echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {words}\"' | sudo tee /etc/default/grub.d/nightporter.cfg"
            ),
            update_grub(*update),
        ],
        Boot::Grub { fragments: false, update } => {
            vec![format!("add to GRUB_CMDLINE_LINUX in /etc/default/grub: {words}"), update_grub(*update)]
        }
        Boot::UBootMenu => vec![
            "sudo mkdir -p /etc/u-boot-menu/conf.d".to_owned(),
            format!(
                "echo 'U_BOOT_PARAMETERS=\"${{U_BOOT_PARAMETERS:-ro quiet}} {words}\"' | \
                 sudo tee /etc/u-boot-menu/conf.d/nightporter.conf"
            ),
            "sudo u-boot-update".to_owned(),
        ],
        Boot::PostmarketOs { fragments: true } => vec![
            "sudo mkdir -p /etc/kernel-cmdline.d".to_owned(),
            format!("printf '%s\\n' {words} | sudo tee /etc/kernel-cmdline.d/90-nightporter.conf"),
            "sudo mkinitfs".to_owned(),
        ],
        Boot::PostmarketOs { fragments: false } => vec![
            format!("add to deviceinfo_kernel_cmdline_append=\"\" in /etc/deviceinfo: {words}"),
            "sudo mkinitfs".to_owned(),
        ],
        Boot::Armbian => vec![format!("add to the line extraargs= in /boot/armbianEnv.txt: {words}")],
        Boot::KernelInstall => vec![
            format!("sudo sed -i '1 s/$/ {words}/' /etc/kernel/cmdline"),
            "sudo kernel-install add \"$(uname -r)\" \"/boot/vmlinuz-$(uname -r)\"".to_owned(),
        ],
        Boot::Unknown => vec![format!("add to the kernel's command line, where your boot loader keeps it: {words}")],
    };
    steps.push("sudo reboot".to_owned());
    steps
}

fn update_grub(update: bool) -> String {
    if update { "sudo update-grub" } else { "sudo grub2-mkconfig -o /boot/grub2/grub.cfg" }.to_owned()
}

/// How swap in compressed memory is had.
pub(super) fn zram(machine: Option<&Machine>) -> Vec<String> {
    let is = |id: &str| machine.is_some_and(|machine| machine.ids.iter().any(|one| one == id));
    let systemd = machine.is_some_and(|machine| machine.systemd);
    let generator = |install: Option<&str>| {
        let mut steps: Vec<String> = install.map(str::to_owned).into_iter().collect();
        steps.push("printf '[zram0]\\nzram-size = ram / 2\\n' | sudo tee /etc/systemd/zram-generator.conf".to_owned());
        steps.push("sudo systemctl daemon-reload".to_owned());
        steps.push("sudo systemctl start systemd-zram-setup@zram0.service".to_owned());
        steps
    };
    if is("debian") && systemd {
        generator(Some("sudo apt install systemd-zram-generator"))
    } else if is("debian") {
        vec!["sudo apt install zram-tools".to_owned()]
    } else if (is("postmarketos") || is("alpine")) && !systemd {
        vec![
            "sudo apk add zram-init".to_owned(),
            "sudo rc-update add zram-init default".to_owned(),
            "sudo rc-service zram-init start".to_owned(),
        ]
    } else if is("fedora") {
        vec![
            "sudo dnf install zram-generator-defaults".to_owned(),
            "sudo systemctl start systemd-zram-setup@zram0.service".to_owned(),
        ]
    } else if is("arch") {
        generator(Some("sudo pacman -S zram-generator"))
    } else if systemd {
        let mut steps = vec!["install systemd's zram-generator".to_owned()];
        steps.extend(generator(None));
        steps
    } else {
        vec!["set up swap on zram, at half of the memory's size".to_owned()]
    }
}

/// How a package is had.
pub(super) fn package(machine: Option<&Machine>, debian: &str, alpine: &str) -> String {
    let is = |id: &str| machine.is_some_and(|machine| machine.ids.iter().any(|one| one == id));
    if is("debian") {
        format!("sudo apt install {debian}")
    } else if is("postmarketos") || is("alpine") {
        format!("sudo apk add {alpine}")
    } else {
        format!("install {debian} (as Debian calls it)")
    }
}
