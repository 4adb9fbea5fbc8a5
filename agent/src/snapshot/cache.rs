//! The page-hash cache: what the newest snapshot knows of each file, kept in the state directory as `<system>.pages`.
//!
//! ```text
//! magic │ chunks of page hashes, file maps, file records, as they come │ index │ footer │ three lengths │ BLAKE3
//! ```
//!
//! It belongs to one snapshot, and is used only if that is the parent. It is written as `.new` while the snapshot is
//! assembled, synced, and renamed when the snapshot is committed somewhere; a crash leaves `.new`, which is looked at too.
//! The BLAKE3 at its end finds truncation and garbage; the footer says whose it is. Anything wrong means: no cache.
//! In memory there are 16 bytes for each file; everything else is read where it lies.

mod record;
mod wear;
mod writer;

pub use record::{DoubtRecord, FileRecord, FileStat, SharedPart, Summary};
pub use wear::path_hash;
pub use writer::CacheWriter;

use backstay_common::cbor;
use backstay_common::id::{ObjectId, SystemId};
use backstay_common::snapshot::{Content, FileMap, Run};
use backstay_common::{Context, Error, Kind, Result};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use wear::Wear;

const MAGIC: &[u8; 8] = b"BSPAGES1";
const HASH_BYTES: usize = 32;
/// Place and number of the index, length of the footer: a `u64` each.
const LENGTHS_BYTES: usize = 24;
/// More than any footer: a table of a thousand million files is cut into fewer parts.
const FOOTER_BYTES_MAX: u64 = 256 << 20;
/// What is read at once of a record; most are shorter.
const RECORD_GUESS: usize = 1024;
/// More than the record of a file of 32 TiB.
const RECORD_BYTES_MAX: usize = 512 << 20;

/// Where the cache of `system` is.
pub fn path_of(state_dir: &Path, system: SystemId) -> PathBuf {
    state_dir.join(format!("{system}.pages"))
}

/// A fingerprint of the key of page hashes: hashes under another key say nothing.
pub fn fingerprint(hash_key: &[u8; 32]) -> [u8; 32] {
    *blake3::keyed_hash(hash_key, b"backstay 2026-11-22 v1 page-hash cache").as_bytes()
}

/// A cache that was found whole.
#[derive(Debug)]
pub struct Cache {
    file: File,
    pub summary: Summary,
    index: HashMap<u64, Entry>,
    /// Packs whose frames are stored again, wherever they are used.
    pub worn_packs: HashSet<ObjectId>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    at: u64,
    /// The file is stored again whole.
    again: bool,
}

impl Cache {
    /// Reads it through once. The error says what is wrong with it, for the log.
    pub fn open(path: &Path, worn_packs: HashSet<ObjectId>) -> Result<Cache> {
        let doing = || format!("read {}", path.display());
        let mut file = File::open(path).context(doing())?;
        let total = check(&mut file).context(doing())?;
        let wrong = || Error::new(Kind::Corrupt, "its end does not describe it").context(doing());
        let lengths_at =
            total.checked_sub((HASH_BYTES + LENGTHS_BYTES) as u64).ok_or_else(wrong)?;
        let lengths: [u8; LENGTHS_BYTES] = fixed(&file, lengths_at).context(doing())?;
        let word = |n: usize| u64::from_le_bytes(lengths[n * 8..][..8].try_into().expect("8"));
        let (index_at, entries, footer_bytes) = (word(0), word(1), word(2));
        let index_bytes = entries.checked_mul(wear::ENTRY_BYTES as u64).ok_or_else(wrong)?;
        let footer_at = index_at.checked_add(index_bytes).ok_or_else(wrong)?;
        if footer_at.checked_add(footer_bytes) != Some(lengths_at)
            || footer_bytes > FOOTER_BYTES_MAX
        {
            return Err(wrong());
        }
        let footer = bytes_at(&file, footer_at, footer_bytes as usize).context(doing())?;
        let summary: Summary = cbor::decode(&footer).context(doing())?;
        let index = bytes_at(&file, index_at, index_bytes as usize).context(doing())?;
        let wear = Wear::of(index.as_chunks().0);
        let entry = |line: &[u8; wear::ENTRY_BYTES]| {
            let line = wear::Line::decode(line);
            (line.path, Entry { at: line.at, again: wear.is_worn(&line) })
        };
        let index = index.as_chunks().0.iter().map(entry).collect();
        Ok(Cache { file, summary, index, worn_packs })
    }

    /// What is known of the file at `path`. None for one without any bytes.
    pub fn known(self: &Arc<Cache>, path: &str) -> Result<Option<Known>> {
        let Some(entry) = self.index.get(&wear::path_hash(path)) else { return Ok(None) };
        let record = self.record(entry.at).context("read the page-hash cache")?;
        if record.path != path {
            return Ok(None);
        }
        let mut known = Known { cache: self.clone(), record, again: entry.again, worn: Vec::new() };
        if !self.worn_packs.is_empty() && !entry.again {
            known.worn = known.worn_pages()?;
        }
        Ok(Some(known))
    }

    fn record(&self, at: u64) -> Result<FileRecord> {
        let mut start = vec![0; RECORD_GUESS];
        let read = read_some(&self.file, &mut start, at).context("a record")?;
        let wrong = || Error::new(Kind::Corrupt, "a file's record is not whole");
        let (length, rest) = start[..read].split_first_chunk().ok_or_else(wrong)?;
        let length = u32::from_le_bytes(*length) as usize;
        match rest.get(..length) {
            Some(record) => cbor::decode(record),
            None if length > RECORD_BYTES_MAX => Err(wrong()),
            None => cbor::decode(&bytes_at(&self.file, at + 4, length).context("a record")?),
        }
    }
}

/// One file, as the parent has it.
#[derive(Debug)]
pub struct Known {
    cache: Arc<Cache>,
    pub record: FileRecord,
    /// All of it is stored again, whether it changed or not.
    pub again: bool,
    /// Pages that are stored again because their packs are hardly in use.
    worn: Vec<Range<u32>>,
}

impl Known {
    pub fn page_bytes(&self) -> u32 {
        self.cache.summary.page_bytes
    }

    /// The hashes of the pages of one part, eight bytes each; none behind the end.
    pub fn hashes(&self, part: u32) -> Result<Vec<u8>> {
        let pages_each = super::part_pages(self.page_bytes());
        let pages = self.record.size.div_ceil(u64::from(self.page_bytes()));
        let before = u64::from(part) * u64::from(pages_each);
        let pages = pages.saturating_sub(before).min(u64::from(pages_each)) as usize;
        match self.record.chunks.get(part as usize) {
            Some(&at) if pages > 0 => {
                bytes_at(&self.cache.file, at, pages * 8).context("read the page-hash cache")
            }
            _ => Ok(Vec::new()),
        }
    }

    pub fn parts(&self) -> u32 {
        self.record.chunks.len() as u32
    }

    /// True if a page with the same hash need not be held to its checksum again: the parent's was right.
    pub fn is_sound(&self, page: u32) -> bool {
        self.cache.summary.judged && !self.record.doubts.iter().any(|doubt| doubt.page == page)
    }

    pub fn is_worn(&self, page: u32) -> bool {
        let after = self.worn.partition_point(|range| range.start <= page);
        after > 0 && self.worn[after - 1].contains(&page)
    }

    /// Nothing of it has to be stored again for another reason than a change.
    pub fn is_fresh(&self) -> bool {
        !self.again && self.worn.is_empty()
    }

    /// The encoded map, for a file that has one.
    pub fn map_bytes(&self) -> Result<Option<Vec<u8>>> {
        let Some(place) = self.record.map else { return Ok(None) };
        let bytes = bytes_at(&self.cache.file, place.at, place.bytes as usize);
        bytes.map(Some).context("read the page-hash cache")
    }

    /// Where the parent has each page.
    pub fn map(&self) -> Result<FileMap> {
        let page_bytes = self.page_bytes();
        match (&self.record.content, self.map_bytes()?) {
            (Content::Within { frame, at }, _) => {
                let pages = self.record.size.div_ceil(u64::from(page_bytes)) as u32;
                let runs = vec![Run { first_page: 0, pages, frame: 0, at: *at }];
                Ok(FileMap { frames: vec![*frame], runs })
            }
            (Content::Mapped(_), Some(bytes)) => {
                FileMap::decode(&bytes, self.record.size, page_bytes)
            }
            (Content::Mapped(_), None) => {
                Err(Error::new(Kind::Corrupt, "the page-hash cache lacks a file's map"))
            }
            (Content::Empty, _) => Ok(FileMap::default()),
        }
    }

    fn worn_pages(&self) -> Result<Vec<Range<u32>>> {
        let map = self.map()?;
        let is_worn =
            |run: &&Run| self.cache.worn_packs.contains(&map.frames[run.frame as usize].pack);
        let pages = |run: &Run| run.first_page..run.first_page + run.pages;
        Ok(map.runs.iter().filter(is_worn).map(pages).collect())
    }
}

/// Finds a cache whose bytes are not those that were written. Gives its length.
fn check(file: &mut File) -> Result<u64> {
    let total = file.metadata().context("look at it")?.len();
    let wrong = || Error::new(Kind::Corrupt, "it is damaged or was cut off");
    let body = total.checked_sub(HASH_BYTES as u64).ok_or_else(wrong)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let (mut left, mut is_first) = (body, true);
    while left > 0 {
        let now = buffer.len().min(left as usize);
        file.read_exact(&mut buffer[..now]).context("read it")?;
        if is_first && !buffer[..now].starts_with(MAGIC) {
            return Err(Error::new(Kind::Corrupt, "it is no page-hash cache of this version"));
        }
        hasher.update(&buffer[..now]);
        (left, is_first) = (left - now as u64, false);
    }
    let mut stated = [0; HASH_BYTES];
    file.read_exact(&mut stated).context("read it")?;
    match hasher.finalize() == stated {
        true => Ok(total),
        false => Err(wrong()),
    }
}

fn bytes_at(file: &File, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
    let mut read = vec![0; bytes];
    file.read_exact_at(&mut read, at)?;
    Ok(read)
}

fn fixed<const N: usize>(file: &File, at: u64) -> io::Result<[u8; N]> {
    let mut read = [0; N];
    file.read_exact_at(&mut read, at)?;
    Ok(read)
}

/// Up to as much as fits into `buffer`, less at the end.
fn read_some(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64)? {
            0 => break,
            read => done += read,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests;
