//! The last look at a frame of a guest, in our own copy of it: checksum, length, source. Pure.
//!
//! The checksum goes where the guest says, be it into the link header, so it is filled in before anything is read: what is
//! checked is what is sent.
#![forbid(unsafe_code)]

use super::switch::{Link, Rules, may_send};
use crate::net::checksum;
use crate::net::header::VirtioNetHdr;
use crate::uplink::SendError;
use std::io;
use virtio_bindings::virtio_net::VIRTIO_NET_HDR_F_NEEDS_CSUM;

/// A frame that the guest should not have sent.
#[cold]
pub fn refused() -> SendError {
    SendError::Rejected(io::ErrorKind::InvalidInput.into())
}

/// Makes a frame ready to be sent, and reads its link header.
///
/// # Errors
/// It is too short or too long, its checksum lies outside, or its source is not the port's.
#[inline]
pub fn finish(data: &mut [u8], header: VirtioNetHdr, mtu: u16, rules: &Rules) -> Result<Link, SendError> {
    if u32::from(header.flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
        && !checksum::complete(data, header.csum_start.get().into(), header.csum_offset.get().into())
    {
        return Err(refused());
    }
    let link = Link::of(data).ok_or_else(refused)?;
    if data.len() > usize::from(mtu) + 14 + 4 * link.tags {
        return Err(refused());
    }
    if !may_send(rules, &link) {
        return Err(SendError::Spoofed);
    }
    Ok(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
    const STRICT: Rules =
        Rules { mac: Some(A), vlan: Some(5), flood: true, local_switch: false, anti_spoof: true };

    /// From A, in VLAN 5.
    fn frame(len: usize) -> Vec<u8> {
        let mut frame = [&[2, 0, 0, 0, 0, 0xb], &A[..], &[0x81, 0, 0, 5, 8, 0]].concat();
        frame.resize(len, 0x5a);
        frame
    }

    fn checksum_at(start: u16, offset: u16) -> VirtioNetHdr {
        VirtioNetHdr {
            flags: VIRTIO_NET_HDR_F_NEEDS_CSUM as u8,
            csum_start: start.into(),
            csum_offset: offset.into(),
            ..VirtioNetHdr::default()
        }
    }

    #[test]
    fn what_is_checked_is_what_is_sent() {
        for at in 0..40 {
            for start in 0..=at {
                let mut data = frame(60);
                let outcome = finish(&mut data, checksum_at(start, at - start), 1500, &STRICT);
                let is_own =
                    data[6..12] == A && data[12..14] == [0x81, 0] && data[14] & 0xf == 0 && data[15] == 5;
                match outcome {
                    Ok(link) => assert!(is_own && Some(link) == Link::of(&data), "{start} {at}"),
                    Err(SendError::Spoofed) => assert!(!is_own && (5..16).contains(&at), "{start} {at}"),
                    Err(error) => panic!("{start} {at}: {error}"),
                }
            }
        }
    }

    #[test]
    fn tags_that_the_checksum_takes_away_make_no_room() {
        let rules = Rules { anti_spoof: false, ..STRICT };
        let none = VirtioNetHdr::default();
        assert!(finish(&mut frame(1518), none, 1500, &rules).is_ok());
        assert!(matches!(finish(&mut frame(1519), none, 1500, &rules), Err(SendError::Rejected(_))));
        let untagged = finish(&mut frame(1518), checksum_at(0, 12), 1500, &rules);
        assert!(matches!(untagged, Err(SendError::Rejected(_))));
    }

    #[test]
    fn short_frames_and_checksums_outside_are_refused() {
        for (len, header) in
            [(13, VirtioNetHdr::default()), (13, checksum_at(0, 0)), (60, checksum_at(50, 9))]
        {
            let outcome = finish(&mut frame(60)[..len], header, 1500, &STRICT);
            assert!(matches!(outcome, Err(SendError::Rejected(_))), "{len}");
        }
    }
}
