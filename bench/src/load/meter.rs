//! What a load measures of itself: packets, and the share of the time in which the driver had nothing to do.
#![forbid(unsafe_code)]

/// Time without anything to do: looks that found nothing. A look that found something counts as work from its beginning, with
/// the transfer of the line that it looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Idle {
    since: Option<u64>,
    total: u64,
    /// Looks at the rings.
    pub looks: u64,
    /// Those that found nothing.
    pub empty: u64,
}

impl Idle {
    /// A look that began at `start` found nothing.
    #[inline(always)]
    pub fn nothing(&mut self, start: u64) {
        self.looks += 1;
        self.empty += 1;
        if self.since.is_none() {
            self.since = Some(start);
        }
    }

    /// A look that began at `start` found something.
    #[inline(always)]
    pub fn something(&mut self, start: u64) {
        self.looks += 1;
        if let Some(since) = self.since.take() {
            self.total += start.wrapping_sub(since);
        }
    }

    /// Idle ticks until now, which is `now`; counting starts anew.
    pub fn cut(&mut self, now: u64) -> u64 {
        if let Some(since) = &mut self.since {
            self.total += now.wrapping_sub(std::mem::replace(since, now));
        }
        std::mem::take(&mut self.total)
    }
}

/// What happened in some time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    /// How long it was, in ticks of the clock.
    pub ticks: u64,
    /// How long the driver had nothing to do.
    pub idle_ticks: u64,
    /// Packets that devices have taken.
    pub sent: u64,
    /// Packets that came from them.
    pub received: u64,
    /// Bytes of received packets, virtio-net headers included.
    pub received_bytes: u64,
    /// Packets that were sent and never came (where all should).
    pub lost: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_that_find_nothing_are_idle_time() {
        let mut idle = Idle::default();
        idle.something(100);
        assert_eq!(idle.cut(110), 0);
        idle.nothing(120);
        idle.nothing(130);
        assert_eq!(idle.cut(140), 20);
        idle.something(150);
        idle.something(160);
        assert_eq!(idle.cut(170), 10);
        assert_eq!((idle.looks, idle.empty), (5, 2));
    }
}
