//! When which page comes: the source and the link to it, as numbers. Pure: time goes in, pages come out.
//!
//! A page that is asked for comes after the latency: half of it for the question, half for the page. The link sends
//! one page at a time if its bandwidth is limited; the background stream gets the link when no asked-for page waits
//! for it.
#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The link to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// From a fault to its page, on an idle link; `None`: no page ever comes.
    pub latency_ns: Option<u64>,
    /// Bytes per second; 0 is no limit.
    pub bandwidth: u64,
    /// Pages per second that come without being asked for.
    pub background: u64,
}

impl Link {
    fn transmission_ns(&self, bytes: u64) -> u64 {
        (bytes * 1_000_000_000).checked_div(self.bandwidth).unwrap_or(0)
    }
}

/// Who waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// The back-end under test.
    BackEnd,
    /// This program's driver, which stands for the guest's CPU.
    Guest,
}

/// What to do about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The page will come.
    Waits,
    /// It came before the fault was read: wake at once.
    Here,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    AtSource,
    /// On its way because somebody asked.
    Asked,
    /// On its way with the background stream.
    Streamed,
    Here,
}

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    stage: Stage,
    /// The back-end waits for it.
    wanted: bool,
}

/// What has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Counts {
    /// Faults of the back-end.
    pub faults: u64,
    /// Of these, how many were for a page that it waited for already.
    pub repeated: u64,
    /// Of these, how many were for a page that had come meanwhile.
    pub late: u64,
    /// Faults of the driver.
    pub guest_faults: u64,
    /// Pages placed after somebody asked.
    pub placed: u64,
    /// Pages placed by the background stream.
    pub placed_background: u64,
    /// The most pages that the back-end waited for at one time.
    pub outstanding_max: u64,
    /// Time during which it waited for any, nanoseconds.
    pub stalled_ns: u64,
    /// How many it waited for on average over that time.
    pub outstanding_mean: f64,
}

/// All pages of guest memory and what is on its way.
#[derive(Debug)]
pub struct Schedule {
    link: Link,
    /// Bytes of each page.
    page_bytes: u64,
    pages: Vec<Page>,
    /// (arrival, page), earliest first.
    coming: BinaryHeap<Reverse<(u64, u64)>>,
    link_free_ns: u64,
    background_ns: u64,
    background_page: u64,
    outstanding: u64,
    changed_ns: u64,
    /// Sum of outstanding × time.
    waited: u128,
    counts: Counts,
}

impl Schedule {
    /// So many pages of so many bytes are at the source; the background stream starts at time 0.
    pub fn new(link: Link, pages: u64, page_bytes: u64) -> Self {
        Self {
            link,
            page_bytes,
            pages: vec![Page::default(); pages as usize],
            coming: BinaryHeap::new(),
            link_free_ns: 0,
            background_ns: 0,
            background_page: 0,
            outstanding: 0,
            changed_ns: 0,
            waited: 0,
            counts: Counts::default(),
        }
    }

    /// This page came before the switch.
    pub fn preset(&mut self, page: u64) {
        self.pages[page as usize].stage = Stage::Here;
    }

    /// Somebody waits for a page.
    pub fn fault(&mut self, page: u64, asker: Asker, now_ns: u64) -> Answer {
        let state = self.pages[page as usize];
        match asker {
            Asker::Guest => self.counts.guest_faults += 1,
            Asker::BackEnd => {
                self.counts.faults += 1;
                if state.stage == Stage::Here {
                    self.counts.late += 1;
                } else if state.wanted {
                    self.counts.repeated += 1;
                } else {
                    self.pages[page as usize].wanted = true;
                    self.count_outstanding(now_ns, 1);
                }
            }
        }
        if state.stage == Stage::AtSource {
            self.pages[page as usize].stage = Stage::Asked;
            if let Some(latency) = self.link.latency_ns {
                self.send(page, now_ns + latency / 2, latency - latency / 2);
            }
        }
        if state.stage == Stage::Here { Answer::Here } else { Answer::Waits }
    }

    fn send(&mut self, page: u64, earliest_ns: u64, way_ns: u64) {
        self.link_free_ns = self.link_free_ns.max(earliest_ns) + self.link.transmission_ns(self.page_bytes);
        // Without a limit nothing waits for anything.
        let sent = if self.link.bandwidth == 0 { earliest_ns } else { self.link_free_ns };
        self.coming.push(Reverse((sent + way_ns, page)));
    }

    /// A page that has to be placed now, if there is one. Every page comes once.
    pub fn due(&mut self, now_ns: u64) -> Option<u64> {
        self.run_background(now_ns);
        let Reverse((at, page)) = *self.coming.peek()?;
        if at > now_ns {
            return None;
        }
        self.coming.pop();
        Some(page)
    }

    fn run_background(&mut self, now_ns: u64) {
        let (Some(latency), true) = (self.link.latency_ns, self.link.background > 0) else { return };
        let step = (1_000_000_000 / self.link.background).max(1);
        while self.background_ns <= now_ns && self.background_page < self.pages.len() as u64 {
            if self.link.bandwidth > 0 && self.link_free_ns > self.background_ns {
                // Asked-for pages go first; the stream goes on when they are out.
                self.background_ns = self.link_free_ns;
                continue;
            }
            let page = self.background_page;
            self.background_page += 1;
            let state = &mut self.pages[page as usize];
            if state.stage == Stage::AtSource {
                state.stage = Stage::Streamed;
                self.send(page, self.background_ns, latency - latency / 2);
                self.background_ns += step;
            }
        }
    }

    /// When to look again: the next arrival or background page. `None`: only a fault can change anything.
    pub fn next_ns(&self) -> Option<u64> {
        let streaming = self.link.background > 0
            && self.link.latency_ns.is_some()
            && self.background_page < self.pages.len() as u64;
        let background = streaming.then_some(self.background_ns);
        let arrival = self.coming.peek().map(|Reverse((at, _))| *at);
        [background, arrival].into_iter().flatten().min()
    }

    /// A page was placed and everybody woken. Whether that was its first time.
    pub fn placed(&mut self, page: u64, now_ns: u64) -> bool {
        let state =
            std::mem::replace(&mut self.pages[page as usize], Page { stage: Stage::Here, wanted: false });
        if state.wanted {
            self.count_outstanding(now_ns, -1);
        }
        match state.stage {
            Stage::Asked => self.counts.placed += 1,
            Stage::Streamed => self.counts.placed_background += 1,
            // Brought at the end of the migration, or twice, which the caller reports.
            Stage::AtSource | Stage::Here => {}
        }
        state.stage != Stage::Here
    }

    fn count_outstanding(&mut self, now_ns: u64, change: i64) {
        let passed = now_ns.saturating_sub(self.changed_ns);
        if self.outstanding > 0 {
            self.waited += u128::from(self.outstanding) * u128::from(passed);
            self.counts.stalled_ns += passed;
        }
        self.changed_ns = self.changed_ns.max(now_ns);
        self.outstanding = self.outstanding.saturating_add_signed(change);
        self.counts.outstanding_max = self.counts.outstanding_max.max(self.outstanding);
    }

    /// How many pages the back-end waits for.
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Whether a page has been placed.
    pub fn is_here(&self, page: u64) -> bool {
        self.pages[page as usize].stage == Stage::Here
    }

    /// Pages that have not been placed.
    pub fn absent(&self) -> impl Iterator<Item = u64> {
        (0..self.pages.len() as u64).filter(|&p| !self.is_here(p))
    }

    /// What has happened until now.
    pub fn counts(&mut self, now_ns: u64) -> Counts {
        self.count_outstanding(now_ns, 0);
        let mean = if self.counts.stalled_ns == 0 {
            0.0
        } else {
            self.waited as f64 / self.counts.stalled_ns as f64
        };
        Counts { outstanding_mean: mean, ..self.counts }
    }
}

#[cfg(test)]
mod tests {
    use super::super::PAGE;
    use super::Asker::{BackEnd, Guest};
    use super::*;

    const MS: u64 = 1_000_000;

    fn link(latency_ms: u64, bandwidth: u64, background: u64) -> Link {
        Link { latency_ns: Some(latency_ms * MS), bandwidth, background }
    }

    /// Places what is due until `end`; (time, page) of each.
    fn run(s: &mut Schedule, end: u64) -> Vec<(u64, u64)> {
        let mut placed = Vec::new();
        while let Some(at) = s.next_ns().filter(|&at| at <= end) {
            while let Some(page) = s.due(at) {
                assert!(s.placed(page, at), "page {page} twice");
                placed.push((at, page));
            }
        }
        placed
    }

    #[test]
    fn pages_come_in_parallel_after_the_latency() {
        let mut s = Schedule::new(link(5, 0, 0), 100, PAGE);
        assert_eq!(s.fault(7, BackEnd, MS), Answer::Waits);
        assert_eq!(s.fault(8, BackEnd, MS), Answer::Waits);
        assert_eq!(s.fault(7, BackEnd, 2 * MS), Answer::Waits);
        assert_eq!(s.due(6 * MS - 1), None);
        assert_eq!(run(&mut s, u64::MAX), [(6 * MS, 7), (6 * MS, 8)]);
        assert_eq!(s.fault(7, BackEnd, 7 * MS), Answer::Here);
        let c = s.counts(10 * MS);
        assert_eq!((c.faults, c.repeated, c.late, c.placed, c.outstanding_max), (4, 1, 1, 2, 2));
        assert_eq!(c.stalled_ns, 5 * MS);
        assert!((c.outstanding_mean - 2.0).abs() < 1e-9);
    }

    #[test]
    fn one_at_a_time_is_one_outstanding() {
        let mut s = Schedule::new(link(5, 0, 0), 4, PAGE);
        for page in 0..4 {
            s.fault(page, BackEnd, page * 6 * MS);
            assert_eq!(run(&mut s, page * 6 * MS + 5 * MS).len(), 1);
        }
        let c = s.counts(100 * MS);
        assert_eq!((c.outstanding_max, c.stalled_ns), (1, 20 * MS));
        assert!((c.outstanding_mean - 1.0).abs() < 1e-9);
    }

    #[test]
    fn bandwidth_spaces_pages() {
        // 4096 bytes take 1 ms.
        let mut s = Schedule::new(link(4, PAGE * 1000, 0), 10, PAGE);
        (0..3).for_each(|p| assert_eq!(s.fault(p, BackEnd, 0), Answer::Waits));
        assert_eq!(run(&mut s, u64::MAX), [(5 * MS, 0), (6 * MS, 1), (7 * MS, 2)]);
    }

    #[test]
    fn the_guests_faults_do_not_count_as_the_back_ends() {
        let mut s = Schedule::new(link(5, 0, 0), 4, PAGE);
        s.fault(1, Guest, 0);
        assert_eq!(s.outstanding(), 0);
        s.fault(1, BackEnd, MS);
        assert_eq!(s.outstanding(), 1);
        assert_eq!(run(&mut s, u64::MAX), [(5 * MS, 1)]);
        assert_eq!(s.counts(0).guest_faults, 1);
    }

    #[test]
    fn the_background_stream_brings_everything_once() {
        let mut s = Schedule::new(link(2, 0, 1000), 10, PAGE);
        s.preset(0);
        s.fault(3, BackEnd, 0);
        let placed = run(&mut s, u64::MAX);
        let mut pages: Vec<u64> = placed.iter().map(|p| p.1).collect();
        pages.sort();
        assert_eq!(pages, (1..10).collect::<Vec<_>>());
        assert_eq!(placed[0], (MS, 1), "first of the stream: half a latency after its start");
        assert_eq!(placed[1].0, 2 * MS);
        let c = s.counts(20 * MS);
        assert_eq!((c.placed, c.placed_background), (1, 8));
        assert_eq!(s.next_ns(), None);
    }

    #[test]
    fn asked_for_pages_go_before_the_stream() {
        let mut s = Schedule::new(link(2, PAGE * 1000, 100_000), 50, PAGE);
        (40..45).for_each(|p| assert_eq!(s.fault(p, BackEnd, 0), Answer::Waits));
        let first: Vec<u64> = run(&mut s, 8 * MS).into_iter().map(|p| p.1).filter(|&p| p >= 40).collect();
        assert_eq!(first, [40, 41, 42, 43, 44]);
    }

    #[test]
    fn never_is_never() {
        let mut s = Schedule::new(Link { latency_ns: None, bandwidth: 0, background: 5 }, 3, PAGE);
        s.fault(1, BackEnd, 0);
        assert_eq!((s.due(u64::MAX), s.next_ns(), s.outstanding()), (None, None, 1));
        assert_eq!(s.absent().count(), 3);
    }
}
