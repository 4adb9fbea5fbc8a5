//! The WAL of a restore: any range of any branch, from whichever object and location has it whole.
//!
//! Every byte given out has passed its authentication tag, or lies in the `pg_wal` of the damaged server
//! (`--wal-from`) inside the range whose records were checked when the plan was made. Several objects may cover one
//! range; one that cannot be read anywhere is passed over if others cover its place, also others that were stored
//! meanwhile.

mod later;
pub mod local;

use crate::access::Access;
use backstay_common::catalog::{Catalog, WalEntry, cover};
use backstay_common::id::{Branch, ObjectId};
use backstay_common::lsn::{Lsn, LsnRange, SPAN_BYTES};
use backstay_common::name::ObjectName;
use backstay_common::span::WalObject;
use backstay_common::{Error, Kind, Result, pool};
use later::{LISTINGS_MAX, Later};
use local::LocalWal;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use tokio::sync::OnceCell;

/// Opened objects that are kept, because segments are often smaller than spans; each is at most a sealed span.
const OBJECTS_KEPT: usize = 6;

/// Reads WAL. Safe to use from many tasks at once, which then share what they fetch.
#[derive(Debug)]
pub struct WalSource {
    access: Access,
    catalog: Arc<Catalog>,
    later: Later,
    local: Option<LocalWal>,
    kept: Mutex<VecDeque<(ObjectId, Kept)>>,
    /// Objects that no location has whole, with the reason.
    spoilt: Mutex<HashMap<ObjectId, (Kind, String)>>,
}

type Kept = Arc<OnceCell<Arc<WalObject>>>;

impl WalSource {
    pub fn new(access: Access, catalog: Arc<Catalog>, local: Option<LocalWal>) -> WalSource {
        let (kept, spoilt) = (Mutex::default(), Mutex::default());
        WalSource { access, catalog, later: Later::default(), local, kept, spoilt }
    }

    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    pub fn access(&self) -> &Access {
        &self.access
    }

    /// The WAL of `range`, which should be of a segment's size or so: it is held in memory. A byte that is nowhere is
    /// [`Kind::Missing`], and the error names its place; an object that is damaged everywhere is named. Safe to drop.
    pub async fn read(&self, branch: Branch, range: LsnRange) -> Result<Vec<u8>> {
        let mut wal = Vec::with_capacity(range.len() as usize);
        let (mut at, mut listings) = (range.start, 0);
        while at < range.end {
            let rest = LsnRange::new(at, range.end);
            let Some(entry) = self.next(branch, rest) else {
                listings += 1;
                if listings <= LISTINGS_MAX && self.find_later(branch, rest).await {
                    continue;
                }
                wal.extend_from_slice(&self.read_local(branch, rest).await?);
                return Ok(wal);
            };
            let part = LsnRange::new(at, entry.range.end.min(range.end));
            match self.object(branch, &entry).await {
                Ok(object) => {
                    wal.extend_from_slice(&pool::run(move || object.part(part)).await??);
                    at = part.end;
                }
                // Only what is wrong with the object itself can be mended by another object.
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Missing) => {
                    let reason = (error.kind(), error.message().to_string());
                    self.spoilt().insert(entry.id, reason);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(wal)
    }

    /// The object to read next: it holds the first byte of `wanted`.
    fn next(&self, branch: Branch, wanted: LsnRange) -> Option<WalEntry> {
        let entries = self.usable(branch);
        cover::covering(&entries, wanted).first().copied()
    }

    /// The stored objects of a branch, sorted by range, but those that are known to be good nowhere.
    pub fn usable(&self, branch: Branch) -> Vec<WalEntry> {
        let spoilt = self.spoilt();
        let entries = self.catalog.branches.get(&branch).map(|entry| &entry.wal[..]);
        let mut entries = entries.unwrap_or_default().to_vec();
        let later = self.later.of(branch);
        if !later.is_empty() {
            entries.extend(later);
            entries.sort_by_key(|entry| (entry.range, entry.id));
        }
        entries.retain(|entry| !spoilt.contains_key(&entry.id));
        entries
    }

    /// Why no location has the object that holds `lsn`, if that is known.
    fn why_spoilt(&self, branch: Branch, lsn: Lsn) -> Option<(Kind, String)> {
        let entries = &self.catalog.branches.get(&branch)?.wal;
        let spoilt = self.spoilt();
        entries.iter().filter(|e| e.range.contains(lsn)).find_map(|e| spoilt.get(&e.id).cloned())
    }

    /// Looks for what was stored in place of an object that has gone since it was listed. True if something holds the start of
    /// `wanted` now.
    async fn find_later(&self, branch: Branch, wanted: LsnRange) -> bool {
        let is_gone = || {
            let why = self.why_spoilt(branch, wanted.start);
            why.is_some_and(|(kind, _)| kind == Kind::Missing)
        };
        if !is_gone() {
            return false;
        }
        let _turn = self.later.turn().await;
        if self.next(branch, wanted).is_none() {
            self.later.list(&self.access, branch, wanted).await;
        }
        self.next(branch, wanted).is_some()
    }

    /// Records that no location has this object whole. True if other objects cover all of its place.
    pub(crate) async fn pass_over(&self, branch: Branch, entry: &WalEntry, error: &Error) -> bool {
        self.spoilt().insert(entry.id, (error.kind(), error.message().to_string()));
        for _ in 0..LISTINGS_MAX {
            let entries = self.usable(branch);
            let covering = cover::covering(&entries, entry.range);
            let at = covering.last().map_or(entry.range.start, |last| last.range.end);
            if at >= entry.range.end {
                return true;
            }
            if !self.find_later(branch, LsnRange::new(at, entry.range.end)).await {
                return false;
            }
        }
        false
    }

    fn spoilt(&self) -> std::sync::MutexGuard<'_, HashMap<ObjectId, (Kind, String)>> {
        self.spoilt.lock().expect("no panic while held")
    }

    pub(crate) fn name(&self, branch: Branch, entry: &WalEntry) -> ObjectName {
        let (system, range, id) = (self.catalog.system, entry.range, entry.id);
        ObjectName::Wal { system, branch, range, id }
    }

    async fn object(&self, branch: Branch, entry: &WalEntry) -> Result<Arc<WalObject>> {
        let cell = self.cell(entry.id);
        let name = self.name(branch, entry);
        let open = || async {
            let object = self.access.read(&name, entry.places, WalObject::open).await?;
            Ok(Arc::new(object))
        };
        cell.get_or_try_init(open).await.cloned()
    }

    /// The place of one object among those that are kept; the least recently used one goes.
    fn cell(&self, id: ObjectId) -> Kept {
        let mut kept = self.kept.lock().expect("no panic while held");
        let found = kept.iter().position(|(other, _)| *other == id);
        let cell = found.and_then(|at| kept.remove(at)).map(|(_, cell)| cell).unwrap_or_default();
        kept.push_back((id, cell.clone()));
        if kept.len() > OBJECTS_KEPT {
            kept.pop_front();
        }
        cell
    }

    async fn read_local(&self, branch: Branch, range: LsnRange) -> Result<Vec<u8>> {
        assert!(range.len() <= 1 << 30, "{range} is read piecewise");
        let local = self.local.clone().filter(|local| local.branch == branch);
        let found = match local {
            Some(local) => pool::run(move || local.read(range)).await??,
            None => None,
        };
        found.ok_or_else(|| match self.why_spoilt(branch, range.start) {
            Some((kind, reason)) => Error::new(kind, reason)
                .remedy("bring back a location that has it whole, or choose a moment before it"),
            None => Error::new(
                Kind::Missing,
                format!(
                    "no location that answers has the WAL from {} on branch {branch}",
                    range.start
                ),
            ),
        })
    }
}

/// Cuts a range so that no piece is longer than a span.
pub(crate) fn pieces(range: LsnRange) -> impl Iterator<Item = LsnRange> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let piece = LsnRange::new(at, at.add(SPAN_BYTES).min(range.end));
        at = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests;
