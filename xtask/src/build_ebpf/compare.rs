//! Whether a rebuilt object is the committed one: byte by byte, or, where the same source was built by another compiler or
//! in another state of the debug information, in all that the kernel runs.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;

use super::btf;
use super::object::{Object, Origin};

/// What came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The same bytes.
    Same,
    /// The same programs and maps; other debug information.
    SameCode,
    /// Of the same source, by another compiler, whose programs differ; the same maps, sections and licence.
    OtherCompiler { committed: String, here: String, first: String },
    /// It is not what the source gives.
    Differs(String),
}

impl Verdict {
    /// Whether the committed object may stay.
    pub fn is_good(&self) -> bool {
        !matches!(self, Self::Differs(_))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Same => write!(f, "is what the source gives, byte by byte"),
            Self::SameCode => {
                write!(f, "is what the source gives: same programs and maps, other debug information")
            }
            Self::OtherCompiler { committed, here, first } => write!(
                f,
                "was built from this source by another compiler ({committed}; here: {here}); maps are the same, programs \
                 cannot be compared: {first}"
            ),
            Self::Differs(why) => write!(f, "is not what the source gives: {why}"),
        }
    }
}

/// What the kernel gets to see of an object, as text by place.
struct Parts {
    code: BTreeMap<String, Vec<String>>,
    rest: BTreeMap<String, Vec<String>>,
}

/// Compares.
pub fn compare(committed: &[u8], built: &[u8]) -> Result<Verdict> {
    if committed == built {
        return Ok(Verdict::Same);
    }
    let (committed, built) = (Object::parse(committed)?, Object::parse(built)?);
    let (old, new) = (parts(&committed)?, parts(&built)?);
    if let Some(why) = first_difference(&old.rest, &new.rest) {
        return Ok(Verdict::Differs(why));
    }
    let Some(first) = first_difference(&old.code, &new.code) else { return Ok(Verdict::SameCode) };
    Ok(match (Origin::of(&committed), Origin::of(&built)) {
        (Some(old), Some(new)) if old.built_by != new.built_by && old.sources == new.sources => {
            Verdict::OtherCompiler { committed: old.built_by, here: new.built_by, first }
        }
        _ => Verdict::Differs(first),
    })
}

fn parts(object: &Object<'_>) -> Result<Parts> {
    let mut parts = Parts { code: BTreeMap::new(), rest: BTreeMap::new() };
    for (i, section) in object.sections.iter().enumerate() {
        if section.is_code() && !section.bytes.is_empty() {
            // A program is a section of a name; `.text` holds what they call.
            if section.name != ".text" {
                parts.rest.insert(format!("section {}", section.name), Vec::new());
            }
            parts.code.insert(format!("section {}", section.name), instructions(object, i)?);
        } else if ["license", ".rodata", ".data", ".bss", ".ksyms", ".kconfig"].iter().any(|name| {
            section.name == *name || section.name.strip_prefix(name).is_some_and(|r| r.starts_with('.'))
        }) {
            // Constants lie where the compiler puts them.
            let place = if section.name == "license" { &mut parts.rest } else { &mut parts.code };
            place.insert(section.name.to_owned(), section.bytes.iter().map(|b| format!("{b:02x}")).collect());
        }
    }
    let maps =
        object.section(".BTF").map(|section| btf::maps(section.bytes)).transpose()?.unwrap_or_default();
    parts.rest.insert("maps".to_owned(), maps);
    Ok(parts)
}

/// The instructions of a section, each with the function that begins there and what is put into it at load.
fn instructions(object: &Object<'_>, section: usize) -> Result<Vec<String>> {
    let mut notes: BTreeMap<u64, String> = BTreeMap::new();
    for (name, of, value, size) in object.symbols()? {
        if of == section && size > 0 {
            *notes.entry(value).or_default() += &format!(" {}:", plain(&name));
        }
    }
    for (at, kind, symbol) in object.relocations(section)? {
        *notes.entry(at).or_default() += &format!(" [{kind} {}]", plain(&symbol));
    }
    let code = object.sections[section].bytes;
    let line = |(i, word): (usize, &[u8])| {
        let bytes: String = word.iter().map(|byte| format!("{byte:02x}")).collect();
        let note = notes.get(&(i as u64 * 8)).map_or("", String::as_str);
        format!("{bytes}{note}")
    };
    Ok(code.chunks(8).enumerate().map(line).collect())
}

/// A mangled name without the hashes in it, which depend on the compiler: at the end, or behind each crate's `Cs`.
fn plain(name: &str) -> String {
    if let Some(at) = name.rfind("17h").filter(|_| name.starts_with("_ZN")) {
        return name[..at].to_owned();
    }
    if !name.starts_with("_R") {
        return name.to_owned();
    }
    let mut crates = name.split("Cs");
    let mut plain = crates.next().unwrap_or_default().to_owned();
    for part in crates {
        plain.push('C');
        plain.push_str(part.split_once('_').map_or(part, |(_, rest)| rest));
    }
    plain
}

fn first_difference(
    old: &BTreeMap<String, Vec<String>>,
    new: &BTreeMap<String, Vec<String>>,
) -> Option<String> {
    for (place, old) in old {
        let Some(new) = new.get(place) else { return Some(format!("{place} is no longer there")) };
        for (i, line) in old.iter().enumerate() {
            if new.get(i) != Some(line) {
                let now = new.get(i).map_or("nothing", String::as_str);
                return Some(format!("{place}, line {i}: committed {line}, built {now}"));
            }
        }
        if new.len() > old.len() {
            return Some(format!("{place}, line {}: committed nothing, built {}", old.len(), new[old.len()]));
        }
    }
    new.keys().find(|place| !old.contains_key(*place)).map(|place| format!("{place} is new"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build_ebpf::object::reduce;

    fn committed() -> Vec<u8> {
        std::fs::read(crate::workspace().join("backend/bpf/xdp.o")).unwrap()
    }

    fn origin(built_by: &str, sources: u64) -> Origin {
        Origin { built_by: built_by.to_owned(), sources }
    }

    /// Where a section's bytes are in the file.
    fn place(file: &[u8], name: &str) -> usize {
        let object = Object::parse(file).unwrap();
        object.section(name).unwrap().bytes.as_ptr() as usize - file.as_ptr() as usize
    }

    #[test]
    fn an_object_is_itself_whatever_its_debug_information() {
        let file = committed();
        assert_eq!(compare(&file, &file).unwrap(), Verdict::Same);
        let mut other = file.clone();
        let at = place(&file, ".BTF.ext") + 100;
        other[at] ^= 1;
        assert_eq!(compare(&file, &other).unwrap(), Verdict::SameCode);
        let again = reduce(&file, &origin("another compiler", 1)).unwrap();
        assert_eq!(compare(&file, &again).unwrap(), Verdict::SameCode);
        assert!(Object::parse(&file).unwrap().section(".debug_info").unwrap().bytes.is_empty());
    }

    #[test]
    fn other_code_is_fine_only_from_the_same_source_by_another_compiler() {
        let old = reduce(&committed(), &origin("one compiler", 7)).unwrap();
        let changed = |built_by: &str, sources: u64| {
            let mut file = reduce(&committed(), &origin(built_by, sources)).unwrap();
            let at = place(&file, "xdp.frags") + 8;
            file[at] ^= 1;
            compare(&old, &file).unwrap()
        };
        assert!(
            matches!(changed("one compiler", 7), Verdict::Differs(why) if why.contains("xdp.frags, line 1"))
        );
        assert!(matches!(changed("another", 8), Verdict::Differs(_)));
        assert!(matches!(changed("another", 7), Verdict::OtherCompiler { .. }));
    }

    #[test]
    fn another_licence_or_map_is_never_fine() {
        let old = reduce(&committed(), &origin("one compiler", 7)).unwrap();
        let mut file = reduce(&committed(), &origin("another", 7)).unwrap();
        let at = place(&file, "license");
        file[at] ^= 1;
        assert!(matches!(compare(&old, &file).unwrap(), Verdict::Differs(why) if why.starts_with("license")));
        let maps = btf::maps(Object::parse(&old).unwrap().section(".BTF").unwrap().bytes).unwrap();
        let find = |name: &str| maps.iter().find(|line| line.starts_with(name)).unwrap();
        assert_eq!(maps.len(), 6);
        assert!(find("mac_table").contains("mac@0: [int of 1; 6], vlan@6: int of 2"), "{maps:?}");
        assert!(find("xdp_config").contains("layout@0: int of 4, pid@4: int of 4, start_time@8: int of 8"));
    }

    #[test]
    fn broken_files_are_errors() {
        let file = committed();
        for len in (0..file.len()).step_by(97) {
            assert!(compare(&file, &file[..len]).is_err());
        }
        let mut random = 88172645463325252u64;
        for _ in 0..500 {
            let mut file = file.clone();
            for _ in 0..4 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = random as usize % file.len();
                file[at] = (random >> 40) as u8;
            }
            let _ = compare(&committed(), &file);
        }
    }
}
