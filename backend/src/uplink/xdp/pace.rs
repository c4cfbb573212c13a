//! When to wake the kernel's side of a TX ring again. Pure: results in, decisions out.
//!
//! In copy mode a wake-up sends a limited number of frames and says so by an error, so it is repeated while frames are left
//! and some were taken. One that takes none (the device is busy, its link is down) is repeated after a pause, which grows.
//! Without an error all were taken, or the driver knows that it has to (zero-copy).
#![forbid(unsafe_code)]

use crate::uplink::Woken;
use std::io;
use std::time::Duration;

/// The first pause after a wake-up that moved nothing.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_millis(64);
/// The pause before the next look at a link that is down.
const LINK_PAUSE: Duration = Duration::from_millis(100);

/// The interface is gone.
#[derive(Debug, PartialEq, Eq)]
pub struct Gone;

/// What is remembered between wake-ups.
#[derive(Debug)]
pub struct Pace {
    /// Frames that waited before the wake-up.
    before: u32,
    pause: Duration,
    link_down: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self { before: 0, pause: PAUSE_MIN, link_down: false }
    }
}

impl Pace {
    /// The link was down when last seen: frames are dropped, and looked after now and then.
    pub fn link_is_down(&self) -> bool {
        self.link_down
    }

    /// A wake-up begins with so many frames waiting.
    pub fn before(&mut self, waiting: u32) {
        self.before = waiting;
    }

    /// It has ended, and so many are left.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn after(&mut self, result: &io::Result<()>, waiting: u32) -> Result<Woken, Gone> {
        let error = result.as_ref().err().and_then(io::Error::raw_os_error);
        self.link_down = false;
        match error {
            Some(libc::ENXIO | libc::ENODEV | libc::EBADF) => return Err(Gone),
            Some(libc::ENETDOWN) => {
                self.link_down = true;
                return Ok(Woken::After(LINK_PAUSE));
            }
            _ => {}
        }
        if error.is_none() || waiting == 0 || waiting < self.before {
            self.pause = PAUSE_MIN;
            return Ok(if error.is_none() || waiting == 0 { Woken::Done } else { Woken::Again });
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(PAUSE_MAX);
        Ok(Woken::After(pause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(number: i32) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(number))
    }

    #[test]
    fn progress_goes_on_at_once_and_standstill_pauses_longer_and_longer() {
        let mut pace = Pace::default();
        pace.before(100);
        assert!(matches!(pace.after(&error(libc::EAGAIN), 68), Ok(Woken::Again)));
        let mut last = Duration::ZERO;
        for _ in 0..12 {
            pace.before(68);
            let Ok(Woken::After(pause)) = pace.after(&error(libc::EAGAIN), 68) else { panic!() };
            assert!(pause > last || pause == PAUSE_MAX);
            last = pause;
        }
        pace.before(68);
        assert!(matches!(pace.after(&Ok(()), 0), Ok(Woken::Done)));
        pace.before(5);
        assert!(matches!(pace.after(&error(libc::EBUSY), 5), Ok(Woken::After(PAUSE_MIN))), "from the start");
    }

    #[test]
    fn a_driver_that_was_woken_is_left_alone() {
        let mut pace = Pace::default();
        pace.before(64);
        assert!(matches!(pace.after(&Ok(()), 64), Ok(Woken::Done)));
    }

    #[test]
    fn a_link_that_is_down_is_looked_after() {
        let mut pace = Pace::default();
        pace.before(1);
        assert!(matches!(pace.after(&error(libc::ENETDOWN), 1), Ok(Woken::After(LINK_PAUSE))));
        assert!(pace.link_is_down());
        pace.before(1);
        assert!(matches!(pace.after(&Ok(()), 0), Ok(Woken::Done)));
        assert!(!pace.link_is_down());
        assert_eq!(pace.after(&error(libc::ENXIO), 1).err(), Some(Gone));
    }
}
