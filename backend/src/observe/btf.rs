//! Where fields lie in the running kernel's structures, from its type information (BTF).
//!
//! Pure: bytes in, offsets out. Only what that takes is read: names, structures, unions, and what leads to them.
//! Format: Documentation/bpf/btf.rst in the kernel's source.
#![forbid(unsafe_code)]

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;
const HEADER_LEN: usize = 24;
const MEMBER_LEN: usize = 12;
/// Types between a member and the structure it is of, at most.
const ALIASES_MAX: usize = 8;
/// Unnamed structures inside each other, at most.
const NESTING_MAX: usize = 8;

/// Kinds of types (`BTF_KIND_*`).
mod kind {
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const TYPE_TAG: u32 = 18;
}

/// A parsed BTF blob.
pub struct Btf<'b> {
    types: &'b [u8],
    names: &'b [u8],
    /// Where type `n + 1` begins in `types`.
    starts: Vec<u32>,
    structures: HashMap<&'b [u8], u32>,
}

/// A type's head.
struct Type<'b> {
    kind: u32,
    /// Bit fields are encoded in the offsets.
    has_bit_fields: bool,
    /// The type it leads to.
    to: u32,
    members: &'b [u8],
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Bytes that follow a type's head.
fn tail_len(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        2 | 7..=12 | 16 | 18 => 0,
        1 | 14 | 17 => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | 15 | 19 => count * 12,
        6 | 13 => count * 8,
        _ => return None,
    })
}

impl<'b> Btf<'b> {
    /// Reads a blob of this machine's byte order. None: it is damaged, or of a kind that is not known here.
    pub fn parse(bytes: &'b [u8]) -> Option<Self> {
        let magic = bytes.get(..2)?.try_into().ok().map(u16::from_ne_bytes)?;
        let header = word(bytes, 4)? as usize;
        if magic != MAGIC || header < HEADER_LEN {
            return None;
        }
        let section = |at: usize| {
            let start = header.checked_add(word(bytes, at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        let (types, names) = (section(8)?, section(16)?);
        let mut btf = Self { types, names, starts: Vec::new(), structures: HashMap::new() };
        let mut at = 0;
        while at < types.len() {
            let (name, info) = (word(types, at)?, word(types, at + 4)?);
            let kind = info >> 24 & 0x1f;
            btf.starts.push(at as u32);
            if kind == kind::STRUCT && name != 0 {
                let id = btf.starts.len() as u32;
                btf.structures.entry(btf.name(name)?).or_insert(id);
            }
            at += 12 + tail_len(kind, (info & 0xffff) as usize)?;
        }
        Some(btf)
    }

    fn name(&self, at: u32) -> Option<&'b [u8]> {
        let rest = self.names.get(at as usize..)?;
        rest.split(|byte| *byte == 0).next()
    }

    fn get(&self, id: u32) -> Option<Type<'b>> {
        let at = *self.starts.get((id as usize).checked_sub(1)?)? as usize;
        let info = word(self.types, at + 4)?;
        let kind = info >> 24 & 0x1f;
        let tail = self.types.get(at + 12..)?.get(..tail_len(kind, (info & 0xffff) as usize)?)?;
        Some(Type { kind, has_bit_fields: info >> 31 == 1, to: word(self.types, at + 8)?, members: tail })
    }

    /// The structure or union behind names and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<Type<'b>> {
        for _ in 0..ALIASES_MAX {
            let found = self.get(id)?;
            match found.kind {
                kind::STRUCT | kind::UNION => return Some(found),
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = found.to
                }
                _ => return None,
            }
        }
        None
    }

    /// Bytes from the start of structure `name` to the field that `path` leads to, one member after the other.
    /// Unnamed structures on the way need not be named.
    pub fn offset(&self, name: &str, path: &[&str]) -> Option<u32> {
        let mut holder = self.get(*self.structures.get(name.as_bytes())?)?;
        let mut bits = 0;
        for (step, member) in path.iter().enumerate() {
            let (at, id) = self.member(&holder, member.as_bytes(), NESTING_MAX)?;
            bits += at;
            if step + 1 < path.len() {
                holder = self.resolve(id)?;
            }
        }
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Bits from the start of `holder` to its member, and the member's type.
    fn member(&self, holder: &Type<'b>, wanted: &[u8], nesting: usize) -> Option<(u32, u32)> {
        for member in holder.members.chunks_exact(MEMBER_LEN) {
            let (name, id, at) = (word(member, 0)?, word(member, 4)?, word(member, 8)?);
            let at = if holder.has_bit_fields { at & 0x00ff_ffff } else { at };
            if self.name(name)? == wanted {
                return Some((at, id));
            }
            if name == 0
                && nesting > 0
                && let Some(inner) = self.resolve(id)
                && let Some((inside, id)) = self.member(&inner, wanted, nesting - 1)
            {
                return Some((at + inside, id));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// struct a { int x; struct { const b y; }; }; typedef struct { int p; int q; } b;
    fn blob() -> Vec<u8> {
        let names = b"\0a\0x\0y\0b\0p\0q\0int\0";
        let head = |kind: u32, count: u32| kind << 24 | count;
        #[rustfmt::skip]
        let types: &[u32] = &[
            13, head(1, 0), 4, 32,                             // 1: int
            1, head(kind::STRUCT, 2), 12, 3, 1, 0, 0, 3, 32,   // 2: a
            0, head(kind::STRUCT, 1), 8, 5, 4, 0,              // 3: unnamed, y
            0, head(kind::CONST, 0), 5,                        // 4
            7, head(kind::TYPEDEF, 0), 6,                      // 5: b
            0, head(kind::STRUCT, 2), 8, 9, 1, 0, 11, 1, 32,   // 6: p, q
        ];
        let mut blob = MAGIC.to_ne_bytes().to_vec();
        blob.extend([1, 0]);
        let len = types.len() as u32 * 4;
        for word in [HEADER_LEN as u32, 0, len, len, names.len() as u32] {
            blob.extend(word.to_ne_bytes());
        }
        for word in types {
            blob.extend(word.to_ne_bytes());
        }
        blob.extend(names);
        blob
    }

    #[test]
    fn fields_are_found_through_unnamed_structures_and_names() {
        let blob = blob();
        let btf = Btf::parse(&blob).unwrap();
        assert_eq!(btf.offset("a", &["x"]), Some(0));
        assert_eq!(btf.offset("a", &["y"]), Some(4));
        assert_eq!(btf.offset("a", &["y", "q"]), Some(8));
        assert_eq!(btf.offset("a", &["z"]), None);
        assert_eq!(btf.offset("a", &["x", "q"]), None);
        assert_eq!(btf.offset("b", &["p"]), None, "b is a name for an unnamed structure");
    }

    #[test]
    fn damaged_blobs_are_refused_or_answer_nothing() {
        let blob = blob();
        for cut in 0..blob.len() {
            assert!(Btf::parse(&blob[..cut]).is_none(), "{cut}");
        }
        for at in 0..blob.len() {
            for value in [0, 0xff, 0x7f] {
                let mut bad = blob.clone();
                bad[at] = value;
                if let Some(btf) = Btf::parse(&bad) {
                    let _ = btf.offset("a", &["y", "q"]);
                }
            }
        }
    }

    #[test]
    fn this_kernel_has_the_fields_that_matter() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else { return };
        let btf = Btf::parse(&bytes).unwrap();
        for (name, path) in [("task_struct", &["tgid"][..]), ("vm_fault", &["address"])] {
            assert!(btf.offset(name, path).is_some(), "{name} {path:?}");
        }
    }
}
