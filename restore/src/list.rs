//! What can be restored: the snapshots, and the stretches of time and WAL that each branch can be recovered to.
//!
//! Read from listings, manifests and the footers at the ends of each stretch; nothing is decoded.

use crate::access::Access;
use crate::plan::bytes;
use crate::resolve::line::line_of;
use crate::resolve::reach::{Gap, Reach};
use crate::resolve::survey::Survey;
use backstay_common::Result;
use backstay_common::catalog::Catalog;
use backstay_common::id::{Branch, ClusterName, LocationName, ObjectId, SnapshotId, SystemId};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_common::pgtime::PgTime;
use backstay_common::pin::{Hold, PinRecord};
use backstay_common::snapshot::ManifestPlain;
use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// All that `list --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    pub cluster: ClusterName,
    pub system: SystemId,
    /// Oldest first.
    pub snapshots: Vec<ListedSnapshot>,
    pub branches: Vec<ListedBranch>,
    pub unreachable: Vec<(LocationName, String)>,
    pub notes: Vec<String>,
    /// The systems that the cluster had before, newest first, as far as anything is left of them.
    pub earlier: Vec<Listing>,
}

/// One snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct ListedSnapshot {
    pub id: SnapshotId,
    /// `None` for one that was begun and is complete nowhere.
    pub complete: Option<CompleteSnapshot>,
    /// Where it is complete.
    pub locations: Vec<LocationName>,
    /// Where it has been begun and is not complete.
    pub incomplete_at: Vec<LocationName>,
    /// What holds it, so that prune leaves it alone.
    pub pins: Vec<ListedPin>,
}

/// A pin that holds.
#[derive(Clone, Debug, Serialize)]
pub struct ListedPin {
    pub pin: ObjectId,
    pub reason: String,
    pub by: String,
    /// Without it, until somebody gives it back.
    pub until: Option<Timestamp>,
    /// All WAL from the snapshot's start on is held too.
    pub with_wal: bool,
}

/// What a manifest says.
#[derive(Clone, Debug, Serialize)]
pub struct CompleteSnapshot {
    pub branch: Branch,
    pub start: Lsn,
    pub stop: Lsn,
    pub finished: Timestamp,
    pub server_version: u32,
    pub database_bytes: u64,
    pub stored_bytes: u64,
    pub corrupt_pages: u64,
    /// True if all WAL up to its end is there, so that it can be restored.
    pub is_usable: bool,
}

/// One branch.
#[derive(Clone, Debug, Serialize)]
pub struct ListedBranch {
    pub branch: Branch,
    /// Stretches without a hole to which this branch can be recovered, oldest first.
    pub recoverable: Vec<Recoverable>,
    /// Holes in the stored WAL.
    pub gaps: Vec<(Lsn, Lsn)>,
    /// What agents recorded: no moment in these can be recovered.
    pub recorded_gaps: Vec<backstay_common::gap::Gap>,
}

/// Every position from `from` to `to` can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Recoverable {
    /// The earliest snapshot that begins it,
    pub snapshot: SnapshotId,
    /// and its end.
    pub from: Lsn,
    pub from_time: Timestamp,
    pub to: Lsn,
    /// The newest transaction in it.
    pub newest_transaction: Option<Timestamp>,
    /// The latest time that the server's clock proves to be covered.
    pub covered_until: Option<Timestamp>,
}

/// Lists the locations and says what can be restored. Changes nothing; safe to drop.
pub async fn list(access: &Access) -> Result<Listing> {
    let catalog = Arc::new(Catalog::load(&access.locations, access.system).await?);
    let survey = Survey::load(access, catalog.clone()).await?;
    let mut branches = Vec::new();
    for &branch in survey.pasts.keys() {
        branches.push(listed_branch(&survey, branch).await?);
    }
    let mut notes = survey.notes.clone();
    let mut pins = pins(access, &catalog, &mut notes).await;
    let mut snapshots = snapshots(&survey, &catalog);
    for snapshot in &mut snapshots {
        snapshot.pins = pins.remove(&snapshot.id).unwrap_or_default();
    }
    Ok(Listing {
        cluster: access.cluster.clone(),
        system: access.system,
        snapshots,
        branches,
        unreachable: [&access.unreachable[..], &catalog.unreachable[..]].concat(),
        notes,
        earlier: Vec::new(),
    })
}

/// The same with all systems that the cluster has had.
pub async fn list_all(access: &Access) -> Result<Listing> {
    let mut listing = list(access).await?;
    for &system in access.systems.iter().filter(|system| **system != access.system) {
        let earlier = list(&access.of(system)?).await?;
        if !earlier.snapshots.is_empty() || !earlier.branches.is_empty() {
            listing.earlier.push(earlier);
        }
    }
    Ok(listing)
}

/// The pins that hold now. One that cannot be read is noted.
async fn pins(
    access: &Access,
    catalog: &Catalog,
    notes: &mut Vec<String>,
) -> BTreeMap<SnapshotId, Vec<ListedPin>> {
    let now = Timestamp::now().as_second();
    let mut pins: BTreeMap<SnapshotId, Vec<ListedPin>> = BTreeMap::new();
    for (&pin, &(seq, places)) in &catalog.pins {
        let name = ObjectName::Pin { system: catalog.system, pin, seq };
        match access.read(&name, places, PinRecord::open).await {
            Ok(record) if record.holds(now) => {
                pins.entry(record.snapshot).or_default().push(ListedPin {
                    pin,
                    until: record.until.and_then(|until| Timestamp::from_second(until).ok()),
                    with_wal: record.hold == Hold::Onwards,
                    reason: record.reason,
                    by: record.by,
                })
            }
            Ok(_) => {}
            Err(error) => notes.push(format!("pin {pin} is left out: {}", error.message())),
        }
    }
    pins
}

fn snapshots(survey: &Survey, catalog: &Catalog) -> Vec<ListedSnapshot> {
    let listed = catalog.snapshots.iter().map(|(&id, entry)| {
        let incomplete = entry.begin.iter().filter(|&index| !entry.manifest.contains(index));
        ListedSnapshot {
            id,
            complete: survey.snapshots.get(&id).map(|plain| complete(survey, id, plain)),
            locations: catalog.names(entry.manifest),
            incomplete_at: incomplete.map(|index| catalog.locations[index].clone()).collect(),
            pins: Vec::new(),
        }
    });
    listed.collect()
}

fn complete(survey: &Survey, id: SnapshotId, plain: &ManifestPlain) -> CompleteSnapshot {
    let reach = survey.reach(&line_of(plain.branch, &survey.pasts), plain);
    CompleteSnapshot {
        branch: plain.branch,
        start: plain.start,
        stop: plain.stop,
        finished: finished(id, plain),
        server_version: plain.server_version,
        database_bytes: plain.database_bytes,
        stored_bytes: plain.stored_bytes,
        corrupt_pages: plain.corrupt_pages,
        is_usable: reach.is_some_and(|reach| reach.end >= plain.stop),
    }
}

fn finished(id: SnapshotId, plain: &ManifestPlain) -> Timestamp {
    Timestamp::from_second(plain.finished).unwrap_or(id.began())
}

async fn listed_branch(survey: &Survey, branch: Branch) -> Result<ListedBranch> {
    let line = line_of(branch, &survey.pasts);
    let on_line = survey.on_line(&line, None);
    let mut recoverable: Vec<(Recoverable, Reach)> = Vec::new();
    for (id, plain) in on_line.into_iter().rev() {
        let reach = survey.reach(&line, plain).filter(|reach| reach.end >= plain.stop);
        let Some(reach) = reach.filter(|reach| reach.tip() == branch) else { continue };
        // What ends where an older snapshot's stretch does is a part of it.
        if recoverable.iter().any(|(_, other)| other.end == reach.end) {
            continue;
        }
        let from_time = finished(id, plain);
        let stretch = Recoverable {
            snapshot: id,
            from: plain.stop,
            from_time,
            to: reach.end,
            newest_transaction: None,
            covered_until: None,
        };
        recoverable.push((stretch, reach));
    }
    let mut filled = Vec::new();
    for (mut stretch, reach) in recoverable {
        stretch.newest_transaction =
            newest_transaction(survey, &reach).await?.map(PgTime::timestamp);
        stretch.covered_until = covered_until(survey, &reach).await?.map(PgTime::timestamp);
        filled.push(stretch);
    }
    let covered = &survey.pasts[&branch].covered;
    let gaps = covered.windows(2).map(|two| (two[0].end, two[1].start)).collect();
    let recorded_gaps = survey.gaps.iter().filter(|gap| gap.branch == branch).cloned().collect();
    Ok(ListedBranch { branch, recoverable: filled, gaps, recorded_gaps })
}

/// Looks at the last footers only, a few at a time, back to the first that tells of a transaction.
async fn newest_transaction(survey: &Survey, reach: &Reach) -> Result<Option<PgTime>> {
    const AT_ONCE: usize = 8;
    for stretches in reach.stretches.rchunks(AT_ONCE) {
        let footers = survey.footers(stretches).await?;
        let newest = footers.iter().filter_map(|meta| meta.summary.greatest_time).max();
        if newest.is_some() {
            return Ok(newest.map(PgTime));
        }
    }
    Ok(None)
}

async fn covered_until(survey: &Survey, reach: &Reach) -> Result<Option<PgTime>> {
    const LAST: usize = 8;
    let last = reach.stretches.len().saturating_sub(LAST);
    let end = Reach { stretches: reach.stretches[last..].to_vec(), ..reach.clone() };
    survey.clock(&end).await
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Cluster {} (system {})\n", self.cluster, self.system)?;
        let width = "20261122T020000Z-1f2e3d4c".len();
        writeln!(
            f,
            "{:width$}  {:20}  {:>9}  {:>9}  WHERE",
            "SNAPSHOT", "FINISHED", "DATABASE", "ADDED"
        )?;
        for snapshot in &self.snapshots {
            writeln!(f, "{snapshot}")?;
        }
        if self.snapshots.is_empty() {
            writeln!(f, "none: nothing can be restored yet")?;
        }
        for branch in &self.branches {
            write!(f, "\n{branch}")?;
        }
        for (name, reason) in &self.unreachable {
            write!(f, "\nnot asked: {name}: {reason}")?;
        }
        for note in &self.notes {
            write!(f, "\nnote: {note}")?;
        }
        for earlier in &self.earlier {
            write!(f, "\nEarlier: {earlier}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ListedSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |names: &[LocationName]| {
            names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
        };
        let Some(complete) = &self.complete else {
            let place = names(&[&self.locations[..], &self.incomplete_at[..]].concat());
            return write!(f, "{}  incomplete, or damaged: {place}", self.id);
        };
        let (database, added) = (bytes(complete.database_bytes), bytes(complete.stored_bytes));
        let finished = complete.finished.to_string();
        write!(
            f,
            "{}  {finished:20}  {database:>9}  {added:>9}  {}",
            self.id,
            names(&self.locations)
        )?;
        if !self.incomplete_at.is_empty() {
            write!(f, " (not yet: {})", names(&self.incomplete_at))?;
        }
        if complete.corrupt_pages > 0 {
            write!(f, "; {} damaged pages", complete.corrupt_pages)?;
        }
        if !complete.is_usable {
            f.write_str("; its WAL is not all there")?;
        }
        for pin in &self.pins {
            write!(f, "\n  pinned by {} ({}): {}", pin.by, pin.pin, pin.reason)?;
            if let Some(until) = pin.until {
                write!(f, ", until {until}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ListedBranch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Branch {}", self.branch)?;
        for stretch in &self.recoverable {
            let until = stretch.newest_transaction.max(stretch.covered_until);
            let until = until.map_or("its end".to_string(), |time| time.to_string());
            let range = LsnRange::new(stretch.from, stretch.to);
            writeln!(f, "  recoverable from {} to {until}, {range}", stretch.from_time)?;
        }
        if self.recoverable.is_empty() {
            writeln!(f, "  nothing on it can be recovered: no snapshot reaches it")?;
        }
        for &(start, end) in &self.gaps {
            let gap = Gap { branch: self.branch, range: LsnRange::new(start, end) };
            writeln!(f, "  gap: the WAL {} is at no location that answers", gap.range)?;
        }
        for gap in &self.recorded_gaps {
            writeln!(f, "  cannot be recovered: {gap}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Repo, SYSTEM, at, micros};
    use backstay_common::snapshot::Begin;

    #[tokio::test]
    async fn a_snapshot_begun_when_its_lease_was_over_is_none() {
        use backstay_common::lease::Lease;
        let repo = Repo::new(2).await;
        let mut writer = repo.first_branch(&[0, 1]).await;
        let known = writer.snapshot(&repo, 0).await;
        writer.wal.switch(false);
        let late = writer.snapshot(&repo, 200).await;
        writer.ship(&repo).await;
        let lease = Lease {
            generation: 1,
            agent: "db1".parse().unwrap(),
            slot: "backstay_db1".into(),
            holder: [1; 16],
            begun: vec![known],
            is_complete: true,
            made: 0,
        };
        repo.put(&lease.seal(&repo.epoch, SYSTEM), &[1]).await;
        let listing = list(&repo.access).await.unwrap();
        let complete: Vec<bool> = listing.snapshots.iter().map(|s| s.complete.is_some()).collect();
        assert_eq!(complete, [true, false]);
        assert_eq!(repo.plan("latest").await.unwrap().snapshot, known);
        assert!(listing.notes.iter().any(|note| note.contains(&late.to_string())), "{listing}");
    }

    #[tokio::test]
    async fn stretches_end_at_gaps_and_begin_at_snapshots() {
        let repo = Repo::new(2).await;
        let mut writer = repo.first_branch(&[0, 1]).await;
        let first = writer.snapshot(&repo, 0).await;
        let first_stop = writer.position();
        writer.wal.commit(10, micros(60));
        writer.ship_with_clock(&repo, 90).await;
        let gap_start = writer.position();
        writer.wal.commit(11, micros(120));
        writer.seal(&repo, writer.position(), None);
        let gap_end = writer.position();
        // The second snapshot needs its segment from the start on.
        writer.wal.switch(false);
        writer.places = vec![0];
        let second = writer.snapshot(&repo, 200).await;
        writer.ship(&repo).await;
        let begun = SnapshotId::new(at(900), [9; 4]);
        let agent = "db1".parse().unwrap();
        let begin = Begin { snapshot: begun, agent, parent: None, generation: 0 };
        repo.put(&begin.seal(&repo.epoch, SYSTEM), &[1]).await;

        for (seq, reason) in [(0, "first words"), (1, "before the migration")] {
            let pin = PinRecord {
                snapshot: first,
                hold: Hold::Consistent,
                reason: reason.into(),
                by: "db1".into(),
                made: 0,
                until: None,
                released: false,
                damage: None,
                restore: None,
            };
            let id = ObjectId::from_bytes([seq; 8]);
            repo.put(
                &pin.seal(&repo.epoch, SYSTEM, ObjectId::from_bytes([7; 8]), seq.into()),
                &[1],
            )
            .await;
            repo.put(&pin.given_back().seal(&repo.epoch, SYSTEM, id, 9), &[0]).await;
        }
        let recorded = backstay_common::gap::Gap {
            branch: writer.branch,
            start: gap_start,
            end: gap_end,
            cause: "removed".into(),
            agent: "db1".parse().unwrap(),
            noticed: 0,
            detail: "the slot was lost".into(),
        };
        repo.put(&recorded.seal(&repo.epoch, SYSTEM), &[1]).await;

        let listing = list(&repo.access).await.unwrap();
        let pins: Vec<&str> = listing.snapshots[0].pins.iter().map(|pin| &pin.reason[..]).collect();
        assert_eq!(pins, ["before the migration"]);
        assert!(listing.to_string().contains("pinned by db1 (0707070707070707): before"));
        let branch = &listing.branches[0];
        assert_eq!(branch.recorded_gaps, [recorded]);
        let refused = repo.refusal(&format!("lsn:{}", gap_start.add(8))).await;
        assert!(refused.contains("the slot was lost"), "{refused}");
        let plan = repo.plan(&format!("snapshot:{second}")).await.unwrap();
        assert!(plan.notes.iter().any(|note| note.contains("the slot was lost")), "{plan}");
        assert_eq!(branch.gaps, [(gap_start, gap_end)]);
        let stretch = &branch.recoverable[0];
        assert_eq!((stretch.snapshot, stretch.from, stretch.to), (first, first_stop, gap_start));
        assert_eq!(
            (stretch.newest_transaction, stretch.covered_until),
            (Some(at(60)), Some(at(90)))
        );
        assert_eq!(branch.recoverable[1].snapshot, second);
        assert_eq!(branch.recoverable.len(), 2);
        let places: Vec<usize> = listing.snapshots.iter().map(|s| s.locations.len()).collect();
        assert_eq!(places, [2, 1, 0]);
        assert!(listing.snapshots[2].complete.is_none());
        let text = listing.to_string();
        assert!(text.contains("the slot was lost"), "{text}");
        assert!(text.contains("gap") && text.contains(&format!("{begun}  incomplete")), "{text}");
        assert!(serde_json::to_string(&listing).unwrap().contains("\"is_usable\":true"));
    }
}
