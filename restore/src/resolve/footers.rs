//! Footers of stored WAL: from indexes where those answer for many at once, else from the objects themselves.
//!
//! An entry of an index counts only for an object that the catalog knows by exactly its range, id and size; what no index
//! tells, or only one that cannot be read, is read from the objects, one by one. So the answers are the same with
//! indexes and without, and only the number of requests differs.

use super::reach::Stretch;
use crate::wal_source::WalSource;
use backstay_common::catalog::WalEntry;
use backstay_common::id::{Branch, ObjectId};
use backstay_common::lsn::LsnRange;
use backstay_common::name::ObjectName;
use backstay_common::span::SpanMeta;
use backstay_common::walindex::WalIndex;
use backstay_common::walindex::blocks::choose;
use futures::StreamExt;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

/// An index is read if it spares the footers of so many objects.
const WORTH: usize = 4;
/// Indexes that are read at once: up to 64 MiB each.
const INDEXES_AT_ONCE: usize = 4;

/// What has been read so far. Safe to use from many tasks at once.
#[derive(Debug, Default)]
pub(super) struct Footers {
    known: Mutex<HashMap<ObjectId, Arc<SpanMeta>>>,
    /// Indexes that were asked, whether or not they could be read.
    asked: Mutex<HashSet<ObjectId>>,
}

impl Footers {
    pub(super) fn get(&self, id: ObjectId) -> Option<Arc<SpanMeta>> {
        self.known().get(&id).cloned()
    }

    /// What is kept from now on: the first that was said of an object.
    pub(super) fn keep(&self, id: ObjectId, meta: SpanMeta) -> Arc<SpanMeta> {
        self.known().entry(id).or_insert_with(|| Arc::new(meta)).clone()
    }

    /// Reads the indexes that answer for many of `stretches` whose footers are not known yet. A damaged one is asked
    /// once, and then those that it would have replaced.
    pub(super) async fn ask_indexes(&self, source: &WalSource, stretches: &[Stretch]) {
        loop {
            let chosen = self.choose(source, stretches);
            if chosen.is_empty() {
                return;
            }
            let reads = chosen.into_iter().map(|(branch, index)| self.ask(source, branch, index));
            futures::stream::iter(reads).buffer_unordered(INDEXES_AT_ONCE).collect::<()>().await;
        }
    }

    fn choose(&self, source: &WalSource, stretches: &[Stretch]) -> Vec<(Branch, WalEntry)> {
        let mut unknown: BTreeMap<Branch, Vec<LsnRange>> = BTreeMap::new();
        {
            let known = self.known();
            let objects = stretches.iter().filter_map(|s| Some((s.branch, s.object?)));
            for (branch, entry) in objects.filter(|(_, entry)| !known.contains_key(&entry.id)) {
                unknown.entry(branch).or_default().push(entry.range);
            }
        }
        let asked = self.asked.lock().expect("no panic while held");
        let mut chosen = Vec::new();
        for (branch, mut wanted) in unknown {
            let Some(entry) = source.catalog().branches.get(&branch) else { continue };
            let fresh: Vec<WalEntry> =
                entry.indexes.iter().filter(|index| !asked.contains(&index.id)).copied().collect();
            wanted.sort_unstable();
            let best = choose(&fresh, &wanted, WORTH);
            chosen.extend(best.into_iter().map(|index| (branch, index)));
        }
        chosen
    }

    async fn ask(&self, source: &WalSource, branch: Branch, index: WalEntry) {
        let system = source.catalog().system;
        let name = ObjectName::WalIndex { system, branch, range: index.range, id: index.id };
        let read = source.access().read(&name, index.places, WalIndex::open).await;
        self.asked.lock().expect("no panic while held").insert(index.id);
        match read {
            Ok(read) => self.believe(source, branch, read),
            Err(error) => tracing::debug!(%error, "footers are read one by one"),
        }
    }

    fn believe(&self, source: &WalSource, branch: Branch, index: WalIndex) {
        let Some(stored) = source.catalog().branches.get(&branch) else { return };
        let mut known = self.known();
        for entry in index.into_entries() {
            let is_listed =
                stored.find(entry.range(), entry.id).is_some_and(|at| at.size == entry.size);
            if is_listed {
                known.entry(entry.id).or_insert_with(|| Arc::new(entry.meta));
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<ObjectId, Arc<SpanMeta>>> {
        self.known.lock().expect("no panic while held")
    }
}

#[cfg(test)]
mod tests;
