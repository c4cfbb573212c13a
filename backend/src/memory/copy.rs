//! Copies between our memory and a guest's, made of single moves ([`super::moves`]): the compiler may neither repeat a load (a
//! double fetch of something the guest changes) nor assume that what was stored stays.

use super::moves::{BLOCK, Unit, Wide, copy_block, copy_string, has_fast_strings};

/// Bytes from which on the CPU's own copy is faster than moves (frames of 1500 bytes to a guest: 1.3 times), where it has one:
/// it need not fetch lines that it writes whole. It does so only where both ends lie alike; elsewhere it is up to five times
/// slower than moves.
const STRING_MIN: usize = 512;
/// How they must lie alike: to so many bytes (AMD Zen 4: 3.3 GB/s against 20 at other distances).
const STRING_ALIGN: usize = 32;

/// Copies `dst.len()` bytes out of guest memory.
///
/// # Safety
/// `src` must be valid for reads of `dst.len()` bytes inside a live guest mapping.
#[inline]
pub(super) unsafe fn from_guest(src: *const u8, dst: &mut [u8]) {
    // SAFETY: the caller's promise; `dst` has as many bytes.
    unsafe { few(src, dst.as_mut_ptr(), dst.len()) }
}

/// Copies `src` into guest memory.
///
/// # Safety
/// `dst` must be valid for writes of `src.len()` bytes inside a live guest mapping.
#[inline]
pub(super) unsafe fn to_guest(dst: *mut u8, src: &[u8]) {
    // SAFETY: the caller's promise; `src` has as many bytes.
    unsafe { few(src.as_ptr(), dst, src.len()) }
}

/// Copies an array into guest memory, in as few moves as its length, known to the compiler, takes.
///
/// # Safety
/// `dst` must be valid for writes of `N` bytes inside a live guest mapping.
#[inline(always)]
pub(super) unsafe fn array_to_guest<const N: usize>(dst: *mut u8, src: &[u8; N]) {
    // SAFETY: the caller's promise; `src` has `N` bytes.
    unsafe { few(src.as_ptr(), dst, N) }
}

/// Copies `len` bytes out of guest memory, many at a time, each loaded once.
///
/// # Safety
/// `src` must be valid for reads of `len` bytes inside a live mapping, `dst` for writes.
#[inline]
pub(super) unsafe fn bulk_from_guest(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { bulk(src, dst, len) }
}

/// Copies `len` bytes into guest memory, many at a time, each stored once.
///
/// # Safety
/// As for [`bulk_from_guest`].
#[inline]
pub(super) unsafe fn bulk_to_guest(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { bulk(src, dst, len) }
}

/// Copies `len` bytes from one guest's memory (or ours) to another's, many at a time, each loaded once and stored once.
/// Where both overlap, what the destination holds afterwards is a mixture.
///
/// # Safety
/// As for [`bulk_from_guest`].
#[inline]
pub(super) unsafe fn bulk_between_guests(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { bulk(src, dst, len) }
}

/// # Safety
/// As for [`bulk_from_guest`].
#[inline(always)]
unsafe fn bulk(src: *const u8, dst: *mut u8, len: usize) {
    let alike = (src.addr() ^ dst.addr()).is_multiple_of(STRING_ALIGN);
    if len >= STRING_MIN && alike && has_fast_strings() {
        // SAFETY: the caller's promise.
        unsafe { copy_string(src, dst, len) };
        return;
    }
    let (mut src, mut dst, mut len) = (src, dst, len);
    while len >= BLOCK {
        // SAFETY: the block lies within what is left.
        unsafe {
            copy_block(src, dst);
            (src, dst) = (src.add(BLOCK), dst.add(BLOCK));
        }
        len -= BLOCK;
    }
    if len == 0 {
        return;
    }
    // SAFETY: goes on where the blocks ended, within what is left.
    unsafe {
        let done = pieces::<Wide>(src, dst, 0, len);
        few(src.add(done), dst.add(done), len - done);
    }
}

/// Copies `len` bytes by moves of 8, 4 and 1 bytes.
///
/// # Safety
/// As for [`bulk_from_guest`].
#[inline(always)]
unsafe fn few(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: each call goes on where the last one ended, within `len`.
    unsafe {
        let done = pieces::<u64>(src, dst, 0, len);
        let done = pieces::<u32>(src, dst, done, len);
        pieces::<u8>(src, dst, done, len);
    }
}

/// Copies from `done` on as many pieces as `len` has; returns how far it came.
///
/// # Safety
/// As for [`bulk_from_guest`].
#[inline(always)]
unsafe fn pieces<T: Unit>(src: *const u8, dst: *mut u8, mut done: usize, len: usize) -> usize {
    while len - done >= size_of::<T>() {
        // SAFETY: the piece lies within `len`.
        unsafe { T::load(src.add(done)).store(dst.add(done)) };
        done += size_of::<T>();
    }
    done
}

/// One 16-byte descriptor as two little-endian words, each loaded once.
///
/// # Safety
/// `src` must be valid for reads of 16 bytes inside a live guest mapping.
#[inline(always)]
pub(super) unsafe fn load_two_words(src: *const u8) -> (u64, u64) {
    // SAFETY: 16 readable bytes.
    unsafe { (u64::from_le(u64::load(src)), u64::from_le(u64::load(src.add(8)))) }
}

/// One little-endian word, loaded once.
///
/// # Safety
/// `src` must be valid for reads of 8 bytes inside a live guest mapping.
#[inline(always)]
pub(super) unsafe fn load_word(src: *const u8) -> u64 {
    // SAFETY: 8 readable bytes.
    u64::from_le(unsafe { u64::load(src) })
}

/// Stores two little-endian halves.
///
/// # Safety
/// `dst` must be valid for writes of 8 bytes inside a live guest mapping.
#[inline(always)]
pub(super) unsafe fn store_two_halves(dst: *mut u8, low: u32, high: u32) {
    // SAFETY: 8 writable bytes.
    unsafe {
        low.to_le().store(dst);
        high.to_le().store(dst.add(4));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment_survives_a_round_trip() {
        let data: Vec<u8> = (0..64).map(|i| i as u8 ^ 0x5a).collect();
        for align in 0..9 {
            for len in 0..40 {
                let mut far = [0u8; 64];
                let mut back = vec![0u8; len];
                // SAFETY: `far` is larger than align + len.
                unsafe {
                    to_guest(far.as_mut_ptr().add(align), &data[..len]);
                    from_guest(far.as_ptr().add(align), &mut back);
                }
                assert_eq!(back, &data[..len]);
                assert!(far[..align].iter().chain(&far[align + len..]).all(|b| *b == 0));
            }
        }
    }

    #[test]
    fn bulk_copies_move_every_byte_and_no_other() {
        let data: Vec<u8> = (0..2000).map(|i| (i * 7) as u8 ^ 0x5a).collect();
        for align in [0, 1, 7, 8, 15, 32] {
            for len in (0..200).chain([255, 256, 300, 511, 512, 1512]) {
                let (mut far, mut back) = (vec![0u8; 2000], vec![0u8; 2000]);
                // SAFETY: all are larger than align + len.
                unsafe {
                    bulk_to_guest(data.as_ptr(), far.as_mut_ptr().add(align), len);
                    bulk_from_guest(far.as_ptr().add(align), back.as_mut_ptr().add(1), len);
                }
                assert_eq!(back[1..=len], data[..len]);
                assert!(far[..align].iter().chain(&far[align + len..]).all(|b| *b == 0));
                assert!(back[1 + len..].iter().all(|b| *b == 0));
            }
        }
    }

    #[test]
    fn words_are_little_endian() {
        let bytes: [u8; 16] = std::array::from_fn(|i| i as u8);
        // SAFETY: 16 bytes.
        let (low, high) = unsafe { load_two_words(bytes.as_ptr()) };
        assert_eq!(low, 0x0706_0504_0302_0100);
        assert_eq!(high, 0x0f0e_0d0c_0b0a_0908);
    }
}
