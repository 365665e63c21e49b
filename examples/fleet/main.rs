//! A million phones and one server: what the reconnect wave looks like.
//!
//! `cargo run --profile fleet --no-default-features --example fleet` writes `docs/scale.md` and `docs/scale.svg`.
//! It takes 21 minutes of processor time, shared by up to four threads, and 5.5 GB.
//! `-- --phones N --seed N --upstream autopush|ntfy --out DIR` for other crowds.
#![expect(clippy::print_stderr, reason = "a program that takes minutes says where it is")]

mod crowd;
mod dialect;
mod figure;
mod model;
mod page;
mod scenario;
mod survey;
#[cfg(test)]
mod tests;
mod world;

use std::{env, error::Error, fs, path::PathBuf, time::Instant};

use crate::{crowd::Upstream, scenario::ALL};

fn main() -> Result<(), Box<dyn Error>> {
    let Options { phones, seed, upstream, out } = Options::parse(env::args().skip(1))?;
    let started = Instant::now();
    let chapters = survey::run(&ALL, &Upstream::new(&upstream)?, phones, seed, |scenario, crowd| {
        eprintln!("{:6.1} s  {}: {}", started.elapsed().as_secs_f64(), scenario.title, crowd.name());
    });
    fs::create_dir_all(&out)?;
    fs::write(out.join("scale.md"), page::page(&chapters, &upstream, phones, seed))?;
    fs::write(out.join("scale.svg"), figure::figure(&chapters, phones))?;
    eprintln!("written: {}", out.join("scale.{md,svg}").display());
    Ok(())
}

struct Options {
    phones: u32,
    seed: u64,
    upstream: String,
    out: PathBuf,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let out = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs");
        let mut options = Self { phones: 1_000_000, seed: 1, upstream: "autopush".to_owned(), out };
        while let Some(key) = args.next() {
            let value = args.next().ok_or_else(|| format!("{key} needs a value"))?;
            match key.as_str() {
                "--phones" => options.phones = value.parse()?,
                "--seed" => options.seed = value.parse()?,
                "--upstream" => options.upstream = value,
                "--out" => options.out = value.into(),
                _ => return Err(format!("{key}: --phones N, --seed N, --upstream KIND and --out DIR are known").into()),
            }
        }
        Ok(options)
    }
}
