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

fn field(text: &str, name: &str) -> Option<u64> {
    let rest = &text[text.find(name)? + name.len()..];
    rest.split_whitespace().next()?.parse().ok()
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
