//! Fills a location with what only another location has: WAL that the spool no longer holds.
//!
//! What always holds: until a location has all that precedes the current line, as far as anybody has it, its share of the line
//! counts for no acknowledgement. A position that is acknowledged says that all before it is there, also what another agent
//! stored elsewhere, on an older timeline. What precedes the newest snapshot that the location has is filled too, and not
//! waited for.
//!
//! Objects are copied as [`copy`] does, and one that cannot be does not keep the others back. Only holes inside what the
//! location has are filled: what is before its first object may have been pruned. It goes on in the background, object by
//! object, and a restart begins it again from the listings.

use super::WalPath;
use super::board::State;
use super::branch::{Stock, ranges};
use super::gaps::Kept;
use super::line::Line;
use crate::copy::{self, Whole};
use crate::prune;
use crate::sync::superseded;
use backstay_common::catalog::cover::uncovered;
use backstay_common::gap::Cause;
use backstay_common::id::Branch;
use backstay_common::ledger::Event;
use backstay_common::line::{Past, line_of};
use backstay_common::location::Location;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::{ObjectName, folder};
use backstay_common::seal::Header;
use backstay_common::segment::parse_history;
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::{Error, Kind, Result};
use bytes::Bytes;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// How long after a hole that could not be filled yet it is tried again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// How long our own spool is waited for at a time.
const OURS: Duration = Duration::from_secs(5);
/// How often one that nobody can fill is looked at again: a snapshot may have closed it.
const LOST: Duration = Duration::from_secs(300);
/// Of so many snapshots the newest that is on the line is looked for.
const SNAPSHOTS_MAX: usize = 4;

/// What a location lacks of the WAL before a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacks {
    Nothing,
    /// What our own spool has.
    Ours,
    /// What no location has.
    Lost(Branch, LsnRange),
    /// What another location has, or may have.
    Hole(Branch, LsnRange),
}

/// A location that is filled up to where a line begins.
struct Filling {
    path: Arc<WalPath>,
    location: usize,
    line: Arc<Line>,
    branch: Branch,
    /// Where the line's spool began when the location was listed.
    begin: Lsn,
    /// Manifests that were read: where their snapshots begin.
    snapshots: BTreeMap<ObjectName, (Branch, Lsn)>,
}

/// One branch's part of what precedes the line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Leg {
    branch: Branch,
    /// What the location should have.
    wanted: LsnRange,
    /// What of that it must have before it counts begins here.
    from: Lsn,
}

/// Starts filling the holes that `location`, which has just been listed, has before `line`, on its branch and on those that
/// it grew from. From when there are none that could be filled the location counts.
pub fn spawn(path: &Arc<WalPath>, location: usize, line: &Arc<Line>, at: (Branch, Lsn)) {
    let (line, (branch, begin)) = (line.clone(), at);
    let snapshots = BTreeMap::new();
    let mut filling = Filling { path: path.clone(), location, line, branch, begin, snapshots };
    let stop = path.context.stop.clone();
    path.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = filling.until_whole() => {}
        }
        Ok(())
    });
}

impl Filling {
    fn place(&self) -> &Location {
        self.path.context.writers[self.location].location()
    }

    /// False when another line, or another listing of this one, is what counts.
    fn is_wanted(&self) -> bool {
        let (location, number) = (self.location, self.line.number);
        self.path.board.read(|state| {
            state.current == number && state.shelf.is_listed_from(location, number, self.begin)
        })
    }

    async fn until_whole(&mut self) {
        let name = self.place().name().to_string();
        for failures in 1.. {
            if !self.is_wanted() {
                return;
            }
            let looked = self.look().await;
            let alarms = &self.path.context.alarms;
            let mut pause = super::backoff(failures, AGAIN);
            match looked {
                Ok(Lacks::Nothing) => {
                    alarms.clear("location-hole", &name);
                    return self.complete();
                }
                Ok(Lacks::Ours) => {
                    pause = pause.min(OURS);
                    // Looked at again in any case.
                    let _ = tokio::time::timeout(OURS, self.until_shipped()).await;
                }
                Ok(Lacks::Lost(on, hole)) => {
                    let reason = format!("branch {on}: no location has the WAL of {hole}");
                    alarms.raise("location-hole", &name, reason);
                    self.complete();
                    pause = LOST;
                }
                Ok(Lacks::Hole(on, hole)) => {
                    let reason =
                        format!("branch {on}: the WAL of {hole} is yet to be copied to it");
                    alarms.raise("location-hole", &name, reason);
                }
                Err(error) => alarms.raise("location-hole", &name, error),
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn complete(&self) {
        let (location, number, begin) = (self.location, self.line.number, self.begin);
        self.path.board.update(|state| state.shelf.complete(location, number, begin));
    }

    /// Returns when the location has all of our lines before this one.
    async fn until_shipped(&self) {
        let mut bell = self.path.board.listen();
        let number = self.line.number;
        let is_shipped = |state: &State| {
            let mut earlier = state.lines.values().filter(|line| line.number < number);
            earlier.all(|line| line.is_sealed()) && state.shelf.has_before(self.location, number)
        };
        while !self.path.board.read(is_shipped) {
            // The board outlives this task.
            let _ = bell.changed().await;
        }
    }

    /// Looks, fills what can be filled, and tells what is left.
    async fn look(&mut self) -> Result<Lacks> {
        let own = Stock::of(&self.path, self.location).await?;
        // Pieces of before a restart, of which the shelf knows nothing.
        self.tidy(own.at(self.location).unwrap_or_default()).await;
        let snapshots = self.newest_snapshots().await?;
        let legs = self.legs(&own, &snapshots).await?;
        let has = own.at(self.location).unwrap_or_default();
        let is_new = !has.iter().any(|name| matches!(name, ObjectName::Wal { .. }));
        // Mostly what it has from its newest snapshot on is enough, and the others need not be asked.
        let is_closed = legs.iter().any(|leg| leg.from > leg.wanted.start);
        if is_closed && has_from(&legs, has, |leg| leg.from) {
            self.complete();
        }
        if is_new || is_closed && has_from(&legs, has, |leg| leg.wanted.start) {
            return Ok(Lacks::Nothing);
        }
        let stock = Stock::list(&self.path).await;
        let absent =
            || Error::new(Kind::Storage, format!("{} did not answer", self.place().name()));
        let has = stock.at(self.location).ok_or_else(absent)?;
        let legs = self.legs(&stock, &snapshots).await?;
        let copied = self.copy(&legs, &stock, has).await;
        let has: Vec<ObjectName> = has.iter().cloned().chain(copied).collect();
        let gaps = self.path.gaps.clone();
        let gaps = super::blocking(move || gaps.all()).await?;
        Ok(self.judge(&legs, &stock, &has, &gaps))
    }

    async fn tidy(&self, names: &[ObjectName]) {
        let names: BTreeSet<ObjectName> = names.iter().cloned().collect();
        superseded::delete(&self.path.context, self.place(), &names).await;
    }

    /// The line's branches, oldest first, as far as `stock` knows them.
    async fn legs(&self, stock: &Stock, snapshots: &[(Branch, Lsn)]) -> Result<Vec<Leg>> {
        let mut pasts = stock.pasts(&self.path).await?;
        // Its origin may be on its way still.
        let history = self.line.beginnings.history.as_deref().unwrap_or_default();
        let ancestors = parse_history(&String::from_utf8_lossy(history))
            .map_err(|reason| Error::new(Kind::Local, reason))?;
        pasts.entry(self.branch).or_insert(Past { ancestors, covered: Vec::new() });
        let line = line_of(self.branch, &pasts);
        // The newest that is on the line closes all before it.
        let closed = snapshots.iter().find_map(|(branch, from)| {
            let index = line.index_of(*branch)?;
            (*from < line.legs[index].to.min(self.begin)).then_some((index, *from))
        });
        let size = self.path.context.segment_size;
        let has = stock.at(self.location).unwrap_or_default();
        let (mut legs, mut has_any) = (Vec::new(), false);
        for (index, leg) in line.legs.iter().enumerate() {
            let until = if leg.branch == self.branch { self.begin } else { leg.to };
            let there = ranges(has, leg.branch).map(|range| range.start).min();
            // What is before the first that it has may have been pruned; but not on a branch that grew from one that it has.
            let first = if has_any { Some(size.start_of(leg.from)) } else { there };
            has_any |= there.is_some();
            let Some(first) = first else { continue };
            let wanted = LsnRange::new(first.min(until), until);
            let from = match closed {
                Some((at, _)) if index < at => until,
                Some((at, from)) if index == at => size.start_of(from).max(wanted.start).min(until),
                _ => wanted.start,
            };
            legs.push(Leg { branch: leg.branch, wanted, from });
        }
        Ok(legs)
    }

    /// On which branches, and where, the newest snapshots begin that the location has.
    async fn newest_snapshots(&mut self) -> Result<Vec<(Branch, Lsn)>> {
        let listed = self.place().list(&folder::snapshots(self.path.context.system)).await?;
        let names = listed.into_iter().filter_map(|listed| listed.name);
        let mut names: Vec<ObjectName> =
            names.filter(|name| matches!(name, ObjectName::Manifest { .. })).collect();
        names.sort_unstable();
        let mut newest = Vec::new();
        for name in names.into_iter().rev().take(SNAPSHOTS_MAX) {
            if !self.snapshots.contains_key(&name) {
                match self.place().get(&name).await.and_then(|bytes| read_plain(&bytes, &name)) {
                    Ok((_, plain)) => {
                        self.snapshots.insert(name.clone(), (plain.branch, plain.start));
                    }
                    // What was read is newer, and mostly enough.
                    Err(error) if error.kind() == Kind::Storage && !newest.is_empty() => break,
                    Err(error) if error.kind() == Kind::Storage => return Err(error),
                    // Gone, or damaged.
                    Err(_) => continue,
                }
            }
            newest.push(self.snapshots[&name]);
        }
        Ok(newest)
    }

    /// Copies what the location should have, only others have, and is not on its way from our spool. Returns what came.
    async fn copy(&self, legs: &[Leg], stock: &Stock, has: &[ObjectName]) -> Vec<ObjectName> {
        let mut copied = Vec::new();
        for leg in legs {
            let there = ranges(has, leg.branch).chain(self.in_spool(leg.branch));
            let mut holes = uncovered(leg.wanted, there);
            if holes.is_empty() {
                continue;
            }
            // Between snapshots that outlive the window there is no WAL, and none is missed.
            if let Some(needed) = prune::needed_wal(&self.path.context).await {
                let unneeded = unneeded(needed.get(&leg.branch).map_or(&[][..], Vec::as_slice));
                holes = without(&holes, &unneeded);
            }
            for (name, sources) in self.offered(stock, leg.branch) {
                let ObjectName::Wal { range, .. } = name else { continue };
                if !holes.iter().any(|hole| range.start < hole.end && hole.start < range.end) {
                    continue;
                }
                match self.copy_one(&name, &sources).await {
                    Ok(()) => {
                        tracing::info!(object = %name, "a hole was filled");
                        holes = without(&holes, &[range]);
                        copied.push(name);
                    }
                    // Another object may fill the hole, or the next one.
                    Err(error) => tracing::warn!(%error, "a hole is not filled"),
                }
            }
        }
        if !copied.is_empty() {
            let detail = format!("{} objects of WAL before {}", copied.len(), self.begin);
            self.path.context.tell(Event::Copied, self.place().name(), detail);
            // Pieces, of which the shelf may know nothing any more.
            let all: Vec<ObjectName> = has.iter().cloned().chain(copied.iter().cloned()).collect();
            self.tidy(&all).await;
        }
        copied
    }

    async fn copy_one(&self, name: &ObjectName, sources: &[&Location]) -> Result<()> {
        let writer = &self.path.context.writers[self.location];
        let whole = copy::fetch(name, sources, None, &mut Vec::new()).await?;
        self.path.context.strays.note(writer.location().name(), name);
        copy::store(writer, &whole, sources).await.map(drop)
    }

    /// What the other locations have of the branch, and which of them has it; the longest first, so that no piece is
    /// copied whose span is there.
    fn offered(&self, stock: &Stock, branch: Branch) -> Vec<(ObjectName, Vec<&Location>)> {
        let mut offered: BTreeMap<(Lsn, Reverse<Lsn>, &ObjectName), Vec<&Location>> =
            BTreeMap::new();
        for (number, names) in stock.listed().filter(|(number, _)| *number != self.location) {
            for name in names {
                let ObjectName::Wal { branch: of, range, .. } = name else { continue };
                if *of == branch {
                    let location = self.path.context.writers[number].location();
                    offered
                        .entry((range.start, Reverse(range.end), name))
                        .or_default()
                        .push(location);
                }
            }
        }
        offered.into_iter().map(|((_, _, name), sources)| (name.clone(), sources)).collect()
    }

    /// What our earlier lines still have of the branch, or may have.
    fn in_spool(&self, branch: Branch) -> Vec<LsnRange> {
        self.path.board.read(|state| {
            let earlier = state.lines.values().filter(|line| line.number < self.line.number);
            let of_branch = earlier.filter(|line| match line.branch() {
                Some(of) => of == branch,
                None => line.timeline() == branch.timeline,
            });
            of_branch.map(|line| LsnRange::new(line.spool.begin(), line.spool.end())).collect()
        })
    }

    fn judge(&self, legs: &[Leg], stock: &Stock, has: &[ObjectName], gaps: &[Kept]) -> Lacks {
        let settings = &self.path.context.writers;
        let required: Vec<bool> = settings.iter().map(|w| w.location().is_required()).collect();
        let silent = required.iter().enumerate().filter(|(number, required)| {
            **required && !stock.listed().any(|(answered, _)| answered == *number)
        });
        let required = required.iter().filter(|required| **required).count();
        let needed = self.path.context.settings.durability.acknowledge.needed(required).max(1);
        // Whatever was acknowledged is at one at least of those that answered.
        let is_conclusive = silent.count() < needed;
        let mut lacks = Lacks::Nothing;
        for leg in legs {
            let elsewhere = stock.listed().flat_map(|(_, names)| ranges(names, leg.branch));
            let known = Known {
                has: ranges(has, leg.branch).collect(),
                in_spool: self.in_spool(leg.branch),
                elsewhere: elsewhere.collect(),
                gaps: gaps.iter().filter_map(|gap| lost(gap, leg.branch)).collect(),
                is_conclusive,
            };
            lacks = known.lacks(leg).or(lacks);
        }
        lacks
    }
}

/// True if nothing of the legs is missing, of each from where `from` says.
fn has_from(legs: &[Leg], has: &[ObjectName], from: impl Fn(&Leg) -> Lsn) -> bool {
    legs.iter().all(|leg| {
        let range = LsnRange::new(from(leg), leg.wanted.end);
        uncovered(range, ranges(has, leg.branch)).is_empty()
    })
}

/// What is left of `ranges` without `others`.
fn without(ranges: &[LsnRange], others: &[LsnRange]) -> Vec<LsnRange> {
    ranges.iter().flat_map(|range| uncovered(*range, others.iter().copied())).collect()
}

/// What is known of a branch's WAL.
#[derive(Debug)]
struct Known {
    has: Vec<LsnRange>,
    in_spool: Vec<LsnRange>,
    elsewhere: Vec<LsnRange>,
    /// On record.
    gaps: Vec<LsnRange>,
    /// What is at none of the locations that answered is nowhere.
    is_conclusive: bool,
}

impl Known {
    fn lacks(&self, leg: &Leg) -> Lacks {
        let mut lacks = Lacks::Nothing;
        let holes = without(&[LsnRange::new(leg.from, leg.wanted.end)], &self.has);
        let left = without(&holes, &self.in_spool);
        if left != holes {
            lacks = Lacks::Ours;
        }
        for hole in left {
            let unknown = without(&[hole], &self.elsewhere);
            let found = match without(&unknown, &self.gaps).first() {
                _ if unknown != [hole] => Lacks::Hole(leg.branch, hole),
                Some(_) if !self.is_conclusive => Lacks::Hole(leg.branch, hole),
                Some(gone) => Lacks::Lost(leg.branch, *gone),
                None => Lacks::Nothing,
            };
            lacks = found.or(lacks);
        }
        lacks
    }
}

impl Lacks {
    /// The one that is waited for longest.
    fn or(self, other: Lacks) -> Lacks {
        let rank = |lacks: &Lacks| match lacks {
            Lacks::Nothing => 0,
            Lacks::Lost(..) => 1,
            Lacks::Ours => 2,
            Lacks::Hole(..) => 3,
        };
        if rank(&self) > rank(&other) { self } else { other }
    }
}

/// What of `branch` a gap says is nowhere.
fn lost(gap: &Kept, branch: Branch) -> Option<LsnRange> {
    let is_of = gap.branch.is_none_or(|of| of == branch);
    let range = match gap.cause {
        // That branch begins there.
        Cause::Diverged => LsnRange::new(Lsn::INVALID, gap.start),
        Cause::Removed | Cause::Broken | Cause::Released => LsnRange::new(gap.start, gap.end),
    };
    is_of.then_some(range)
}

/// What lies between `needed`, which is disjoint and sorted.
fn unneeded(needed: &[LsnRange]) -> Vec<LsnRange> {
    needed.windows(2).map(|two| LsnRange::new(two[0].end, two[1].start)).collect()
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

    fn branch() -> Branch {
        "00000001-01020304".parse().unwrap()
    }

    fn known(has: &[LsnRange]) -> Known {
        let (has, none) = (has.to_vec(), Vec::new());
        Known {
            has,
            in_spool: none.clone(),
            elsewhere: none.clone(),
            gaps: none,
            is_conclusive: true,
        }
    }

    fn leg(start: u64, from: u64, end: u64) -> Leg {
        Leg { branch: branch(), wanted: range(start, end), from: Lsn::new(from) }
    }

    #[test]
    fn what_it_has_is_not_lacking_nor_is_what_a_snapshot_has_closed() {
        let all = known(&[range(10, 50), range(50, 120)]);
        assert_eq!(all.lacks(&leg(10, 10, 100)), Lacks::Nothing);
        let holed = known(&[range(10, 50), range(60, 120)]);
        assert_eq!(holed.lacks(&leg(10, 10, 100)), Lacks::Lost(branch(), range(50, 60)));
        assert_eq!(holed.lacks(&leg(10, 60, 100)), Lacks::Nothing);
        assert_eq!(holed.lacks(&leg(10, 100, 100)), Lacks::Nothing);
    }

    #[test]
    fn what_another_has_or_may_have_is_waited_for() {
        let mut known = known(&[range(10, 50)]);
        known.elsewhere = vec![range(40, 70)];
        assert_eq!(known.lacks(&leg(10, 10, 100)), Lacks::Hole(branch(), range(50, 100)));
        known.has.push(range(40, 70));
        assert_eq!(known.lacks(&leg(10, 10, 100)), Lacks::Lost(branch(), range(70, 100)));
        known.is_conclusive = false;
        assert_eq!(known.lacks(&leg(10, 10, 100)), Lacks::Hole(branch(), range(70, 100)));
        known.gaps = vec![range(70, 200)];
        assert_eq!(known.lacks(&leg(10, 10, 100)), Lacks::Nothing, "a gap on record");
    }

    #[test]
    fn a_hole_that_is_closed_hides_no_other() {
        let mut known = known(&[range(10, 50), range(60, 80)]);
        known.elsewhere = vec![range(80, 100)];
        known.gaps = vec![range(50, 60)];
        assert_eq!(known.lacks(&leg(10, 10, 100)), Lacks::Hole(branch(), range(80, 100)));
        known.elsewhere.clear();
        known.in_spool = vec![range(80, 100)];
        assert_eq!(known.lacks(&leg(10, 10, 100)), Lacks::Ours);
        known.in_spool = vec![range(80, 90)];
        known.elsewhere = vec![range(90, 100)];
        assert_eq!(known.lacks(&leg(10, 10, 100)), Lacks::Hole(branch(), range(90, 100)));
    }

    #[test]
    fn a_branch_that_a_server_left_another_for_begins_where_it_did() {
        let gap = |cause: Cause, branch: Option<Branch>| Kept {
            start: Lsn::new(50),
            end: Lsn::new(70),
            cause,
            detail: String::new(),
            noticed: jiff::Timestamp::UNIX_EPOCH,
            line: 1,
            branch,
        };
        assert_eq!(lost(&gap(Cause::Diverged, Some(branch())), branch()), Some(range(0, 50)));
        assert_eq!(lost(&gap(Cause::Removed, None), branch()), Some(range(50, 70)));
        let other = "00000001-01020305".parse().unwrap();
        assert_eq!(lost(&gap(Cause::Broken, Some(other)), branch()), None);
    }

    #[test]
    fn between_snapshots_that_outlive_the_window_nothing_is_needed() {
        let needed = [range(10, 20), range(50, 60), range(90, 1000)];
        assert_eq!(unneeded(&needed), [range(20, 50), range(60, 90)]);
    }
}
