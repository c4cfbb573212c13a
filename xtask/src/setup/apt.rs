//! Packages through the machine's own apt: which mirror it uses, installing, downloading, unpacking.
//!
//! Nothing here names a mirror: the address and the signing key of Debian's main archive are read
//! from the machine's sources, in either of apt's two formats.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};

/// Seconds to wait for another apt to finish.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=300";

/// The machine's package manager.
pub struct Apt {
    /// The release's name, such as `bookworm`.
    pub codename: String,
    dir: PathBuf,
    updated: Cell<bool>,
    backports_updated: Cell<bool>,
}

/// One place that packages come from.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
    /// As written, with its continuation lines.
    signed_by: Option<String>,
}

impl Apt {
    /// Fails where the machine is no Debian.
    pub fn new(dir: &Path) -> Result<Self> {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let field = |key: &str| {
            release
                .lines()
                .find_map(|l| l.strip_prefix(key)?.strip_prefix('='))
                .map(|v| v.trim_matches('"').to_owned())
        };
        let id = field("ID").unwrap_or_default();
        ensure!(id == "debian", "this machine is not Debian (ID={id})");
        let codename = field("VERSION_CODENAME").context("/etc/os-release has no VERSION_CODENAME")?;
        Ok(Self {
            codename,
            dir: dir.to_owned(),
            updated: Cell::new(false),
            backports_updated: Cell::new(false),
        })
    }

    /// Installs packages without what they merely recommend.
    pub fn install(&self, packages: &[&str]) -> Result<()> {
        let missing: Vec<&str> = packages.iter().copied().filter(|p| installed(&[p]).is_empty()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let list = missing.join(" ");
        ensure!(
            nix::unistd::geteuid().is_root(),
            "only root can install packages; ask for: apt-get install --no-install-recommends {list}"
        );
        self.update()?;
        println!("setup:   apt-get install {list}");
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-o", LOCK_TIMEOUT, "-y", "-q", "install", "--no-install-recommends"])
            .args(&missing);
        output(&mut apt)?;
        Ok(())
    }

    /// Downloads packages of this release into `to` and returns the files.
    pub fn download(&self, packages: &[&str], to: &Path) -> Result<Vec<PathBuf>> {
        self.update()?;
        fetch(Command::new("apt-get").args(["-o", "APT::Sandbox::User=root", "download"]).args(packages), to)
    }

    /// Downloads packages of the release's backports, by a source list of our own.
    pub fn download_backports(&self, packages: &[&str], to: &Path) -> Result<Vec<PathBuf>> {
        let options = self.backports()?;
        let suite = format!("{}-backports", self.codename);
        println!("setup:   downloading {} from {suite}", packages.join(" "));
        let mut apt_get = Command::new("apt-get");
        fetch(apt_get.args(options).args(["-q", "-t", &suite, "download"]).args(packages), to)
    }

    /// Options by which apt sees the release's backports and nothing else; their lists are up to date.
    fn backports(&self) -> Result<Vec<String>> {
        let suite = format!("{}-backports", self.codename);
        let source = machine_sources()
            .into_iter()
            .find(|s| s.suites.contains(&self.codename) && s.components.iter().any(|c| c == "main"))
            .with_context(|| format!("the machine's apt sources do not name {} main", self.codename))?;
        let apt_dir = self.dir.join("apt");
        let parts = apt_dir.join("sources");
        let lists = apt_dir.join("lists/partial");
        let cache = apt_dir.join("cache/archives/partial");
        for folder in [&parts, &lists, &cache] {
            fs::create_dir_all(folder)?;
        }
        let mut stanza = format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n", source.uri);
        if let Some(key) = &source.signed_by {
            stanza.push_str(&format!("Signed-By: {key}\n"));
        }
        fs::write(parts.join("backports.sources"), stanza)?;
        let options: Vec<String> = [
            "Dir::Etc::SourceList=/dev/null".to_owned(),
            format!("Dir::Etc::SourceParts={}", parts.display()),
            format!("Dir::State::Lists={}", apt_dir.join("lists").display()),
            format!("Dir::Cache={}", apt_dir.join("cache").display()),
            "APT::Sandbox::User=root".to_owned(),
        ]
        .into_iter()
        .flat_map(|option| ["-o".to_owned(), option])
        .collect();
        if !self.backports_updated.replace(true) {
            println!("setup:   apt-get update of {suite}");
            output(Command::new("apt-get").args(&options).args(["-q", "update"]))?;
        }
        Ok(options)
    }

    /// The package that a metapackage stands for: its first dependency that starts with `prefix`.
    pub fn behind(&self, metapackage: &str, prefix: &str) -> Result<String> {
        self.update()?;
        behind(&[], metapackage, prefix)
    }

    /// As [`Apt::behind`], in the release's backports.
    pub fn behind_backports(&self, metapackage: &str, prefix: &str) -> Result<String> {
        behind(&self.backports()?, metapackage, prefix)
    }

    /// Full names of packages that end in an ABI number, such as `librte-net-tap23`.
    pub fn with_abi_number(&self, prefixes: &[&str]) -> Result<Vec<String>> {
        self.update()?;
        let out = output(Command::new("apt-cache").args(["pkgnames", "librte-"]))?;
        let names = String::from_utf8_lossy(&out.stdout).into_owned();
        prefixes
            .iter()
            .map(|prefix| {
                let is_ours = |name: &&str| name.strip_prefix(prefix).is_some_and(is_abi_number);
                let found = names.lines().filter(is_ours).max();
                found.map(str::to_owned).with_context(|| format!("apt knows no {prefix}*"))
            })
            .collect()
    }

    /// Refreshes apt's lists, once per run, where we may.
    fn update(&self) -> Result<()> {
        if self.updated.replace(true) || !nix::unistd::geteuid().is_root() {
            return Ok(());
        }
        println!("setup:   apt-get update");
        let done = Command::new("apt-get").args(["-o", LOCK_TIMEOUT, "-q", "update"]).output()?;
        if !done.status.success() {
            // Old lists may still do; if not, the next step says what it lacks.
            println!("setup:   apt-get update failed: {}", String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }
}

fn behind(options: &[String], metapackage: &str, prefix: &str) -> Result<String> {
    let out = output(Command::new("apt-cache").args(options).args(["depends", "--important", metapackage]))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.split_whitespace()
        .find(|word| *word != metapackage && word.starts_with(prefix))
        .map(str::to_owned)
        .with_context(|| format!("{metapackage} depends on no {prefix}*"))
}

/// Which of these packages (names, or names without their ABI number) are installed.
pub fn installed(names: &[&str]) -> Vec<String> {
    let query = ["-W", "-f", "${db:Status-Abbrev}${Package}\n"];
    let Ok(out) = Command::new("dpkg-query").args(query).output() else { return Vec::new() };
    let list = String::from_utf8_lossy(&out.stdout).into_owned();
    let present: Vec<&str> = list.lines().filter_map(|l| l.strip_prefix("ii ")).collect();
    names
        .iter()
        .filter(|name| {
            present
                .iter()
                .any(|p| p.strip_prefix(**name).is_some_and(|rest| rest.is_empty() || is_abi_number(rest)))
        })
        .map(|name| (*name).to_owned())
        .collect()
}

fn is_abi_number(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

/// Unpacks a package file without installing it.
pub fn unpack(package: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    output(Command::new("dpkg-deb").arg("-x").args([package, to])).map(drop)
}

/// The names that a package file depends on, first alternatives only.
pub fn depends(package: &Path) -> Result<Vec<String>> {
    let out = output(Command::new("dpkg-deb").arg("-f").arg(package).arg("Depends"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let name = |d: &str| d.split(['|', '(', ':']).next().unwrap_or_default().trim().to_owned();
    Ok(text.split(',').map(name).filter(|n| !n.is_empty()).collect())
}

/// Runs a downloading command in `to` and returns the package files it left there.
fn fetch(command: &mut Command, to: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(to)?;
    output(command.current_dir(to))?;
    let files = fs::read_dir(to)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(files.into_iter().filter(|f| f.extension().is_some_and(|e| e == "deb")).collect())
}

fn output(command: &mut Command) -> Result<Output> {
    let out = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !out.status.success() {
        bail!(
            "{:?} failed ({}): {}{}",
            command,
            out.status,
            String::from_utf8_lossy(&out.stderr).trim(),
            String::from_utf8_lossy(&out.stdout).lines().last().unwrap_or_default()
        );
    }
    Ok(out)
}

/// All enabled binary sources of this machine.
fn machine_sources() -> Vec<Source> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut parts: Vec<PathBuf> = parts.flatten().map(|e| e.path()).collect();
        parts.sort();
        files.extend(parts);
    }
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => sources.extend(parse_lines(&text)),
            Some("sources") => sources.extend(parse_stanzas(&text)),
            _ => {}
        }
    }
    sources
}

/// `deb [options] URI suite component...`
fn parse_lines(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb").filter(|r| r.starts_with([' ', '\t'])) else { continue };
        let (options, rest) = match rest.trim().strip_prefix('[').and_then(|r| r.split_once(']')) {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
        let signed_by =
            options.split_whitespace().find_map(|o| o.strip_prefix("signed-by=")).map(str::to_owned);
        sources.push(Source { uri, suites: vec![suite], components: words.collect(), signed_by });
    }
    sources
}

/// The deb822 format: stanzas of `Field: value`, continued by indented lines.
fn parse_stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
        } else if line.trim().is_empty() {
            let get = |key: &str| fields.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
            let words = |key: &str| {
                get(key).unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            };
            let enabled = get("enabled").is_none_or(|v| v != "no");
            if enabled && words("types").iter().any(|t| t == "deb") {
                sources.extend(words("uris").into_iter().map(|uri| Source {
                    uri,
                    suites: words("suites"),
                    components: words("components"),
                    signed_by: get("signed-by"),
                }));
            }
            fields.clear();
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_sources() {
        let text = "# deb cdrom\ndeb [arch=amd64 signed-by=/k.gpg] http://a/debian bookworm main contrib # x\ndeb-src http://a b c\n";
        let expected = Source {
            uri: "http://a/debian".into(),
            suites: vec!["bookworm".into()],
            components: vec!["main".into(), "contrib".into()],
            signed_by: Some("/k.gpg".into()),
        };
        assert_eq!(parse_lines(text), [expected]);
    }

    #[test]
    fn deb822_sources() {
        let text = "Types: deb\n# note\nURIs: http://a/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\
            Signed-By:\n -----BEGIN\n .\n\nTypes: deb\nEnabled: no\nURIs: http://b\nSuites: x\n";
        let sources = parse_stanzas(text);
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(sources[0].signed_by.as_deref(), Some("\n -----BEGIN\n ."));
    }

    #[test]
    fn abi_numbers() {
        assert!(is_abi_number("23") && is_abi_number("-25"));
        assert!(!is_abi_number("") && !is_abi_number("-e1000") && !is_abi_number("23-dev"));
    }
}
