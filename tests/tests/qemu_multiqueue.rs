//! Four queue pairs carry the flows of a guest with four CPUs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Amount, Bed, GUEST_IP, HOST_IP, PATIENCE, Qemu, Source, ping, scenario};

const PAIRS: u16 = 4;
const FLOWS: u64 = 8;
/// Flows are spread by hash: rounds of new flows until every pair has carried some.
const ROUNDS_MAX: u32 = 20;
const FLOW_BYTES: u64 = 1_000_000;
const ROUND_PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn four_queue_pairs() {
    scenario("four_queue_pairs", |lab| {
        let mut bed = Bed::start(lab, |backend, guest| {
            backend.queue_pairs = PAIRS;
            guest.queue_pairs = PAIRS;
            guest.cpus = u32::from(PAIRS);
        })?;
        ping(&bed.netns, GUEST_IP, 3, PATIENCE)?;
        for kind in ["tx", "rx"] {
            let count = bed.guest.run(&format!("ls -d /sys/class/net/eth0/queues/{kind}-* | wc -l"))?;
            ensure!(count == PAIRS.to_string(), "the guest uses {count} {kind} queues");
        }
        let before = busy_vectors(&mut bed.guest)?;
        let mut rounds = 0;
        loop {
            round(&mut bed, u64::from(rounds) * FLOWS)?;
            rounds += 1;
            let now = busy_vectors(&mut bed.guest)?;
            let idle: Vec<&String> = now
                .iter()
                .zip(&before)
                .filter(|((_, now), (_, old))| now == old)
                .map(|((n, _), _)| n)
                .collect();
            if idle.is_empty() {
                break;
            }
            ensure!(
                rounds < ROUNDS_MAX,
                "after {} flows, no interrupt from {idle:?}",
                u64::from(rounds) * FLOWS
            );
        }
        bed.stop()
    });
}

/// Several flows at once from the host to the guest, each with its own checksum.
fn round(bed: &mut Bed, seed: u64) -> Result<()> {
    let sources = (0..FLOWS)
        .map(|flow| Source::start(&bed.netns, seed + flow, Amount::Bytes(FLOW_BYTES)))
        .collect::<Result<Vec<_>>>()?;
    let ports: Vec<String> = sources.iter().map(|source| source.port().to_string()).collect();
    let ports = ports.join(" ");
    let sums = bed.guest.shell.run_within(
        &format!(
            "for p in {ports}; do (nc {HOST_IP} $p </dev/null | md5sum >/tmp/sum.$p) & done; wait; \
             for p in {ports}; do cat /tmp/sum.$p; done"
        ),
        ROUND_PATIENCE,
    )?;
    let sums: Vec<&str> = sums.lines().filter_map(|line| line.split_whitespace().next()).collect();
    ensure!(sums.len() == sources.len(), "the guest has {} of {FLOWS} checksums: {sums:?}", sums.len());
    for (source, sum) in sources.into_iter().zip(sums) {
        let sent = source.finish()?;
        ensure!(sent.md5 == sum, "sent {sent:?}, the guest has {sum}");
    }
    Ok(())
}

/// Interrupts of each receive queue, by its name in the guest.
fn busy_vectors(guest: &mut Qemu) -> Result<Vec<(String, u64)>> {
    let text = guest.run("grep 'virtio0-input' /proc/interrupts")?;
    let mut vectors = Vec::new();
    for line in text.lines() {
        let name = line.split_whitespace().last().context("a line of /proc/interrupts is empty")?.to_owned();
        let counts = line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
        vectors.push((name, counts.sum()));
    }
    ensure!(vectors.len() == usize::from(PAIRS), "the guest's interrupts: {text}");
    Ok(vectors)
}
