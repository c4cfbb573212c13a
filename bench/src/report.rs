//! Medians with their spread, and tables of text.
#![forbid(unsafe_code)]

use serde::Serialize;

/// The median of several rounds and how far they were apart.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// How many.
    pub rounds: usize,
}

impl Spread {
    /// Of some numbers; all NaN if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut v: Vec<f64> = values.into_iter().collect();
        v.sort_by(f64::total_cmp);
        let n = v.len();
        let median = match n {
            0 => f64::NAN,
            n if n % 2 == 1 => v[n / 2],
            n => (v[n / 2 - 1] + v[n / 2]) / 2.0,
        };
        let end = |x: Option<&f64>| x.copied().unwrap_or(f64::NAN);
        Self { median, min: end(v.first()), max: end(v.last()), rounds: n }
    }

    /// As text with `digits` behind the point.
    pub fn show(&self, digits: usize) -> String {
        format!("{:.digits$} ({:.digits$}-{:.digits$})", self.median, self.min, self.max)
    }
}

/// A table with aligned columns.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (w, cell) in widths.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut out = String::from("|");
        for (cell, &w) in cells.zip(&widths) {
            out.push_str(&format!(" {cell:<w$} |"));
        }
        out.push('\n');
        out
    };
    let mut out = line(&mut head.iter().copied());
    let rule: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
    out.push_str(&line(&mut rule.iter().map(String::as_str)));
    for row in rows {
        out.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]).median, 2.0);
        let s = Spread::of([4.0, 1.0]);
        assert_eq!((s.median, s.min, s.max, s.rounds), (2.5, 1.0, 4.0, 2));
        assert!(Spread::of([]).median.is_nan());
    }

    #[test]
    fn columns_are_aligned() {
        let t = table(&["a", "long"], &[vec!["xyz".into(), "1".into()]]);
        assert_eq!(t, "| a   | long |\n| --- | ---- |\n| xyz | 1    |\n");
    }
}
