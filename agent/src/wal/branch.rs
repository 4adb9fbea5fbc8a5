//! Which branch a line's WAL is stored under.
//!
//! A writer joins an existing branch only if its history, switch point and first record agree with the branch's
//! origin, and if the WAL that is stored last is the WAL that it has; else it opens another. The first two do not tell
//! two servers of one timeline apart: a copy that was started beside its original, or a server that went back to an older
//! state. The answer is kept in the spool: the origin's sealed bytes, fsynced, then the name of
//! the line's folder. So every location gets the same origin, byte for byte, however late, and a restart asks nobody.

use super::WalPath;
use super::line::Line;
use backstay_common::catalog::cover::{merged, uncovered};
use backstay_common::id::{Branch, BranchId};
use backstay_common::line::Past;
use backstay_common::location::Location;
use backstay_common::lsn::{Lsn, LsnRange, SPAN_BYTES, covered_until};
use backstay_common::name::{ObjectName, folder};
use backstay_common::origin::{Beginnings, Origin};
use backstay_common::seal::Header;
use backstay_common::span::WalObject;
use backstay_common::{Context, Kind, Result};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How long all locations are waited for; then those that answered must do.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);
/// WAL this far before the end of what a location has is taken to be complete.
const LOOK_BACK: u64 = 64 * SPAN_BYTES;

/// What the locations that answered hold of all branches: one listing for many questions.
#[derive(Debug)]
pub struct Stock {
    /// By the location's number.
    listed: Vec<(usize, Vec<ObjectName>)>,
}

/// A branch whose origin agrees with a line's beginnings.
#[derive(Clone, Debug)]
pub struct Joinable {
    pub branch: Branch,
    /// The origin's sealed bytes.
    pub origin: Bytes,
    /// How far the required location that has the least of it has it; 0/0 if none has any WAL of it.
    pub least: Lsn,
    /// How far the required location that has the most of it has it.
    pub furthest: Lsn,
    /// The location that has the most of it, required or not, and how far.
    most: (usize, Lsn),
    /// What is stored there.
    objects: Vec<(LsnRange, ObjectName)>,
}

impl Joinable {
    /// How far the location that has the most of it has it.
    pub fn frontier(&self) -> Lsn {
        self.most.1
    }

    /// The stored object that reaches furthest, of those that begin before `limit`.
    pub fn newest_before(&self, limit: Lsn) -> Option<&(LsnRange, ObjectName)> {
        let before = self.objects.iter().filter(|(range, _)| range.start < limit);
        before.max_by_key(|(range, _)| (range.end, std::cmp::Reverse(range.start)))
    }

    /// The WAL of a stored object.
    pub async fn wal(&self, path: &WalPath, name: &ObjectName) -> Result<Vec<u8>> {
        let location = path.context.writers[self.most.0].location();
        let bytes = location.get(name).await?;
        let header = Header::check(&bytes, name)?;
        let keyring = path.context.epochs.keyring();
        let epoch = keyring.epoch(path.context.system, header.epoch(), location).await?;
        let name = name.clone();
        super::blocking(move || WalObject::open(bytes, &name, &epoch)?.wal()).await
    }
}

/// Finds or makes the line's branch, unless it has one. Waits as long as no location answers.
pub async fn settle(path: &Arc<WalPath>, line: &Arc<Line>) -> Result<()> {
    if line.branch().is_some() {
        return Ok(());
    }
    let found = loop {
        let stock = Stock::list(path).await;
        if !stock.listed.is_empty() || path.context.writers.is_empty() {
            break choose(path, line, stock.joinable(path, &line.beginnings).await).await;
        }
        tokio::time::sleep(RETRY).await;
    };
    let (branch, origin) = match found {
        Some(found) => (found.branch, found.origin),
        None => open_another(path, &line.beginnings).await?,
    };
    let (sealed, line) = (path.sealed.clone(), line.clone());
    super::blocking(move || {
        sealed.keep_origin(branch, &origin)?;
        line.settle(branch)
    })
    .await?;
    tracing::info!(%branch, "branch chosen");
    path.board.ring();
    Ok(())
}

/// Of the branches that agree, one that does not hold other bytes where the spool has some.
async fn choose(path: &WalPath, line: &Line, candidates: Vec<Joinable>) -> Option<Joinable> {
    let mut fitting = Vec::new();
    for candidate in candidates {
        match equals_spool(path, line, &candidate).await {
            Ok(Some(true)) => fitting.push(candidate),
            Ok(Some(false)) => {
                tracing::warn!(branch = %candidate.branch, "it holds other WAL than ours");
            }
            Ok(None) if !line.beginnings.is_first_record_unknown() => fitting.push(candidate),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, branch = %candidate.branch, "not compared with its WAL");
            }
        }
    }
    fitting.into_iter().min_by_key(|found| (std::cmp::Reverse(found.frontier()), found.branch))
}

/// `None` if the two have no position in common.
async fn equals_spool(path: &WalPath, line: &Line, candidate: &Joinable) -> Result<Option<bool>> {
    let spool = LsnRange::new(line.spool.begin(), line.spool.end());
    let Some((range, name)) = candidate.newest_before(spool.end) else { return Ok(None) };
    let (start, end) = (range.start.max(spool.start), range.end.min(spool.end));
    if start >= end {
        return Ok(None);
    }
    let stored = candidate.wal(path, name).await?;
    let ours = line.spool.read(LsnRange::new(start, end))?;
    let from = start.since(range.start) as usize;
    Ok(Some(stored[from..from + ours.len()] == ours))
}

/// A branch that nobody has, and its origin.
pub async fn open_another(path: &WalPath, beginnings: &Beginnings) -> Result<(Branch, Bytes)> {
    let branch = Branch { timeline: beginnings.timeline, id: BranchId::random() };
    let epoch = path.context.epochs.current().await?;
    let sealed = Origin::new(beginnings)?.seal(&epoch, path.context.system, branch);
    Ok((branch, sealed.bytes))
}

impl Stock {
    /// Lists all locations; those that do not answer in time are left out.
    pub async fn list(path: &WalPath) -> Stock {
        let folder = &folder::wal(path.context.system);
        let asked = path.context.writers.iter().enumerate().map(|(number, writer)| async move {
            let listing = list(writer.location(), folder);
            match tokio::time::timeout(PATIENCE, listing).await {
                Ok(Ok(names)) => Some((number, names)),
                Ok(Err(error)) => {
                    tracing::warn!(%error, "a location cannot say which branches it has");
                    None
                }
                Err(_) => None,
            }
        });
        let listed = futures::future::join_all(asked).await;
        Stock { listed: listed.into_iter().flatten().collect() }
    }

    /// The branches whose origin agrees.
    pub async fn joinable(&self, path: &WalPath, beginnings: &Beginnings) -> Vec<Joinable> {
        let mut found: Vec<Joinable> = Vec::new();
        for (number, names) in &self.listed {
            for name in names {
                let ObjectName::Origin { branch, .. } = name else { continue };
                if branch.timeline != beginnings.timeline {
                    continue;
                }
                match agreeing(path, *number, name, beginnings).await {
                    Ok(Some(origin)) => {
                        let is_required = path.context.writers[*number].location().is_required();
                        join(&mut found, *branch, origin, (*number, is_required), names);
                    }
                    Ok(None) => {}
                    Err(error) => tracing::warn!(%error, %branch, "a branch is left out"),
                }
            }
        }
        found
    }

    /// One location only.
    pub async fn of(path: &WalPath, location: usize) -> Result<Stock> {
        let place = path.context.writers[location].location();
        let names = list(place, &folder::wal(path.context.system)).await?;
        Ok(Stock { listed: vec![(location, names)] })
    }

    /// Where the branches come from, and what of them is stored anywhere. An origin that is damaged or cannot be opened is
    /// left out; one that cannot be fetched now may be the one that matters.
    pub async fn pasts(&self, path: &WalPath) -> Result<BTreeMap<Branch, Past>> {
        let (mut pasts, mut unread) = (BTreeMap::new(), BTreeMap::new());
        for (number, names) in &self.listed {
            for name in names {
                let ObjectName::Origin { branch, .. } = name else { continue };
                if pasts.contains_key(branch) {
                    continue;
                }
                let read = open_origin(path, *number, name).await;
                match read.and_then(|(origin, _)| origin.ancestors()) {
                    Ok(ancestors) => {
                        let covered = merged(self.all(*branch));
                        pasts.insert(*branch, Past { ancestors, covered });
                    }
                    Err(error) if error.kind() == Kind::Storage => {
                        unread.insert(*branch, error);
                    }
                    Err(error) => tracing::warn!(%error, %branch, "a branch is left out"),
                }
            }
        }
        unread.retain(|branch, _| !pasts.contains_key(branch));
        match unread.into_values().next() {
            Some(error) => Err(error),
            None => Ok(pasts),
        }
    }

    /// What of `range` no location that answered has on `branch`.
    pub fn missing(&self, branch: Branch, range: LsnRange) -> Vec<LsnRange> {
        uncovered(range, self.all(branch))
    }

    /// All ranges of `branch` that are stored anywhere.
    fn all(&self, branch: Branch) -> impl Iterator<Item = LsnRange> + '_ {
        self.listed.iter().flat_map(move |(_, names)| ranges(names, branch))
    }

    /// The locations that answered, by number, and what they have.
    pub fn listed(&self) -> impl Iterator<Item = (usize, &[ObjectName])> {
        self.listed.iter().map(|(number, names)| (*number, &names[..]))
    }

    /// What `location` has; `None` if it did not answer.
    pub fn at(&self, location: usize) -> Option<&[ObjectName]> {
        self.listed().find(|(number, _)| *number == location).map(|(_, names)| names)
    }
}

fn join(
    found: &mut Vec<Joinable>,
    branch: Branch,
    origin: Bytes,
    (number, is_required): (usize, bool),
    names: &[ObjectName],
) {
    let frontier = frontier(names, branch);
    let known = found.iter().position(|joinable| joinable.branch == branch);
    let at = known.unwrap_or_else(|| {
        let (least, furthest, most) = (Lsn::INVALID, Lsn::INVALID, (number, Lsn::INVALID));
        found.push(Joinable { branch, origin, least, furthest, most, objects: Vec::new() });
        found.len() - 1
    });
    let joinable = &mut found[at];
    if frontier > joinable.most.1 {
        joinable.most = (number, frontier);
        joinable.objects = objects(names, branch);
    }
    if is_required && frontier.is_valid() {
        let least = Some(joinable.least).filter(|least| least.is_valid());
        joinable.least = least.unwrap_or(frontier).min(frontier);
        joinable.furthest = joinable.furthest.max(frontier);
    }
}

fn objects(names: &[ObjectName], branch: Branch) -> Vec<(LsnRange, ObjectName)> {
    let of_branch = names.iter().filter_map(|name| match name {
        ObjectName::Wal { branch: of, range, .. } if *of == branch => Some((*range, name.clone())),
        _ => None,
    });
    of_branch.collect()
}

async fn list(location: &Location, folder: &str) -> Result<Vec<ObjectName>> {
    location.require_cluster().await?;
    let listed = location.list(folder).await?;
    Ok(listed.into_iter().filter_map(|object| object.name).collect())
}

/// The origin's bytes, if it agrees.
async fn agreeing(
    path: &WalPath,
    number: usize,
    name: &ObjectName,
    beginnings: &Beginnings,
) -> Result<Option<Bytes>> {
    let (origin, bytes) = open_origin(path, number, name).await?;
    let agrees = match beginnings.first_record {
        // The server no longer has it. Its WAL is compared besides.
        None => origin.may_agree(beginnings),
        Some(_) => origin.agrees(beginnings),
    };
    Ok(agrees.context(format!("compare with {name}"))?.then_some(bytes))
}

/// An origin, and its sealed bytes.
async fn open_origin(path: &WalPath, number: usize, name: &ObjectName) -> Result<(Origin, Bytes)> {
    let location = path.context.writers[number].location();
    let bytes = location.get(name).await?;
    let header = Header::check(&bytes, name)?;
    let keyring = path.context.epochs.keyring();
    let epoch = keyring.epoch(path.context.system, header.epoch(), location).await?;
    Ok((Origin::open(bytes.clone(), name, &epoch)?, bytes))
}

/// The ranges of a branch's WAL among `names`.
pub fn ranges(names: &[ObjectName], of: Branch) -> impl Iterator<Item = LsnRange> + '_ {
    names.iter().filter_map(move |name| match name {
        ObjectName::Wal { branch, range, .. } if *branch == of => Some(*range),
        _ => None,
    })
}

/// How far the newest WAL of a branch goes without a hole; 0/0 if there is none.
fn frontier(names: &[ObjectName], of: Branch) -> Lsn {
    let ranges: Vec<LsnRange> = ranges(names, of).collect();
    let Some(end) = ranges.iter().map(|range| range.end).max() else { return Lsn::INVALID };
    let from = Lsn::new(end.get().saturating_sub(LOOK_BACK));
    let mut newest: Vec<LsnRange> = ranges.into_iter().filter(|range| range.end > from).collect();
    let begin = newest.iter().map(|range| range.start).min().unwrap_or(end);
    covered_until(begin, &mut newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::id::{ObjectId, SystemId};

    #[test]
    fn a_frontier_ends_at_a_new_hole_but_not_at_an_old_one() {
        let branch: Branch = "00000001-01020304".parse().unwrap();
        let span = |n: u64| ObjectName::Wal {
            system: SystemId::new(7),
            branch,
            range: LsnRange::new(Lsn::new(n * SPAN_BYTES), Lsn::new((n + 1) * SPAN_BYTES)),
            id: ObjectId::random(),
        };
        assert_eq!(frontier(&[], branch), Lsn::INVALID);
        let names = [span(1), span(100), span(101), span(103)];
        assert_eq!(frontier(&names, branch), Lsn::new(102 * SPAN_BYTES));
        assert_eq!(frontier(&names[..3], branch), Lsn::new(102 * SPAN_BYTES));
        assert_eq!(frontier(&names, "00000001-01020305".parse().unwrap()), Lsn::INVALID);
    }

    #[test]
    fn what_any_location_has_is_not_missing() {
        let branch: Branch = "00000001-01020304".parse().unwrap();
        let span = |n: u64| ObjectName::Wal {
            system: SystemId::new(7),
            branch,
            range: LsnRange::new(Lsn::new(n * SPAN_BYTES), Lsn::new((n + 1) * SPAN_BYTES)),
            id: ObjectId::random(),
        };
        let range =
            |a: u64, b: u64| LsnRange::new(Lsn::new(a * SPAN_BYTES), Lsn::new(b * SPAN_BYTES));
        let stock =
            Stock { listed: vec![(0, vec![span(1), span(2)]), (1, vec![span(2), span(4)])] };
        assert_eq!(stock.missing(branch, range(1, 3)), []);
        assert_eq!(stock.missing(branch, range(1, 6)), [range(3, 4), range(5, 6)]);
        assert_eq!(stock.missing(branch, range(0, 2)), [range(0, 1)]);
        let other = "00000001-01020305".parse().unwrap();
        assert_eq!(stock.missing(other, range(1, 3)), [range(1, 3)]);
    }
}
