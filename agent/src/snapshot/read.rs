//! Readers: threads that turn jobs into frames. Positional reads, page checksums, page hashes, zstd.
//!
//! A file is read up to the size that it had when it was found. Pages that are appended later, or
//! changed while they are read, come right in replay: PostgreSQL logs them whole while the backup runs. A file that
//! became shorter ends where it ends now, and one that vanished is left out: the log says why.
//!
//! What arrived over the network can't be read again: a page that is wrong is a doubt at once.
//!
//! The page cache stays the database's: what a read brings into it is dropped again (`aside`).
//!
//! A page that equals the parent's is not held to its checksum again, unless the parent's was wrong.

mod aside;

use super::assemble::{Doubt, Message, Part, PartState};
use super::cache::{CacheWriter, Known};
use super::cut::{Job, SMALL_BELOW, SmallFile, SmallSource, Source, Stretch};
use super::diff::{self, Differ};
use super::leftover::Leftover;
use super::overlay::Stored;
use super::pace::Pace;
use super::progress::Meter;
use super::walk::unreadable;
use aside::read_full;
use backstay_common::lsn::Lsn;
use backstay_common::page::{self, PageState};
use backstay_common::seal::{FRAME_BYTES_MAX, Frame, Packer};
use backstay_common::snapshot::{page_hash, page_hashes};
use backstay_common::{Context, Error, Result};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

/// How often a page with a wrong checksum is read again before it is called damaged.
const READS_AGAIN_MAX: u32 = 5;
const READ_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// What readers need to know.
#[derive(Clone, Debug)]
pub struct Reading {
    pub page_bytes: u32,
    /// Pages in one segment of a relation.
    pub segment_pages: u32,
    pub checksums: bool,
    /// Where the backup's WAL starts.
    pub start: Lsn,
    pub hash_key: [u8; 32],
    /// zstd's.
    pub level: i32,
}

/// One reader.
#[derive(Debug)]
pub struct Reader {
    reading: Arc<Reading>,
    meter: Arc<Meter>,
    cache: Arc<CacheWriter>,
    leftover: Arc<Leftover>,
    pace: Arc<Pace>,
    differ: Differ,
    buffer: Vec<u8>,
}

impl Reader {
    pub fn new(
        reading: Arc<Reading>,
        meter: Arc<Meter>,
        cache: Arc<CacheWriter>,
        leftover: Arc<Leftover>,
        pace: Arc<Pace>,
        messages: mpsc::Sender<Message>,
    ) -> Result<Reader> {
        let differ = Differ::new(&reading, messages)?;
        let buffer = vec![0; FRAME_BYTES_MAX];
        Ok(Reader { reading, meter, cache, leftover, pace, differ, buffer })
    }

    /// Works until there are no more jobs, or nobody wants what becomes of them. Blocks.
    pub fn work(mut self, jobs: &Mutex<Receiver<Job>>) {
        loop {
            let job = jobs.lock().expect("no panic while held").recv();
            let Ok(job) = job else { return };
            if let Err(error) = self.job(job) {
                // Nobody listens if the snapshot has been given up.
                let _ = self.differ.send(Message::Failed(error));
                return;
            }
        }
    }

    fn job(&mut self, job: Job) -> Result<()> {
        let parts = match job {
            Job::Stretch(stretch) => self
                .stretch(&stretch)
                .map_err(|e| e.context(format_args!("read {}", stretch.file.path)))?,
            Job::Bundle(files) => {
                self.bundle(&files).map_err(|e| e.context("read a small file"))?
            }
        };
        self.differ.flush()?;
        self.differ.send(Message::Read(parts))
    }

    fn stretch(&mut self, stretch: &Stretch) -> Result<Vec<Part>> {
        stretch.parts.clone().map(|part| self.part(stretch, part)).collect()
    }

    fn part(&mut self, stretch: &Stretch, part: u32) -> Result<Part> {
        let file = &stretch.file;
        let part_pages = super::part_pages(self.reading.page_bytes);
        let part_bytes = (part_pages * self.reading.page_bytes) as usize;
        let first = part * part_pages;
        let offset = u64::from(first) * u64::from(self.reading.page_bytes);
        let whole = (self.buffer.len() as u64).min(file.bytes - offset) as usize;
        let buffer = &mut self.buffer[..whole];
        let (handle, read) = match &stretch.source {
            Source::Disk(handle) => {
                self.pace.wait(whole as u64, || self.differ.is_wanted());
                let read = read_full(handle, buffer, offset).context("its pages")?;
                (Some(&**handle), read)
            }
            Source::Arrived(bytes) => {
                let behind = (part - stretch.parts.start) as usize * part_bytes;
                (None, arrived(&bytes[behind.min(bytes.len())..], buffer))
            }
        };
        let pages = Pages { file: handle, offset, segment: file.segment };
        let plain = &mut self.buffer[..read];
        let known = file.known.as_deref();
        let compared = compare(&self.reading, plain, &pages, known, part)?;
        let Compared { hashes, changed, changed_bytes, doubts } = compared;
        let (reused, changed) = self.reuse(&file.path, first, &hashes, changed)?;
        let (file, plain) = (file.number, &self.buffer[..read]);
        self.differ.run(diff::Pages { file, first, plain, hashes: &hashes }, &changed)?;
        self.meter.done(whole as u64);
        self.meter.read(read as u64, changed_bytes);
        let state = if read == whole { PartState::Whole } else { PartState::Short };
        let (bytes, chunk) = (read as u32, self.cache.chunk(&hashes));
        Ok(Part { file, part, bytes, state, hashes, chunk, doubts, reused })
    }

    /// What of the changed pages an interrupted snapshot has stored, and which are still to be stored. Where most are, the run
    /// is stored whole.
    fn reuse(
        &self,
        path: &str,
        first: u32,
        hashes: &[u8],
        changed: Vec<bool>,
    ) -> Result<(Vec<Stored>, Vec<bool>)> {
        let mut rest = changed.clone();
        let reused = self.leftover.find(path, first, hashes, &mut rest)?;
        if reused.is_empty() || diff::is_image(&rest) {
            return Ok((Vec::new(), changed));
        }
        let pages: u64 = reused.iter().map(|stored| u64::from(stored.pages)).sum();
        self.leftover.count(pages * u64::from(self.reading.page_bytes));
        Ok((reused, rest))
    }

    fn bundle(&mut self, files: &[SmallFile]) -> Result<Vec<Part>> {
        files.iter().map(|file| self.small(file)).collect()
    }

    fn small(&mut self, small: &SmallFile) -> Result<Part> {
        self.meter.done(small.bytes as u64);
        let number = small.number;
        debug_assert!((small.bytes as u64) < SMALL_BELOW);
        let buffer = &mut self.buffer[..small.bytes];
        let (file, bytes) = match &small.source {
            SmallSource::Disk(path) => match File::open(path) {
                Ok(file) => {
                    self.pace.wait(small.bytes as u64, || self.differ.is_wanted());
                    let read = read_full(&file, buffer, 0).map_err(|e| unreadable(path, e))?;
                    (Some(file), read)
                }
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Part::vanished(number)),
                Err(e) => return Err(unreadable(path, e)),
            },
            SmallSource::Arrived(bytes) => (None, arrived(bytes, buffer)),
        };
        let pages = Pages { file: file.as_ref(), offset: 0, segment: small.segment };
        let plain = &mut self.buffer[..bytes];
        let known = small.known.as_deref();
        let compared = compare(&self.reading, plain, &pages, known, 0)?;
        let Compared { hashes, changed, changed_bytes, doubts } = compared;
        self.meter.read(bytes as u64, changed_bytes);
        let is_same = known.is_some_and(|known| known.record.size == bytes as u64);
        let mut reused = Vec::new();
        if bytes > 0 && (!is_same || changed.contains(&true)) {
            reused = self.leftover.find(&small.path, 0, &hashes, &mut vec![true; changed.len()])?;
            // It is all there, in order, or it is stored again.
            if reused.len() == 1 && reused[0].pages as usize == changed.len() {
                self.leftover.count(bytes as u64);
            } else {
                reused.clear();
                let plain = &self.buffer[..bytes];
                self.differ.small(diff::Pages {
                    file: number,
                    first: 0,
                    plain,
                    hashes: &hashes,
                })?;
            }
        }
        let state = if bytes == small.bytes { PartState::Whole } else { PartState::Short };
        let (bytes, chunk) = (bytes as u32, self.cache.chunk(&hashes));
        Ok(Part { file: number, part: 0, bytes, state, hashes, chunk, doubts, reused })
    }
}

/// What a part of a file is, beside what the parent has of it.
struct Compared {
    hashes: Vec<u8>,
    /// For each page, whether it is to be stored.
    changed: Vec<bool>,
    /// Of the pages that differ from the parent's.
    changed_bytes: u64,
    doubts: Vec<Doubt>,
}

/// Hashes the pages, and holds those to their checksums that are not known to be right.
fn compare(
    reading: &Reading,
    plain: &mut [u8],
    pages: &Pages<'_>,
    known: Option<&Known>,
    part: u32,
) -> Result<Compared> {
    let mut hashes = reading.hash(plain);
    let old = known.map_or_else(|| Ok(Vec::new()), |known| known.hashes(part))?;
    let first = part * super::part_pages(reading.page_bytes);
    let is_sound = |n: usize| {
        let is_same = old.as_chunks::<8>().0.get(n) == hashes.as_chunks::<8>().0.get(n);
        is_same && known.is_some_and(|known| known.is_sound(first + n as u32))
    };
    let judged = reading.judge(plain, pages, &is_sound).context("a page again")?;
    for n in judged.read_again {
        let page_bytes = reading.page_bytes as usize;
        let page = &plain[n * page_bytes..][..page_bytes];
        hashes[n * 8..][..8].copy_from_slice(&page_hash(&reading.hash_key, page));
    }
    let changed = diff::changed(known, part, &old, &hashes);
    let pages = plain.chunks(reading.page_bytes as usize).zip(hashes.as_chunks::<8>().0);
    let differs =
        pages.enumerate().filter(|(n, (_, hash))| old.as_chunks().0.get(*n) != Some(hash));
    let changed_bytes = differs.map(|(_, (page, _))| page.len() as u64).sum();
    Ok(Compared { hashes, changed, changed_bytes, doubts: judged.doubts })
}

/// A file's bytes as one frame, for what is not read by a job.
pub fn pack_whole(reading: &Reading, plain: &[u8]) -> Result<(Frame, Vec<u8>)> {
    let hashes = reading.hash(plain);
    Ok((Frame::pack(&mut Packer::new(reading.level)?, plain)?, hashes))
}

/// Where the pages in a buffer come from.
struct Pages<'a> {
    /// None if they cannot be read again.
    file: Option<&'a File>,
    /// Of the first, in the file.
    offset: u64,
    /// For a relation: which segment of the fork the file is.
    segment: Option<u32>,
}

impl Reading {
    fn hash(&self, file: &[u8]) -> Vec<u8> {
        let mut hashes = Vec::new();
        page_hashes(&self.hash_key, file, self.page_bytes as usize, &mut hashes);
        hashes.into_flattened()
    }

    /// Checks the checksums of a relation's pages but those that are known to be sound, and reads again those that are
    /// wrong. What stays wrong is kept and reported.
    fn judge(
        &self,
        plain: &mut [u8],
        pages: &Pages<'_>,
        is_sound: &dyn Fn(usize) -> bool,
    ) -> io::Result<Judged> {
        let (true, Some(segment)) = (self.checksums, pages.segment) else {
            return Ok(Judged::default());
        };
        let page_bytes = self.page_bytes as usize;
        let first = pages.offset / page_bytes as u64;
        let block = |n: usize| {
            segment.wrapping_mul(self.segment_pages).wrapping_add(first as u32 + n as u32)
        };
        let (mut doubts, mut wrong) = (Vec::new(), Vec::new());
        let mut judge = |n: usize, page: &[u8]| match page::verify(page, block(n), self.start) {
            PageState::Valid | PageState::New => true,
            PageState::TornOk => {
                let page_number = first as u32 + n as u32;
                let newer = Some(page::page_lsn(page));
                doubts.push(Doubt { page: page_number, block: block(n), newer });
                true
            }
            PageState::Mismatch { .. } => false,
        };
        for (n, page) in plain.chunks_exact(page_bytes).enumerate() {
            if !is_sound(n) && !judge(n, page) {
                wrong.push(n);
            }
        }
        let read_again = wrong.clone();
        for _ in 0..READS_AGAIN_MAX {
            let Some(file) = pages.file.filter(|_| !wrong.is_empty()) else { break };
            std::thread::sleep(READ_AGAIN_AFTER);
            let mut failed = None;
            wrong.retain(|&n| {
                let page = &mut plain[n * page_bytes..][..page_bytes];
                let offset = pages.offset + (n * page_bytes) as u64;
                match reread(file, page, offset) {
                    Ok(true) => !judge(n, page),
                    // The file is shorter by now: the page is gone, and replay knows.
                    Ok(false) => false,
                    Err(e) => {
                        failed = Some(e);
                        true
                    }
                }
            });
            failed.map_or(Ok(()), Err)?;
        }
        let damaged =
            |n: usize| Doubt { page: first as u32 + n as u32, block: block(n), newer: None };
        doubts.extend(wrong.into_iter().map(damaged));
        Ok(Judged { doubts, read_again })
    }
}

/// What became of the pages of a buffer.
#[derive(Debug, Default)]
struct Judged {
    doubts: Vec<Doubt>,
    /// Pages that may have changed in the buffer.
    read_again: Vec<usize>,
}

/// Takes what fits from what arrived; how much.
fn arrived(bytes: &[u8], buffer: &mut [u8]) -> usize {
    let taken = bytes.len().min(buffer.len());
    buffer[..taken].copy_from_slice(&bytes[..taken]);
    taken
}

/// Reads one page again; false, and the page as it was, if it is not there any more.
fn reread(file: &File, page: &mut [u8], offset: u64) -> io::Result<bool> {
    let mut again = vec![0; page.len()];
    let whole = read_full(file, &mut again, offset)? == page.len();
    if whole {
        page.copy_from_slice(&again);
    }
    Ok(whole)
}

/// Reads `global/pg_control` whole; its own checksum says that it is.
pub fn control(data_dir: &Path) -> Result<(backstay_common::control::ControlFile, Vec<u8>), Error> {
    backstay_common::control::read_with_bytes(&data_dir.join(super::walk::CONTROL_PATH))
}

#[cfg(test)]
mod tests;
