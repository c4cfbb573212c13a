//! Up to 256 ports in one process: what each costs, and that one which floods takes nothing from the others.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::rawfront::{Backend, Front, eventually, test_frame};

/// What an idle port may take of the process's own memory.
const PORT_KIB: u64 = 128;
/// Frames that the flooding port keeps in its ring.
const FLOOD: u32 = 64;

fn start(ports: usize) -> Result<(Backend, Vec<Front>)> {
    let port = |i| format!("[[port]]\nname = 'p{i}'\nsocket = '@/p{i}.sock'\nuplink = 'null'\n");
    // Measuring stalls takes memory for a moment, which would be counted here.
    let config = format!("fault-latency = 'off'\n{}", (0..ports).map(port).collect::<String>());
    let backend = Backend::with_config(&config)?;
    let fronts =
        (0..ports).map(|i| Front::up(&backend.socket(&format!("p{i}")))).collect::<Result<Vec<_>>>()?;
    Ok((backend, fronts))
}

#[test]
fn idle_ports_are_small_and_cost_nothing() -> Result<()> {
    let mut before: Option<(usize, u64)> = None;
    for ports in [1, 64, 256] {
        let (backend, mut fronts) = start(ports)?;
        fronts.iter_mut().try_for_each(|front| front.prove_alive(4).map(drop))?;
        // Polling after work has ended by then.
        std::thread::sleep(Duration::from_millis(300));
        let (memory, woken) = (backend.rss_anon_kib()?, backend.wakeups()?);
        std::thread::sleep(Duration::from_secs(1));
        let woken = backend.wakeups()? - woken;
        ensure!(woken == 0, "{ports} idle ports: woken {woken} times in 1 s");
        if let Some((less, least)) = before {
            let each = memory.saturating_sub(least) / (ports - less) as u64;
            println!("{ports} ports: {memory} KiB, {each} KiB for each port more");
            ensure!(each <= PORT_KIB, "{ports} ports: {each} KiB for each port more");
        }
        before = before.or(Some((ports, memory)));
        fronts.iter_mut().try_for_each(|front| front.prove_alive(4).map(drop))?;
    }
    Ok(())
}

#[test]
fn a_flood_takes_nothing_from_others() -> Result<()> {
    let (backend, mut fronts) = start(64)?;
    let (flood, others) = fronts.split_first_mut().expect("ports");
    for _ in 0..5 {
        for other in others.iter_mut() {
            for _ in 0..FLOOD {
                flood.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
            }
            flood.tx().kick()?;
            other.prove_alive(1)?;
            ensure!(eventually(Duration::from_secs(10), || flood.tx().is_drained_within(Duration::ZERO)));
        }
    }
    let sent = backend.counters("p0")?["tx_packets"];
    ensure!(sent == 5 * 63 * u64::from(FLOOD), "{sent}");
    Ok(())
}
