//! The announcement that SEND_RARP asks for: a broadcast RARP request in the guest's name, which teaches
//! switches where its MAC address lives now (vhost-user: VHOST_USER_SEND_RARP; RFC 903).
#![forbid(unsafe_code)]

/// Shortest Ethernet frame without checksum, bytes.
const FRAME_MIN: usize = 60;

/// The frame for this MAC address.
pub fn frame(mac: [u8; 6]) -> [u8; FRAME_MIN] {
    let mut frame = [0; FRAME_MIN];
    frame[0..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&0x8035_u16.to_be_bytes()); // RARP
    frame[14..16].copy_from_slice(&1_u16.to_be_bytes()); // Ethernet
    frame[16..18].copy_from_slice(&0x0800_u16.to_be_bytes()); // IPv4
    frame[18] = 6;
    frame[19] = 4;
    frame[20..22].copy_from_slice(&3_u16.to_be_bytes()); // reverse request
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

#[cfg(test)]
mod tests {
    #[test]
    fn says_who_and_to_whom() {
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let frame = super::frame(mac);
        assert_eq!(&frame[..6], &[0xff; 6]);
        assert_eq!(&frame[6..14], &[0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x80, 0x35]);
        assert_eq!(&frame[14..22], &[0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(
            &frame[22..42],
            &[0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0, 0, 0, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0, 0, 0]
        );
    }
}
