//! The loop's alarms, on CLOCK_BOOTTIME and, to wake the machine, CLOCK_BOOTTIME_ALARM, and notice of a resume.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use mio::{Interest, Registry, Token, event::Source, unix::SourceFd};
use nix::{
    errno::Errno,
    sys::{
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use crate::{sys::clock, time::Instant};

/// One deadline. Becomes readable when it has passed, on time even when the machine slept meanwhile (at the resume).
#[derive(Debug)]
pub struct Alarm {
    timer: TimerFd,
    armed: Option<Instant>,
}

impl Alarm {
    /// A disarmed alarm.
    ///
    /// # Errors
    /// When the kernel gives no timerfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self { timer: timer(ClockId::CLOCK_BOOTTIME)?, armed: None })
    }

    /// A disarmed alarm that wakes the machine from suspend as well: CLOCK_BOOTTIME_ALARM. It needs CAP_WAKE_ALARM.
    /// `None`, said in the log, where the system does not let us.
    pub fn waking() -> Option<Self> {
        match timer(ClockId::CLOCK_BOOTTIME_ALARM) {
            Ok(timer) => Some(Self { timer, armed: None }),
            Err(error) => {
                let permission =
                    if error.raw_os_error() == Some(libc::EPERM) { "; it takes CAP_WAKE_ALARM" } else { "" };
                log::info!("the machine is not woken for the heartbeat: {error}{permission}");
                None
            }
        }
    }

    /// Goes off at `deadline`, or never. No system call when that is so already.
    ///
    /// # Errors
    /// When timerfd_settime(2) fails, which no deadline can make it do.
    pub fn set(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        if self.armed == deadline {
            return Ok(());
        }
        match deadline {
            // Zero would disarm it.
            Some(at) => {
                self.timer.set(Expiration::OneShot(spec(at.as_nanos().max(1))), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?
            }
            None => self.timer.unset()?,
        }
        self.armed = deadline;
        Ok(())
    }

    /// Whether the deadline has passed; afterwards the alarm is disarmed. To be called when it is readable.
    pub fn drain(&mut self) -> bool {
        let rang = self.timer.wait().is_ok();
        if rang {
            self.armed = None;
        }
        rang
    }
}

/// Becomes readable when the machine resumes from suspend or somebody sets the wall clock; never otherwise.
///
/// The kernel cancels a CLOCK_REALTIME timer with TFD_TIMER_CANCEL_ON_SET on both (timerfd_create(2)), which costs no
/// wake-up of its own and needs neither logind nor polling.
#[derive(Debug)]
pub struct ResumeWatch {
    timer: TimerFd,
    slept: u64,
}

/// A sleep shorter than this leaves connections alone, in nanoseconds.
const SHORTEST_SLEEP: u64 = 1_000_000_000;

impl ResumeWatch {
    /// Watches from now on.
    ///
    /// # Errors
    /// When the kernel gives no timerfd.
    pub fn new() -> io::Result<Self> {
        let watch = Self { timer: timer(ClockId::CLOCK_REALTIME)?, slept: clock::slept_nanos() };
        watch.arm()?;
        Ok(watch)
    }

    /// Whether the machine slept for more than a second since the last call. Watches on. To be called when it is
    /// readable.
    pub fn drain(&mut self) -> bool {
        // Cancelled or, far in the future, expired; nix folds both into one.
        if self.timer.wait() == Err(Errno::EAGAIN) {
            return false;
        }
        if let Err(error) = self.arm() {
            log::warn!("the next resume from suspend will not be noticed: {error}");
        }
        self.slept_since(clock::slept_nanos())
    }

    fn slept_since(&mut self, slept: u64) -> bool {
        let grown = slept.saturating_sub(self.slept);
        self.slept = slept;
        grown > SHORTEST_SLEEP
    }

    fn arm(&self) -> io::Result<()> {
        let never = TimeSpec::new(libc::time_t::MAX, 0);
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        Ok(self.timer.set(Expiration::OneShot(never), flags)?)
    }
}

/// The kernel and logind both tell of a resume, whoever is first: it is to be told once.
#[derive(Debug, Default)]
pub struct OneResume {
    told: Option<Instant>,
}

/// What comes within this is the same resume.
const SAME_RESUME: Duration = Duration::from_secs(2);

impl OneResume {
    /// Somebody says that the machine has resumed: whether that is news.
    pub fn is_news(&mut self, now: Instant) -> bool {
        let news = self.told.is_none_or(|told| now.since(told) > SAME_RESUME);
        if news {
            self.told = Some(now);
        }
        news
    }

    /// The machine is about to sleep: whatever resume comes next is another one.
    pub fn falling_asleep(&mut self) {
        self.told = None;
    }
}

fn timer(clock: ClockId) -> io::Result<TimerFd> {
    Ok(TimerFd::new(clock, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?)
}

fn spec(nanos: u64) -> TimeSpec {
    TimeSpec::from_duration(Duration::from_nanos(nanos))
}

macro_rules! source_of_timer {
    ($source:ty) => {
        impl Source for $source {
            fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
                SourceFd(&self.timer.as_fd().as_raw_fd()).register(registry, token, interests)
            }

            fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
                SourceFd(&self.timer.as_fd().as_raw_fd()).reregister(registry, token, interests)
            }

            fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
                SourceFd(&self.timer.as_fd().as_raw_fd()).deregister(registry)
            }
        }
    };
}

source_of_timer!(Alarm);
source_of_timer!(ResumeWatch);

#[cfg(test)]
mod tests {
    use mio::{Events, Poll};

    use super::*;

    fn readable(poll: &mut Poll, wait: Duration) -> bool {
        let mut events = Events::with_capacity(4);
        poll.poll(&mut events, Some(wait)).unwrap();
        !events.is_empty()
    }

    #[test]
    fn the_alarm_rings_once_at_its_time_and_can_be_moved() {
        let mut poll = Poll::new().unwrap();
        let mut alarm = Alarm::new().unwrap();
        poll.registry().register(&mut alarm, Token(0), Interest::READABLE).unwrap();
        assert!(!alarm.drain());
        let start = clock::boot();
        let at = start + Duration::from_millis(60);
        alarm.set(Some(start + Duration::from_millis(20))).unwrap();
        alarm.set(Some(at)).unwrap();
        assert!(readable(&mut poll, Duration::from_secs(5)));
        assert!(clock::boot() >= at);
        assert!(alarm.drain());
        assert!(!alarm.drain());
        // The same deadline again is a new one: it has rung.
        alarm.set(Some(at)).unwrap();
        assert!(readable(&mut poll, Duration::from_secs(5)));
        assert!(alarm.drain());
        alarm.set(Some(clock::boot() + Duration::from_millis(30))).unwrap();
        alarm.set(None).unwrap();
        assert!(!readable(&mut poll, Duration::from_millis(80)));
    }

    #[test]
    fn the_waking_alarm_is_to_be_had_with_its_capability_only_and_rings_on_the_clock_that_wakes() {
        let capable = std::fs::read_to_string("/proc/self/status").unwrap().lines().any(|line| {
            let caps = line.strip_prefix("CapEff:").map(|caps| u64::from_str_radix(caps.trim(), 16).unwrap());
            // CAP_WAKE_ALARM is 35.
            caps.is_some_and(|caps| caps >> 35 & 1 == 1)
        });
        let alarm = Alarm::waking();
        assert_eq!(alarm.is_some(), capable);
        let Some(mut alarm) = alarm else { return };
        let info = format!("/proc/self/fdinfo/{}", alarm.timer.as_fd().as_raw_fd());
        assert!(std::fs::read_to_string(info).unwrap().contains("clockid: 9\n"));
        let mut poll = Poll::new().unwrap();
        poll.registry().register(&mut alarm, Token(0), Interest::READABLE).unwrap();
        let at = clock::boot() + Duration::from_millis(50);
        alarm.set(Some(at)).unwrap();
        assert!(readable(&mut poll, Duration::from_secs(5)));
        assert!(clock::boot() >= at && alarm.drain() && !alarm.drain());
    }

    #[test]
    fn an_instant_of_zero_rings_at_once() {
        let mut poll = Poll::new().unwrap();
        let mut alarm = Alarm::new().unwrap();
        poll.registry().register(&mut alarm, Token(0), Interest::READABLE).unwrap();
        alarm.set(Some(Instant::from_nanos(0))).unwrap();
        assert!(readable(&mut poll, Duration::from_secs(5)));
        assert!(alarm.drain());
    }

    #[test]
    fn the_watch_is_armed_to_be_cancelled_by_a_clock_change() {
        let mut watch = ResumeWatch::new().unwrap();
        let info = format!("/proc/self/fdinfo/{}", watch.timer.as_fd().as_raw_fd());
        let text = std::fs::read_to_string(info).unwrap();
        // TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, on CLOCK_REALTIME.
        assert!(text.contains("clockid: 0") && text.contains("settime flags: 03"), "{text}");
        assert!(!watch.drain());
    }

    #[test]
    fn only_a_sleep_of_over_a_second_counts_and_only_once() {
        let mut watch = ResumeWatch::new().unwrap();
        let base = watch.slept;
        assert!(!watch.slept_since(base + 900_000_000));
        assert!(watch.slept_since(base + 3_000_000_000));
        assert!(!watch.slept_since(base + 3_000_000_000));
    }

    #[test]
    fn a_resume_is_told_once_but_one_after_another_sleep_is_another() {
        let at = |tenths: u64| Instant::from_nanos(tenths * 100_000_000);
        let mut resume = OneResume::default();
        assert!(resume.is_news(at(100)));
        // logind, after the kernel.
        assert!(!resume.is_news(at(103)));
        assert!(!resume.is_news(at(120)));
        // A sleep that fails at once.
        resume.falling_asleep();
        assert!(resume.is_news(at(115)));
        assert!(!resume.is_news(at(116)));
        assert!(resume.is_news(at(200)));
    }
}
