//! Makes the locations equal again: what one of them lacks is copied from another, byte for byte.
//!
//! Needed after an agent was killed between the writes to two locations, and after a location was away. Runs at start,
//! then every hour, never beside a snapshot. Copying keeps the order of the format (wraps, origins, packs and
//! WAL, manifests last), so that a manifest at a location still implies all that it needs; it checks each object's
//! BLAKE3 trailer and that it is what its name says, and needs no key.
//!
//! What is superfluous goes: pieces whose span is at the same location, which nobody remembers when the agent was
//! killed between the PUT of the span and their deletion. A name proves nothing: the span is read whole and opened first.

use crate::context::AgentContext;
use crate::prune::{self, System};
use backstay_common::id::{Branch, LocationName, ObjectId, SystemId};
use backstay_common::location::Location;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::{ObjectName, folder};
use backstay_common::seal::Header;
use backstay_common::span::WalObject;
use backstay_common::{Error, Kind, Result};
use futures::TryStreamExt;
use std::collections::{BTreeMap, BTreeSet};

/// Objects copied at the same time to one location; bounds memory to this many objects of at most 64 MiB.
const COPIES_MAX: usize = 3;

/// What one pass did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncReport {
    /// Objects copied to each location that lacked any.
    pub copied: BTreeMap<LocationName, u64>,
    /// Locations that could not be listed or written, with the reason.
    pub failed: Vec<(LocationName, String)>,
}

/// Lists all locations, and copies to each what another one has.
pub async fn run(context: &AgentContext) -> Result<SyncReport> {
    let mut report = SyncReport::default();
    synchronise(context, &context.systems.own(context).await, &mut report).await;
    for system in context.systems.others(context).await? {
        synchronise(context, &system, &mut report).await;
    }
    Ok(report)
}

/// One system, at the locations that take its backups.
async fn synchronise(context: &AgentContext, system: &System, report: &mut SyncReport) {
    let folder = &folder::system(system.id);
    let listings = futures::future::join_all(system.stores.iter().map(|store| async {
        let listed = list(store.writer.location(), folder).await;
        (store.writer.location().clone(), listed)
    }))
    .await;
    let mut present: Vec<(Location, BTreeSet<ObjectName>)> = Vec::new();
    for (location, listed) in listings {
        match listed {
            Ok(names) => present.push((location, names)),
            Err(error) => report.failed.push((location.name().clone(), error.message().into())),
        }
    }
    let mut all: BTreeSet<ObjectName> =
        present.iter().flat_map(|(_, names)| names).cloned().collect();
    if present.iter().any(|(_, names)| !missing(names, &all).concat().is_empty()) {
        // What one location has let go of does not come back from another that has it still.
        let unneeded = prune::unneeded(context, system).await;
        all.retain(|name| !unneeded.contains(name));
    }
    for (location, names) in &present {
        match copy_missing(location, names, &all, &present).await {
            // Of an earlier system prune deletes them.
            Ok(_) if system.id != context.system => {}
            Ok(0) => delete_superseded(context, location, names).await,
            Ok(count) => {
                tracing::info!(location = %location.name(), count, "copied objects that it lacked");
                *report.copied.entry(location.name().clone()).or_default() += count;
                if let Ok(names) = list(location, folder).await {
                    delete_superseded(context, location, &names).await;
                }
            }
            Err(error) => report.failed.push((location.name().clone(), error.message().into())),
        }
    }
}

/// Deletes pieces for which a longer object is whole at the same location. An identity that may not delete leaves them
/// to prune.
async fn delete_superseded(
    context: &AgentContext,
    location: &Location,
    names: &BTreeSet<ObjectName>,
) {
    let place = location.name().as_str();
    let mut damaged = None;
    for (longer, pieces) in superseded(names) {
        let deleted = async {
            prove(context, location, &longer).await?;
            location.delete(&pieces).await
        };
        match deleted.await {
            Ok(()) => {
                tracing::info!(location = place, count = pieces.len(), "deleted superseded pieces")
            }
            Err(error) if error.kind() == Kind::Corrupt => damaged = Some(error),
            Err(error) => tracing::debug!(%error, "superseded pieces are left"),
        }
    }
    match damaged {
        Some(error) => context.alarms.raise("object-damaged", place, error),
        None => context.alarms.clear("object-damaged", place),
    }
}

/// Reads and opens all of a WAL object.
async fn prove(context: &AgentContext, location: &Location, name: &ObjectName) -> Result<()> {
    let bytes = location.get(name).await?;
    let header = Header::check(&bytes, name)?;
    let keyring = context.epochs.keyring();
    let epoch = keyring.epoch(context.system, header.epoch(), location).await?;
    let name = name.clone();
    let opened = move || WalObject::open(bytes, &name, &epoch)?.wal().map(drop);
    tokio::task::spawn_blocking(opened)
        .await
        .unwrap_or_else(|_| Err(Error::new(Kind::Bug, "opening a WAL object panicked")))
}

/// For each WAL object whose range covers shorter ones those that it covers.
fn superseded(names: &BTreeSet<ObjectName>) -> Vec<(ObjectName, Vec<ObjectName>)> {
    let mut branches: BTreeMap<(SystemId, Branch), Vec<(LsnRange, ObjectId)>> = BTreeMap::new();
    for name in names {
        if let ObjectName::Wal { system, branch, range, id } = *name {
            branches.entry((system, branch)).or_default().push((range, id));
        }
    }
    let mut found: Vec<(ObjectName, Vec<ObjectName>)> = Vec::new();
    for ((system, branch), mut objects) in branches {
        objects.sort_by_key(|(range, _)| (range.start, std::cmp::Reverse(range.end)));
        let mut longest = LsnRange::new(Lsn::INVALID, Lsn::INVALID);
        for (range, id) in objects {
            let name = ObjectName::Wal { system, branch, range, id };
            if range.end > longest.end {
                longest = range;
                found.push((name, Vec::new()));
            } else if longest.covers(&range)
                && longest.len() > range.len()
                && let Some((_, pieces)) = found.last_mut()
            {
                pieces.push(name);
            }
        }
    }
    found.retain(|(_, pieces)| !pieces.is_empty());
    found
}

async fn list(location: &Location, folder: &str) -> Result<BTreeSet<ObjectName>> {
    location.require_cluster().await?;
    Ok(location.list(folder).await?.into_iter().filter_map(|listed| listed.name).collect())
}

async fn copy_missing(
    to: &Location,
    has: &BTreeSet<ObjectName>,
    all: &BTreeSet<ObjectName>,
    sources: &[(Location, BTreeSet<ObjectName>)],
) -> Result<u64> {
    let mut count = 0;
    for group in missing(has, all) {
        count += group.len() as u64;
        futures::stream::iter(group.into_iter().map(Ok))
            .try_for_each_concurrent(COPIES_MAX, |name| copy(to, name, sources))
            .await?;
    }
    Ok(count)
}

/// What a location lacks of `all`, in groups that must be stored one after the other.
///
/// WAL counts as there if the location's own objects cover its range, and an index if a larger one does: pieces that a
/// span has superseded do not come back.
fn missing(has: &BTreeSet<ObjectName>, all: &BTreeSet<ObjectName>) -> Vec<Vec<ObjectName>> {
    let covered = coverage(has);
    let indexes: Vec<(Branch, LsnRange)> = has
        .iter()
        .filter_map(|name| match name {
            ObjectName::WalIndex { branch, range, .. } => Some((*branch, *range)),
            _ => None,
        })
        .collect();
    let is_covered = |name: &ObjectName| match name {
        ObjectName::WalIndex { branch, range, .. } => {
            indexes.iter().any(|(of, larger)| of == branch && larger.covers(range))
        }
        ObjectName::Wal { branch, range, .. } => covered
            .get(branch)
            .is_some_and(|ranges| ranges.iter().any(|covered| covered.covers(range))),
        _ => false,
    };
    let mut groups = vec![Vec::new(); 5];
    for name in all.difference(has).filter(|name| !is_covered(name)) {
        let group = match name {
            ObjectName::Wrap { .. } | ObjectName::Lease { .. } => 0,
            ObjectName::Origin { .. } | ObjectName::Begin { .. } | ObjectName::Pin { .. } => 1,
            ObjectName::Pack { .. } | ObjectName::Wal { .. } | ObjectName::Gap { .. } => 2,
            ObjectName::WalIndex { .. } => 3,
            ObjectName::Manifest { .. } => 4,
            // They speak of one location.
            ObjectName::Cluster
            | ObjectName::Accepted { .. }
            | ObjectName::Head { .. }
            | ObjectName::Condemned { .. } => {
                continue;
            }
        };
        groups[group].push(name.clone());
    }
    groups
}

/// The stretches of each branch that a location's objects cover without a hole.
fn coverage(names: &BTreeSet<ObjectName>) -> BTreeMap<Branch, Vec<LsnRange>> {
    let mut branches: BTreeMap<Branch, Vec<LsnRange>> = BTreeMap::new();
    // The set's order is by branch, then by start.
    for name in names {
        let ObjectName::Wal { branch, range, .. } = name else { continue };
        let stretches = branches.entry(*branch).or_default();
        match stretches.last_mut().filter(|last| range.start <= last.end) {
            Some(last) => last.end = last.end.max(range.end),
            None => stretches.push(*range),
        }
    }
    branches
}

async fn copy(
    to: &Location,
    name: ObjectName,
    sources: &[(Location, BTreeSet<ObjectName>)],
) -> Result<()> {
    let mut last_error = None;
    for (source, names) in sources {
        if source.name() == to.name() || !names.contains(&name) {
            continue;
        }
        let fetched = source.get(&name).await;
        match fetched.and_then(|bytes| Header::check(&bytes, &name).map(|_| bytes)) {
            Ok(bytes) => return to.put(&name, bytes).await.map(|_| ()),
            Err(error) => {
                tracing::warn!(location = %source.name(), "cannot copy {name}: {}", error.message());
                last_error = Some(error);
            }
        }
    }
    // Deleted since it was listed, as superseded pieces are: nothing to copy.
    match last_error.filter(|error| error.kind() != backstay_common::Kind::Missing) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYSTEM: SystemId = SystemId::new(7);

    fn wal(start: u64, end: u64, id: u8) -> ObjectName {
        ObjectName::Wal {
            system: SYSTEM,
            branch: "00000001-01020304".parse().unwrap(),
            range: LsnRange::new(Lsn::new(start), Lsn::new(end)),
            id: ObjectId::from_bytes([id; 8]),
        }
    }

    #[test]
    fn copies_go_in_the_order_of_the_format() {
        let snapshot = "20261122T020000Z-1f2e3d4c".parse().unwrap();
        let names = [
            ObjectName::Manifest { system: SYSTEM, snapshot },
            ObjectName::Pack { system: SYSTEM, id: ObjectId::from_bytes([1; 8]) },
            ObjectName::Begin { system: SYSTEM, snapshot },
            "7/keys/00000000000000000000000000000000/0000000000000000".parse().unwrap(),
        ];
        let groups = missing(&BTreeSet::new(), &names.iter().cloned().collect());
        let flat: Vec<ObjectName> = groups.concat();
        assert_eq!(flat, names.into_iter().rev().collect::<Vec<_>>());
    }

    #[test]
    fn superseded_pieces_do_not_come_back() {
        let has: BTreeSet<_> = [wal(0, 100, 1)].into();
        let all: BTreeSet<_> =
            [wal(0, 100, 1), wal(0, 40, 2), wal(40, 100, 3), wal(100, 120, 4)].into();
        assert_eq!(missing(&has, &all).concat(), [wal(100, 120, 4)]);
    }

    #[test]
    fn an_index_that_a_larger_one_has_replaced_does_not_come_back() {
        let index = |start: u64, end: u64| -> ObjectName {
            let branch = "00000001-01020304".parse().unwrap();
            let range = LsnRange::new(Lsn::new(start), Lsn::new(end));
            ObjectName::WalIndex { system: SYSTEM, branch, range, id: ObjectId::random() }
        };
        let has: BTreeSet<_> = [index(0, 16)].into();
        let all: BTreeSet<_> = has.iter().cloned().chain([index(0, 4), index(16, 20)]).collect();
        let lacked = missing(&has, &all).concat();
        assert!(
            matches!(lacked[..], [ObjectName::WalIndex { range, .. }] if range.end == Lsn::new(20))
        );
    }

    #[test]
    fn pieces_go_when_their_span_is_there() {
        let names: BTreeSet<_> =
            [wal(0, 100, 1), wal(0, 40, 2), wal(40, 100, 3), wal(100, 120, 4)].into();
        let gone = vec![wal(0, 40, 2), wal(40, 100, 3)];
        assert_eq!(superseded(&names), [(wal(0, 100, 1), gone)]);
        let equal: BTreeSet<_> = [wal(16, 32, 1), wal(16, 32, 2), wal(20, 40, 3)].into();
        assert_eq!(superseded(&equal), [], "of equal ranges none goes, nor what reaches further");
    }

    #[test]
    fn a_hole_is_filled() {
        let has: BTreeSet<_> = [wal(0, 40, 1), wal(60, 100, 2)].into();
        let all: BTreeSet<_> = has.iter().cloned().chain([wal(30, 70, 3)]).collect();
        assert_eq!(missing(&has, &all).concat(), [wal(30, 70, 3)]);
    }
}
