//! Puts frames, file maps and the file table together, in the order of files, while they are read.
//!
//! ```text
//! files ── all frames sealed ─► map ─► entries ── map sealed ─► table ─► parts ── sealed ─► the root's references
//! ```
//!
//! Readers finish out of order, and a frame's address is known only when its pack is sealed; so files wait, first for their
//! frames, then for their map. What waits is bounded: jobs are given out in order, and packs are sealed in order.

use super::loose::{Loose, Piece};
use super::pack::{Packs, Place, Sealing};
use super::progress::Meter;
use super::read::{Reading, pack_whole};
use backstay_common::cbor;
use backstay_common::lsn::Lsn;
use backstay_common::seal::{FRAME_BYTES_MAX, Frame};
use backstay_common::snapshot::manifest::CorruptPage;
use backstay_common::snapshot::{
    BytesRef, Content, FileDigest, FileEntry, FileKind, FileMap, FrameRef, FrameUse, Run, TablePart,
};
use backstay_common::{Error, Kind, Result, pool};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Encoded bytes at which a part of the table is closed; the last entry still fits into the frame.
const TABLE_PART_BYTES: usize = FRAME_BYTES_MAX - (64 << 10);
/// When so many files wait, packs are sealed before they are full.
const WAITING_FILES_MAX: usize = 32 << 10;
/// More are counted, but not named.
const NAMED_PAGES_MAX: usize = 10_000;

/// What the assembler is told. Every [`Begun`] precedes what is packed of its file.
#[derive(Debug)]
pub enum Message {
    Begun(Begun),
    Packed(Packed),
    Failed(Error),
}

/// The next file or folder; they are numbered from 0.
#[derive(Debug)]
pub struct Begun {
    pub path: String,
    pub mode: u32,
    pub is_folder: bool,
    /// How many parts will come of it.
    pub parts: u32,
}

/// A frame, and what is in it.
#[derive(Debug)]
pub struct Packed {
    pub usage: FrameUse,
    /// None if no file had a byte.
    pub frame: Option<Frame>,
    /// Of the pages of all parts, in their order, eight bytes each.
    pub hashes: Vec<u8>,
    pub parts: Vec<Part>,
    /// Files that are not there any more.
    pub vanished: Vec<u64>,
}

/// A part of one file, in a frame.
#[derive(Debug)]
pub struct Part {
    pub file: u64,
    /// Which part of the file.
    pub part: u32,
    /// Where it lies in the frame.
    pub at: u32,
    pub bytes: u32,
    /// False if the file ends here, before it should.
    pub whole: bool,
    pub doubts: Vec<Doubt>,
}

/// A page whose checksum is wrong.
#[derive(Clone, Copy, Debug)]
pub struct Doubt {
    /// In the fork.
    pub block: u32,
    /// The page claims to be changed here, after the backup began: if that is true, replay repairs it. None if it
    /// claims nothing, and stays wrong.
    pub newer: Option<Lsn>,
}

/// A file that waits for its frames.
#[derive(Debug)]
struct Pending {
    begun: Begun,
    size: u64,
    digest: FileDigest,
    frames: Vec<(Place, u32, u32)>,
    next_part: u32,
    early: BTreeMap<u32, (Part, Option<Place>, Vec<u8>)>,
    has_ended: bool,
    has_vanished: bool,
}

/// A file that waits for its map, if it has one.
#[derive(Debug)]
struct Entry {
    entry: FileEntry,
    map: Option<Vec<Piece>>,
}

/// Pages whose checksums are wrong.
#[derive(Debug, Default)]
pub struct Doubts {
    /// The first of them.
    pub corrupt: Vec<CorruptPage>,
    pub corrupt_count: u64,
    /// With where they claim to be changed.
    pub newer: Vec<(CorruptPage, Lsn)>,
}

/// Everything about a snapshot that its files say.
#[derive(Debug)]
pub struct Assembled {
    pub table: Vec<BytesRef>,
    pub sealing: Sealing,
    pub files: u64,
    pub bytes: u64,
    pub doubts: Doubts,
}

#[derive(Debug)]
pub struct Assembler {
    packs: Packs,
    reading: Arc<Reading>,
    meter: Arc<Meter>,
    /// The number of the first of `files`.
    first: u64,
    files: VecDeque<Pending>,
    maps: Loose,
    entries: VecDeque<Entry>,
    table: TablePart,
    table_bytes: usize,
    table_frames: Loose,
    table_parts: Vec<Vec<Piece>>,
    /// Frames that were read behind the end of a file that became shorter.
    unused: Vec<Place>,
    file_count: u64,
    bytes: u64,
    doubts: Doubts,
}

impl Assembler {
    pub fn new(packs: Packs, reading: Arc<Reading>, meter: Arc<Meter>) -> Assembler {
        let level = reading.level;
        Assembler {
            packs,
            reading,
            meter,
            first: 0,
            files: VecDeque::new(),
            maps: Loose::new(FrameUse::Maps, level),
            entries: VecDeque::new(),
            table: TablePart::default(),
            table_bytes: 0,
            table_frames: Loose::new(FrameUse::Table, level),
            table_parts: Vec::new(),
            unused: Vec::new(),
            file_count: 0,
            bytes: 0,
            doubts: Doubts::default(),
        }
    }

    /// Takes everything that cutter and readers have to say. Safe to drop: nothing is committed.
    pub async fn take_all(&mut self, mut messages: mpsc::Receiver<Message>) -> Result<()> {
        while let Some(message) = messages.recv().await {
            match message {
                Message::Begun(begun) => self.begin(begun).await?,
                Message::Packed(packed) => self.packed(packed).await?,
                Message::Failed(error) => return Err(error),
            }
        }
        match self.files.iter().all(Pending::is_complete) {
            true => Ok(()),
            false => Err(Error::new(Kind::Bug, "a thread that reads files ended too early")),
        }
    }

    async fn begin(&mut self, begun: Begun) -> Result<()> {
        self.files.push_back(Pending::new(begun));
        let waiting = self.files.len() + self.entries.len();
        match waiting >= WAITING_FILES_MAX && waiting.is_multiple_of(WAITING_FILES_MAX / 4) {
            true => self.relieve().await,
            false => Ok(()),
        }
    }

    async fn packed(&mut self, packed: Packed) -> Result<()> {
        let Packed { usage, frame, hashes, parts, vanished } = packed;
        for number in vanished {
            self.file(number)?.has_vanished = true;
        }
        let mut rest = hashes.as_slice();
        let mut shares = Vec::with_capacity(parts.len());
        for part in &parts {
            let pages = (part.bytes as usize).div_ceil(self.reading.page_bytes as usize);
            let (share, after) = rest.split_at(pages * 8);
            shares.push(share.to_vec());
            rest = after;
        }
        let place = frame.map(|frame| self.packs.add(frame, usage, hashes));
        for (part, share) in parts.into_iter().zip(shares) {
            self.note(&part)?;
            let number = part.file;
            let file = self.file(number)?;
            file.early.insert(part.part, (part, place.clone(), share));
            let unused = file.absorb();
            self.unused.extend(unused);
        }
        match self.packs.is_full() {
            true => {
                self.packs.seal().await?;
                self.advance().await
            }
            false => Ok(()),
        }
    }

    fn file(&mut self, number: u64) -> Result<&mut Pending> {
        let at = number.checked_sub(self.first).map(|at| at as usize);
        at.and_then(|at| self.files.get_mut(at))
            .ok_or_else(|| Error::new(Kind::Bug, "a part of a file that was not begun"))
    }

    fn note(&mut self, part: &Part) -> Result<()> {
        for doubt in &part.doubts {
            let page =
                CorruptPage { path: self.file(part.file)?.begun.path.clone(), block: doubt.block };
            match doubt.newer {
                Some(lsn) if self.doubts.newer.len() < NAMED_PAGES_MAX => {
                    self.doubts.newer.push((page, lsn));
                }
                Some(_) => {}
                None => self.doubts.add(page),
            }
        }
        Ok(())
    }

    /// Moves on whatever no longer has to wait.
    async fn advance(&mut self) -> Result<()> {
        while let Some(file) = self.files.front() {
            let Some(frames) = file.resolved() else { break };
            let file = self.files.pop_front().expect("looked at just now");
            self.first += 1;
            if !file.has_vanished {
                self.entry(file, frames).await?;
            }
        }
        while let Some(waiting) = self.entries.front() {
            let map = match &waiting.map {
                None => None,
                Some(pieces) => match Piece::resolve(pieces) {
                    Some(map) => Some(map),
                    None => break,
                },
            };
            let mut entry = self.entries.pop_front().expect("looked at just now").entry;
            if let Some(map) = map {
                entry.content = Content::Mapped(map);
            }
            self.list(entry).await?;
        }
        Ok(())
    }

    /// A file whose frames have their addresses.
    async fn entry(&mut self, file: Pending, frames: Vec<FrameRef>) -> Result<()> {
        let Pending { begun, size, digest, frames: places, .. } = file;
        let (content, map) = match frames[..] {
            [] => (Content::Empty, None),
            [frame] => (Content::Within { frame, at: places[0].1 }, None),
            _ => {
                let map = map_of(frames, &places, self.reading.page_bytes);
                (Content::Empty, Some(self.maps.write(&mut self.packs, &map.encode()).await?))
            }
        };
        let kind = if begun.is_folder { FileKind::Directory } else { FileKind::File };
        let digest = (!begun.is_folder).then(|| digest.finish(size));
        self.meter.file();
        self.file_count += 1;
        self.bytes += size;
        let entry = FileEntry { path: begun.path, kind, mode: begun.mode, size, digest, content };
        self.entries.push_back(Entry { entry, map });
        Ok(())
    }

    /// Puts a finished entry into the table.
    async fn list(&mut self, entry: FileEntry) -> Result<()> {
        self.table_bytes += cbor::encode(&entry).len();
        self.table.files.push(entry);
        match self.table_bytes >= TABLE_PART_BYTES {
            true => self.close_table_part().await,
            false => Ok(()),
        }
    }

    async fn close_table_part(&mut self) -> Result<()> {
        self.table_bytes = 0;
        let part = cbor::encode(&std::mem::take(&mut self.table));
        let pieces = self.table_frames.write(&mut self.packs, &part).await?;
        self.table_frames.flush(&mut self.packs).await?;
        self.table_parts.push(pieces);
        Ok(())
    }

    /// Seals what there is, so that all that can move on does.
    async fn relieve(&mut self) -> Result<()> {
        self.maps.flush(&mut self.packs).await?;
        self.packs.seal().await?;
        self.packs.settle().await?;
        self.advance().await
    }

    /// Adds `pg_control`, which is read last.
    pub async fn add_control(&mut self, path: &str, mode: u32, bytes: Vec<u8>) -> Result<()> {
        let (reading, size) = (self.reading.clone(), bytes.len() as u32);
        let (frame, hashes) = pool::run(move || pack_whole(&reading, &bytes)).await??;
        let number = self.first + self.files.len() as u64;
        let begun = Begun { path: path.to_string(), mode, is_folder: false, parts: 1 };
        self.begin(begun).await?;
        let part =
            Part { file: number, part: 0, at: 0, bytes: size, whole: true, doubts: Vec::new() };
        let (usage, vanished) = (FrameUse::Small, Vec::new());
        self.meter.read(size.into());
        self.packed(Packed { usage, frame: Some(frame), hashes, parts: vec![part], vanished }).await
    }

    /// Seals the last frames, then the last maps, then the table: each needs the addresses of the one before.
    pub async fn finish(mut self) -> Result<Assembled> {
        self.relieve().await?;
        self.relieve().await?;
        if !self.files.is_empty() || !self.entries.is_empty() {
            return Err(Error::new(Kind::Bug, "a frame of a snapshot was never sealed"));
        }
        self.close_table_part().await?;
        self.relieve().await?;
        let table = self.table_parts.iter().map(|pieces| Piece::resolve(pieces));
        let table = table.collect::<Option<Vec<BytesRef>>>();
        let table =
            table.ok_or_else(|| Error::new(Kind::Bug, "the file table was never sealed"))?;
        let unused: Vec<FrameRef> = self.unused.iter().filter_map(Place::frame).collect();
        self.packs.disown(&unused);
        Ok(Assembled {
            table,
            sealing: self.packs.into_sealed(),
            files: self.file_count,
            bytes: self.bytes,
            doubts: self.doubts,
        })
    }
}

impl Pending {
    fn new(begun: Begun) -> Pending {
        Pending {
            begun,
            size: 0,
            digest: FileDigest::new(),
            frames: Vec::new(),
            next_part: 0,
            early: BTreeMap::new(),
            has_ended: false,
            has_vanished: false,
        }
    }

    fn is_complete(&self) -> bool {
        self.has_vanished || self.next_part == self.begun.parts
    }

    /// Takes the parts that are next in order; gives back frames that lie behind the file's end.
    fn absorb(&mut self) -> Vec<Place> {
        let mut unused = Vec::new();
        while let Some((part, place, hashes)) = self.early.remove(&self.next_part) {
            self.next_part += 1;
            match place {
                Some(place) if self.has_ended => unused.push(place),
                Some(place) if part.bytes > 0 => {
                    self.digest.push(hashes.as_chunks().0);
                    self.size += u64::from(part.bytes);
                    self.frames.push((place, part.at, part.bytes));
                }
                _ => {}
            }
            self.has_ended |= !part.whole;
        }
        unused
    }

    /// The addresses of all frames; none as long as one is to come.
    fn resolved(&self) -> Option<Vec<FrameRef>> {
        match (self.is_complete(), self.has_vanished) {
            (false, _) => None,
            (true, true) => Some(Vec::new()),
            (true, false) => self.frames.iter().map(|(place, ..)| place.frame()).collect(),
        }
    }
}

impl Doubts {
    fn add(&mut self, page: CorruptPage) {
        self.corrupt_count += 1;
        if self.corrupt.len() < NAMED_PAGES_MAX {
            self.corrupt.push(page);
        }
    }

    /// Pages that claim to be changed after the backup ended were not: they are damaged.
    pub fn judge(&mut self, stop: Lsn) {
        let newer = std::mem::take(&mut self.newer);
        newer.into_iter().filter(|(_, lsn)| *lsn > stop).for_each(|(page, _)| self.add(page));
    }
}

fn map_of(frames: Vec<FrameRef>, places: &[(Place, u32, u32)], page_bytes: u32) -> FileMap {
    let mut first_page = 0;
    let runs = places.iter().enumerate().map(|(number, (_, at, bytes))| {
        let run =
            Run { first_page, pages: bytes.div_ceil(page_bytes), frame: number as u32, at: *at };
        first_page += run.pages;
        run
    });
    let runs = runs.collect();
    FileMap { frames, runs }
}

#[cfg(test)]
mod tests;
