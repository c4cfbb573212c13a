//! The process: opens what the configuration names, starts the workers, runs the first worker's loop.
//!
//! Everything that can fail for a reason that an operator can mend fails here, before the loop, with a sentence
//! that says what to do. In the loop only peers fail.
#![forbid(unsafe_code)]

use crate::config::{self, Config, PortConfig, Postcopy, PostcopyMultiqueue, UplinkSpec};
use crate::memory::sigbus::MAX_LIVE_MAPPINGS;
use crate::net::counters::PairCounters;
use crate::observe::{self, Observer};
use crate::port::connection::{Endpoint, EndpointError};
use crate::port::control::Control;
use crate::port::helper::Helper;
use crate::port::token::ControlToken;
use crate::port::{MEM_SLOTS_MAX, MEM_SLOTS_MIN, Port};
use crate::postcopy::uffd::{UffdError, Userfaultfd};
use crate::reactor::{Done, Mailbox, Reactor, SetupError};
use crate::uplink::null::Null;
use crate::uplink::peer;
use crate::uplink::tap::{Tap, TapError};
use crate::uplink::xdp::{self, NicOptions, PortOptions, Rules, XdpError};
use crate::uplink::{Uplink, UplinkQueue};
use crate::worker::counters::WorkerCounters;
use crate::worker::datapath::Datapath;
use crate::worker::thread::{SpawnError, Worker, spawn};
use crate::worker::{Attachment, PairKey, PairToken, ToControl, ToWorker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Why the process cannot start or had to end. The text is what the operator reads.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No io_uring.
    #[error(transparent)]
    Ring(#[from] SetupError),
    /// A worker did not start.
    #[error(transparent)]
    Worker(#[from] SpawnError),
    /// A port's control socket.
    #[error("port {0}: {1}")]
    Endpoint(String, EndpointError),
    /// A port's tap.
    #[error("port {0}: {1}")]
    Tap(String, TapError),
    /// A port that must offer postcopy and cannot.
    #[error("port {0}: {1}")]
    Postcopy(String, String),
    /// An interface that ports share.
    #[error("port {0}: {1}")]
    Xdp(String, XdpError),
    /// A port's interface cannot be set up.
    #[error("port {0}: {1}: {2}: {3}; run with CAP_NET_ADMIN or set it up beforehand")]
    Interface(String, String, &'static str, io::Error),
    /// A system call that does not fail on a healthy machine.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

/// What a reactor operation of the first worker is for.
#[derive(Clone, Copy, Debug)]
enum Token {
    Pair(PairToken),
    Control(ControlToken),
}

impl From<PairToken> for Token {
    fn from(token: PairToken) -> Self {
        Self::Pair(token)
    }
}

impl From<ControlToken> for Token {
    fn from(token: ControlToken) -> Self {
        Self::Control(token)
    }
}

/// A port's uplink with its queues, and which of them must be served by one worker: those of one number.
struct OpenUplink {
    uplink: Arc<dyn Uplink>,
    queues: Vec<Box<dyn UplinkQueue>>,
    groups: Vec<usize>,
}

/// An uplink with its queues.
type OwnUplink = (Arc<dyn Uplink>, Vec<Box<dyn UplinkQueue>>);

fn boxed<Q: UplinkQueue + 'static>(queues: impl IntoIterator<Item = Q>) -> Vec<Box<dyn UplinkQueue>> {
    queues.into_iter().map(|queue| Box::new(queue) as Box<dyn UplinkQueue>).collect()
}

/// Opens all uplinks: an interface once for all ports that share it.
fn open_uplinks(ports: &[PortConfig]) -> Result<Vec<OpenUplink>, DaemonError> {
    let mut open: Vec<Option<OpenUplink>> = ports.iter().map(|_| None).collect();
    for id in 0..ports.len() {
        match &ports[id].uplink {
            _ if open[id].is_some() => {}
            UplinkSpec::Xdp(xdp) => {
                for (id, uplink) in open_interface(ports, id, &xdp.interface)? {
                    open[id] = Some(uplink);
                }
            }
            UplinkSpec::Peer(_) => {
                for (id, uplink) in open_link(ports, id)? {
                    open[id] = Some(uplink);
                }
            }
            _ => {
                let (uplink, queues) = open_own(&ports[id])?;
                // No two pairs need the same worker.
                let groups = (id..id + queues.len()).collect();
                open[id] = Some(OpenUplink { uplink, queues, groups });
            }
        }
    }
    Ok(open.into_iter().flatten().collect())
}

/// Opens an interface for all ports that name it, of which `first` is the first.
fn open_interface(
    ports: &[PortConfig],
    first: usize,
    interface: &str,
) -> Result<Vec<(usize, OpenUplink)>, DaemonError> {
    let mut shared = NicOptions::default();
    let mut ids = Vec::new();
    let mut options = Vec::new();
    for (id, port) in ports.iter().enumerate() {
        let UplinkSpec::Xdp(xdp) = &port.uplink else { continue };
        if xdp.interface != interface {
            continue;
        }
        // Whoever says something about the interface says the same (checked with the configuration).
        shared.queues = shared.queues.or(xdp.queues);
        shared.mode = xdp.mode.unwrap_or(shared.mode);
        shared.zero_copy = xdp.zero_copy.unwrap_or(shared.zero_copy);
        shared.replace |= xdp.replace;
        ids.push(id);
        options.push(PortOptions {
            name: port.name.clone(),
            pairs: port.queue_pairs.into(),
            rules: Rules {
                mac: port.xdp_mac(xdp),
                vlan: xdp.vlan,
                flood: xdp.flood,
                local_switch: xdp.local_switch,
                anti_spoof: xdp.anti_spoof,
            },
            mtu: port.mtu,
        });
    }
    let opened = xdp::open(interface, &shared, &options)
        .map_err(|error| DaemonError::Xdp(ports[first].name.clone(), error))?;
    let uplinks = opened.into_iter().map(|(port, queues)| OpenUplink {
        groups: (0..queues.len()).map(|pair| first + port.group_of(pair as u16) as usize).collect(),
        uplink: Arc::new(port),
        queues: boxed(queues),
    });
    Ok(ids.into_iter().zip(uplinks).collect())
}

/// Opens both ends of a peer link, of which `first` is the first.
fn open_link(ports: &[PortConfig], first: usize) -> Result<Vec<(usize, OpenUplink)>, DaemonError> {
    let other = config::peer_of(ports, first).unwrap_or(first);
    let side = |id: usize| {
        let PortConfig { name, queue_pairs, mtu, .. } = &ports[id];
        peer::Side { name, pairs: *queue_pairs, mtu: *mtu }
    };
    let ends = peer::wire(side(first), side(other)).map_err(|error| DaemonError::System("eventfd", error))?;
    let uplinks = ends.into_iter().map(|(port, queues)| OpenUplink {
        // Frames go from ring to ring, so one worker has both.
        groups: vec![first; queues.len()],
        uplink: Arc::new(port),
        queues: boxed(queues),
    });
    Ok([first, other].into_iter().zip(uplinks).collect())
}

/// The ports of a peer link have one MTU: the smaller.
fn agree_on_mtus(ports: &mut [PortConfig]) {
    for id in 0..ports.len() {
        let Some(other) = config::peer_of(ports, id) else { continue };
        let (ours, theirs) = (ports[id].mtu, ports[other].mtu);
        if let Some(theirs) = theirs
            && ours.is_none_or(|ours| ours > theirs)
        {
            let (port, peer) = (&ports[id].name, &ports[other].name);
            tracing::info!(port, "its MTU is {theirs}, as that of {peer}, to which it is wired");
            ports[id].mtu = Some(theirs);
        }
    }
}

/// The pairs that those of a port are wired to.
fn peers(ports: &[PortConfig], id: usize) -> Vec<PairKey> {
    let other =
        config::peer_of(ports, id).and_then(|other| Some((u16::try_from(other).ok()?, ports.get(other)?)));
    other.map_or_else(Vec::new, |(port, config)| {
        (0..config.queue_pairs).map(|pair| PairKey { port, pair }).collect()
    })
}

fn open_null(queue_pairs: u16, generate: Option<u16>) -> Result<OwnUplink, DaemonError> {
    let null = Null::new(generate);
    let queues = null.queues(queue_pairs).map_err(|error| DaemonError::System("eventfd", error))?;
    Ok((Arc::new(null), boxed(queues)))
}

/// Opens an uplink that a port has for itself.
fn open_own(port: &PortConfig) -> Result<OwnUplink, DaemonError> {
    let tap = match &port.uplink {
        UplinkSpec::Null { generate } => return open_null(port.queue_pairs, *generate),
        UplinkSpec::Xdp(_) | UplinkSpec::Peer(_) => return open_null(port.queue_pairs, None),
        UplinkSpec::Tap { name, .. } => Tap::open(name, port.queue_pairs, port.mtu),
        UplinkSpec::TapFds(fds) => Tap::inherit(fds, port.mtu),
    };
    let tap = tap.map_err(|error| DaemonError::Tap(port.name.clone(), error))?;
    if matches!(port.uplink, UplinkSpec::Tap { up: true, .. }) {
        tap.bring_up().map_err(|error| {
            DaemonError::Interface(port.name.clone(), tap.describe().into(), "bringing the link up", error)
        })?;
    }
    let queues = boxed(tap.queues());
    Ok((Arc::new(tap), queues))
}

/// Signals that end the process or make it report; blocked in all threads and read by the loop.
fn signals() -> SigSet {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1] {
        signals.add(signal);
    }
    signals
}

/// Keeps signals from ending the process by themselves. Call it before any thread is started, that of the log included.
///
/// # Errors
/// [`DaemonError::System`].
pub fn block_signals() -> Result<(), DaemonError> {
    signals().thread_block().map_err(|error| DaemonError::System("pthread_sigmask", error.into()))
}

fn open_signals() -> io::Result<Arc<OwnedFd>> {
    let signalfd = SignalFd::with_flags(&signals(), SfdFlags::SFD_CLOEXEC)?;
    Ok(Arc::new(signalfd.into()))
}

/// Many ports need many descriptors: take what the hard limit allows.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Serves the configured ports until SIGTERM or SIGINT, or until the last inherited connection has ended. The signals
/// must be blocked ([`block_signals`]).
///
/// # Errors
/// See [`DaemonError`].
pub fn run(mut config: Config) -> Result<(), DaemonError> {
    raise_descriptor_limit();
    let signals = open_signals().map_err(|error| DaemonError::System("signalfd", error))?;
    let mut reactor: Reactor<Token> = Reactor::new()?;
    let mailbox: Mailbox<ToControl> = Mailbox::new(reactor.ring_fd());
    let counters = Arc::<WorkerCounters>::default();
    let mut datapath = Datapath::new(config.poll, counters.clone());
    let mut ports = Vec::new();
    let mut attachments = Vec::new();
    let mem_slots = mem_slots(config.ports.len());
    let userfaultfd = Userfaultfd::new().map(drop);
    let mut routes = Routes::default();
    agree_on_mtus(&mut config.ports);
    let uplinks = open_uplinks(&config.ports)?;
    let wires: Vec<_> = (0..config.ports.len()).map(|id| peers(&config.ports, id)).collect();
    for ((id, port), open) in (0..).zip(config.ports).zip(uplinks) {
        let OpenUplink { uplink, queues, groups } = open;
        routes.0.push(groups.into_iter().map(|group| group % usize::from(config.workers)).collect());
        let endpoint = Endpoint::open(&port.endpoint)
            .map_err(|error| DaemonError::Endpoint(port.name.clone(), error))?;
        let counters: Vec<_> = queues.iter().map(|_| Arc::new(PairCounters::default())).collect();
        for ((pair, uplink), counters) in (0..).zip(queues).zip(&counters) {
            let key = PairKey { port: id, pair };
            let peers = wires[usize::from(id)].clone();
            attachments.push(Attachment { key, uplink, counters: counters.clone(), peers });
        }
        tracing::info!(port = port.name, "{}, uplink {}", port.endpoint, uplink.describe());
        let postcopy = offers_postcopy(&port, userfaultfd.as_ref())?;
        ports.push(Port::new(id, port, uplink, counters, endpoint, mem_slots, postcopy));
    }
    let settings = observe::Settings {
        instance: config.instance,
        latency: config.fault_latency,
        ports: ports.iter().map(|port| port.name().to_owned()).collect(),
    };
    let observer =
        Observer::start(settings).map_err(|error| DaemonError::System("observer thread", error))?;
    observer.handle().register_worker(0);
    let mut workers = Vec::new();
    for index in 1..config.workers {
        workers.push(spawn(index, config.poll, mailbox.postbox(), observer.handle())?);
    }
    for attachment in attachments {
        match routes.worker_of(&workers, attachment.key) {
            None => datapath.attach(attachment),
            Some(worker) => worker.postbox.send(&mut reactor, ToWorker::Attach(attachment)),
        }
    }
    let helper = Helper::start().map_err(|error| DaemonError::System("control helper thread", error))?;
    let mut control = Control::new(ports, helper, observer);
    control.start(&mut reactor);
    tracing::info!("listening for front-ends");
    let crew = Crew { workers: &workers, routes: &routes, counters: &counters };
    let served = serve(&mut reactor, &mailbox, &mut datapath, &mut control, &crew, &signals);
    control.log_counters();
    crew.log_counters();
    for worker in &workers {
        worker.postbox.send(&mut reactor, ToWorker::Stop);
    }
    let _ = reactor.turn(false, &mut Vec::new(), &mut false);
    workers.into_iter().for_each(Worker::join);
    control.give_up_pages();
    served.map_err(|error| DaemonError::System("io_uring_enter", error))
}

/// Whether a port offers postcopy; says why not where that is not the operator's choice.
fn offers_postcopy(port: &PortConfig, userfaultfd: Result<&(), &UffdError>) -> Result<bool, DaemonError> {
    let several = port.queue_pairs > 1 && port.postcopy_multiqueue == PostcopyMultiqueue::Off;
    match (port.postcopy, userfaultfd) {
        (Postcopy::Off, _) => Ok(false),
        (Postcopy::On, Err(error)) => Err(DaemonError::Postcopy(port.name.clone(), error.to_string())),
        (Postcopy::Auto, Err(error)) => {
            tracing::warn!(port = port.name, "postcopy migration is not offered: {error}");
            Ok(false)
        }
        (_, Ok(())) if several => {
            tracing::info!(
                port = port.name,
                "postcopy migration is not offered with {} queue pairs: QEMU (up to 10.2) hangs in it; \
                 --postcopy-multiqueue=resend works around that",
                port.queue_pairs
            );
            Ok(false)
        }
        (_, Ok(())) => Ok(true),
    }
}

/// Memory slots to offer each port: together they must not use up the process's mappings, of which a new memory
/// table needs its own before the old one goes.
fn mem_slots(ports: usize) -> u64 {
    let share = MAX_LIVE_MAPPINGS / 2 / ports.max(1);
    (share as u64).clamp(MEM_SLOTS_MIN, MEM_SLOTS_MAX)
}

/// Which worker serves each pair of each port; 0 is the first, the main thread.
#[derive(Default)]
struct Routes(Vec<Vec<usize>>);

impl Routes {
    /// The worker of a pair; `None` is the main thread.
    fn worker_of<'w>(&self, workers: &'w [Worker], key: PairKey) -> Option<&'w Worker> {
        let index = self.0.get(usize::from(key.port))?.get(usize::from(key.pair))?;
        index.checked_sub(1).and_then(|index| workers.get(index))
    }
}

/// The workers beside the first, and who serves what.
struct Crew<'w> {
    workers: &'w [Worker],
    /// The first one's.
    counters: &'w WorkerCounters,
    routes: &'w Routes,
}

impl Crew<'_> {
    /// Writes each worker's counters to the log.
    fn log_counters(&self) {
        let all = std::iter::once(self.counters).chain(self.workers.iter().map(|worker| &*worker.counters));
        for (index, counters) in all.enumerate() {
            tracing::info!("worker {index}: {counters}");
        }
    }
}

fn serve(
    reactor: &mut Reactor<Token>,
    mailbox: &Mailbox<ToControl>,
    datapath: &mut Datapath,
    control: &mut Control,
    crew: &Crew<'_>,
    signals: &Arc<OwnedFd>,
) -> io::Result<()> {
    reactor.read_signal(signals, ControlToken::Signal.into());
    let mut done = Vec::new();
    let mut busy = false;
    loop {
        let mut mail = false;
        reactor.turn(!busy, &mut done, &mut mail)?;
        if mail {
            for message in mailbox.drain() {
                control.message(reactor, message);
            }
        }
        for (token, done) in done.drain(..) {
            match token {
                Token::Pair(token) => datapath.completion(reactor, token, &done),
                Token::Control(ControlToken::Signal) => {
                    match done {
                        Done::Signal(Ok(signal)) if signal.ssi_signo == Signal::SIGUSR1 as u32 => {
                            control.log_counters();
                            crew.log_counters();
                        }
                        Done::Signal(Ok(_)) => {
                            tracing::info!("ending");
                            return Ok(());
                        }
                        _ => {}
                    }
                    reactor.read_signal(signals, ControlToken::Signal.into());
                }
                Token::Control(token) => control.completion(reactor, token, done),
            }
        }
        busy = datapath.round(reactor);
        busy |= exchange(reactor, datapath, control, crew);
        busy |= control.hear_stalls();
        busy |= control.populate(reactor);
        if control.ended() {
            return Ok(());
        }
    }
}

/// Carries commands and answers between control and the pairs until both are silent. True if pairs may have got
/// work by it.
fn exchange(
    reactor: &mut Reactor<Token>,
    datapath: &mut Datapath,
    control: &mut Control,
    crew: &Crew<'_>,
) -> bool {
    let mut any = false;
    loop {
        let commands = std::mem::take(control.commands());
        let messages = std::mem::take(datapath.outbox());
        if commands.is_empty() && messages.is_empty() {
            return any;
        }
        any = true;
        for (key, command) in commands {
            match crew.routes.worker_of(crew.workers, key) {
                None => datapath.command(reactor, key, command),
                Some(worker) => worker.postbox.send(reactor, ToWorker::Pair(key, command)),
            }
        }
        for message in messages {
            control.message(reactor, message);
        }
    }
}
