//! An owner that carries nothing out, but checks that what it is told makes sense, one effect after the other.
//!
//! Shared by the tests and the fuzz target, so names come from the includer's `api`.

use super::api::{Effect, Outcome, RING_SIZE_MAX, RegionSpec, RingConfig, TABLE_REGIONS_MAX};

/// Rings and memory as a real owner would have them. Every violation panics.
#[derive(Debug)]
pub struct CheckedOwner {
    /// Running rings, by index.
    pub rings: Vec<Option<RingConfig>>,
    /// Where a ring will stand when it is stopped.
    pub bases: Vec<u16>,
    /// Guest memory.
    pub regions: Vec<RegionSpec>,
    /// Acknowledged features.
    pub features: u64,
    /// A log has been set.
    pub log: bool,
    /// A userfaultfd is there.
    pub userfaultfd: bool,
    /// Memory that comes has not arrived.
    pub listening: bool,
}

impl CheckedOwner {
    /// An owner of so many rings.
    pub fn new(rings: usize) -> Self {
        Self {
            rings: vec![None; rings],
            bases: vec![0; rings],
            regions: Vec::new(),
            features: 0,
            log: false,
            userfaultfd: false,
            listening: false,
        }
    }

    /// Check an effect, carry it out in the model unless `refuse`, and tell what became of it.
    pub fn carry_out<F>(&mut self, effect: &Effect<F>, refuse: bool) -> Outcome {
        if refuse {
            self.check(effect);
            // An owner that cannot end a migration well has ended it all the same (see `Effect::PostcopyEnd`).
            if matches!(effect, Effect::PostcopyEnd) {
                (self.userfaultfd, self.listening) = (false, false);
            }
            return Outcome::Refused("the test says no".into());
        }
        self.check(effect);
        match effect {
            Effect::SetMemTable { regions, postcopy } => {
                self.regions = regions.iter().map(|(spec, _)| *spec).collect();
                if *postcopy {
                    return Outcome::Mapped(self.regions.iter().map(host).collect());
                }
            }
            Effect::AddMemReg { region, postcopy, .. } => {
                self.regions.push(*region);
                if *postcopy {
                    return Outcome::Mapped(vec![host(region)]);
                }
            }
            Effect::PostcopyAdvise => self.userfaultfd = true,
            Effect::PostcopyEnd => (self.userfaultfd, self.listening) = (false, false),
            Effect::PostcopyListen => self.listening = true,
            Effect::RemMemReg { region } => self.regions.retain(|known| known != region),
            Effect::SetLogBase { .. } => self.log = true,
            Effect::SetFeatures { features, .. } => self.features = *features,
            Effect::StartRing { index, config, .. } | Effect::UpdateRing { index, config } => {
                self.rings[usize::from(*index)] = Some(*config);
            }
            Effect::EnableRing { index, enabled } => {
                if let Some(config) = &mut self.rings[usize::from(*index)] {
                    config.enabled = *enabled;
                }
            }
            Effect::StopRing { index } => {
                self.rings[usize::from(*index)] = None;
                return Outcome::Base(self.bases[usize::from(*index)].into());
            }
            Effect::SetCall { .. }
            | Effect::SetErr { .. }
            | Effect::SetMtu(_)
            | Effect::SendRarp(_)
            | Effect::SetBackendChannel(_)
            | Effect::PostcopyArm
            | Effect::PostcopyWake
            | Effect::Reset => {}
        }
        Outcome::Done
    }

    fn check<F>(&self, effect: &Effect<F>) {
        match effect {
            Effect::SetMemTable { regions, postcopy } => {
                assert_eq!(*postcopy, self.listening);
                assert!((1..=TABLE_REGIONS_MAX).contains(&regions.len()), "{} regions", regions.len());
            }
            Effect::AddMemReg { region, postcopy, .. } => {
                assert_eq!(*postcopy, self.listening);
                assert!(!self.regions.contains(region), "added twice");
            }
            Effect::PostcopyListen => {
                assert!(self.userfaultfd && !self.listening, "listening without advice")
            }
            Effect::PostcopyArm | Effect::PostcopyWake => assert!(self.listening, "armed without listening"),
            Effect::PostcopyEnd => assert!(self.userfaultfd, "nothing to end"),
            Effect::PostcopyAdvise => assert!(!self.listening, "advised while listening"),
            Effect::RemMemReg { region } => {
                assert!(self.regions.contains(region), "removed what is not there")
            }
            Effect::SetLogBase { size, offset, .. } => {
                assert!(*size > 0 && offset.checked_add(*size).is_some(), "impossible log");
            }
            Effect::SetFeatures { features, log_all } => {
                assert_eq!(*log_all, features & (1 << 26) != 0);
            }
            Effect::StartRing { index, config, .. } => {
                assert!(self.rings[usize::from(*index)].is_none(), "ring {index} started twice");
                assert!(!self.regions.is_empty(), "ring {index} started without memory");
                self.check_config(config);
            }
            Effect::UpdateRing { index, config } => {
                assert!(self.rings[usize::from(*index)].is_some(), "ring {index} updated at rest");
                self.check_config(config);
            }
            Effect::StopRing { index } | Effect::EnableRing { index, .. } => {
                assert!(self.rings[usize::from(*index)].is_some(), "ring {index} does not run");
            }
            Effect::SetCall { index, .. } | Effect::SetErr { index, .. } => {
                assert!(usize::from(*index) < self.rings.len(), "no ring {index}");
            }
            Effect::Reset => assert!(self.rings.iter().all(Option::is_none), "reset while rings run"),
            Effect::SetMtu(_) | Effect::SendRarp(_) | Effect::SetBackendChannel(_) => {}
        }
    }

    fn check_config(&self, config: &RingConfig) {
        let packed = config.features & (1 << 34) != 0;
        assert!(config.size.is_power_of_two() || (packed && config.size > 0));
        assert!(u32::from(config.size) <= RING_SIZE_MAX);
        assert_eq!(config.features, self.features, "a ring with features that were not agreed on");
        assert!(config.enabled || config.features & (1 << 30) != 0, "disabled without PROTOCOL_FEATURES");
    }
}

/// Where this owner says that a region is mapped.
pub fn host(region: &RegionSpec) -> u64 {
    region.user_addr ^ 0x1111_0000_0000
}
