//! Guest memory: the table, and the slots that replace it. Mapping, and whether regions overlap or fit their file,
//! is the owner's business; here are counts, duplicates and the list of what is there.
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, IntoBytes};

use super::{Answer, Call, Fault, Todo};
use crate::memory::RegionSpec;
use crate::session::Session;
use crate::session::error::Refusal;
use crate::session::message::{SingleRegion, TableHead, WireRegion};

impl From<WireRegion> for RegionSpec {
    fn from(wire: WireRegion) -> Self {
        let WireRegion { guest_phys, size, user_addr, mmap_offset } = wire;
        Self { guest_phys, size, user_addr, mmap_offset }
    }
}

/// Replaces all memory, once for the whole device. Rings may be running (memory hotplug without slots).
pub(in crate::session) fn set_mem_table<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    if super::postcopy::is_acknowledgement(session, call) {
        return super::postcopy::acknowledged(session, call);
    }
    let head: TableHead = call.body()?;
    let list = &call.payload[size_of::<TableHead>()..];
    let count = list.len() / size_of::<WireRegion>();
    if head.regions as usize != count {
        return Err(Refusal::PayloadSize { size: call.payload.len() }.into());
    }
    if call.fds.len() != count {
        return Err(Refusal::FdCount { count: call.fds.len() }.into());
    }
    let mut regions: Vec<RegionSpec> = Vec::with_capacity(count);
    for bytes in list.chunks_exact(size_of::<WireRegion>()) {
        let wire = WireRegion::read_from_bytes(bytes);
        let region = wire.map_err(|_| Refusal::PayloadSize { size: call.payload.len() })?.into();
        check_duplicate(&regions, &region)?;
        regions.push(region);
    }
    if regions.is_empty() {
        return Err(Refusal::EmptyTable.into());
    }
    let fds = std::mem::take(&mut call.fds);
    session.todo.push_back(Todo::MemTable(regions.into_iter().zip(fds).collect()));
    Ok(session.postcopy.answer_to_memory())
}

pub(in crate::session) fn get_max_mem_slots<F: 'static>(
    session: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    Ok(Answer::Payload(session.cfg.max_mem_slots.as_bytes().to_vec()))
}

pub(in crate::session) fn add_mem_reg<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    if super::postcopy::is_acknowledgement(session, call) {
        return super::postcopy::acknowledged(session, call);
    }
    let region = call.body::<SingleRegion>()?.region.into();
    if session.agreed.regions.len() as u64 >= session.cfg.max_mem_slots {
        return Err(Refusal::SlotsFull(session.cfg.max_mem_slots).into());
    }
    check_duplicate(&session.agreed.regions, &region)?;
    let fd = call.fd()?;
    session.todo.push_back(Todo::AddRegion(region, fd));
    Ok(session.postcopy.answer_to_memory())
}

/// A region is named by its guest address, user address and size; the offset in the file is not compared.
/// An fd that comes along is dropped.
pub(in crate::session) fn rem_mem_reg<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    if super::postcopy::is_acknowledgement(session, call) {
        return super::postcopy::acknowledged(session, call);
    }
    let wire = call.body::<SingleRegion>()?.region;
    let named = |known: &&RegionSpec| {
        (known.guest_phys, known.user_addr, known.size) == (wire.guest_phys, wire.user_addr, wire.size)
    };
    match session.agreed.regions.iter().find(named) {
        Some(&region) => {
            session.todo.push_back(Todo::RemRegion(region));
            Ok(Answer::Ack)
        }
        None => Err(Refusal::UnknownRegion { guest_phys: wire.guest_phys }.into()),
    }
}

fn check_duplicate(known: &[RegionSpec], new: &RegionSpec) -> Result<(), Refusal> {
    let same = |old: &RegionSpec| old.guest_phys == new.guest_phys || old.user_addr == new.user_addr;
    match known.iter().any(same) {
        true => Err(Refusal::DuplicateRegion { guest_phys: new.guest_phys }),
        false => Ok(()),
    }
}
