//! What is in the locations, once listed.
//!
//! Nothing here has been opened: names and sizes only. Equal names are equal bytes in every location, so the
//! listings of all locations are one union, and each object has the set of places where it is. That WAL has no
//! hole can be seen from this alone ([`cover`]): indexes of WAL ([`crate::walindex`]) are listed like everything else, and
//! never stand for what they name.
//!
//! A location that cannot be listed is reported in [`Catalog::unreachable`], and the others go on.

pub mod cover;
mod sharded;

use crate::id::{AgentName, Branch, LocationName, ObjectId, SnapshotId, SystemId};
use crate::location::{Listed, Location};
use crate::lsn::LsnRange;
use crate::name::{ObjectName, folder};
use crate::{Error, Kind, Result};
use std::collections::BTreeMap;

/// A set of locations, by their place in the list that the catalog was loaded from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Places(u64);

/// No more locations than this can be told apart.
pub const LOCATIONS_MAX: usize = 64;

impl Places {
    /// Every one of `count` locations.
    pub fn all(count: usize) -> Places {
        (0..count).fold(Places::default(), |places, index| places.with(index))
    }

    pub fn with(self, index: usize) -> Places {
        assert!(index < LOCATIONS_MAX, "location {index}");
        Places(self.0 | 1 << index)
    }

    pub fn union(self, other: Places) -> Places {
        Places(self.0 | other.0)
    }

    pub fn contains(self, index: usize) -> bool {
        index < LOCATIONS_MAX && self.0 & 1 << index != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The indexes, in order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..LOCATIONS_MAX).filter(move |&index| self.contains(index))
    }
}

/// A span or a piece of one branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalEntry {
    pub range: LsnRange,
    pub id: ObjectId,
    /// Bytes of the stored object.
    pub size: u64,
    pub places: Places,
}

/// What is stored of one branch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BranchEntry {
    /// Where its origin is.
    pub origin: Places,
    /// Sorted by range, then id.
    pub wal: Vec<WalEntry>,
    /// Indexes of it, sorted likewise. They may name what is gone, and lack what is there.
    pub indexes: Vec<WalEntry>,
}

impl BranchEntry {
    /// The object that is stored under exactly this range and id.
    pub fn find(&self, range: LsnRange, id: ObjectId) -> Option<&WalEntry> {
        let at = self.wal.binary_search_by_key(&(range, id), |entry| (entry.range, entry.id));
        at.ok().map(|at| &self.wal[at])
    }

    /// The stored ranges: sorted, disjoint, and with a hole between any two.
    pub fn covered(&self) -> Vec<LsnRange> {
        cover::merged(self.wal.iter().map(|entry| entry.range))
    }
}

/// What is stored of one snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Where it has been begun.
    pub begin: Places,
    /// Where it is complete.
    pub manifest: Places,
}

/// The union of the listings of all locations.
#[derive(Clone, Debug)]
pub struct Catalog {
    pub system: SystemId,
    /// What [`Places`] index.
    pub locations: Vec<LocationName>,
    /// Locations that could not be listed, with the reason.
    pub unreachable: Vec<(LocationName, String)>,
    pub branches: BTreeMap<Branch, BranchEntry>,
    pub snapshots: BTreeMap<SnapshotId, SnapshotEntry>,
    pub heads: BTreeMap<AgentName, BTreeMap<u64, Places>>,
    /// Of each pin the last record, which counts, and where it is.
    pub pins: BTreeMap<ObjectId, (u64, Places)>,
    pub leases: BTreeMap<u64, Places>,
    /// By branch, range and id.
    pub gaps: BTreeMap<(Branch, LsnRange, ObjectId), Places>,
}

impl Catalog {
    /// Lists all `locations` at once. Fails only if none can be listed. Safe to drop.
    pub async fn load(locations: &[Location], system: SystemId) -> Result<Catalog> {
        assert!(locations.len() <= LOCATIONS_MAX, "{} locations", locations.len());
        let listings = locations.iter().map(|location| listing(location, system));
        let listings = futures::future::join_all(listings).await;
        let mut catalog = Catalog::empty(system, locations.iter().map(|l| l.name().clone()));
        let (mut wal, mut indexes) = (WalByName::new(), WalByName::new());
        for (index, listed) in listings.into_iter().enumerate() {
            match listed {
                Ok(listed) => {
                    listed.iter().for_each(|l| catalog.add(index, l, &mut wal, &mut indexes))
                }
                Err(error) => {
                    let name = catalog.locations[index].clone();
                    catalog.unreachable.push((name, error.message().to_string()));
                }
            }
        }
        if catalog.unreachable.len() == locations.len() {
            return Err(none_reachable(&catalog.unreachable));
        }
        for ((branch, range, id), (size, places)) in wal {
            let entry = WalEntry { range, id, size, places };
            catalog.branches.entry(branch).or_default().wal.push(entry);
        }
        for ((branch, range, id), (size, places)) in indexes {
            // What is left of a branch without WAL says nothing.
            if let Some(entry) = catalog.branches.get_mut(&branch) {
                entry.indexes.push(WalEntry { range, id, size, places });
            }
        }
        Ok(catalog)
    }

    /// With nothing in it.
    pub fn empty(system: SystemId, locations: impl Iterator<Item = LocationName>) -> Catalog {
        Catalog {
            system,
            locations: locations.collect(),
            unreachable: Vec::new(),
            branches: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            heads: BTreeMap::new(),
            pins: BTreeMap::new(),
            leases: BTreeMap::new(),
            gaps: BTreeMap::new(),
        }
    }

    /// The names of `places`.
    pub fn names(&self, places: Places) -> Vec<LocationName> {
        places.iter().filter_map(|index| self.locations.get(index).cloned()).collect()
    }

    fn add(&mut self, index: usize, listed: &Listed, wal: &mut WalByName, indexes: &mut WalByName) {
        let here = Places::default().with(index);
        let join = |places: &mut Places| *places = places.union(here);
        match &listed.name {
            Some(ObjectName::Wal { branch, range, id, .. }) => {
                join(&mut wal.entry((*branch, *range, *id)).or_insert((listed.size, here)).1);
            }
            Some(ObjectName::WalIndex { branch, range, id, .. }) => {
                join(&mut indexes.entry((*branch, *range, *id)).or_insert((listed.size, here)).1);
            }
            Some(ObjectName::Origin { branch, .. }) => {
                join(&mut self.branches.entry(*branch).or_default().origin);
            }
            Some(ObjectName::Begin { snapshot, .. }) => {
                join(&mut self.snapshots.entry(*snapshot).or_default().begin);
            }
            Some(ObjectName::Manifest { snapshot, .. }) => {
                join(&mut self.snapshots.entry(*snapshot).or_default().manifest);
            }
            Some(ObjectName::Head { agent, seq, .. }) => {
                join(self.heads.entry(agent.clone()).or_default().entry(*seq).or_default());
            }
            Some(ObjectName::Pin { pin, seq, .. }) => {
                let last = self.pins.entry(*pin).or_insert((*seq, here));
                match seq.cmp(&last.0) {
                    std::cmp::Ordering::Less => {}
                    std::cmp::Ordering::Equal => join(&mut last.1),
                    std::cmp::Ordering::Greater => *last = (*seq, here),
                }
            }
            Some(ObjectName::Lease { generation, .. }) => {
                join(self.leases.entry(*generation).or_default());
            }
            Some(ObjectName::Gap { branch, range, id, .. }) => {
                join(self.gaps.entry((*branch, *range, *id)).or_default());
            }
            _ => {}
        }
    }
}

type WalByName = BTreeMap<(Branch, LsnRange, ObjectId), (u64, Places)>;

async fn listing(location: &Location, system: SystemId) -> Result<Vec<Listed>> {
    let folders = [
        folder::snapshots(system),
        folder::heads(system),
        folder::walindexes(system),
        folder::pins(system),
        folder::leases(system),
        folder::gaps(system),
    ];
    let others = futures::future::try_join_all(folders.iter().map(|f| location.list(f)));
    let (mut listed, others) = futures::try_join!(sharded::wal(location, system), others)?;
    listed.extend(others.into_iter().flatten());
    Ok(listed)
}

/// What to say when no location answers.
pub fn none_reachable(reasons: &[(LocationName, String)]) -> Error {
    let list: String = reasons.iter().map(|(name, why)| format!("\n  {name}: {why}")).collect();
    Error::new(Kind::Storage, format!("no location can be read:{list}"))
        .remedy("mount it, correct its url or credentials, or see that it can be reached")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::location::LocationSettings;
    use crate::lsn::Lsn;
    use bytes::Bytes;

    const SYSTEM: SystemId = SystemId::new(7);

    fn wal_name(start: u64, end: u64, id: u8) -> ObjectName {
        ObjectName::Wal {
            system: SYSTEM,
            branch: "00000001-01020304".parse().unwrap(),
            range: LsnRange::new(Lsn::new(start), Lsn::new(end)),
            id: ObjectId::from_bytes([id; 8]),
        }
    }

    async fn location(folder: &tempfile::TempDir, name: &str, objects: &[ObjectName]) -> Location {
        let root = folder.path().join(name);
        let url = format!("file://{}", root.display());
        let location = Location::open(&LocationSettings::new(name.parse().unwrap(), url)).unwrap();
        std::fs::create_dir(&root).unwrap();
        for name in objects {
            location.put(name, Bytes::from_static(b"listed, never opened")).await.unwrap();
        }
        location
    }

    #[tokio::test]
    async fn the_catalog_is_the_union_and_knows_who_has_what() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two, three) = (wal_name(0, 8, 1), wal_name(8, 16, 2), wal_name(24, 32, 3));
        let a = location(&folder, "a", &[one.clone(), two.clone()]).await;
        let b = location(&folder, "b", &[two, three]).await;
        let gone = location(&folder, "gone", &[]).await;
        std::fs::remove_dir(folder.path().join("gone")).unwrap();
        let catalog = Catalog::load(&[a, b, gone.clone()], SYSTEM).await.unwrap();
        let entry = catalog.branches.values().next().unwrap();
        let places: Vec<Vec<usize>> = entry.wal.iter().map(|e| e.places.iter().collect()).collect();
        assert_eq!(places, [vec![0], vec![0, 1], vec![1]]);
        let ranges: Vec<String> = entry.covered().iter().map(ToString::to_string).collect();
        assert_eq!(ranges, ["0/0..0/10", "0/18..0/20"]);
        assert_eq!(catalog.unreachable.len(), 1);
        assert_eq!(catalog.unreachable[0].0.as_str(), "gone");
        let error = Catalog::load(&[gone], SYSTEM).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Storage);
        assert!(error.message().contains("gone"), "{error}");
    }
}
