//! A back-end with a tap, and DPDK's virtio-user driver in the place of a guest: independent of Linux's driver, polling,
//! and able to tell how many packets it handed over. And the checks that go with it.
//! Not here: how testpmd is driven (`testpmd`), what frames are (`wire`).
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::backend::{Backend, BackendConfig, is_ours};
use crate::netns::NetNs;
use crate::scenario::Lab;
use crate::testpmd::{PortStats, Testpmd, TestpmdConfig};
use crate::wait::{PATIENCE, until};
use crate::wire::{Capture, Counters, Frame, Injector, Link};

const TAP: &str = "tap0";
/// Room for what comes back while nobody looks; a small frame counts as some 800 bytes.
const CAPTURE_BYTES: usize = 512 << 20;
/// Nothing more is expected when a tap was quiet for so long.
const SILENCE: Duration = Duration::from_secs(2);

/// How front-end and back-end are connected.
#[derive(Clone, Copy, Debug)]
pub struct Wiring {
    /// Queue pairs of both.
    pub queue_pairs: u16,
    /// Whether the front-end offers VIRTIO_NET_F_MRG_RXBUF.
    pub mergeable: bool,
    /// MTU of the tap.
    pub mtu: u16,
    /// Worker threads of the back-end (DPDK as back-end has one in any case).
    pub workers: u16,
    /// Whether the front-end wants packed rings.
    pub packed: bool,
    /// Whether it wants VIRTIO_F_IN_ORDER.
    pub in_order: bool,
}

impl Default for Wiring {
    fn default() -> Self {
        Self { queue_pairs: 1, mergeable: true, mtu: 1500, workers: 1, packed: false, in_order: false }
    }
}

/// Everything running: testpmd on a back-end on a tap.
#[derive(Debug)]
pub struct VirtioUser {
    /// The front-end; it ends first.
    pub front_end: Testpmd,
    /// The back-end.
    pub backend: Backend,
    netns: NetNs,
    link: Link,
    wiring: Wiring,
}

/// What came back from a front-end that echoes numbered frames.
#[derive(Debug, Default)]
pub struct Echo {
    /// How often each number came back.
    pub seen: HashMap<u64, u32>,
}

impl VirtioUser {
    /// Starts all; forwarding is off.
    pub fn start(lab: &Lab, wiring: Wiring) -> Result<Self> {
        let netns = NetNs::new()?;
        // Else the kernel's own IPv6 packets are in every count.
        netns.run(|| {
            // A kernel without IPv6 has no such file, and no such packets.
            let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            Ok(())
        })?;
        let socket = lab.path("vhost");
        let mut config =
            BackendConfig { queue_pairs: wiring.queue_pairs, ..BackendConfig::tap(&socket, TAP) };
        if wiring.workers > 1 && is_ours() {
            config.extra.push(format!("--workers={}", wiring.workers));
        }
        netns.add_tap(TAP, config.wants_multi_queue(), None)?;
        let link = Link::named(TAP);
        netns.run(|| link.set_mtu(wiring.mtu))?;
        let backend = Backend::start(lab, &netns, &config)?;
        // DPDK as back-end sets its own MTU.
        netns.run(|| link.set_mtu(wiring.mtu))?;
        let Wiring { mergeable, packed, in_order, .. } = wiring;
        let [mergeable, packed, in_order] = [mergeable, packed, in_order].map(u8::from);
        let options = format!(",mrg_rxbuf={mergeable},packed_vq={packed},in_order={in_order}");
        let mut config = TestpmdConfig::front_end(&socket, wiring.queue_pairs, &options);
        if wiring.mtu > 1500 {
            config.arguments.push(format!("--max-pkt-len={}", wiring.mtu + 18));
            config.arguments.push("--enable-scatter".into());
            config.arguments.push("--tx-offloads=0x8000".into());
        }
        let front_end = Testpmd::start(lab, None, &config)?;
        Ok(Self { front_end, backend, netns, link, wiring })
    }

    /// The tap's counters.
    pub fn tap(&self) -> Result<Counters> {
        self.netns.run(|| self.link.counters())
    }

    /// Sets how many packets wait in the tap at most.
    pub fn set_queue_len(&self, packets: u32) -> Result<()> {
        self.netns.run(|| self.link.set_queue_len(packets))
    }

    /// Captures what the back-end writes to the tap.
    pub fn capture(&self) -> Result<Capture> {
        self.netns.run(|| Capture::start(&self.link, CAPTURE_BYTES))
    }

    /// The front-end's counters.
    pub fn stats(&mut self) -> Result<PortStats> {
        self.front_end.stats(0)
    }

    /// Has the front-end send frames of `bytes` for a moment; returns how many it handed to the back-end,
    /// queue by queue.
    pub fn send_for_a_moment(&mut self, bytes: usize) -> Result<Vec<u64>> {
        let before = self.stats()?.tx_packets;
        self.front_end.command("set fwd txonly")?;
        self.front_end.command(&format!("set txpkts {bytes}"))?;
        self.front_end.command("start")?;
        until("packets on the tap", PATIENCE, || {
            Ok((self.front_end.stats(0)?.tx_packets > before).then_some(()))
        })?;
        let summary = self.front_end.command("stop")?;
        let sent = self.stats()?.tx_packets - before;
        let queues = sent_by_queue(&summary);
        if self.wiring.queue_pairs == 1 {
            return Ok(vec![sent]);
        }
        ensure!(queues.iter().sum::<u64>() == sent, "queues sent {queues:?}, the port {sent}: {summary}");
        Ok(queues)
    }

    /// Waits until the tap has received `packets` since `before`, and no more than these.
    pub fn wait_for_tap(&self, before: Counters, packets: u64) -> Result<()> {
        let arrived = || anyhow::Ok(self.tap()?.rx_packets - before.rx_packets);
        until("the tap's counter", PATIENCE, || Ok((arrived()? >= packets).then_some(())))
            .with_context(|| format!("{packets} sent, {:?} arrived", arrived()))?;
        let arrived = arrived()?;
        ensure!(arrived == packets, "{arrived} packets on the tap, {packets} were sent");
        Ok(())
    }

    /// Puts frames into the tap at `per_second`, has the front-end send each back, and collects what comes. Fails if
    /// a byte is wrong. Ends when all are back or nothing comes any more.
    pub fn echo(&mut self, frames: &[Vec<u8>], per_second: u64) -> Result<Echo> {
        self.front_end.command("set fwd macswap retry")?;
        self.front_end.command("set burst tx delay 50 retry 100000")?;
        self.front_end.command("start")?;
        let mut capture = self.capture()?;
        let injector = self.netns.run(|| Injector::open(&self.link))?;
        let mut echo = Echo::default();
        std::thread::scope(|scope| -> Result<()> {
            let sender = scope.spawn(|| injector.send_paced(frames, per_second));
            let mut last = Instant::now();
            while echo.seen.len() < frames.len() {
                match capture.next(Duration::from_millis(100))? {
                    Some(frame) => {
                        last = Instant::now();
                        echo.take(frame, frames)?;
                    }
                    None if sender.is_finished() && last.elapsed() > SILENCE => break,
                    None => {}
                }
            }
            sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
            Ok(())
        })?;
        // A duplicate comes late if at all.
        while let Some(frame) = capture.next(Duration::from_millis(200))? {
            echo.take(frame, frames)?;
        }
        ensure!(capture.lost()? == 0, "the capture lost frames: the test's own fault");
        self.front_end.command("stop")?;
        Ok(echo)
    }

    /// Ends the front-end, then the back-end, which must have survived everything and end cleanly.
    pub fn stop(mut self) -> Result<()> {
        self.backend.check_alive()?;
        drop(self.front_end);
        self.backend.stop_cleanly()
    }
}

impl Echo {
    fn take(&mut self, frame: &[u8], sent: &[Vec<u8>]) -> Result<()> {
        let Some(number) = Frame::number(frame) else {
            bail!("a stranger on the tap: {:02x?}", &frame[..14])
        };
        let number = number?;
        let original =
            sent.get(number as usize).with_context(|| format!("number {number} was never sent"))?;
        ensure!(frame.len() == original.len(), "frame {number}: {} bytes of {}", frame.len(), original.len());
        ensure!(frame[0..6] == original[6..12], "frame {number}: destination is not the sender");
        ensure!(frame[6..12] == original[0..6], "frame {number}: source is not the destination");
        *self.seen.entry(number).or_default() += 1;
        Ok(())
    }

    /// Fails if a frame came back twice.
    pub fn check_unique(&self) -> Result<()> {
        match self.seen.iter().find(|(_, n)| **n > 1) {
            Some((number, times)) => bail!("frame {number} came back {times} times"),
            None => Ok(()),
        }
    }
}

/// testpmd prints a block per queue when forwarding stops, if there are several.
fn sent_by_queue(summary: &str) -> Vec<u64> {
    summary
        .split("Forward Stats for")
        .skip(1)
        .filter_map(|block| {
            let rest = &block[block.find("TX-packets:")? + "TX-packets:".len()..];
            rest.split_whitespace().next()?.parse().ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_counters_are_read() {
        let text = "
  ------- Forward Stats for RX Port= 0/Queue= 0 -> TX Port= 0/Queue= 0 -------
  RX-packets: 10             TX-packets: 9              TX-dropped: 1

  ------- Forward Stats for RX Port= 0/Queue= 3 -> TX Port= 0/Queue= 3 -------
  RX-packets: 4              TX-packets: 4              TX-dropped: 0
";
        assert_eq!(sent_by_queue(text), [9, 4]);
        assert!(sent_by_queue("nothing").is_empty());
    }
}
