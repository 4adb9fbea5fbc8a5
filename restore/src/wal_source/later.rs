//! WAL that was stored after the catalog was listed, in place of some that has gone since.
//!
//! An agent that goes on while somebody restores stores longer objects in place of pieces, and deletes the pieces. So where an
//! object of the catalog is at no location any more, its span is listed again. What was listed first stays what a plan
//! is made from: the same WAL is read, from other objects.

use crate::access::Access;
use backstay_common::catalog::{Places, WalEntry};
use backstay_common::id::{Branch, ObjectId};
use backstay_common::lsn::LsnRange;
use backstay_common::name::{ObjectName, folder};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

/// So many times a span is listed again for one read: each time a longer object may have taken the place of another.
pub(super) const LISTINGS_MAX: u32 = 5;

/// What was found when spans were listed again.
#[derive(Debug, Default)]
pub(super) struct Later {
    found: Mutex<BTreeMap<Branch, Vec<WalEntry>>>,
    /// One listing at a time: many reads may miss the same object.
    turn: tokio::sync::Mutex<()>,
}

impl Later {
    /// Whoever holds it may list.
    pub(super) async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// What is known of a branch besides the catalog.
    pub(super) fn of(&self, branch: Branch) -> Vec<WalEntry> {
        self.found().get(&branch).cloned().unwrap_or_default()
    }

    /// Lists the span that holds the start of `wanted`, wherever that is possible, and keeps what touches `wanted`.
    pub(super) async fn list(&self, access: &Access, branch: Branch, wanted: LsnRange) {
        let listings = access.locations.iter().map(|location| async move {
            let start = wanted.start.span_start();
            let after = folder::branch_from(access.system, branch, start);
            let until = folder::branch_from(access.system, branch, wanted.start.next_span());
            let root = folder::branch(access.system, branch);
            location.list_between(&root, &after, Some(&until)).await
        });
        let mut objects: BTreeMap<(LsnRange, ObjectId), (u64, Places)> = BTreeMap::new();
        for (index, listed) in futures::future::join_all(listings).await.into_iter().enumerate() {
            for object in listed.unwrap_or_default() {
                let Some(ObjectName::Wal { range, id, .. }) = object.name else { continue };
                if range.start < wanted.end && wanted.start < range.end {
                    let known =
                        objects.entry((range, id)).or_insert((object.size, Places::default()));
                    known.1 = known.1.with(index);
                }
            }
        }
        let mut found = self.found();
        let known = found.entry(branch).or_default();
        for ((range, id), (size, places)) in objects {
            known.retain(|entry| (entry.range, entry.id) != (range, id));
            known.push(WalEntry { range, id, size, places });
        }
    }

    fn found(&self) -> MutexGuard<'_, BTreeMap<Branch, Vec<WalEntry>>> {
        self.found.lock().expect("no panic while held")
    }
}
