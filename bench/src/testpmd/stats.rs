//! Reads testpmd's counters out of what it prints. Text in, numbers out.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};

/// Counters of one testpmd port, in packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Received by the port.
    pub rx_packets: u64,
    /// Dropped by the device or driver before testpmd saw them.
    pub rx_missed: u64,
    /// Received with an error.
    pub rx_errors: u64,
    /// Put into the ring to the back-end.
    pub tx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes put into the ring.
    pub tx_bytes: u64,
}

/// What forwarding in one loop over all ports has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardStats {
    /// Times that the loop went round: each port was polled once.
    pub rounds: u64,
    /// Polls that found packets.
    pub bursts: u64,
    /// Packets that were found.
    pub packets: u64,
    /// Clock cycles of polls that found packets, from the poll to the end of sending.
    pub cycles: u64,
    /// The clock, MHz.
    pub mhz: u64,
}

impl ForwardStats {
    /// Time in polls that found packets, ns.
    pub fn busy_ns(&self) -> f64 {
        self.cycles as f64 * 1e3 / self.mhz as f64
    }
}

pub(super) fn parse_forward(text: &str) -> Result<ForwardStats> {
    let numbers = |name: &str| -> Vec<u64> {
        text.match_indices(name).filter_map(|(at, _)| field(&text[at..], name)).collect()
    };
    let rounds = *numbers("RX-bursts :").iter().max().with_context(|| format!("no RX-bursts in:\n{text}"))?;
    Ok(ForwardStats {
        rounds,
        // One call to send per poll that found something; without any the line is left out, as are the cycles.
        bursts: numbers("TX-bursts :").iter().sum(),
        packets: numbers("io packets=").iter().sum(),
        cycles: numbers("total cycles=").iter().sum(),
        mhz: numbers("at ").first().copied().unwrap_or(1),
    })
}

fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text[text.find(name)? + name.len()..].trim_start();
    rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())].parse().ok()
}

pub(super) fn parse_port(text: &str) -> Result<PortStats> {
    let get =
        |name: &str| field(text, name).with_context(|| format!("no {name} in testpmd's answer:\n{text}"));
    Ok(PortStats {
        rx_packets: get("RX-packets:")?,
        rx_missed: get("RX-missed:")?,
        rx_errors: get("RX-errors:")?,
        tx_packets: get("TX-packets:")?,
        rx_bytes: get("RX-bytes:")?,
        tx_bytes: get("TX-bytes:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: &str = "
  ######################## NIC statistics for port 1  ########################
  RX-packets: 7          RX-missed: 1          RX-bytes:  586
  RX-errors: 2
  RX-nombuf:  0
  TX-packets: 4299104    TX-errors: 0          TX-bytes:  275142656

  Throughput (since last show)
  Rx-pps:            0          Rx-bps:            0
";

    const FORWARD: &str = "
  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 0              RX-dropped: 0             RX-total: 0
  TX-packets: 314983         TX-dropped: 95750         TX-total: 410733
  RX-bursts : 17957795 [100% of 0 pkts]
  TX-bursts : 85072 [91% of 0 pkts + 5% of 1 pkts + 2% of 32 pkts + 2% of other]
  ----------------------------------------------------------------------------
  ---------------------- Forward statistics for port 1  ----------------------
  RX-packets: 314983         RX-dropped: 95750         RX-total: 410733
  TX-packets: 0              TX-dropped: 0             TX-total: 0
  RX-bursts : 17957796 [99% of 0 pkts + 0% of 1 pkts + 0% of 32 pkts + 1% of other]
  ----------------------------------------------------------------------------
  CPU cycles/packet=6434.39 (total cycles=2026723686 / total io packets=314983) at 2600 MHz Clock
";

    #[test]
    fn forwarding_is_read() {
        let s = parse_forward(FORWARD).expect("parses");
        let expected = ForwardStats {
            rounds: 17_957_796,
            bursts: 85_072,
            packets: 314_983,
            cycles: 2_026_723_686,
            mhz: 2600,
        };
        assert_eq!(s, expected);
        let idle = parse_forward("  RX-bursts : 94102706 [100% of 0 pkts]\n").expect("parses");
        assert_eq!((idle.rounds, idle.bursts), (94_102_706, 0));
    }

    #[test]
    fn port_counters_are_read() {
        let s = parse_port(PORT).expect("parses");
        let expected = PortStats {
            rx_packets: 7,
            rx_missed: 1,
            rx_errors: 2,
            tx_packets: 4_299_104,
            rx_bytes: 586,
            tx_bytes: 275_142_656,
        };
        assert_eq!(s, expected);
        assert!(parse_port("testpmd> nothing").is_err());
    }
}
