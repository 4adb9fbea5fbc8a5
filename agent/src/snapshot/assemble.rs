//! Puts file maps and the file table together while files are read, from what is new and what the parent has.
//!
//! ```text
//! files ── all parts known, all frames sealed ─► map ─► waiting entries ── map sealed ─► entries
//! all entries, sorted by path ─► parts of the table ── sealed, or the parent's very part ─► the root's references
//! ```
//!
//! Files may come in any order, and their parts out of order. A frame's address is known only when its pack is sealed; so
//! files wait, first for their frames, then for their map. What waits is bounded: jobs are few, and packs are sealed as they
//! fill. A file that equals the parent's waits for nothing.

mod entries;
mod pending;

pub use pending::{Begun, Doubt, Doubts, Held, Part, PartState};

use super::cache::{CacheWriter, DoubtRecord, FileRecord, SharedPart};
use super::leftover::Leftover;
use super::loose::{Loose, Piece};
use super::overlay::{self, Stored};
use super::pack::Packs;
use super::parent::Parent;
use super::progress::Meter;
use super::read::{Reading, pack_whole};
use super::usage::Usage;
use backstay_common::id::EpochId;
use backstay_common::seal::Frame;
use backstay_common::snapshot::manifest::CorruptPage;
use backstay_common::snapshot::{
    BytesRef, Content, FileEntry, FileKind, FileMap, FrameUse, PackEntry,
};
use backstay_common::{Error, Kind, Result, pool};
use entries::Entries;
use pending::Pending;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::mpsc;

/// When so many files wait, packs are sealed before they are full.
const WAITING_FILES_MAX: usize = 32 << 10;

/// What the assembler is told. Every [`Begun`] precedes what is told of its file, every frame the parts that it is of.
#[derive(Debug)]
pub enum Message {
    Begun(Begun),
    Packed(Packed),
    Read(Vec<Part>),
    Failed(Error),
}

/// A frame, and what is in it.
#[derive(Debug)]
pub struct Packed {
    pub usage: FrameUse,
    pub frame: Frame,
    /// Of its pages, in their order, eight bytes each.
    pub hashes: Vec<u8>,
    pub holds: Vec<Held>,
}

/// A file that waits for its map.
#[derive(Debug)]
struct Waiting {
    entry: FileEntry,
    record: FileRecord,
    map: Vec<Piece>,
    read_bytes: u64,
}

/// Everything about a snapshot that its files say.
#[derive(Debug)]
pub struct Assembled {
    pub table: Vec<BytesRef>,
    /// The parts of the table again, for the cache.
    pub shared: Vec<SharedPart>,
    pub epochs: Vec<EpochId>,
    /// All that the snapshot uses, the parent's among them.
    pub packs: Vec<PackEntry>,
    /// Bytes of the packs that are new.
    pub stored_bytes: u64,
    pub files: u64,
    pub bytes: u64,
    pub doubts: Doubts,
}

#[derive(Debug)]
pub struct Assembler {
    packs: Packs,
    parent: Option<Arc<Parent>>,
    leftover: Arc<Leftover>,
    cache: Arc<CacheWriter>,
    reading: Arc<Reading>,
    meter: Arc<Meter>,
    next_number: u64,
    /// Files of which parts are to come.
    files: HashMap<u64, Pending>,
    /// Files whose frames are not all sealed.
    unsealed: Vec<Pending>,
    maps: Loose,
    waiting: Vec<Waiting>,
    entries: Entries,
    usage: Usage,
    bytes: u64,
    doubts: Doubts,
}

impl Assembler {
    pub fn new(
        packs: Packs,
        parent: Option<Arc<Parent>>,
        leftover: Arc<Leftover>,
        cache: Arc<CacheWriter>,
        reading: Arc<Reading>,
        meter: Arc<Meter>,
    ) -> Assembler {
        let level = reading.level;
        Assembler {
            packs,
            parent,
            leftover,
            cache,
            reading,
            meter,
            next_number: 0,
            files: HashMap::new(),
            unsealed: Vec::new(),
            maps: Loose::new(FrameUse::Maps, level),
            waiting: Vec::new(),
            entries: Entries::default(),
            usage: Usage::default(),
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
                Message::Read(parts) => self.read(parts).await?,
                Message::Failed(error) => return Err(error),
            }
        }
        match self.files.is_empty() {
            true => Ok(()),
            false => Err(Error::new(Kind::Bug, "a thread that reads files ended too early")),
        }
    }

    async fn begin(&mut self, begun: Begun) -> Result<()> {
        let (number, has_parts) = (self.next_number, begun.parts > 0);
        self.next_number += 1;
        let pending = Pending::new(begun);
        if !has_parts {
            return self.complete(pending).await;
        }
        self.files.insert(number, pending);
        Ok(())
    }

    async fn packed(&mut self, packed: Packed) -> Result<()> {
        let Packed { usage, frame, hashes, holds } = packed;
        let place = self.packs.add(frame, usage, hashes);
        let path = |held: &Held| self.files.get(&held.file).map(|file| file.begun.path.as_str());
        let run =
            |held: &Held| (path(held).unwrap_or_default(), held.first_page, held.pages, held.at);
        self.packs.holds(holds.iter().map(run));
        for held in holds {
            self.file(held.file)?.held.push((place.clone(), held));
        }
        match self.packs.is_full() {
            true => {
                self.packs.seal().await?;
                self.advance().await
            }
            false => Ok(()),
        }
    }

    async fn read(&mut self, parts: Vec<Part>) -> Result<()> {
        for part in parts {
            let number = part.file;
            let file = self.file(number)?;
            file.take(part);
            if file.is_complete() {
                let file = self.files.remove(&number).expect("looked at just now");
                self.complete(file).await?;
            }
        }
        Ok(())
    }

    fn file(&mut self, number: u64) -> Result<&mut Pending> {
        let unknown = || Error::new(Kind::Bug, "a part of a file that was not begun");
        self.files.get_mut(&number).ok_or_else(unknown)
    }

    /// A file all of whose parts are known.
    async fn complete(&mut self, file: Pending) -> Result<()> {
        if file.has_vanished {
            return Ok(());
        }
        for doubt in &file.doubts {
            let page = CorruptPage { path: file.begun.path.clone(), block: doubt.block };
            self.doubts.note(page, doubt.newer);
        }
        self.meter.file();
        self.bytes += file.size;
        if file.held.is_empty() {
            let reused = file.reused.clone();
            return self.entry(file, reused).await;
        }
        self.unsealed.push(file);
        let waiting = self.unsealed.len() + self.waiting.len();
        match waiting >= WAITING_FILES_MAX && waiting.is_multiple_of(WAITING_FILES_MAX / 4) {
            true => self.relieve().await,
            false => Ok(()),
        }
    }

    /// Moves on whatever no longer has to wait.
    async fn advance(&mut self) -> Result<()> {
        for file in std::mem::take(&mut self.unsealed) {
            match file.stored() {
                Some(stored) => self.entry(file, stored).await?,
                None => self.unsealed.push(file),
            }
        }
        for mut waiting in std::mem::take(&mut self.waiting) {
            match Piece::resolve(&waiting.map) {
                Some(map) => {
                    self.usage.mark_bytes(&map)?;
                    waiting.entry.content = Content::Mapped(map);
                    self.list(waiting.entry, waiting.record, waiting.read_bytes);
                }
                None => self.waiting.push(waiting),
            }
        }
        Ok(())
    }

    /// A file whose new frames have their addresses.
    async fn entry(&mut self, file: Pending, stored: Vec<Stored>) -> Result<()> {
        let Pending { begun, size, digest, chunks, doubts, .. } = file;
        let (path, mode) = (begun.path, begun.mode);
        let kind = if begun.is_folder { FileKind::Directory } else { FileKind::File };
        let digest = digest.finish(size);
        let of_file = (!begun.is_folder).then_some(digest);
        let content = Content::Empty;
        let mut entry =
            FileEntry { path: path.clone(), kind, mode, size, digest: of_file, content };
        if size == 0 {
            self.entries.add(&entry);
            return Ok(());
        }
        let doubts = doubts.iter().map(|doubt| DoubtRecord { page: doubt.page }).collect();
        let (content, stat) = (Content::Empty, begun.stat);
        let mut record =
            FileRecord { path, size, digest, content, chunks, map: None, stat, doubts };
        let old = match &begun.known {
            Some(known) => {
                let known = known.clone();
                pool::run(move || known.map()).await??
            }
            None => FileMap::default(),
        };
        let unchanged =
            begun.known.as_ref().filter(|known| stored.is_empty() && known.record.size == size);
        let pages = size.div_ceil(u64::from(self.reading.page_bytes)) as u32;
        let page_bytes = self.reading.page_bytes;
        let map = match unchanged {
            Some(_) => old,
            None => pool::run(move || overlay::overlay(&old, stored, pages, page_bytes)).await??,
        };
        map.frames.iter().try_for_each(|frame| self.usage.mark(frame))?;
        let read_bytes = overlay::read_bytes(&map);
        if let ([frame], [run]) = (&map.frames[..], &map.runs[..]) {
            entry.content = Content::Within { frame: *frame, at: run.at };
            self.list(entry, record, read_bytes);
            return Ok(());
        }
        let kept = unchanged.map(|known| &known.record.content).filter(|c| self.may_stay(c));
        let bytes = map.encode();
        record.map = Some(self.cache.map(&bytes));
        if let Some(Content::Mapped(map)) = kept {
            self.usage.mark_bytes(map)?;
            entry.content = Content::Mapped(map.clone());
            self.list(entry, record, read_bytes);
            return Ok(());
        }
        let map = self.maps.write(&mut self.packs, &bytes).await?;
        self.waiting.push(Waiting { entry, record, map, read_bytes });
        Ok(())
    }

    /// True for the parent's map where its bytes lie in packs that stay.
    fn may_stay(&self, content: &Content) -> bool {
        match (content, &self.parent) {
            (Content::Mapped(map), Some(parent)) => parent.keeps(map),
            _ => false,
        }
    }

    /// A finished file: into the table, and into the cache.
    fn list(&mut self, entry: FileEntry, mut record: FileRecord, read_bytes: u64) {
        self.entries.add(&entry);
        record.content = entry.content;
        self.cache.record(&record, read_bytes);
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
        let file = self.next_number;
        let (path, is_folder, known, stat) = (path.to_string(), false, None, None);
        self.begin(Begun { path, mode, is_folder, parts: 1, known, stat }).await?;
        self.meter.done(size.into());
        self.meter.read(size.into(), size.into());
        let held = Held { file, first_page: 0, pages: (hashes.len() / 8) as u32, at: 0 };
        let (usage, holds, chunk) = (FrameUse::Small, vec![held], self.cache.chunk(&hashes));
        self.packed(Packed { usage, frame, hashes: hashes.clone(), holds }).await?;
        let (state, doubts, reused) = (PartState::Whole, Vec::new(), Vec::new());
        let part = Part { file, part: 0, bytes: size, state, hashes, chunk, doubts, reused };
        self.read(vec![part]).await
    }

    /// Seals the last frames, then the last maps, then the table: each needs the addresses of the one before.
    pub async fn finish(mut self) -> Result<Assembled> {
        self.relieve().await?;
        self.relieve().await?;
        let waits = !self.files.is_empty() || !self.unsealed.is_empty() || !self.waiting.is_empty();
        if waits {
            return Err(Error::new(Kind::Bug, "a frame of a snapshot was never sealed"));
        }
        let entries = std::mem::take(&mut self.entries);
        let files = entries.count();
        let shared = self.write_table(entries).await?;
        let table: Vec<BytesRef> = shared.iter().map(|part| part.place.clone()).collect();
        table.iter().try_for_each(|part| self.usage.mark_bytes(part))?;
        let sealed = self.packs.into_sealed();
        let stored_bytes = sealed.packs.iter().map(|pack| pack.size).sum();
        let (mut epochs, mut packs) = (sealed.epochs, sealed.packs);
        packs.retain_mut(|entry| self.usage.settle(entry));
        if let Some(parent) = &self.parent {
            parent.add_packs(&mut self.usage, &mut epochs, &mut packs)?;
        }
        self.leftover.add_packs(&mut self.usage, &mut epochs, &mut packs);
        if let Some(pack) = self.usage.rest() {
            let reason = format!("pack {pack} is neither new, nor the parent's, nor left over");
            return Err(Error::new(Kind::Bug, reason));
        }
        let (bytes, doubts) = (self.bytes, self.doubts);
        Ok(Assembled { table, shared, epochs, packs, stored_bytes, files, bytes, doubts })
    }

    /// Writes those parts of the table that the parent does not have.
    async fn write_table(&mut self, entries: Entries) -> Result<Vec<SharedPart>> {
        enum At {
            There(BytesRef),
            New(Vec<Piece>),
        }
        let mut frames = Loose::new(FrameUse::Table, self.reading.level);
        let mut parts = Vec::new();
        for part in entries.into_parts() {
            let hash = *blake3::hash(&part).as_bytes();
            let there = self.parent.as_ref().and_then(|parent| parent.table_part(&hash));
            let at = match there {
                Some(there) => At::There(there.clone()),
                None => {
                    let pieces = frames.write(&mut self.packs, &part).await?;
                    frames.flush(&mut self.packs).await?;
                    At::New(pieces)
                }
            };
            if self.packs.is_full() {
                self.packs.seal().await?;
            }
            parts.push((hash, at));
        }
        self.packs.seal().await?;
        self.packs.settle().await?;
        let unsealed = || Error::new(Kind::Bug, "the file table was never sealed");
        let place = |at: At| match at {
            At::There(place) => Ok(place),
            At::New(pieces) => Piece::resolve(&pieces).ok_or_else(unsealed),
        };
        parts
            .into_iter()
            .map(|(hash, at)| place(at).map(|place| SharedPart { hash, place }))
            .collect()
    }
}

#[cfg(test)]
mod tests;
