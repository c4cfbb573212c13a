//! Fault latency by fentry and fexit, which most kernels have but not every machine that runs the tests: in a guest with
//! a newer Debian kernel, where a small program makes page faults of known length.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::cpio::Archive;
use lab::{Lab, Process, scenario, stalls, until};

/// A boot and the scenarios take 20 s on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// The guest's first process.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo
/fault-latency
echo \"@@exit $?@@\"
/fault-latency --way tracepoint
echo \"@@exit $?@@\"
ls /sys/fs/bpf
echo '@@end@@'
reboot -f
";

#[test]
fn fentry_measures_every_stall_on_a_newer_kernel() {
    scenario("fentry_measures_every_stall_on_a_newer_kernel", |lab| {
        let initramfs = initramfs(lab)?;
        let console = lab.new_log("console");
        let mut qemu =
            Process::start("QEMU", command(lab, &initramfs, &console)?, &lab.new_log("qemu"), None)?;
        let text = until("the guest to end its work", PATIENCE, || {
            let text = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).replace('\r', "");
            if text.contains("@@end@@") {
                return Ok(Some(text));
            }
            qemu.check_alive()?;
            Ok(None)
        })?;
        let parts: Vec<&str> = text.split("@@exit ").collect();
        let [by_function, by_tracepoint, rest] = parts[..] else { bail!("unexpected output: {text}") };
        ensure!(by_tracepoint.starts_with("0@@") && rest.starts_with("0@@"), "a run failed: {text}");
        ensure!(!rest.contains("vhost-user-net"), "pins were left: {rest}");
        let (mode, _) = stalls::check(by_function)?;
        ensure!(mode == "fentry", "measured by {mode}");
        let (mode, _) = stalls::check(by_tracepoint)?;
        ensure!(mode == "tracepoint", "measured by {mode}");
        Ok(())
    });
}

fn command(lab: &Lab, initramfs: &Path, console: &Path) -> Result<Command> {
    let mut command = Command::new(&lab.artefacts.qemu);
    for data in &lab.artefacts.qemu_data {
        command.arg("-L").arg(data);
    }
    command.args(["-M", "pc,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "512M"]);
    command.args(["-nodefaults", "-nographic", "-no-reboot"]);
    command.arg("-serial").arg(format!("file:{}", console.display()));
    command.arg("-kernel").arg(lab.artefacts.newer_kernel()?).arg("-initrd").arg(initramfs);
    command.args([
        "-append",
        "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off rdinit=/start",
    ]);
    command.stdin(Stdio::null());
    Ok(command)
}

/// The lab's initramfs, with the program and its libraries behind it.
fn initramfs(lab: &Lab) -> Result<PathBuf> {
    let program = lab.path("fault-latency");
    run(Command::new("strip").arg("-o").arg(&program).arg(stalls::program()?))?;
    let mut more = Archive::default();
    let mut folders = vec![PathBuf::new()];
    for library in libraries(&program)? {
        let folder = library.parent().context("a library lies in a folder")?.to_owned();
        for ancestor in folder.ancestors().collect::<Vec<_>>().into_iter().rev() {
            if !folders.contains(&ancestor.to_owned()) && ancestor != Path::new("/") {
                more.folder(&inside(ancestor));
                folders.push(ancestor.to_owned());
            }
        }
        more.file(&inside(&library), 0o755, &fs::read(&library)?);
    }
    more.file("fault-latency", 0o755, &fs::read(&program)?);
    more.file("start", 0o755, INIT.as_bytes());
    let path = lab.path("initramfs");
    let mut bytes = fs::read(&lab.artefacts.initramfs)?;
    bytes.extend(more.finish());
    fs::write(&path, bytes)?;
    Ok(path)
}

fn inside(path: &Path) -> String {
    path.display().to_string().trim_start_matches('/').to_owned()
}

/// Libraries that a program loads, its loader included, as it finds them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let text = run(Command::new("ldd").arg(program))?;
    let paths = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(paths.collect())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
