//! What an object's BTF says of its maps, as text: kind, size, and what keys and values are made of.
//!
//! Type numbers, and types that no map needs, differ between compilers; this text does not.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail, ensure};

use super::object::{number, text};

/// Nested types at most: a definition, a pointer, an array or a value, and what that is made of.
const DEPTH_MAX: usize = 16;

mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const DECL_TAG: u32 = 17;
    pub const ENUM64: u32 = 19;
    pub const LAST: u32 = 19;
}

struct Type<'a> {
    name: &'a str,
    kind: u32,
    /// How many members.
    len: usize,
    /// Size in bytes, or the type it refers to.
    size: u64,
    /// What follows the type's head.
    tail: &'a [u8],
}

struct Btf<'a> {
    types: Vec<Type<'a>>,
    strings: &'a [u8],
}

/// Describes the maps, one a line, in the order of their names.
pub fn maps(section: &[u8]) -> Result<Vec<String>> {
    let btf = Btf::parse(section)?;
    let Some(maps) = btf.types.iter().find(|t| t.kind == kind::DATASEC && t.name == ".maps") else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for i in 0..maps.len {
        let variable = btf.get(number::<4>(maps.tail, i * 12)?)?;
        found.push(format!("{}: {}", variable.name, btf.describe(variable.size, 0)?));
    }
    found.sort();
    Ok(found)
}

impl<'a> Btf<'a> {
    fn parse(section: &'a [u8]) -> Result<Self> {
        ensure!(number::<2>(section, 0)? == 0xeb9f, "no BTF");
        let header = number::<4>(section, 4)? as usize;
        let part = |field: usize| -> Result<&'a [u8]> {
            let (at, len) =
                (number::<4>(section, field)? as usize, number::<4>(section, field + 4)? as usize);
            section.get(header + at..).and_then(|rest| rest.get(..len)).context("BTF is cut off")
        };
        let (mut rest, strings) = (part(8)?, part(16)?);
        let mut types = vec![Type { name: "void", kind: 0, len: 0, size: 0, tail: &[] }];
        while !rest.is_empty() {
            let info = number::<4>(rest, 4)? as u32;
            let (kind, len) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let tail = match kind {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * len,
                kind::ENUM | kind::FUNC_PROTO => 8 * len,
                1..=kind::LAST => 0,
                _ => bail!("a type of the unknown kind {kind}"),
            };
            types.push(Type {
                name: text(strings, number::<4>(rest, 0)? as usize)?,
                kind,
                len,
                size: number::<4>(rest, 8)?,
                tail: rest.get(12..12 + tail).context("BTF is cut off")?,
            });
            rest = &rest[12 + tail..];
        }
        Ok(Self { types, strings })
    }

    fn get(&self, id: u64) -> Result<&Type<'a>> {
        self.types.get(id as usize).context("no such type")
    }

    fn describe(&self, id: u64, depth: usize) -> Result<String> {
        ensure!(depth < DEPTH_MAX, "types refer to each other");
        let found = self.get(id)?;
        Ok(match found.kind {
            kind::PTR => format!("*{}", self.describe(found.size, depth + 1)?),
            kind::ARRAY => {
                let element = self.describe(number::<4>(found.tail, 0)?, depth + 1)?;
                format!("[{element}; {}]", number::<4>(found.tail, 8)?)
            }
            kind::STRUCT | kind::UNION => {
                let members = (0..found.len).map(|i| {
                    let name = text(self.strings, number::<4>(found.tail, i * 12)? as usize)?;
                    let of = self.describe(number::<4>(found.tail, i * 12 + 4)?, depth + 1)?;
                    let bit = number::<4>(found.tail, i * 12 + 8)? & 0x00ff_ffff;
                    Ok(format!("{name}@{}: {of}", bit / 8))
                });
                let members = members.collect::<Result<Vec<_>>>()?.join(", ");
                format!("{{{members}}} of {}", found.size)
            }
            kind::INT => format!("int of {}", found.size),
            _ => found.name.to_owned(),
        })
    }
}
