//! Postcopy under a process that may do little: no userfaultfd for three reasons, each with its remedy; and memory of
//! another owner.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, BAD, Backend, Confinement, Front, GOOD, Late, Memory, PATIENCE, Setup, eventually, protocol,
    test_frame,
};
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;

fn config(postcopy: &str) -> String {
    [BAD, GOOD]
        .map(|name| {
            format!("[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'null'\npostcopy = '{postcopy}'\n")
        })
        .concat()
}

fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        lab::skip(test, "only root can give rights away");
    }
    root
}

#[test]
fn each_reason_for_no_userfaultfd_has_its_remedy() -> Result<()> {
    if !is_root("each_reason_for_no_userfaultfd_has_its_remedy") {
        return Ok(());
    }
    let everybody = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    let (eperm, enosys) = (Some(libc_errno::EPERM), Some(libc_errno::ENOSYS));
    let mut cases = vec![
        (Confinement { ptrace: true, filter: eperm }, "seccomp"),
        (Confinement { ptrace: true, filter: enosys }, "seccomp"),
    ];
    if everybody.trim() == "0" {
        cases.push((Confinement::default(), "vm.unprivileged_userfaultfd=1"));
    }
    for (confinement, remedy) in cases {
        let mut backend = Backend::confined(&config("auto"), confinement)?;
        let mut setup = Late::setup(64);
        setup.protocol |= protocol::PAGEFAULT;
        let mut front = Front::up_with(&backend.socket(BAD), setup).with_context(|| backend.log_text())?;
        ensure!(!front.has(protocol::PAGEFAULT), "{confinement:?}: PAGEFAULT is offered");
        // Everything else goes on.
        front.prove_alive(64)?;
        let log = backend.log_text();
        ensure!(log.contains("postcopy migration is not offered") && log.contains(remedy), "{remedy}: {log}");
        ensure!(log.contains(BAD), "of which port? {log}");
        backend.terminate()?;
        // Where it was asked for, the program does not start without it.
        let mut backend = Backend::confined(&config("on"), confinement)?;
        let ended = eventually(PATIENCE, || backend.check_alive().is_err());
        ensure!(ended, "it runs without what it was told to have");
        // The log's reader may lag behind.
        let said = eventually(PATIENCE, || backend.log_text().contains(remedy));
        ensure!(said && backend.log_text().contains(BAD), "{}", backend.log_text());
    }
    Ok(())
}

mod libc_errno {
    pub const EPERM: u16 = nix::errno::Errno::EPERM as u16;
    pub const ENOSYS: u16 = nix::errno::Errno::ENOSYS as u16;
}

/// mincore(2) would call every page of such a file present.
#[test]
fn memory_of_another_owner_is_not_taken_for_present() -> Result<()> {
    if !is_root("memory_of_another_owner_is_not_taken_for_present") {
        return Ok(());
    }
    let backend = Backend::confined(&config("on"), Confinement { ptrace: true, filter: None })?;
    let mut arena = Arena::over(backend)?;
    let place = tempfile::Builder::new().prefix("vun-").tempfile_in("/dev/shm")?;
    std::fs::set_permissions(place.path(), Permissions::from_mode(0o600))?;
    let file: File = place.reopen()?;
    let size = 8 << 20;
    file.set_len(size)?;
    let memory = Memory::of_file(file, size);
    let mut late = Late::connect_with_memory(&arena.bad(), Late::setup(256), memory)?;
    for _ in 0..200 {
        late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
        late.front.rx().queue_buffer()?;
    }
    late.depart(|_| false)?;
    late.arm()?;
    late.front.rings.iter().try_for_each(|ring| ring.kick())?;
    let rings = late.ring_pages();
    let asked = eventually(PATIENCE, || late.collect().is_ok_and(|asked| asked == rings.len()));
    ensure!(asked, "{:?} of {} ring pages were asked for", late.collect(), rings.len());
    let drained = eventually(PATIENCE, || {
        late.deliver_asked().is_ok() && late.front.rings[1].used_idx().is_ok_and(|used| used == 200)
    });
    ensure!(drained, "TX stands still\n{}", arena.backend.log_text());
    // 200 frames and as many buffers, each on a page of its own, and the rings.
    let expected = 400 + rings.len();
    let all = eventually(PATIENCE, || late.deliver_asked().is_ok() && late.asked().len() == expected);
    ensure!(all, "{} pages were asked for, not {expected}", late.asked().len());
    late.away().check_holes()?;
    late.deliver_all()?;
    ensure!(late.end()? == 0);
    late.front.prove_alive(64)?;
    late.hang_up();
    arena.check_all()
}

/// What a front-end without PAGEFAULT gets is the ordinary thing.
#[test]
fn a_port_that_is_told_not_to_offers_nothing() -> Result<()> {
    let backend = Backend::with_config(&config("off"))?;
    let mut front = Front::up_with(&backend.socket(BAD), Setup { ..Late::setup(64) })?;
    ensure!(!front.has(protocol::PAGEFAULT));
    front.prove_alive(64).map(drop).with_context(|| backend.log_text())?;
    ensure!(!backend.log_text().contains("postcopy"), "{}", backend.log_text());
    Ok(())
}
