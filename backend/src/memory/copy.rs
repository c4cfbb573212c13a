//! Copies between our memory and a guest's, by volatile loads and stores: the compiler may neither repeat a load
//! (a double fetch of something the guest changes) nor assume that what was stored stays.
//! Wide accesses of unaligned memory go through packed wrappers, which compile to single plain moves.

use std::ptr::{read_volatile, write_volatile};

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Word(u64);

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Half(u32);

const WORD: usize = size_of::<Word>();
const HALF: usize = size_of::<Half>();

/// Copies `dst.len()` bytes out of guest memory.
///
/// # Safety
/// `src` must be valid for reads of `dst.len()` bytes inside a live guest mapping.
#[inline]
pub(super) unsafe fn from_guest(src: *const u8, dst: &mut [u8]) {
    let mut done = 0;
    while dst.len() - done >= WORD {
        // SAFETY: `done + WORD <= dst.len()`, within what the caller vouches for; Word has alignment 1.
        let word = unsafe { read_volatile(src.add(done).cast::<Word>()) };
        dst[done..done + WORD].copy_from_slice(&{ word.0 }.to_ne_bytes());
        done += WORD;
    }
    if dst.len() - done >= HALF {
        // SAFETY: as above with HALF.
        let half = unsafe { read_volatile(src.add(done).cast::<Half>()) };
        dst[done..done + HALF].copy_from_slice(&{ half.0 }.to_ne_bytes());
        done += HALF;
    }
    while done < dst.len() {
        // SAFETY: `done < dst.len()`.
        dst[done] = unsafe { read_volatile(src.add(done)) };
        done += 1;
    }
}

/// Copies `src` into guest memory.
///
/// # Safety
/// `dst` must be valid for writes of `src.len()` bytes inside a live guest mapping.
#[inline]
pub(super) unsafe fn to_guest(dst: *mut u8, src: &[u8]) {
    let mut chunks = src.chunks_exact(WORD);
    let mut done = 0;
    for chunk in &mut chunks {
        let word = Word(u64::from_ne_bytes(chunk.try_into().expect("chunks_exact gives whole words")));
        // SAFETY: `done + WORD <= src.len()`, within what the caller vouches for; Word has alignment 1.
        unsafe { write_volatile(dst.add(done).cast::<Word>(), word) };
        done += WORD;
    }
    for byte in chunks.remainder() {
        // SAFETY: `done < src.len()`.
        unsafe { write_volatile(dst.add(done), *byte) };
        done += 1;
    }
}

/// Copies `len` bytes out of guest memory, many at a time, each loaded once.
///
/// # Safety
/// `src` must be valid for reads of `len` bytes inside a live mapping, `dst` for writes; they must not overlap.
#[inline]
pub(super) unsafe fn bulk_from_guest(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { bulk::<true, false>(src, dst, len) }
}

/// Copies `len` bytes into guest memory, many at a time, each stored once.
///
/// # Safety
/// As for [`bulk_from_guest`].
#[inline]
pub(super) unsafe fn bulk_to_guest(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { bulk::<false, true>(src, dst, len) }
}

/// Copies `len` bytes from one guest's memory (or ours) to another's, many at a time, each loaded once and stored once.
/// Where both overlap, what the destination holds afterwards is a mixture.
///
/// # Safety
/// `src` must be valid for reads of `len` bytes, `dst` for writes, each inside a live mapping or memory of ours.
#[inline]
pub(super) unsafe fn bulk_between_guests(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { bulk::<true, true>(src, dst, len) }
}

/// The widest thing that one plain move carries on every machine of the kind.
#[derive(Clone, Copy)]
#[repr(C, packed)]
#[cfg(target_arch = "x86_64")]
struct Wide(std::arch::x86_64::__m128i);
#[derive(Clone, Copy)]
#[repr(C, packed)]
#[cfg(not(target_arch = "x86_64"))]
struct Wide(u64);

/// # Safety
/// As for [`bulk_from_guest`]; `FROM`: the source is a guest's, `TO`: the destination is.
#[inline(always)]
unsafe fn bulk<const FROM: bool, const TO: bool>(src: *const u8, dst: *mut u8, len: usize) {
    const WIDE: usize = size_of::<Wide>();
    let mut done = 0;
    while len - done >= 4 * WIDE {
        // Loads before stores: they need not wait for each other. By name and not in an array, which would lie on the
        // stack: its stores would take the places of those that wait for lines of guest memory.
        // SAFETY: four pieces lie within `len`.
        unsafe {
            let a = load::<Wide, FROM>(src.add(done));
            let b = load::<Wide, FROM>(src.add(done + WIDE));
            let c = load::<Wide, FROM>(src.add(done + 2 * WIDE));
            let d = load::<Wide, FROM>(src.add(done + 3 * WIDE));
            store::<Wide, TO>(dst.add(done), a);
            store::<Wide, TO>(dst.add(done + WIDE), b);
            store::<Wide, TO>(dst.add(done + 2 * WIDE), c);
            store::<Wide, TO>(dst.add(done + 3 * WIDE), d);
        }
        done += 4 * WIDE;
    }
    // SAFETY: each call goes on where the last one ended, within `len`.
    unsafe {
        let done = pieces::<Wide, FROM, TO>(src, dst, done, len);
        let done = pieces::<Word, FROM, TO>(src, dst, done, len);
        let done = pieces::<Half, FROM, TO>(src, dst, done, len);
        pieces::<u8, FROM, TO>(src, dst, done, len);
    }
}

/// Copies from `done` on as many pieces as `len` has; returns how far it came.
///
/// # Safety
/// As for [`bulk_from_guest`]; `T` must have alignment 1.
#[inline(always)]
unsafe fn pieces<T: Copy, const FROM: bool, const TO: bool>(
    src: *const u8,
    dst: *mut u8,
    mut done: usize,
    len: usize,
) -> usize {
    while len - done >= size_of::<T>() {
        // SAFETY: the piece lies within `len`.
        unsafe { store::<T, TO>(dst.add(done), load::<T, FROM>(src.add(done))) };
        done += size_of::<T>();
    }
    done
}

/// One move from the source; volatile if that is the guest's.
///
/// # Safety
/// `from` must be valid for a read of a `T`, which must have alignment 1.
#[inline(always)]
unsafe fn load<T: Copy, const FROM: bool>(from: *const u8) -> T {
    // SAFETY: the caller's promise.
    unsafe { if FROM { read_volatile(from.cast::<T>()) } else { from.cast::<T>().read() } }
}

/// One move to the destination; volatile if that is the guest's.
///
/// # Safety
/// `to` must be valid for a write of a `T`, which must have alignment 1.
#[inline(always)]
unsafe fn store<T: Copy, const TO: bool>(to: *mut u8, value: T) {
    // SAFETY: the caller's promise.
    unsafe { if TO { write_volatile(to.cast::<T>(), value) } else { to.cast::<T>().write(value) } }
}

/// One 16-byte descriptor as two little-endian words, each loaded once.
///
/// # Safety
/// `src` must be valid for reads of 16 bytes inside a live guest mapping.
#[inline(always)]
pub(super) unsafe fn load_two_words(src: *const u8) -> (u64, u64) {
    // SAFETY: 16 readable bytes; Word has alignment 1.
    let (low, high) =
        unsafe { (read_volatile(src.cast::<Word>()), read_volatile(src.add(WORD).cast::<Word>())) };
    (u64::from_le(low.0), u64::from_le(high.0))
}

/// Stores two little-endian halves.
///
/// # Safety
/// `dst` must be valid for writes of 8 bytes inside a live guest mapping.
#[inline(always)]
pub(super) unsafe fn store_two_halves(dst: *mut u8, low: u32, high: u32) {
    // SAFETY: 8 writable bytes; Half has alignment 1.
    unsafe {
        write_volatile(dst.cast::<Half>(), Half(low.to_le()));
        write_volatile(dst.add(HALF).cast::<Half>(), Half(high.to_le()));
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
        let data: Vec<u8> = (0..400).map(|i| (i * 7) as u8 ^ 0x5a).collect();
        for align in [0, 1, 7, 8, 15] {
            for len in (0..200).chain([255, 256, 300]) {
                let (mut far, mut back) = (vec![0u8; 400], vec![0u8; 400]);
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
