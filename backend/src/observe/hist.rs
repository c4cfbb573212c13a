//! Arithmetic on histograms: differences, percentiles, bars. Pure.
#![forbid(unsafe_code)]

use ebpf_common::faults::{Hist, SLOTS};

/// Eighths of a character cell, from empty to one eighth short of full.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// Where a bucket begins, µs.
pub fn from_us(slot: usize) -> u64 {
    if slot == 0 { 0 } else { 1 << slot }
}

/// Where it ends, µs.
pub fn below_us(slot: usize) -> u64 {
    2 << slot
}

/// What has come to `before` until `now`. A stall that moved to a longer bucket meanwhile counts in none of them.
pub fn difference(now: &Hist, before: &Hist) -> Hist {
    let minus = |a: u64, b: u64| (a.wrapping_sub(b) as i64).max(0) as u64;
    let mut rest = *now;
    rest.count = minus(now.count, before.count);
    rest.sum_ns = minus(now.sum_ns, before.sum_ns);
    for (to, from) in rest.slots.iter_mut().zip(before.slots) {
        *to = minus(*to, from);
    }
    for (to, from) in rest.sources.iter_mut().zip(before.sources) {
        *to = minus(*to, from);
    }
    // The longest of all times need not be of this one; a new longest is.
    if now.max_ns == before.max_ns {
        let longest = rest.slots.iter().rposition(|count| *count > 0);
        rest.max_ns = longest.map_or(0, |slot| (below_us(slot) * 1000).min(now.max_ns));
    }
    rest
}

/// Mean length, ns.
pub fn mean_ns(hist: &Hist) -> u64 {
    hist.sum_ns.checked_div(hist.count).unwrap_or(0)
}

/// A length, ns, that at least `percent` of the stalls are not above: the end of their bucket, or the longest stall.
pub fn percentile_ns(hist: &Hist, percent: u64) -> u64 {
    let total: u64 = hist.slots.iter().sum();
    let wanted = (u128::from(total) * u128::from(percent)).div_ceil(100);
    let mut seen = 0;
    for (slot, count) in hist.slots.iter().enumerate() {
        seen += u128::from(*count);
        if seen >= wanted && *count > 0 {
            return (below_us(slot) * 1000).min(hist.max_ns);
        }
    }
    0
}

/// The buckets from the first to the last that counts something.
pub fn buckets(hist: &Hist) -> impl Iterator<Item = (usize, u64)> {
    let first = hist.slots.iter().position(|count| *count > 0).unwrap_or(SLOTS);
    let last = hist.slots.iter().rposition(|count| *count > 0).unwrap_or(0);
    (first..last.saturating_add(1).max(first)).map(|slot| (slot, hist.slots[slot]))
}

/// A bar of `width` cells for the largest count, others in proportion; something for every count above zero.
pub fn bar(count: u64, largest: u64, width: usize) -> String {
    if count == 0 || largest == 0 {
        return String::new();
    }
    let eighths = u128::from(count.min(largest)) * width as u128 * 8 / u128::from(largest);
    let eighths = eighths.max(1) as usize;
    format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

/// A length for people: three digits and a unit.
pub fn length(ns: u64) -> String {
    let (value, unit) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (ns as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {unit}")
}

/// Where a bucket begins, for people: powers of two count in 1024s, so that the numbers stay short.
pub fn bucket_label(slot: usize) -> String {
    match slot {
        0 => "0 µs".into(),
        1..10 => format!("{} µs", 1 << slot),
        10..20 => format!("{} ms", 1 << (slot - 10)),
        _ => format!("{} s", 1_u64 << (slot - 20)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hist(slots: &[(usize, u64)], max_us: u64) -> Hist {
        let mut hist = Hist { max_ns: max_us * 1000, ..Hist::EMPTY };
        for (slot, count) in slots {
            hist.slots[*slot] = *count;
            hist.count += count;
            hist.sum_ns += count * from_us(*slot) * 1500;
        }
        hist
    }

    #[test]
    fn percentiles_are_the_ends_of_buckets_or_the_longest_stall() {
        let h = hist(&[(3, 90), (8, 9), (12, 1)], 5000);
        assert_eq!(percentile_ns(&h, 50), 16_000);
        assert_eq!(percentile_ns(&h, 90), 16_000);
        assert_eq!(percentile_ns(&h, 91), 512_000);
        assert_eq!(percentile_ns(&h, 99), 512_000);
        assert_eq!(percentile_ns(&h, 100), 5_000_000);
        assert_eq!(percentile_ns(&Hist::EMPTY, 99), 0);
        assert_eq!(mean_ns(&Hist::EMPTY), 0);
    }

    #[test]
    fn differences_leave_out_what_was() {
        let before = hist(&[(3, 2), (5, 1)], 40);
        let mut now = hist(&[(3, 5), (5, 1), (4, 1)], 40);
        let rest = difference(&now, &before);
        assert_eq!((rest.count, rest.slots[3], rest.slots[4], rest.slots[5]), (4, 3, 1, 0));
        assert_eq!(rest.max_ns, 32_000, "the longest is not of this time: the end of the last bucket");
        now.max_ns = 50_000;
        assert_eq!(difference(&now, &before).max_ns, 50_000);
        // A stall that slept on: one bucket down, another up, none new.
        let moved = hist(&[(3, 2), (6, 1)], 70);
        let rest = difference(&moved, &before);
        assert_eq!((rest.count, rest.slots[5], rest.slots[6]), (0, 0, 1));
    }

    #[test]
    fn lengths_and_labels_are_short() {
        let shown = [999, 1_000, 12_345, 123_456, 5_176_000, 20_238_000, 1_234_567_890].map(length);
        assert_eq!(shown, ["999 ns", "1.00 µs", "12.3 µs", "123 µs", "5.18 ms", "20.2 ms", "1.23 s"]);
        let labels: Vec<String> = [0, 1, 9, 10, 19, 20, 39].map(bucket_label).into();
        assert_eq!(labels, ["0 µs", "2 µs", "512 µs", "1 ms", "512 ms", "1 s", "524288 s"]);
    }

    #[test]
    fn bars_are_in_proportion_and_never_empty_for_something() {
        assert_eq!(bar(8, 8, 2), "██");
        assert_eq!(bar(3, 8, 1), "▍");
        assert_eq!(bar(1, 1_000_000, 10), "▏");
        assert_eq!(bar(0, 8, 2), "");
        assert_eq!(buckets(&hist(&[(3, 1), (5, 1)], 9)).map(|b| b.1).collect::<Vec<_>>(), [1, 0, 1]);
        assert_eq!(buckets(&Hist::EMPTY).count(), 0);
    }

    proptest! {
        #[test]
        fn a_percentile_is_never_above_the_longest_and_grows(
            counts in prop::collection::vec(0..1_000_u64, SLOTS), max_us in 1..u64::from(u32::MAX),
        ) {
            let slots: Vec<_> = counts.into_iter().enumerate().collect();
            let h = hist(&slots, max_us);
            let mut last = 0;
            for percent in [1, 50, 90, 99, 100] {
                let at = percentile_ns(&h, percent);
                prop_assert!(at >= last && at <= h.max_ns);
                last = at;
            }
        }
    }
}
