//! The steering programs, run by the kernel on crafted frames (BPF_PROG_TEST_RUN), against a second implementation of what
//! they shall do (`oracle`). Frames are made in `frames`.

mod frames;
mod oracle;
mod tap;
mod xdp;

/// xorshift64*: the same frames in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 32) as usize % limit
    }

    /// Some frame with some bytes changed, cut off somewhere.
    fn spoil(&mut self, frames: &[Vec<u8>]) -> Vec<u8> {
        let mut frame = frames[self.below(frames.len())].clone();
        for _ in 0..self.below(4) {
            let at = self.below(frame.len().min(80));
            frame[at] = match self.below(4) {
                0 => 0,
                1 => 0xff,
                2 => frame[at] ^ 1 << self.below(8),
                _ => self.next() as u8,
            };
        }
        if self.below(3) == 0 {
            frame.truncate(14 + self.below(frame.len() - 14));
        }
        frame
    }
}
