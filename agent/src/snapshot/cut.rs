//! Cuts what the walk finds into jobs for the readers: big files into stretches, small files into bundles. What is known to
//! be unchanged without being read becomes no job at all.
//!
//! The assembler is told of each file before any job of it can be done.

pub mod arriving;

use super::assemble::{Begun, Message, Part, PartState};
use super::cache::{CacheWriter, Known};
use super::parent::Parent;
use super::progress::Meter;
use super::walk::{self, Found, Tree, What, unreadable};
use backstay_common::{Error, Kind, Result};
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use tokio::sync::mpsc;

/// Files below this share frames.
pub const SMALL_BELOW: u64 = 64 << 10;
const BUNDLE_FILES_MAX: usize = 1024;
/// A bundle is read at the latest when so many parts came after its first file: what waits for it is bounded.
const BUNDLE_WAITS_MAX: u32 = 1024;
/// Parts of one file that one reader reads in a row, so that the pages that changed fill frames: 64 MiB.
const STRETCH_PARTS: u32 = 64;

/// Something to read.
#[derive(Debug)]
pub enum Job {
    Stretch(Stretch),
    Bundle(Vec<SmallFile>),
}

/// Parts of one file, in order.
#[derive(Debug)]
pub struct Stretch {
    pub file: Arc<OpenFile>,
    pub parts: Range<u32>,
    pub source: Source,
}

/// Where a stretch's bytes are.
#[derive(Debug)]
pub enum Source {
    Disk(Arc<File>),
    /// Here: those of its parts, and nowhere else.
    Arrived(Vec<u8>),
}

/// A file that is read by several readers at once.
#[derive(Debug)]
pub struct OpenFile {
    pub number: u64,
    pub path: String,
    /// When it was found.
    pub bytes: u64,
    pub segment: Option<u32>,
    pub known: Option<Arc<Known>>,
}

/// A file that is read whole.
#[derive(Debug)]
pub struct SmallFile {
    pub number: u64,
    pub path: String,
    pub source: SmallSource,
    pub bytes: usize,
    pub segment: Option<u32>,
    pub known: Option<Arc<Known>>,
}

/// Where a small file's bytes are.
#[derive(Debug)]
pub enum SmallSource {
    Disk(PathBuf),
    Arrived(Vec<u8>),
}

/// What the cutter gives to, and takes from.
#[derive(Debug)]
pub struct Links {
    pub jobs: SyncSender<Job>,
    pub messages: mpsc::Sender<Message>,
    pub parent: Option<Arc<Parent>>,
    pub cache: Arc<CacheWriter>,
    pub meter: Arc<Meter>,
    pub page_bytes: u32,
}

/// The files in order, and what is to be done with them.
#[derive(Debug)]
pub struct Cutter {
    links: Links,
    part_bytes: u64,
    next_number: u64,
    bundle: Vec<SmallFile>,
    parts_since: u32,
}

impl Cutter {
    pub fn new(links: Links) -> Cutter {
        let part_bytes = part_bytes(links.page_bytes);
        Cutter { links, part_bytes, next_number: 0, bundle: Vec::new(), parts_since: 0 }
    }

    /// Cuts all of `tree`; a fault goes to the assembler. Blocks.
    pub fn cut(mut self, tree: &Tree) {
        let done = walk::walk(tree, &mut |found| self.found(found)).and_then(|()| self.flush());
        if let Err(error) = done {
            // Nobody listens if the snapshot has been given up.
            let _ = self.links.messages.blocking_send(Message::Failed(error));
        }
    }

    fn found(&mut self, found: Found) -> Result<()> {
        let What::File { size, segment, .. } = found.what else {
            return self.begin(&found, 0, None).map(drop);
        };
        if size == 0 {
            return self.begin(&found, 0, None).map(drop);
        }
        let known = match &self.links.parent {
            Some(parent) => parent.known(&found.path)?.map(Arc::new),
            None => None,
        };
        match known {
            Some(known) if self.may_skip(&found, &known) => self.skip(&found, known),
            known if size < SMALL_BELOW => self.small(found, size, segment, known),
            known => self.big(found, size, segment, known),
        }
    }

    fn may_skip(&self, found: &Found, known: &Known) -> bool {
        let (What::File { stat, .. }, Some(then)) = (found.what, known.record.stat) else {
            return false;
        };
        let parent = self.links.parent.as_ref();
        parent.is_some_and(|parent| parent.may_skip(stat.device, &found.source))
            && known.is_fresh()
            && known.record.doubts.is_empty()
            && stat.is_unchanged_since(&then)
    }

    /// Takes over what the parent has, without reading.
    fn skip(&mut self, found: &Found, known: Arc<Known>) -> Result<()> {
        let size = known.record.size;
        let number = self.begin(found, known.parts(), Some(known.clone()))?;
        let skipped = |part| {
            let hashes = known.hashes(part)?;
            let bytes = (size - u64::from(part) * self.part_bytes).min(self.part_bytes) as u32;
            let (state, chunk) = (PartState::Skipped, self.links.cache.chunk(&hashes));
            let (doubts, reused) = (Vec::new(), Vec::new());
            Ok(Part { file: number, part, bytes, state, hashes, chunk, doubts, reused })
        };
        for first in (0..known.parts()).step_by(STRETCH_PARTS as usize) {
            let parts = first..known.parts().min(first + STRETCH_PARTS);
            let parts = parts.map(skipped).collect::<Result<Vec<Part>>>()?;
            self.links.messages.blocking_send(Message::Read(parts)).map_err(|_| given_up())?;
        }
        self.links.meter.done(size);
        Ok(())
    }

    fn begin(&mut self, found: &Found, parts: u32, known: Option<Arc<Known>>) -> Result<u64> {
        let number = self.next_number;
        self.next_number += 1;
        let stat = match found.what {
            What::File { stat, .. } => Some(stat),
            What::Folder => None,
        };
        let (path, mode) = (found.path.clone(), found.mode);
        let is_folder = found.what == What::Folder;
        let begun = Begun { path, mode, is_folder, parts, known, stat };
        self.links.messages.blocking_send(Message::Begun(begun)).map_err(|_| given_up())?;
        Ok(number)
    }

    fn small(
        &mut self,
        found: Found,
        size: u64,
        segment: Option<u32>,
        known: Option<Arc<Known>>,
    ) -> Result<()> {
        if self.bundle.len() == BUNDLE_FILES_MAX {
            self.flush()?;
        }
        let number = self.begin(&found, 1, known.clone())?;
        let (source, bytes) = (SmallSource::Disk(found.source), size as usize);
        self.bundle.push(SmallFile { number, path: found.path, source, bytes, segment, known });
        Ok(())
    }

    fn big(
        &mut self,
        found: Found,
        size: u64,
        segment: Option<u32>,
        known: Option<Arc<Known>>,
    ) -> Result<()> {
        let handle = match File::open(&found.source) {
            Ok(handle) => handle,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(unreadable(&found.source, e)),
        };
        let parts = u32::try_from(size.div_ceil(self.part_bytes)).map_err(|_| {
            Error::new(Kind::Local, format!("{} is too large", found.source.display()))
        })?;
        let number = self.begin(&found, parts, known.clone())?;
        let (path, bytes) = (found.path, size);
        let file = Arc::new(OpenFile { number, path, bytes, segment, known });
        let handle = Arc::new(handle);
        for first in (0..parts).step_by(STRETCH_PARTS as usize) {
            let parts = first..parts.min(first + STRETCH_PARTS);
            self.parts_since += parts.len() as u32;
            let source = Source::Disk(handle.clone());
            self.give(Job::Stretch(Stretch { file: file.clone(), parts, source }))?;
            if self.parts_since >= BUNDLE_WAITS_MAX {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.parts_since = 0;
        match std::mem::take(&mut self.bundle) {
            bundle if bundle.is_empty() => Ok(()),
            bundle => self.give(Job::Bundle(bundle)),
        }
    }

    fn give(&self, job: Job) -> Result<()> {
        self.links.jobs.send(job).map_err(|_| given_up())
    }
}

fn part_bytes(page_bytes: u32) -> u64 {
    u64::from(super::part_pages(page_bytes)) * u64::from(page_bytes)
}

fn given_up() -> Error {
    Error::new(Kind::Cancelled, "the snapshot was given up")
}
