//! A full disk: nothing is acknowledged that is neither taken nor stored.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::support::{Behaviour, Setup, World, stays, wait};

/// A file system of a size, unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(path: &Path, size: &str) -> Self {
        fs::create_dir(path).unwrap();
        let options = format!("size={size},mode=700");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "nightporter-test"]).arg(path).status();
        assert!(mount.unwrap().success(), "mounting needs root");
        Self(path.to_owned())
    }

    /// Leaves not a byte.
    fn fill(&self) {
        let mut file = File::create(self.0.join("ballast")).unwrap();
        for size in [4096, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    let mut world = World::without_daemon(Setup::default());
    let disk = Disk::mount(&world.dir.path().join("disk"), "2m");
    world.state = world.dir.path().join("disk/state");
    world.start_daemon();
    let good = world.client("org.example.Good", Behaviour::Accept);
    let endpoint = good.endpoint("t");
    let mute = world.client("org.example.Mute", Behaviour::Accept);
    let unheard = mute.endpoint("t");
    mute.quit();

    disk.fill();
    // Who is there gets what comes, and that is acknowledged.
    let mut taken = Vec::new();
    for n in 0..20 {
        taken.push(world.post_to(&endpoint, &[("TTL", "600")], &format!("message {n}")));
        assert_eq!(good.message(), format!("message {n}"));
    }
    // For who is not there the server must keep it.
    let kept: Vec<String> = (0..3).map(|n| world.post_to(&unheard, &[("TTL", "600")], &format!("kept {n}"))).collect();
    let troubles = wait("the trouble to be told", || {
        let troubles = world.status().troubles;
        troubles.iter().any(|trouble| trouble.contains("cannot be written")).then_some(troubles)
    });
    eprintln!("{troubles:?}");
    assert!(String::from_utf8_lossy(&world.cli(&["status"]).stdout).contains("cannot be written"));
    assert!(stays(Duration::from_millis(300), || world.daemon_lives()));
    for location in &taken {
        wait("it to be acknowledged", || world.is_acked(location).then_some(()));
    }
    // A new app cannot be promised what would not survive.
    let new = world.client("org.example.New", Behaviour::Accept);
    let (result, reason) = new.register("t");
    assert_eq!((result.as_str(), reason.as_str()), ("REGISTRATION_FAILED", "INTERNAL_ERROR"));

    // The proof: killed now, the daemon has lost nothing, because the server still has it.
    world.kill_daemon();
    disk.empty();
    world.start_daemon();
    wait("the messages to come again", || (world.show("org.example.Mute").app.waiting == 3).then_some(()));
    let mute = world.client("org.example.Mute", Behaviour::Accept);
    // That it was told its endpoint could not be written down either.
    for n in 0..3 {
        assert_eq!(mute.next_message(), format!("kept {n}"));
    }
    for location in &kept {
        wait("it to be acknowledged", || world.is_acked(location).then_some(()));
    }
}

#[test]
fn a_disk_with_room_again_is_used_again() {
    let mut world = World::without_daemon(Setup::default());
    let disk = Disk::mount(&world.dir.path().join("disk"), "2m");
    world.state = world.dir.path().join("disk/state");
    world.start_daemon();
    let app = world.client("org.example.A", Behaviour::Accept);
    let endpoint = app.endpoint("t");
    app.quit();
    wait("it to be gone", || (!world.is_owned("org.example.A")).then_some(()));
    disk.fill();
    world.post_to(&endpoint, &[("TTL", "600")], "first");
    wait("the trouble", || (!world.status().troubles.is_empty()).then_some(()));
    disk.empty();
    world.post_to(&endpoint, &[("TTL", "600")], "second");
    wait("the trouble to end", || world.status().troubles.is_empty().then_some(()));
    wait("both to wait", || (world.show("org.example.A").app.waiting == 2).then_some(()));
    // Given the time, all of it is on the disk, and the server is rid of it.
    let third = world.post_to(&endpoint, &[("TTL", "600")], "third");
    wait("it to wait", || (world.show("org.example.A").app.waiting == 3).then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    assert!(world.is_acked(&third));
    world.kill_daemon();
    world.kill_relay();
    world.start_daemon();
    let app = world.client("org.example.A", Behaviour::Accept);
    for text in ["first", "second", "third"] {
        assert_eq!(app.next_message(), text);
    }
}
