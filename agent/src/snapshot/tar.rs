//! Tar as PostgreSQL writes it, read as it streams in ("src/port/tar.c").
//!
//! Bytes go in cut anywhere, and come out as entries and their contents, without a copy. Nothing here does I/O. The archive
//! may end without the two blocks of zeros that tar has at its end: PostgreSQL 14 leaves them to its client.

use bytes::{Buf, Bytes};
use thiserror::Error;

const BLOCK: usize = 512;
/// PostgreSQL's own are at most 99 bytes.
const NAME_BYTES_MAX: usize = 255;
/// No file of a data directory is larger; it keeps sums of sizes from overflowing.
const SIZE_MAX: u64 = 1 << 50;

/// One file, folder or link of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As it stands in the archive, without a slash at its end.
    pub name: String,
    /// Unix permission bits.
    pub mode: u32,
    pub kind: EntryKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    File { size: u64 },
    Folder,
    Link { target: String },
}

/// What an archive consists of, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarEvent {
    Entry(Entry),
    /// More bytes of the file before.
    Data(Bytes),
    /// All bytes of the file before were there; also told of files without any.
    FileEnd,
}

/// What is wrong with an archive; `at` is where its header begins.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadTar {
    #[error("the header at byte {at} has the checksum {stored}, where {computed} is right")]
    Checksum { at: u64, stored: u64, computed: u64 },
    #[error("the header at byte {at} has no number as its {field}")]
    Number { at: u64, field: &'static str },
    #[error("the header at byte {at} gives {name:?} a size of {size} bytes")]
    Size { at: u64, name: String, size: u64 },
    #[error("the header at byte {at} has a name that is empty, too long or not UTF-8")]
    Name { at: u64 },
    #[error("{name:?} is of the kind '{kind}', which no data directory has")]
    Kind { name: String, kind: String },
    #[error("something follows the end of the archive, at byte {at}")]
    Trailing { at: u64 },
    #[error("the archive ends in the middle of an entry, at byte {at}")]
    Cut { at: u64 },
}

/// Reads one archive.
#[derive(Debug)]
pub struct Tar {
    state: State,
    /// Bytes taken so far.
    at: u64,
    header: Box<[u8; BLOCK]>,
    have: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A header, of which some is there.
    Header,
    /// So many bytes of a file are still to come, and then so many of padding.
    File {
        left: u64,
        padding: u64,
    },
    Padding {
        left: u64,
    },
    /// A block of zeros was there: nothing else may follow.
    Zeros,
}

impl Tar {
    pub fn new() -> Tar {
        Tar { state: State::Header, at: 0, header: Box::new([0; BLOCK]), have: 0 }
    }

    /// Takes from `input` up to the next event; none when all of it is used up. After an error nothing more is to be
    /// read of the archive.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<TarEvent>, BadTar> {
        loop {
            match self.state {
                State::File { left: 0, padding } => {
                    self.state = State::Padding { left: padding };
                    return Ok(Some(TarEvent::FileEnd));
                }
                _ if input.is_empty() => return Ok(None),
                State::File { left, padding } => {
                    let taken = left.min(input.len() as u64);
                    self.state = State::File { left: left - taken, padding };
                    self.at += taken;
                    return Ok(Some(TarEvent::Data(input.split_to(taken as usize))));
                }
                State::Padding { left } => {
                    let taken = left.min(input.len() as u64);
                    self.skip(input, taken);
                    self.state = match left - taken {
                        0 => State::Header,
                        left => State::Padding { left },
                    };
                }
                State::Header => {
                    if let Some(entry) = self.header(input)? {
                        return Ok(Some(TarEvent::Entry(entry)));
                    }
                }
                State::Zeros => {
                    if input.iter().any(|byte| *byte != 0) {
                        return Err(BadTar::Trailing { at: self.at });
                    }
                    self.skip(input, input.len() as u64);
                }
            }
        }
    }

    /// Nothing more comes: the archive must end between two entries.
    pub fn end(&self) -> Result<(), BadTar> {
        match self.state {
            State::Header if self.have == 0 => Ok(()),
            State::Zeros | State::Padding { left: 0 } => Ok(()),
            _ => Err(BadTar::Cut { at: self.at }),
        }
    }

    fn skip(&mut self, input: &mut Bytes, bytes: u64) {
        input.advance(bytes as usize);
        self.at += bytes;
    }

    /// Gathers a header; the entry, when it is all there and is one.
    fn header(&mut self, input: &mut Bytes) -> Result<Option<Entry>, BadTar> {
        let taken = input.len().min(BLOCK - self.have);
        input.copy_to_slice(&mut self.header[self.have..self.have + taken]);
        self.have += taken;
        self.at += taken as u64;
        if self.have < BLOCK {
            return Ok(None);
        }
        self.have = 0;
        if self.header.iter().all(|byte| *byte == 0) {
            self.state = State::Zeros;
            return Ok(None);
        }
        let entry = Header { bytes: &self.header, at: self.at - BLOCK as u64 }.read()?;
        self.state = match entry.kind {
            EntryKind::File { size } => {
                State::File { left: size, padding: size.next_multiple_of(BLOCK as u64) - size }
            }
            _ => State::Header,
        };
        Ok(Some(entry))
    }
}

/// A header that is all there.
struct Header<'a> {
    bytes: &'a [u8; BLOCK],
    at: u64,
}

impl Header<'_> {
    fn read(&self) -> Result<Entry, BadTar> {
        self.check()?;
        let name = self.name()?;
        let mode = self.number(100, 8, "mode")? as u32 & 0o7777;
        let size = self.number(124, 12, "size")?;
        let kind = match self.bytes[156] {
            b'0' | 0 if size > SIZE_MAX => return Err(BadTar::Size { at: self.at, name, size }),
            b'0' | 0 => EntryKind::File { size },
            b'5' | b'2' if size > 0 => return Err(BadTar::Size { at: self.at, name, size }),
            b'5' => EntryKind::Folder,
            b'2' => EntryKind::Link { target: self.text(157, 100)? },
            other => {
                return Err(BadTar::Kind { name, kind: other.escape_ascii().to_string() });
            }
        };
        Ok(Entry { name, mode, kind })
    }

    /// The sum of all bytes, with blanks in place of the sum itself.
    fn check(&self) -> Result<(), BadTar> {
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        let computed = sum(&self.bytes[..148]) + 8 * u64::from(b' ') + sum(&self.bytes[156..]);
        let stored = self.number(148, 8, "checksum")?;
        match stored == computed {
            true => Ok(()),
            false => Err(BadTar::Checksum { at: self.at, stored, computed }),
        }
    }

    /// The name, behind the prefix that ustar has for long ones.
    fn name(&self) -> Result<String, BadTar> {
        let is_ustar = &self.bytes[257..262] == b"ustar";
        let prefix = if is_ustar { self.text(345, 155)? } else { String::new() };
        let name = self.text(0, 100)?;
        let name = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let name = name.strip_suffix('/').unwrap_or(&name);
        match (1..=NAME_BYTES_MAX).contains(&name.len()) {
            true => Ok(name.to_string()),
            false => Err(BadTar::Name { at: self.at }),
        }
    }

    fn text(&self, offset: usize, bytes: usize) -> Result<String, BadTar> {
        let field = &self.bytes[offset..offset + bytes];
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(bytes);
        let text = std::str::from_utf8(&field[..end]);
        text.map(str::to_string).map_err(|_| BadTar::Name { at: self.at })
    }

    /// Octal digits, or, where these do not suffice, the number itself behind a first byte of 0x80.
    fn number(&self, offset: usize, bytes: usize, field: &'static str) -> Result<u64, BadTar> {
        let bad = BadTar::Number { at: self.at, field };
        let digits = &self.bytes[offset..offset + bytes];
        if digits[0] == 0x80 {
            let (high, low) = digits[1..].split_at(bytes.saturating_sub(9));
            let is_small = high.iter().all(|byte| *byte == 0);
            let number = low.iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
            return if is_small { Ok(number) } else { Err(bad) };
        }
        let text = digits.split(|byte| *byte == 0).next().unwrap_or_default().trim_ascii();
        if text.is_empty() || !text.iter().all(|byte| (b'0'..=b'7').contains(byte)) {
            return Err(bad);
        }
        Ok(text.iter().fold(0, |number, digit| number << 3 | u64::from(digit - b'0')))
    }
}

#[cfg(test)]
pub mod tests;
