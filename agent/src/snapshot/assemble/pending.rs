//! Files of which parts are to come, and pages whose checksums are wrong.

use super::super::cache::{FileStat, Known};
use super::super::overlay::Stored;
use super::super::pack::Place;
use backstay_common::lsn::Lsn;
use backstay_common::snapshot::FileDigest;
use backstay_common::snapshot::manifest::CorruptPage;
use std::collections::BTreeMap;
use std::sync::Arc;

/// More are counted, but not named.
const NAMED_PAGES_MAX: usize = 10_000;

/// The next file or folder; they are numbered from 0.
#[derive(Debug)]
pub struct Begun {
    pub path: String,
    /// Unix permission bits.
    pub mode: u32,
    pub is_folder: bool,
    /// How many parts will come of it: of [`super::super::part_pages`] each, the last may be shorter.
    pub parts: u32,
    /// As the parent has it.
    pub known: Option<Arc<Known>>,
    /// What the file system said before it is read. Absent where that is not known.
    pub stat: Option<FileStat>,
}

/// Pages of one file in a frame.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub file: u64,
    pub first_page: u32,
    pub pages: u32,
    /// Where the first lies in the frame's plain bytes.
    pub at: u32,
}

/// A part of one file. The pages of it that no frame holds are as the parent has them.
#[derive(Debug)]
pub struct Part {
    pub file: u64,
    /// Which part of the file.
    pub part: u32,
    pub bytes: u32,
    pub state: PartState,
    /// Of all its pages, eight bytes each.
    pub hashes: Vec<u8>,
    /// Where they are in the new cache.
    pub chunk: u64,
    pub doubts: Vec<Doubt>,
    /// Pages that an interrupted snapshot has stored, in its frames.
    pub reused: Vec<Stored>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartState {
    /// All that was expected was read.
    Whole,
    /// The parent has it, and the file system says that it did not change.
    Skipped,
    /// The file ends here, before it should.
    Short,
    /// The file is not there any more.
    Vanished,
}

impl Part {
    /// Of a file of one part that is not there any more.
    pub fn vanished(file: u64) -> Part {
        let (state, hashes) = (PartState::Vanished, Vec::new());
        let (doubts, reused) = (Vec::new(), Vec::new());
        Part { file, part: 0, bytes: 0, state, hashes, chunk: 0, doubts, reused }
    }
}

/// A page whose checksum is wrong.
#[derive(Clone, Copy, Debug)]
pub struct Doubt {
    /// In the file.
    pub page: u32,
    /// In the fork.
    pub block: u32,
    /// The page claims to be changed here, after the backup began: if that is true, replay repairs it. None if it
    /// claims nothing, and stays wrong.
    pub newer: Option<Lsn>,
}

/// A file that waits for its parts, then for its frames.
#[derive(Debug)]
pub struct Pending {
    pub begun: Begun,
    pub size: u64,
    pub digest: FileDigest,
    /// What was stored of it.
    pub held: Vec<(Place, Held)>,
    /// What an interrupted snapshot stored of it.
    pub reused: Vec<Stored>,
    /// Where the hashes of its parts are in the new cache.
    pub chunks: Vec<u64>,
    pub doubts: Vec<Doubt>,
    pub has_vanished: bool,
    next_part: u32,
    early: BTreeMap<u32, Part>,
    has_ended: bool,
}

impl Pending {
    pub fn new(begun: Begun) -> Pending {
        Pending {
            begun,
            size: 0,
            digest: FileDigest::new(),
            held: Vec::new(),
            reused: Vec::new(),
            chunks: Vec::new(),
            doubts: Vec::new(),
            has_vanished: false,
            next_part: 0,
            early: BTreeMap::new(),
            has_ended: false,
        }
    }

    pub fn is_complete(&self) -> bool {
        self.next_part == self.begun.parts
    }

    /// Takes a part, and those that waited for it. What lies behind the file's end is dropped.
    pub fn take(&mut self, part: Part) {
        self.early.insert(part.part, part);
        while let Some(part) = self.early.remove(&self.next_part) {
            self.next_part += 1;
            if !self.has_ended && part.bytes > 0 {
                self.digest.push(part.hashes.as_chunks().0);
                self.size += u64::from(part.bytes);
                self.chunks.push(part.chunk);
                self.doubts.extend(part.doubts);
                self.reused.extend(part.reused);
            }
            match part.state {
                PartState::Whole => {}
                PartState::Short => self.has_ended = true,
                PartState::Vanished => self.has_vanished = true,
                PartState::Skipped => {
                    // It was last read when the parent, or one before it, was taken.
                    let then = self.begun.known.as_ref().and_then(|known| known.record.stat);
                    self.begun.stat = then;
                }
            }
        }
    }

    /// Where its frames are that the parent does not have; none until all are sealed.
    pub fn stored(&self) -> Option<Vec<Stored>> {
        let stored = |(place, held): &(Place, Held)| {
            let Held { first_page, pages, at, .. } = *held;
            Some(Stored { first_page, pages, frame: place.frame()?, at })
        };
        let reused = self.reused.iter().map(|stored| Some(*stored));
        self.held.iter().map(stored).chain(reused).collect()
    }
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

impl Doubts {
    pub fn note(&mut self, page: CorruptPage, newer: Option<Lsn>) {
        match newer {
            Some(lsn) if self.newer.len() < NAMED_PAGES_MAX => self.newer.push((page, lsn)),
            Some(_) => {}
            None => self.add(page),
        }
    }

    fn add(&mut self, page: CorruptPage) {
        self.corrupt_count += 1;
        if self.corrupt.len() < NAMED_PAGES_MAX {
            self.corrupt.push(page);
        }
    }

    /// All that are named, for a judge with better evidence than what the pages claim.
    pub fn take_named(&mut self) -> Vec<CorruptPage> {
        let newer = std::mem::take(&mut self.newer).into_iter().map(|(page, _)| page);
        let corrupt = std::mem::take(&mut self.corrupt);
        self.corrupt_count -= corrupt.len() as u64;
        corrupt.into_iter().chain(newer).collect()
    }

    /// Adds those that were found to be damaged, by file and block.
    pub fn add_damaged(&mut self, mut pages: Vec<CorruptPage>) {
        pages.sort_by(|a, b| (&a.path, a.block).cmp(&(&b.path, b.block)));
        pages.into_iter().for_each(|page| self.add(page));
    }

    /// Pages that claim to be changed after the backup ended were not: they are damaged.
    pub fn judge(&mut self, stop: Lsn) {
        let newer = std::mem::take(&mut self.newer);
        newer.into_iter().filter(|(_, lsn)| *lsn > stop).for_each(|(page, _)| self.add(page));
    }
}
