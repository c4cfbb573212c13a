//! `vubench table`: everything that rings, peer links and many ports are held against, ours, DPDK's and others' in turn
//! within one run.
//!
//! | file | what |
//! |---|---|
//! | `rows` | what is measured, and what is to be reached |
//! | `sides` | the contenders, started for a measurement |
//! | `run`, `limit` | one measurement; what the machine can do at all |
//! | `uplinks` | rows of `vubench tap` and `vubench xdp` |
//! | `score`, `show`, `picture` | medians, ratios and verdicts; as text; as SVG |
//!
//! Here: the order of things. The back-end has CPU 0; this program, whose driver is the front-end, has CPU 1, as has testpmd
//! where it is the front-end.
#![forbid(unsafe_code)]

mod limit;
mod picture;
mod rows;
mod run;
mod score;
mod show;
mod sides;
mod uplinks;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::compare::Place;
use crate::interrupt;
use rows::Row;
use score::{Line, OURS, Sample, Samples};
use sides::Contender;

/// `vubench table`.
#[derive(clap::Args)]
pub struct Args {
    /// Our back-end
    #[arg(long, default_value = "target/release/vhost-user-net")]
    backend_bin: PathBuf,
    /// Another back-end: NAME=COMMAND with {socket}, which drops what a guest sends, or makes packets for it
    #[arg(long, value_name = "NAME=COMMAND")]
    other: Vec<Contender>,
    /// Leave DPDK's back-end out
    #[arg(long)]
    no_dpdk: bool,
    /// Rounds; the contenders take turns in each
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of each measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only rows whose names begin with one of these (see --list)
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Say what the rows are called
    #[arg(long)]
    list: bool,
    /// Without the rows of `vubench tap` and `vubench xdp`, which take some minutes
    #[arg(long)]
    no_uplinks: bool,
    /// Instructions per packet, guest to null, as callgrind has counted them
    #[arg(long)]
    instructions_tx: Option<f64>,
    /// The same, null to guest
    #[arg(long)]
    instructions_rx: Option<f64>,
    /// Write the JSON report here
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the picture here
    #[arg(long)]
    picture: Option<PathBuf>,
}

impl Args {
    fn wants(&self, id: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|prefix| id.starts_with(prefix.as_str()))
    }
}

/// What was found so far.
struct Found {
    rows: Vec<(Row, Samples)>,
    notes: Vec<String>,
}

impl Found {
    fn note(&mut self, text: String) {
        eprintln!("note: {text}");
        self.notes.push(text);
    }

    fn add(&mut self, row: &Row, column: &str, sample: Sample) {
        let at = self.rows.iter().position(|(r, _)| r.id == row.id).unwrap_or_else(|| {
            self.rows.push((row.clone(), Samples::new()));
            self.rows.len() - 1
        });
        self.rows[at].1.entry(column.into()).or_default().push(sample);
    }
}

/// Measures and prints; fails only if it could not measure.
pub fn run(args: &Args) -> Result<()> {
    if args.list {
        let rows = rows::all().into_iter().flat_map(|(_, rows)| rows).chain(rows::INSTRUCTIONS);
        rows.for_each(|row| println!("{:<14} {}", row.id, row.title));
        println!("{:<14} rows of `vubench tap`\n{:<14} rows of `vubench xdp`", "tap", "xdp");
        return Ok(());
    }
    ensure!(args.rounds > 0 && args.seconds > 0.0, "--rounds and --seconds must be positive");
    let program = std::path::absolute(&args.backend_bin)?;
    ensure!(program.exists(), "there is no {}: build it first", program.display());
    let mut lines = rings(args, &program)?;
    let others = args.other.iter().map(|o| o.name().to_string()).collect::<Vec<_>>();
    let mut notes = std::mem::take(&mut lines.1);
    let mut lines = lines.0;
    for (row, value) in rows::INSTRUCTIONS.iter().zip([args.instructions_tx, args.instructions_rx]) {
        if let Some(value) = value.filter(|_| args.wants(row.id)) {
            let sample = Sample { round: 0, value, idle: None, others: 0.0 };
            lines.push(score::line(row, &[(OURS.to_string(), vec![sample])].into()));
        }
    }
    for what in ["tap", "xdp"] {
        if !args.no_uplinks && args.wants(what) {
            match uplinks::lines(what, &program, args.rounds) {
                Ok(more) => lines.extend(more),
                Err(e) => {
                    interrupt::check()?;
                    notes.push(format!("{what}: {e:#}"));
                }
            }
        }
    }
    print!("{}", show::text(&lines, args.rounds, &others));
    notes.iter().for_each(|note| println!("note: {note}"));
    publish(args, &lines, &notes)
}

/// Everything that is measured at rings, round by round.
fn rings(args: &Args, program: &Path) -> Result<(Vec<Line>, Vec<String>)> {
    let _place = Place::take()?;
    raise_fd_limit()?;
    let mut contenders = vec![Contender::Ours(program.to_owned())];
    if !args.no_dpdk {
        contenders.push(Contender::Dpdk);
    }
    contenders.extend(args.other.iter().cloned());
    let work: Vec<_> =
        rows::all().into_iter().filter(|(_, rows)| rows.iter().any(|r| args.wants(r.id))).collect();
    let mut found = Found { rows: Vec::new(), notes: Vec::new() };
    // Rows stand in the table's order, whoever is measured first.
    found.rows.extend(work.iter().flat_map(|(_, rows)| rows).map(|r| (r.clone(), Samples::new())));
    for round in 0..args.rounds {
        for (work, rows) in &work {
            for i in 0..contenders.len() {
                let contender = &contenders[(i + round) % contenders.len()];
                if !work.takes(contender) {
                    continue;
                }
                eprintln!("round {}/{}: {}: {}", round + 1, args.rounds, rows[0].title, contender.name());
                match work.measure(contender, args.seconds) {
                    Ok(readings) => readings.iter().for_each(|r| {
                        let sample = Sample { round, value: r.value, idle: r.idle, others: r.others };
                        found.add(&rows[r.row], r.column.unwrap_or(contender.name()), sample);
                    }),
                    // One side that fails once must not take the others' numbers with it.
                    Err(e) => {
                        interrupt::check()?;
                        let name = contender.name();
                        found.note(format!("round {}, {}, {name}: {e:#}", round + 1, rows[0].title));
                    }
                }
            }
        }
    }
    let lines = found.rows.iter().map(|(row, samples)| score::line(row, samples)).collect();
    Ok((lines, found.notes))
}

/// Hundreds of ports have thousands of eventfds, here and in the back-end, which inherits the limit.
fn raise_fd_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of open files")
}

fn publish(args: &Args, lines: &[Line], notes: &[String]) -> Result<()> {
    if let Some(path) = &args.json {
        let all = serde_json::json!({
            "rounds": args.rounds, "seconds": args.seconds, "rows": lines, "notes": notes
        });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)
            .with_context(|| path.display().to_string())?;
        println!("JSON: {}", path.display());
    }
    if let Some(path) = &args.picture {
        let caption = format!("medians of {} rounds", args.rounds);
        std::fs::write(path, picture::svg(lines, &caption)).with_context(|| path.display().to_string())?;
        println!("picture: {}", path.display());
    }
    Ok(())
}
