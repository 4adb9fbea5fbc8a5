//! What is known of a location, or of several together, when it is judged.

use crate::condemned::Condemned;
use crate::id::{Branch, SnapshotId, SystemId};
use crate::lease::{self, Lease};
use crate::line::Past;
use crate::lsn::LsnRange;
use crate::name::ObjectName;
use crate::pin::PinRecord;
use crate::segment::Ancestor;
use crate::snapshot::{Begin, ManifestPlain};
use jiff::Timestamp;
use std::collections::BTreeMap;

/// One listed object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When it was stored, at the earliest of the locations that are known to hold it, by the store's clock.
    pub stored: Timestamp,
    /// In bytes.
    pub size: u64,
}

/// Everything that a judgement is made from. It must be complete: every manifest, `begin`, origin, pin and lease that is
/// listed has been read, or nothing may be judged.
#[derive(Clone, Debug)]
pub struct View {
    pub system: SystemId,
    /// By the store's clock.
    pub now: Timestamp,
    /// All objects of the system.
    pub objects: BTreeMap<ObjectName, Seen>,
    /// Of every listed manifest.
    pub manifests: BTreeMap<SnapshotId, ManifestPlain>,
    /// Of every listed `begin` without a manifest.
    pub begins: BTreeMap<SnapshotId, Begin>,
    /// Of every listed origin; oldest first.
    pub ancestors: BTreeMap<Branch, Vec<Ancestor>>,
    /// When a branch was last said to be complete, for a server that writes nothing.
    pub heard: BTreeMap<Branch, Timestamp>,
    /// By name; of each pin the last one counts.
    pub pins: BTreeMap<ObjectName, PinRecord>,
    pub condemned: BTreeMap<ObjectName, Condemned>,
    /// Every listed lease.
    pub leases: Vec<Lease>,
}

/// Whether a snapshot may be what the window begins with. A committed manifest is; one with damaged pages is not, until the
/// damage is acknowledged. A record
/// that it has been verified, or was found wanting, is to be asked for here.
pub fn is_trusted(plain: &ManifestPlain) -> bool {
    plain.corrupt_pages == 0
}

impl View {
    /// With nothing in it.
    pub fn empty(system: SystemId, now: Timestamp) -> View {
        View {
            system,
            now,
            objects: BTreeMap::new(),
            manifests: BTreeMap::new(),
            begins: BTreeMap::new(),
            ancestors: BTreeMap::new(),
            heard: BTreeMap::new(),
            pins: BTreeMap::new(),
            condemned: BTreeMap::new(),
            leases: Vec::new(),
        }
    }

    /// All locations as if they were one. What is condemned is each location's own, and left out.
    pub fn union(views: &[View]) -> Option<View> {
        let first = views.first()?;
        let mut union = View::empty(first.system, first.now);
        for view in views {
            union.now = union.now.min(view.now);
            for (name, seen) in &view.objects {
                if matches!(name, ObjectName::Condemned { .. }) {
                    continue;
                }
                let known = union.objects.entry(name.clone()).or_insert(*seen);
                known.stored = known.stored.min(seen.stored);
            }
            union.manifests.extend(view.manifests.iter().map(|(id, plain)| (*id, plain.clone())));
            union.begins.extend(view.begins.iter().map(|(id, begin)| (*id, begin.clone())));
            union.ancestors.extend(view.ancestors.iter().map(|(b, past)| (*b, past.clone())));
            for (branch, at) in &view.heard {
                let heard = union.heard.entry(*branch).or_insert(*at);
                *heard = (*heard).max(*at);
            }
            union.pins.extend(view.pins.iter().map(|(name, pin)| (name.clone(), pin.clone())));
            union.leases.extend(view.leases.iter().cloned());
        }
        union.begins.retain(|id, _| !union.manifests.contains_key(id));
        Some(union)
    }

    /// Takes over when each object was first stored anywhere.
    pub fn date_by(&mut self, union: &View) {
        for (name, seen) in &mut self.objects {
            if let Some(first) = union.objects.get(name) {
                seen.stored = seen.stored.min(first.stored);
            }
        }
    }

    /// Whether the snapshot was begun when its agent no longer held the lease: nobody restores it.
    pub(super) fn is_superseded(&self, plain: &ManifestPlain) -> bool {
        lease::is_superseded(plain.snapshot, plain.generation, &self.leases)
    }

    /// The least generation of a listed snapshot, be it finished or not.
    pub(super) fn oldest_generation(&self) -> Option<u64> {
        let manifests = self.manifests.values().map(|plain| plain.generation);
        manifests.chain(self.begins.values().map(|begin| begin.generation)).min()
    }

    /// The listed WAL of each branch, sorted by range.
    pub(super) fn wal(&self) -> BTreeMap<Branch, Vec<LsnRange>> {
        let mut wal: BTreeMap<Branch, Vec<LsnRange>> = BTreeMap::new();
        for name in self.objects.keys() {
            if let ObjectName::Wal { branch, range, .. } = name {
                wal.entry(*branch).or_default().push(*range);
            }
        }
        wal.values_mut().for_each(|ranges| ranges.sort_unstable());
        wal
    }

    /// Every branch of which anything is known, with what is stored of it.
    pub(super) fn pasts(&self) -> BTreeMap<Branch, Past> {
        let mut pasts: BTreeMap<Branch, Past> = BTreeMap::new();
        for (&branch, ancestors) in &self.ancestors {
            pasts.entry(branch).or_default().ancestors = ancestors.clone();
        }
        for (branch, ranges) in self.wal() {
            let covered = crate::catalog::cover::merged(ranges.into_iter());
            pasts.entry(branch).or_default().covered = covered;
        }
        for plain in self.manifests.values() {
            pasts.entry(plain.branch).or_default();
        }
        pasts
    }

    /// When a snapshot ended, and not before: the later of what it says and when its manifest was stored.
    pub fn ended(&self, plain: &ManifestPlain) -> Timestamp {
        let (system, snapshot) = (self.system, plain.snapshot);
        let said = Timestamp::from_second(plain.finished).unwrap_or(snapshot.began());
        let stored = self.objects.get(&ObjectName::Manifest { system, snapshot });
        stored.map_or(said, |seen| said.max(seen.stored))
    }

    /// Of each pin the record that counts, by the name of its object.
    pub fn newest_pins(&self) -> impl Iterator<Item = (&ObjectName, &PinRecord)> {
        let mut pins = self.pins.iter().peekable();
        std::iter::from_fn(move || {
            loop {
                let (name, record) = pins.next()?;
                let is_same = |other: &ObjectName| match (name, other) {
                    (ObjectName::Pin { pin: a, .. }, ObjectName::Pin { pin: b, .. }) => a == b,
                    _ => false,
                };
                if !pins.peek().is_some_and(|(next, _)| is_same(next)) {
                    return Some((name, record));
                }
            }
        })
    }
}
