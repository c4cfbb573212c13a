//! The Internet checksum in software, for frames whose sender left it to the device (VIRTIO 1.3 §5.1.6.2).
//! Uplinks whose other end takes no unfinished frames have it done here, in our own copy of the frame.
#![forbid(unsafe_code)]

/// Sums the 16-bit words of `bytes` in one's complement (RFC 1071), in the machine's byte order; an odd byte counts as
/// if a zero followed.
pub fn sum(bytes: &[u8]) -> u16 {
    // Wide words give the same sum once folded; two accumulators at least, so that additions need not wait.
    let mut total = 0u64;
    let mut chunks = bytes.chunks_exact(32);
    for chunk in &mut chunks {
        let word = |at: usize| {
            u64::from(u32::from_ne_bytes([chunk[at], chunk[at + 1], chunk[at + 2], chunk[at + 3]]))
        };
        total += (word(0) + word(4) + word(8) + word(12)) + (word(16) + word(20) + word(24) + word(28));
    }
    for pair in chunks.remainder().chunks(2) {
        total += u64::from(u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Fills in the checksum of what begins `start` bytes into the frame, `offset` bytes after that. The field holds the
/// sum of the pseudo-header, as the sender has left it. False if the field lies outside the frame.
pub fn complete(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let at = start + offset;
    if at + 2 > frame.len() {
        return false;
    }
    // 0 means "none" to UDP; in one's complement 0xffff is the same number.
    let sum = match !sum(&frame[start..]) {
        0 => 0xffff,
        sum => sum,
    };
    frame[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
    true
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 §3, and its own words: add, fold, complement.
    pub(in crate::net) fn oracle(bytes: &[u8]) -> u16 {
        let mut total: u32 = 0;
        for pair in bytes.chunks(2) {
            total += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    #[test]
    fn rfc_1071_example() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(sum(&bytes).to_ne_bytes(), [0xdd, 0xf2]);
    }

    #[test]
    fn a_sum_of_zero_is_sent_as_ones() {
        let mut frame = [0xff, 0xff, 0, 0];
        assert!(complete(&mut frame, 0, 2));
        assert_eq!(frame, [0xff; 4]);
    }

    #[test]
    fn fields_outside_are_refused() {
        let mut frame = [0; 20];
        assert!(complete(&mut frame, 10, 8));
        for (start, offset) in [(10, 9), (19, 0), (20, 0), (65535, 65535)] {
            assert!(!complete(&mut frame, start, offset));
        }
    }

    proptest! {
        #[test]
        fn sums_are_those_of_the_rfc(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(sum(&bytes).to_ne_bytes(), oracle(&bytes).to_be_bytes());
        }

        /// A receiver that sums everything, pseudo-header included, finds 0xffff.
        #[test]
        fn receivers_find_it_right(mut frame in prop::collection::vec(any::<u8>(), 40..200), pseudo: u16) {
            let (start, offset) = (14, 6);
            frame[start + offset..start + offset + 2].copy_from_slice(&pseudo.to_be_bytes());
            prop_assert!(complete(&mut frame, start, offset));
            let total = u32::from(oracle(&frame[start..])) + u32::from(pseudo);
            prop_assert_eq!((total & 0xffff) + (total >> 16), 0xffff);
        }
    }
}
