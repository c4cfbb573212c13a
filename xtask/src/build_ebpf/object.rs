//! A BPF object file: its sections, and what is kept of them.
//!
//! The linker leaves DWARF in the object, which is most of it, tells where it was built and is of no use in the kernel. It
//! is emptied: the section headers stay, so that nothing that refers to a section by number must be changed. Added is a
//! section `.origin` that says what the object was built from.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};

/// What an object was built from and by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Versions of compiler and linker.
    pub built_by: String,
    /// A number for the source files.
    pub sources: u64,
}

const ORIGIN: &str = ".origin";

impl Origin {
    fn text(&self) -> String {
        format!("{}\nsources {:016x}\n", self.built_by, self.sources)
    }

    /// That of an object.
    pub fn of(object: &Object<'_>) -> Option<Self> {
        // The last one: an object may be reduced again.
        let section = object.sections.iter().rev().find(|section| section.name == ORIGIN)?;
        let text = std::str::from_utf8(section.bytes).ok()?;
        let (built_by, rest) = text.split_once('\n')?;
        let sources = u64::from_str_radix(rest.trim().strip_prefix("sources ")?, 16).ok()?;
        Some(Self { built_by: built_by.to_owned(), sources })
    }
}

const EHDR_LEN: usize = 64;
const SHDR_LEN: usize = 64;
const SHT_SYMTAB: u32 = 2;
const SHT_NOBITS: u32 = 8;
const SHT_REL: u32 = 9;
const SHF_EXECINSTR: u64 = 4;

/// One section.
#[derive(Debug, Clone, Copy)]
pub struct Section<'a> {
    pub name: &'a str,
    pub bytes: &'a [u8],
    kind: u32,
    flags: u64,
    /// For relocations, the section they are for.
    info: u32,
    header: &'a [u8],
}

impl Section<'_> {
    /// Whether programs are in it.
    pub fn is_code(&self) -> bool {
        self.flags & SHF_EXECINSTR != 0
    }
}

/// A little-endian ELF64 relocatable file.
#[derive(Debug)]
pub struct Object<'a> {
    header: &'a [u8],
    pub sections: Vec<Section<'a>>,
    names: usize,
}

/// A little-endian number of `N` bytes.
pub fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64> {
    let field = at.checked_add(N).and_then(|end| bytes.get(at..end)).context("it is cut off")?;
    Ok(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// The text at an offset of a string table.
pub fn text(table: &[u8], at: usize) -> Result<&str> {
    let rest = table.get(at..).context("a name lies outside its table")?;
    let end = rest.iter().position(|byte| *byte == 0).context("a name does not end")?;
    Ok(std::str::from_utf8(&rest[..end])?)
}

impl<'a> Object<'a> {
    /// Reads the headers.
    pub fn parse(file: &'a [u8]) -> Result<Self> {
        ensure!(
            file.len() >= EHDR_LEN && file.starts_with(b"\x7fELF\x02\x01"),
            "no little-endian ELF64 file"
        );
        let (offset, count) = (number::<8>(file, 40)? as usize, number::<2>(file, 60)? as usize);
        let names = number::<2>(file, 62)? as usize;
        ensure!(number::<2>(file, 58)? as usize == SHDR_LEN, "section headers of another size");
        let header = |i: usize| {
            let at = i.checked_mul(SHDR_LEN).and_then(|at| at.checked_add(offset)).context("too large")?;
            file.get(at..).and_then(|rest| rest.get(..SHDR_LEN)).context("section headers are cut off")
        };
        let content = |header: &[u8]| -> Result<&'a [u8]> {
            if number::<4>(header, 4)? as u32 == SHT_NOBITS {
                return Ok(&[]);
            }
            let (at, len) = (number::<8>(header, 24)? as usize, number::<8>(header, 32)? as usize);
            file.get(at..).and_then(|rest| rest.get(..len)).context("a section is cut off")
        };
        let table = content(header(names)?)?;
        let sections = (0..count)
            .map(|i| {
                let header = header(i)?;
                Ok(Section {
                    name: text(table, number::<4>(header, 0)? as usize)?,
                    bytes: content(header)?,
                    kind: number::<4>(header, 4)? as u32,
                    flags: number::<8>(header, 8)?,
                    info: number::<4>(header, 44)? as u32,
                    header,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { header: &file[..EHDR_LEN], sections, names })
    }

    /// A section by name.
    pub fn section(&self, name: &str) -> Option<&Section<'a>> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The symbols: name, section number, value, size.
    pub fn symbols(&self) -> Result<Vec<(String, usize, u64, u64)>> {
        let table = self.sections.iter().find(|s| s.kind == SHT_SYMTAB).context("no symbols")?;
        let names = self.sections.get(number::<4>(table.header, 40)? as usize).context("no symbol names")?;
        let entries = table.bytes.chunks_exact(24).map(|entry| {
            let name = text(names.bytes, number::<4>(entry, 0)? as usize)?.to_owned();
            let section = number::<2>(entry, 6)? as usize;
            Ok((name, section, number::<8>(entry, 8)?, number::<8>(entry, 16)?))
        });
        entries.collect()
    }

    /// The relocations of a section: where, kind, symbol (or the section it stands for).
    pub fn relocations(&self, section: usize) -> Result<Vec<(u64, u64, String)>> {
        let symbols = self.symbols()?;
        let tables = self.sections.iter().filter(|s| s.kind == SHT_REL && s.info as usize == section);
        let mut found = Vec::new();
        for entry in tables.flat_map(|table| table.bytes.chunks_exact(16)) {
            let info = number::<8>(entry, 8)?;
            let (name, section, ..) = symbols.get((info >> 32) as usize).context("no such symbol")?;
            let name =
                if name.is_empty() { self.sections.get(*section).map_or("", |s| s.name) } else { name };
            found.push((number::<8>(entry, 0)?, info & 0xffff_ffff, name.to_owned()));
        }
        found.sort();
        Ok(found)
    }
}

/// The object without DWARF, and with its origin.
pub fn reduce(file: &[u8], origin: &Origin) -> Result<Vec<u8>> {
    let object = Object::parse(file)?;
    let origin_text = origin.text();
    let mut out = object.header.to_vec();
    let mut headers = Vec::new();
    for (i, section) in object.sections.iter().enumerate() {
        let mut header = section.header.to_vec();
        let is_dwarf = section.name.starts_with(".debug") || section.name.starts_with(".rel.debug");
        let mut bytes = if is_dwarf { &[][..] } else { section.bytes }.to_vec();
        if i == object.names {
            bytes.extend(ORIGIN.bytes().chain([0]));
        }
        let alignment = number::<8>(&header, 48)?.clamp(1, 16) as usize;
        out.resize(out.len().next_multiple_of(alignment), 0);
        if section.kind != SHT_NOBITS && i > 0 {
            header[24..32].copy_from_slice(&(out.len() as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            out.extend(bytes);
        }
        headers.extend(header);
    }
    // Program bits, no flags, byte alignment.
    let mut header = [0; SHDR_LEN];
    header[..4].copy_from_slice(&(object.sections[object.names].bytes.len() as u32).to_le_bytes());
    header[4] = 1;
    header[24..32].copy_from_slice(&(out.len() as u64).to_le_bytes());
    header[32..40].copy_from_slice(&(origin_text.len() as u64).to_le_bytes());
    header[48] = 1;
    out.extend(origin_text.bytes());
    headers.extend(header);
    out.resize(out.len().next_multiple_of(8), 0);
    let (at, count) = (out.len() as u64, object.sections.len() as u16 + 1);
    out[40..48].copy_from_slice(&at.to_le_bytes());
    out[60..62].copy_from_slice(&count.to_le_bytes());
    out.extend(headers);
    Ok(out)
}
