//! The picture of the table: a bar per row that has a ratio, as SVG. Pure.
//!
//! Rows whose goal is another one than a ratio are not in it. A bar is ours divided by DPDK, on a scale that ends a little above the largest; the line at 1 is DPDK, the mark is what
//! is to be reached.
#![forbid(unsafe_code)]

use std::fmt::Write;

use super::score::{Line, Verdict};

const WIDTH: f64 = 860.0;
const ROW: f64 = 26.0;
const BAR: f64 = 16.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 44.0;
/// Where bars begin and where the scale ends.
const LEFT: f64 = 330.0;
const RIGHT: f64 = 760.0;
const REACHED: &str = "#2a7a4b";
const LIMITED: &str = "#8a8f98";
const MISSED: &str = "#c4562f";

/// The SVG; `caption` stands below it.
pub fn svg(lines: &[Line], caption: &str) -> String {
    let shown = |l: &&Line| l.ratio_to_reach.is_some() || l.verdict == Verdict::Informs;
    let rows: Vec<_> = lines.iter().filter(shown).filter_map(|l| Some((l, l.ratio?))).collect();
    let largest = rows.iter().map(|(l, r)| r.median.max(l.ratio_to_reach.unwrap_or(0.0)));
    let scale_end = largest.fold(1.0, f64::max) * 1.05;
    let x = |ratio: f64| LEFT + ratio / scale_end * (RIGHT - LEFT);
    let height = TOP + rows.len() as f64 * ROW + BOTTOM;
    let mut out = String::new();
    let mut put = |text: std::fmt::Arguments<'_>| {
        // Writing to a String does not fail.
        let _ = out.write_fmt(text);
        out.push('\n');
    };
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"system-ui, sans-serif\" \
         font-size=\"13\">"
    ));
    put(format_args!("<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>"));
    put(format_args!(
        "<text x=\"16\" y=\"24\" font-size=\"16\" font-weight=\"600\" fill=\"#1c1f23\">vhost-user-net against DPDK, one core: \
         ratio (longer is better)</text>"
    ));
    let mut tick = 0.0;
    while tick <= scale_end {
        let (at, end) = (x(tick), height - BOTTOM + 4.0);
        let (color, width) = if tick == 1.0 { ("#1c1f23", 1.5) } else { ("#e2e4e8", 1.0) };
        put(format_args!(
            "<line x1=\"{at:.1}\" y1=\"{}\" x2=\"{at:.1}\" y2=\"{end}\" stroke=\"{color}\" stroke-width=\"{width}\"/>",
            TOP - 6.0
        ));
        let label = if tick == 1.0 { "DPDK".into() } else { format!("{tick} x") };
        put(format_args!(
            "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\" font-size=\"11\" fill=\"#5b616b\">{label}</text>",
            TOP - 11.0
        ));
        tick += if scale_end > 6.0 { 1.0 } else { 0.5 };
    }
    for (i, (line, ratio)) in rows.iter().enumerate() {
        let y = TOP + i as f64 * ROW;
        let middle = y + ROW / 2.0;
        let color = match line.verdict {
            Verdict::Missed => MISSED,
            Verdict::FrontEndsLimit | Verdict::Informs | Verdict::NotMeasured => LIMITED,
            Verdict::Reached | Verdict::ReachedAtFrontEndsLimit => REACHED,
        };
        put(format_args!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#1c1f23\">{}</text>",
            LEFT - 10.0,
            middle + 4.5,
            escaped(&line.title)
        ));
        put(format_args!(
            "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\" fill=\"{color}\"/>",
            middle - BAR / 2.0,
            (x(ratio.median) - LEFT).max(1.0)
        ));
        if let Some(goal) = line.ratio_to_reach {
            put(format_args!(
                "<line x1=\"{0:.1}\" y1=\"{1:.1}\" x2=\"{0:.1}\" y2=\"{2:.1}\" stroke=\"#1c1f23\" stroke-width=\"2\" \
                 stroke-dasharray=\"3 2\"/>",
                x(goal),
                y + 3.0,
                y + ROW - 3.0
            ));
        }
        let end = x(ratio.median).max(x(line.ratio_to_reach.unwrap_or(0.0)));
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#1c1f23\">{:.2}</text>",
            end + 6.0,
            middle + 4.5,
            ratio.median
        ));
    }
    let y = height - 16.0;
    let legend = [(REACHED, "reached"), (MISSED, "missed"), (LIMITED, "no goal, or the front-end's limit")];
    let mut at = 16.0;
    for (color, label) in legend {
        put(format_args!("<rect x=\"{at}\" y=\"{}\" width=\"10\" height=\"10\" fill=\"{color}\"/>", y - 9.0));
        put(format_args!(
            "<text x=\"{}\" y=\"{y}\" font-size=\"11\" fill=\"#5b616b\">{label}</text>",
            at + 14.0
        ));
        at += 30.0 + 6.2 * label.len() as f64;
    }
    put(format_args!(
        "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\" font-size=\"11\" fill=\"#5b616b\">dashes: to reach; {}</text>",
        WIDTH - 16.0,
        escaped(caption)
    ));
    put(format_args!("</svg>"));
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::rows::{Goal, Row, Unit};
    use super::super::score::{self, DPDK, OURS, Sample, Samples};
    use super::*;

    #[test]
    fn a_bar_for_each_row_with_a_ratio() {
        let sample = |value| vec![Sample { round: 0, value, idle: Some(0.9), others: 0.0 }];
        let row = |title, goal| Row { id: "r", title, unit: Unit::Mpps, goal, paced_by_driver: true };
        let both: Samples = [(OURS.into(), sample(3.0)), (DPDK.into(), sample(1.5))].into();
        let alone: Samples = [(OURS.into(), sample(3.0))].into();
        let lines = [
            score::line(&row("a -> b", Goal::Ratio(1.5)), &both),
            score::line(&row("c", Goal::Ratio(2.5)), &both),
            score::line(&row("d", Goal::Nothing), &alone),
        ];
        let svg = svg(&lines, "5 rounds");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("a -&gt; b") && !svg.contains(">d<"));
        assert_eq!(svg.matches("height=\"16\"").count(), 2);
        let bar = |color: &str| svg.matches(&format!("rx=\"2\" fill=\"{color}\"")).count();
        assert_eq!((bar(REACHED), bar(MISSED)), (1, 1));
    }
}
