//! Fills a location with what only another location has: WAL that the spool no longer holds.
//!
//! Objects are copied as [`copy`] does, and one that cannot be does not keep the others back. Only holes inside what the location has are filled: what is before its first object may have been pruned. It goes on in
//! the background, object by object, and a restart begins it again from the listings.

use super::WalPath;
use crate::copy::{self, Whole};
use crate::prune;
use crate::sync::superseded;
use backstay_common::Result;
use backstay_common::id::Branch;
use backstay_common::location::Location;
use backstay_common::lsn::{Lsn, LsnRange, covered_until};
use backstay_common::name::{ObjectName, folder};
use backstay_common::seal::Header;
use backstay_common::snapshot::ManifestPlain;
use backstay_common::snapshot::manifest::read_plain;
use bytes::Bytes;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Starts filling the holes that `location` has in `branch` before `until`.
pub fn spawn(path: &Arc<WalPath>, location: usize, branch: Branch, until: Lsn) {
    let path = path.clone();
    let stop = path.context.stop.clone();
    path.clone().spawn(async move {
        let filled = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            filled = fill(&path, location, branch, until) => filled,
        };
        let name = path.context.writers[location].location().name().to_string();
        match filled {
            Ok(None) => path.context.alarms.clear("location-hole", &name),
            Ok(Some(hole)) if is_closed(&path, location, hole).await => {
                path.context.alarms.clear("location-hole", &name);
            }
            Ok(Some(hole)) => {
                let reason = format!("branch {branch}: no location has the WAL of {hole}");
                path.context.alarms.raise("location-hole", &name, reason);
            }
            Err(error) => path.context.alarms.raise("location-hole", &name, error),
        }
        Ok(())
    });
}

/// True if the location has a snapshot that begins behind `hole`: nothing later needs it.
async fn is_closed(path: &WalPath, location: usize, hole: LsnRange) -> bool {
    let place = path.context.writers[location].location();
    let newest = async {
        let listed = place.list(&folder::snapshots(path.context.system)).await?;
        let names = listed.into_iter().filter_map(|listed| listed.name);
        let newest = names.filter(|name| matches!(name, ObjectName::Manifest { .. })).max();
        let Some(name) = newest else { return Ok(None) };
        Ok(Some(read_plain(&place.get(&name).await?, &name)?.1))
    };
    let newest: Result<Option<ManifestPlain>> = newest.await;
    newest.is_ok_and(|plain| plain.is_some_and(|plain| plain.start >= hole.end))
}

/// Returns the first hole that is left.
async fn fill(
    path: &WalPath,
    location: usize,
    branch: Branch,
    until: Lsn,
) -> Result<Option<LsnRange>> {
    let place = path.context.writers[location].location();
    let there = objects(path, location, branch).await?;
    // Pieces of before a restart, of which the shelf knows nothing.
    superseded::delete(&path.context, place, &there.iter().map(|(_, n)| n.clone()).collect()).await;
    let mut have: Vec<LsnRange> = there.into_iter().map(|(range, _)| range).collect();
    if first_hole(&mut have, until).is_none() {
        return Ok(None);
    }
    // Between snapshots that outlive the window there is no WAL, and none is missed.
    if let Some(needed) = prune::needed_wal(&path.context).await {
        let between = unneeded(needed.get(&branch).map_or(&[][..], Vec::as_slice), &have);
        have.extend(between);
    }
    let mut fault = None;
    let mut filled = false;
    for (name, sources) in offered(path, location, branch).await {
        let ObjectName::Wal { range, .. } = name else { continue };
        if range.start >= until || !fills(&have, range) {
            continue;
        }
        match copy_one(path, location, &name, &sources).await {
            Ok(()) => {
                have.push(range);
                filled = true;
                tracing::info!(object = %name, "a hole was filled");
            }
            // Another object may fill the hole, or the next one.
            Err(error) => {
                tracing::warn!(%error, "a hole is not filled");
                fault = Some(error);
            }
        }
    }
    if filled {
        // Pieces, of which the shelf may know nothing any more.
        let names = objects(path, location, branch).await?.into_iter().map(|(_, name)| name);
        superseded::delete(&path.context, place, &names.collect()).await;
    }
    match (first_hole(&mut have, until), fault) {
        (Some(_), Some(error)) => Err(error),
        (hole, _) => Ok(hole),
    }
}

async fn copy_one(
    path: &WalPath,
    to: usize,
    name: &ObjectName,
    sources: &[&Location],
) -> Result<()> {
    let writer = &path.context.writers[to];
    let whole = copy::fetch(name, sources, None, &mut Vec::new()).await?;
    path.context.strays.note(writer.location().name(), name);
    copy::store(writer, &whole, sources).await.map(drop)
}

/// What the other locations have of the branch, and which of them has it; the longest first, so that no piece is
/// copied whose span is there.
async fn offered(path: &WalPath, to: usize, branch: Branch) -> Vec<(ObjectName, Vec<&Location>)> {
    let mut offered: BTreeMap<(Lsn, Reverse<Lsn>, ObjectName), Vec<&Location>> = BTreeMap::new();
    for (number, location) in others(path, to) {
        for (range, name) in objects(path, number, branch).await.unwrap_or_default() {
            offered.entry((range.start, Reverse(range.end), name)).or_default().push(location);
        }
    }
    offered.into_iter().map(|((_, _, name), sources)| (name, sources)).collect()
}

/// What lies between `needed`, which is disjoint and sorted, after the first of `have`.
fn unneeded(needed: &[LsnRange], have: &[LsnRange]) -> Vec<LsnRange> {
    let Some(begin) = have.iter().map(|range| range.start).min() else { return Vec::new() };
    let between = needed.windows(2).map(|two| LsnRange::new(two[0].end, two[1].start));
    between.filter(|range| range.start >= begin).collect()
}

/// The first hole after the first range and before `until`.
fn first_hole(have: &mut [LsnRange], until: Lsn) -> Option<LsnRange> {
    let begin = have.iter().map(|range| range.start).min()?;
    let end = covered_until(begin, have);
    let next = have.iter().map(|range| range.start).filter(|&start| start > end).min();
    (end < until).then(|| LsnRange::new(end, next.unwrap_or(until).min(until)))
}

/// True if something of `range` is missing, after the first of `have`.
fn fills(have: &[LsnRange], range: LsnRange) -> bool {
    let Some(begin) = have.iter().map(|range| range.start).min() else { return false };
    let mut touching: Vec<LsnRange> =
        have.iter().filter(|h| h.start < range.end && h.end > range.start).copied().collect();
    range.start >= begin && covered_until(range.start, &mut touching) < range.end
}

async fn objects(
    path: &WalPath,
    location: usize,
    branch: Branch,
) -> Result<Vec<(LsnRange, ObjectName)>> {
    let place = path.context.writers[location].location();
    let listed = place.list(&folder::branch(path.context.system, branch)).await?;
    let wal = |name: Option<ObjectName>| match name {
        Some(name @ ObjectName::Wal { range, .. }) => Some((range, name)),
        _ => None,
    };
    Ok(listed.into_iter().filter_map(|object| wal(object.name)).collect())
}

/// Stores an object of ours, with the wraps of its epoch before it.
pub async fn store(path: &WalPath, to: usize, name: &ObjectName, bytes: Bytes) -> Result<()> {
    let whole = Whole { name: name.clone(), epoch: Header::check(&bytes, name)?.epoch(), bytes };
    let sources: Vec<&Location> = others(path, to).map(|(_, location)| location).collect();
    copy::store(&path.context.writers[to], &whole, &sources).await.map(drop)
}

/// All locations but one, in the order of preference for reading.
fn others(path: &WalPath, to: usize) -> impl Iterator<Item = (usize, &Location)> {
    let all = path.context.writers.iter().map(|writer| writer.location()).enumerate();
    all.filter(move |(number, _)| *number != to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> LsnRange {
        LsnRange::new(Lsn::new(start), Lsn::new(end))
    }

    #[test]
    fn holes_are_those_inside_what_is_there() {
        let until = Lsn::new(100);
        assert_eq!(first_hole(&mut [], until), None, "an empty location is not ours to fill");
        assert_eq!(first_hole(&mut [range(10, 120)], until), None);
        assert_eq!(first_hole(&mut [range(10, 50)], until), Some(range(50, 100)));
        assert_eq!(first_hole(&mut [range(10, 50), range(60, 100)], until), Some(range(50, 60)));
    }

    #[test]
    fn what_nobody_needs_is_no_hole() {
        let mut have = vec![range(10, 20), range(50, 120)];
        have.extend(unneeded(&[range(10, 20), range(50, u64::MAX)], &have));
        assert_eq!(first_hole(&mut have, Lsn::new(100)), None);
        let mut have = vec![range(10, 20), range(50, 120)];
        have.extend(unneeded(&[range(10, 20), range(40, u64::MAX)], &have));
        assert_eq!(first_hole(&mut have, Lsn::new(100)), Some(range(40, 50)));
    }

    #[test]
    fn only_what_is_missing_is_copied() {
        let have = [range(10, 50), range(60, 100)];
        assert!(fills(&have, range(50, 60)));
        assert!(fills(&have, range(40, 61)));
        assert!(!fills(&have, range(20, 30)));
        assert!(!fills(&have, range(0, 10)), "what is before the first may have been pruned");
    }
}
