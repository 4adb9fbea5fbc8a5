//! What snapshots that were interrupted have stored, so that the next one does not store it again.
//!
//! ```text
//! <system>.packs in the state directory:  begun │ pack │ pack … begun │ pack …      one record each
//! ```
//!
//! While a snapshot is taken each sealed pack is noted there: what it takes to open it, and which pages of which files are in
//! its frames, with their hashes. A snapshot that is committed removes the file. One that was interrupted leaves it, and the
//! next one reads every page anew as always; where a page has the hash that is noted for its place, it refers to the frame.
//!
//! What always holds: only packs are used that a location lists with their size, of snapshots that were begun so recently
//! ([`USED_FOR`]) that their `begin` keeps prune from them until the new manifest does. A record carries a hash of itself;
//! the file counts up to the first that is damaged or cut off. Nothing depends on it: without it, all is stored again.
//! In memory there are 32 bytes for each run of pages, at most [`RUNS_MAX`] runs; the hashes stay in the file.

mod journal;
mod record;

pub use journal::Journal;
pub use record::{Begun, FrameNote, PackNote, RunNote};

use super::cache::path_hash;
use super::overlay::Stored;
use super::usage::Usage;
use crate::writer::Writer;
use backstay_common::id::{EpochId, ObjectId, SnapshotId, SystemId};
use backstay_common::name::{ObjectName, folder};
use backstay_common::seal::FRAME_BYTES_MAX;
use backstay_common::snapshot::{FrameRef, PackEntry};
use backstay_common::{Context, Result};
use futures::FutureExt;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How old a `begin` may be for its packs to be used. It keeps them for a week, and they need to be kept until the new
/// snapshot is committed.
const USED_FOR: Duration = Duration::from_secs(3 * 86_400);
/// Longer ago nobody takes the snapshot for a running one in any case.
const REMEMBERED_FOR: Duration = Duration::from_secs(8 * 86_400);
/// Runs of pages that are known at most: a TiB of whole frames. What is beyond is stored again.
const RUNS_MAX: usize = 1 << 20;

/// What there is to be used. Empty after a snapshot that was committed.
#[derive(Debug, Default)]
pub struct Leftover {
    /// The snapshots that were begun and not committed.
    pub abandoned: Vec<SnapshotId>,
    /// None if nothing is left.
    file: Option<File>,
    page_bytes: u32,
    /// In the order of files and pages.
    runs: Vec<KnownRun>,
    frames: Vec<FrameRef>,
    packs: HashMap<ObjectId, (EpochId, PackEntry)>,
    used_bytes: AtomicU64,
}

/// Pages of one file, one behind the other in a frame.
#[derive(Clone, Copy, Debug)]
struct KnownRun {
    path: u64,
    first_page: u32,
    pages: u32,
    /// Index of the frame.
    frame: u32,
    /// Where the first page lies in the frame's plain bytes.
    at: u32,
    /// Where the hashes are in the file.
    hashes_at: u64,
}

impl Leftover {
    /// Finds frames for those pages that are wanted, from `first_page` of the file on, `hashes` being theirs. What is found
    /// is no longer wanted.
    pub fn find(
        &self,
        path: &str,
        first_page: u32,
        hashes: &[u8],
        wanted: &mut [bool],
    ) -> Result<Vec<Stored>> {
        let Some(file) = self.file.as_ref().filter(|_| wanted.contains(&true)) else {
            return Ok(Vec::new());
        };
        let hashes = hashes.as_chunks::<8>().0;
        let end = first_page + hashes.len() as u32;
        let mut found: Vec<Option<(u32, u32)>> = vec![None; hashes.len()];
        for run in self.near(path_hash(path), first_page, end) {
            let from = run.first_page.max(first_page);
            let until = (run.first_page + run.pages).min(end);
            if from >= until {
                continue;
            }
            let skipped = from - run.first_page;
            let mut noted = vec![0; (until - from) as usize * 8];
            let doing = "read what was noted of an interrupted snapshot";
            file.read_exact_at(&mut noted, run.hashes_at + u64::from(skipped) * 8)
                .context(doing)?;
            for (page, noted) in (from..until).zip(noted.as_chunks::<8>().0) {
                let n = (page - first_page) as usize;
                if wanted[n] && hashes[n] == *noted {
                    wanted[n] = false;
                    found[n] =
                        Some((run.frame, run.at + (page - run.first_page) * self.page_bytes));
                }
            }
        }
        Ok(self.stored(first_page, &found))
    }

    /// All runs that may touch these pages. None is longer than a frame.
    fn near(&self, path: u64, first_page: u32, end: u32) -> impl Iterator<Item = &KnownRun> {
        let longest = FRAME_BYTES_MAX as u32 / self.page_bytes;
        let from = (path, first_page.saturating_sub(longest));
        let start = self.runs.partition_point(|run| (run.path, run.first_page) < from);
        self.runs[start..].iter().take_while(move |run| run.path == path && run.first_page < end)
    }

    fn stored(&self, first_page: u32, found: &[Option<(u32, u32)>]) -> Vec<Stored> {
        let mut stored: Vec<Stored> = Vec::new();
        let mut before = None;
        for (page, found) in (first_page..).zip(found) {
            match (found, before) {
                (Some((frame, at)), Some((last_frame, last_at)))
                    if *frame == last_frame && *at == last_at + self.page_bytes =>
                {
                    stored.last_mut().expect("the page before is in it").pages += 1;
                }
                (Some((frame, at)), _) => {
                    let frame = self.frames[*frame as usize];
                    stored.push(Stored { first_page: page, pages: 1, frame, at: *at });
                }
                (None, _) => {}
            }
            before = *found;
        }
        stored
    }

    /// Counts what was not stored again.
    pub fn count(&self, bytes: u64) {
        self.used_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many packs can be used.
    pub fn packs(&self) -> usize {
        self.packs.len()
    }

    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Adds those packs that the new snapshot uses, with their epochs.
    pub fn add_packs(
        &self,
        usage: &mut Usage,
        epochs: &mut Vec<EpochId>,
        packs: &mut Vec<PackEntry>,
    ) {
        for (epoch, entry) in self.packs.values() {
            let mut entry = entry.clone();
            if usage.settle(&mut entry) {
                add_pack(*epoch, entry, epochs, packs);
            }
        }
    }

    fn add(&mut self, note: PackNote, mut hashes_at: u64) {
        let id = note.entry.id();
        self.packs.insert(id, (note.epoch, note.entry));
        for frame in note.frames {
            let index = self.frames.len() as u32;
            self.frames.push(frame.frame);
            for run in frame.runs {
                let path = note.paths.get(run.path as usize).map_or(0, |path| path_hash(path));
                let RunNote { first_page, pages, at, .. } = run;
                if self.runs.len() < RUNS_MAX {
                    let frame = index;
                    self.runs.push(KnownRun { path, first_page, pages, frame, at, hashes_at });
                }
                hashes_at += u64::from(pages) * 8;
            }
        }
    }
}

/// Adds a pack of an older snapshot to a list.
pub fn add_pack(
    epoch: EpochId,
    mut entry: PackEntry,
    epochs: &mut Vec<EpochId>,
    packs: &mut Vec<PackEntry>,
) {
    let at = epochs.iter().position(|known| *known == epoch);
    entry.epoch = at.unwrap_or(epochs.len()) as u32;
    if at.is_none() {
        epochs.push(epoch);
    }
    packs.push(entry);
}

/// Packs by id with their size, that locations list.
pub type Listed = BTreeSet<(ObjectId, u64)>;

/// The packs that the locations list. One that does not answer lists none.
pub async fn listed(writers: &[Arc<Writer>], system: SystemId) -> Listed {
    let packs = folder::packs(system);
    let lists = writers.iter().map(|writer| writer.location().list(&packs).boxed());
    let lists = futures::future::join_all(lists).await;
    let id = |listed: backstay_common::location::Listed| match listed.name {
        Some(ObjectName::Pack { id, .. }) => Some((id, listed.size)),
        _ => None,
    };
    lists.into_iter().flatten().flatten().filter_map(id).collect()
}
