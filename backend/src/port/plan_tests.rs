//! The order of steps in which memory goes whose pages are awaited, whatever fails meanwhile: nobody uses it, then it is
//! given up, then its populates are waited for. Never is it unregistered while a page is missing that a ring waits for.
//!
//! That memory given up in this order gets no page is `postcopy::teardown_tests`'.

use super::*;
use crate::config::{self, PortConfig, PostcopyMultiqueue, UplinkSpec};
use crate::memory::testing::{map, memfd, spec};
use crate::net::counters::PairCounters;
use crate::port::connection::Endpoint;
use crate::port::postcopy::PageFailed;
use crate::uplink::null::Null;
use crate::uplink::testing::skip;
use std::io;
use std::time::Instant;

const SIZE: u64 = 1 << 20;

struct Rig {
    port: Port,
    engine: Engine,
    uffd: Arc<Userfaultfd>,
}

impl Rig {
    /// A port that has sent its userfaultfd to the front-end; none where this process may have no such thing.
    fn advised(name: &str) -> Option<Self> {
        let uffd = Userfaultfd::new().map_err(|error| skip(name, &error.to_string())).ok()?;
        let config = PortConfig {
            name: "p".into(),
            endpoint: config::Endpoint::Fd(0),
            uplink: UplinkSpec::Null { generate: None },
            queue_pairs: 1,
            mtu: None,
            mac: None,
            disabled_protocol_features: 0,
            postcopy: config::Postcopy::Auto,
            postcopy_multiqueue: PostcopyMultiqueue::Off,
        };
        let counters = vec![Arc::new(PairCounters::default())];
        let uplink = Arc::new(Null::new(None));
        let port = Port::new(0, config, uplink, counters, Endpoint::Inherited(None), 8, true);
        let mut rig = Self { port, engine: Engine::default(), uffd: Arc::new(uffd) };
        rig.begin(Effect::PostcopyAdvise);
        rig.port.advised(Ok(rig.uffd.clone()));
        Some(rig)
    }

    /// A port that may ask for pages, and has one under way.
    fn armed(name: &str) -> Option<Self> {
        let mut rig = Self::advised(name)?;
        rig.begin(Effect::PostcopyListen);
        rig.map(true);
        rig.port.armed(&mut rig.engine);
        let region = rig.port.postcopy.regions[0].id;
        rig.engine.want(region, 0..1, true);
        assert!(rig.engine.next_populate().is_some());
        Some(rig)
    }

    fn begin(&mut self, effect: Effect<PeerFd>) {
        self.port.begin(effect, &mut self.engine);
    }

    /// The helper has mapped the front-end's memory.
    fn map(&mut self, awaited: bool) {
        self.port.plan = Plan { purpose: Purpose::Effect, awaited, ..Plan::default() };
        let mapping = map(&memfd(SIZE), spec(0, SIZE, 0));
        self.uffd.register(&mapping).unwrap();
        self.port.mapped(Ok(vec![mapping]), &mut self.engine);
    }

    /// Takes steps until this one is under way.
    fn go_to(&mut self, name: &str) {
        let step = std::iter::from_fn(|| self.port.plan.next()).find(|step| name_of(step) == name);
        assert!(step.is_some(), "no step {name}");
        self.port.plan.waiting = 1;
    }

    /// END waits for the page under way.
    fn drain(&mut self) {
        self.begin(Effect::PostcopyEnd);
        assert_eq!(self.steps(), ["drain", "unregister", "end"]);
        self.go_to("drain");
        assert!(!self.port.is_quiet(&self.engine));
        assert!(self.port.drain(Instant::now()).is_some(), "nobody is woken");
    }

    fn steps(&self) -> Vec<&'static str> {
        self.port.plan.steps.iter().map(name_of).collect()
    }

    /// Whether nothing more is asked for, and the page under way is nobody's business.
    fn is_given_up(&mut self) -> bool {
        self.port.postcopy.regions.is_empty()
            && self.port.memory.mappings().is_empty()
            && self.engine.next_populate().is_none()
            && self.engine.completed(RegionId(0), 0, false) == crate::postcopy::engine::Completed::GivenUp
    }
}

fn name_of(step: &Step) -> &'static str {
    match step {
        Step::Pairs(commands) => match commands.first() {
            Some((_, Command::Reset)) => "resets",
            Some((_, Command::Stop { .. })) => "stops",
            Some((_, Command::Memory(_))) => "memory",
            _ => "other commands",
        },
        Step::Job(Job::Register(..)) => "register",
        Step::Job(Job::Unregister(..)) => "unregister",
        Step::Job(Job::GiveUp(..)) => "give up",
        Step::Job(Job::Release(_)) => "release",
        Step::Job(Job::Configure(..)) => "configure",
        Step::Job(_) => "another job",
        Step::Arm => "arm",
        Step::Drain => "drain",
        Step::EndPostcopy => "end",
        Step::Retire(..) => "retire",
    }
}

fn refused(port: &Port) -> &str {
    match &port.plan.outcome {
        Some(Outcome::Refused(why)) => why,
        outcome => panic!("{outcome:?}"),
    }
}

const LOSS: [&str; 4] = ["stops", "memory", "give up", "retire"];
const TEARDOWN: [&str; 4] = ["resets", "configure", "give up", "retire"];

/// LISTEN over memory that is mapped, and END: jobs whose failure means that memory is lost.
#[test]
fn a_job_that_fails_in_a_teardown_changes_none_of_its_steps() {
    const NAME: &str = "a_job_that_fails_in_a_teardown_changes_none_of_its_steps";
    for vital in ["register", "unregister"] {
        let Some(mut rig) = Rig::advised(NAME) else { return };
        rig.map(vital == "unregister");
        rig.begin(if vital == "register" { Effect::PostcopyListen } else { Effect::PostcopyEnd });
        rig.go_to(vital);
        assert!(rig.port.plan.vital);
        rig.port.begin_teardown(&mut rig.engine);
        assert_eq!(rig.steps(), TEARDOWN, "{vital}");
        rig.port.job_failed("the test says no".into(), &mut rig.engine);
        assert_eq!(rig.steps(), TEARDOWN, "{vital}");
        assert_eq!((rig.port.plan.purpose, rig.port.plan.outcome.is_none()), (Purpose::Teardown, true));
        // Its own jobs may fail, too.
        rig.go_to("configure");
        rig.port.job_failed("the test says no".into(), &mut rig.engine);
        assert_eq!(rig.steps(), ["give up", "retire"]);
    }
}

#[test]
fn a_job_that_fails_at_the_end_of_postcopy_has_memory_given_up() {
    let Some(mut rig) = Rig::advised("a_job_that_fails_at_the_end_of_postcopy_has_memory_given_up") else {
        return;
    };
    rig.map(true);
    rig.begin(Effect::PostcopyEnd);
    rig.go_to("unregister");
    rig.port.plan.waiting = 0;
    rig.port.job_failed("the test says no".into(), &mut rig.engine);
    assert_eq!(rig.steps(), LOSS);
    assert!(refused(&rig.port).starts_with("the test says no: guest memory is given up"));
    // The connection ends while the rings stop: what is on its way out stays so, once.
    rig.go_to("stops");
    rig.port.begin_teardown(&mut rig.engine);
    assert_eq!(rig.steps()[..3], ["resets", "give up", "retire"]);
    assert_eq!(rig.steps().iter().filter(|step| **step == "give up").count(), 1);
}

#[test]
fn a_page_that_cannot_be_had_at_the_end_stays_a_hole() {
    const NAME: &str = "a_page_that_cannot_be_had_at_the_end_stays_a_hole";
    // It fails while END waits for it.
    let Some(mut rig) = Rig::armed(NAME) else { return };
    rig.drain();
    let error = io::Error::from_raw_os_error(libc::ENOMEM);
    assert_eq!(rig.port.page_failed(&error, &mut rig.engine), PageFailed::EndFailed);
    assert_eq!(rig.steps(), LOSS);
    assert!(refused(&rig.port).contains("have not arrived: guest memory is given up"));
    assert!(rig.port.plan.waiting == 0 && rig.is_given_up());
    // It does not come while END waits.
    let Some(mut rig) = Rig::armed(NAME) else { return };
    rig.drain();
    rig.port.drain_failed(&mut rig.engine);
    assert_eq!(rig.steps(), LOSS);
    assert!(rig.is_given_up());
    // It has failed before, and END comes before rings have looked again.
    let Some(mut rig) = Rig::armed(NAME) else { return };
    let failed = rig.port.page_failed(&error, &mut rig.engine);
    assert_eq!(failed, PageFailed::LookAgain { is_due: false });
    let failed = rig.port.page_failed(&error, &mut rig.engine);
    assert_eq!(failed, PageFailed::LookAgain { is_due: true });
    rig.begin(Effect::PostcopyEnd);
    assert_eq!(rig.steps(), LOSS);
    assert!(refused(&rig.port).contains("cannot be had"));
    assert!(rig.is_given_up());
    // It never will come, at any time.
    let Some(mut rig) = Rig::armed(NAME) else { return };
    for errno in [libc::EFAULT, libc::EHWPOISON] {
        let error = io::Error::from_raw_os_error(errno);
        assert_eq!(rig.port.page_failed(&error, &mut rig.engine), PageFailed::MemoryLost);
    }
}

/// The connection ends while END waits: nothing is unregistered any more.
#[test]
fn a_teardown_while_end_waits() {
    let Some(mut rig) = Rig::armed("a_teardown_while_end_waits") else { return };
    rig.drain();
    rig.port.begin_teardown(&mut rig.engine);
    assert_eq!((rig.steps(), rig.port.plan.waiting), (TEARDOWN.to_vec(), 0));
    assert!(rig.is_given_up());
}

/// The process ends in a teardown: memory that it has not given up yet is known.
#[test]
fn memory_on_its_way_out_is_known_until_it_is_given_up() {
    let Some(mut rig) = Rig::armed("memory_on_its_way_out_is_known_until_it_is_given_up") else { return };
    let mapping = rig.port.memory.mappings()[0].clone();
    assert_eq!(rig.port.plan.given_up().count(), 0);
    rig.port.begin_teardown(&mut rig.engine);
    rig.go_to("configure");
    {
        let known: Vec<_> = rig.port.plan.given_up().collect();
        assert!(
            matches!(known[..], [(uffd, [only])] if std::ptr::eq(uffd, &*rig.uffd) && Arc::ptr_eq(only, &mapping))
        );
    }
    rig.go_to("give up");
    assert_eq!(rig.port.plan.given_up().count(), 0);
}
