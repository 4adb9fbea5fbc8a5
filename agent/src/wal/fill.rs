//! Fills a location with what only another location has: WAL that the spool no longer holds.
//!
//! Objects are copied as [`copy`] does, and one that cannot be does not keep the others back. Only holes inside what the location has are filled: what is before its first object may have been pruned. It goes on in
//! the background, object by object, and a restart begins it again from the listings.
//!
//! What always holds: until a location has all that precedes a line, as far as anybody has it, its share of the line counts for
//! no acknowledgement. A position that is acknowledged says that all before it is there, also what another agent
//! stored elsewhere, on an older timeline.

use super::WalPath;
use super::branch::Stock;
use super::line::Line;
use crate::copy::{self, Whole};
use crate::prune;
use crate::sync::superseded;
use backstay_common::id::Branch;
use backstay_common::line::{Past, line_of};
use backstay_common::location::Location;
use backstay_common::lsn::{Lsn, LsnRange, covered_until};
use backstay_common::name::{ObjectName, folder};
use backstay_common::seal::Header;
use backstay_common::segment::parse_history;
use backstay_common::snapshot::ManifestPlain;
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::{Error, Kind, Result};
use bytes::Bytes;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How long after a hole that could not be filled yet it is tried again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// What a location lacks of the WAL before a line.
enum Lacks {
    Nothing,
    /// What our own spool has.
    Ours,
    /// What no location has.
    Gap(Branch, LsnRange),
    /// What another location has, or may have.
    Hole(Branch, LsnRange),
}

/// Starts filling the holes that `location` has before `line`, on its branch and on those that it grew from. From when there
/// are none that could be filled the location counts.
pub fn spawn(path: &Arc<WalPath>, location: usize, line: &Arc<Line>, branch: Branch) {
    let (path, line) = (path.clone(), line.clone());
    let stop = path.context.stop.clone();
    path.clone().spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = until_whole(&path, location, &line, branch) => {}
        }
        Ok(())
    });
}

async fn until_whole(path: &WalPath, location: usize, line: &Line, branch: Branch) {
    let name = path.context.writers[location].location().name().to_string();
    let alarms = &path.context.alarms;
    for failures in 1.. {
        match before(path, location, line, branch).await {
            Ok(Lacks::Nothing) => {
                alarms.clear("location-hole", &name);
                break;
            }
            Ok(Lacks::Ours) => {}
            Ok(Lacks::Gap(_, hole) | Lacks::Hole(_, hole))
                if is_closed(path, location, hole).await =>
            {
                alarms.clear("location-hole", &name);
                break;
            }
            Ok(Lacks::Gap(on, hole)) => {
                let reason = format!("branch {on}: no location has the WAL of {hole}");
                alarms.raise("location-hole", &name, reason);
                break;
            }
            Ok(Lacks::Hole(on, hole)) => {
                let reason = format!("branch {on}: the WAL of {hole} is yet to be copied to it");
                alarms.raise("location-hole", &name, reason);
            }
            Err(error) => alarms.raise("location-hole", &name, error),
        }
        tokio::time::sleep(super::backoff(failures, AGAIN)).await;
    }
    path.board.update(|state| state.shelf.complete(location, line.number));
}

/// True if an earlier line of ours has some of it, which is on its way then.
fn is_in_spool(path: &WalPath, line: &Line, branch: Branch, hole: LsnRange) -> bool {
    path.board.read(|state| {
        let mut earlier = state.lines.values().filter(|l| l.number < line.number);
        earlier.any(|l| l.timeline() == branch.timeline && l.spool.end() > hole.start)
    })
}

/// Fills what can be filled, and tells what is left.
async fn before(path: &WalPath, location: usize, line: &Line, tip: Branch) -> Result<Lacks> {
    let begin = line.spool.begin();
    let stock = Stock::list(path).await;
    let mut pasts = stock.pasts(path).await;
    // Its origin may be on its way still.
    let history = line.beginnings.history.as_deref().unwrap_or_default();
    let ancestors = parse_history(&String::from_utf8_lossy(history))
        .map_err(|reason| Error::new(Kind::Local, reason))?;
    pasts.entry(tip).or_insert(Past { ancestors, covered: Vec::new() });
    let (mut lacks, mut has_any) = (Lacks::Nothing, false);
    for leg in line_of(tip, &pasts).legs {
        let until = if leg.branch == tip { begin } else { leg.to };
        let from = path.context.segment_size.start_of(leg.from.min(until));
        let from = has_any.then_some(from);
        has_any |= stock.has(location, leg.branch);
        let Some(hole) = fill(path, location, leg.branch, (from, until)).await? else { continue };
        if is_in_spool(path, line, leg.branch, hole) {
            return Ok(Lacks::Ours);
        }
        if !stock.is_complete(path) || stock.missing(leg.branch, hole) != [hole] {
            return Ok(Lacks::Hole(leg.branch, hole));
        }
        if matches!(lacks, Lacks::Nothing) {
            lacks = Lacks::Gap(leg.branch, hole);
        }
    }
    Ok(lacks)
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

/// Returns the first hole that is left, between `from`, else the first that the location has, and `until`.
async fn fill(
    path: &WalPath,
    location: usize,
    branch: Branch,
    (from, until): (Option<Lsn>, Lsn),
) -> Result<Option<LsnRange>> {
    let place = path.context.writers[location].location();
    let there = objects(path, location, branch).await?;
    // Pieces of before a restart, of which the shelf knows nothing.
    superseded::delete(&path.context, place, &there.iter().map(|(_, n)| n.clone()).collect()).await;
    let mut have: Vec<LsnRange> = there.into_iter().map(|(range, _)| range).collect();
    have.extend(from.map(|from| LsnRange::new(from, from)));
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
    fn a_location_that_has_what_a_branch_grew_from_needs_it_from_its_beginning() {
        let from = range(10, 10);
        assert_eq!(first_hole(&mut [from], Lsn::new(100)), Some(range(10, 100)));
        assert_eq!(first_hole(&mut [from, range(40, 120)], Lsn::new(100)), Some(range(10, 40)));
        assert_eq!(first_hole(&mut [from, range(10, 120)], Lsn::new(100)), None);
        assert!(fills(&[from, range(40, 120)], range(10, 30)));
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
