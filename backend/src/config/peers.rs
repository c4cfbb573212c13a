//! Peer links between ports: a wire has two ends, and both say so.
#![forbid(unsafe_code)]

use super::{PortConfig, UplinkSpec};

/// What is wrong with a port's peer link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerProblem {
    /// There is no such port.
    #[error("uplink peer:{0}: there is no port '{0}', give both ports a name in one configuration file")]
    Unknown(String),
    /// The port itself.
    #[error("uplink peer:{0} is the port itself, name another")]
    Itself(String),
    /// The other port has another uplink.
    #[error(
        "uplink peer:{peer}: port '{peer}' has uplink {uplink}, give it uplink = \"peer:{name}\": a link has two ends"
    )]
    OneSided {
        /// The port that says it.
        name: String,
        /// The port that it names.
        peer: String,
        /// What that has.
        uplink: String,
    },
}

/// The port that the one at `index` is wired to, by its place.
pub fn peer_of(ports: &[PortConfig], index: usize) -> Option<usize> {
    let UplinkSpec::Peer(peer) = &ports.get(index)?.uplink else { return None };
    ports.iter().position(|port| port.name == *peer)
}

/// Checks that each link has two ends. An error comes with the index of its port.
pub(super) fn check(ports: &[PortConfig]) -> Result<(), (usize, PeerProblem)> {
    for (index, port) in ports.iter().enumerate() {
        let UplinkSpec::Peer(peer) = &port.uplink else { continue };
        let other = peer_of(ports, index).ok_or_else(|| (index, PeerProblem::Unknown(peer.clone())))?;
        if other == index {
            return Err((index, PeerProblem::Itself(peer.clone())));
        }
        if peer_of(ports, other) != Some(index) {
            let (name, uplink) = (port.name.clone(), ports[other].uplink.to_string());
            return Err((index, PeerProblem::OneSided { name, peer: peer.clone(), uplink }));
        }
    }
    Ok(())
}
