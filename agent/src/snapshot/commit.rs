//! The commit, at each location by itself: the manifest is put there when all that it needs is listed there.
//!
//! That is: every pack, whoever stored it, with its right size; and the WAL from the start of the segment that holds
//! the snapshot's start up to its stop. A crash before leaves a `begin` without a manifest: no snapshot.

use super::parent::{self, Parent};
use super::ship::{Fleet, Lane, Parcel, patiently, put_patiently};
use crate::copy::{self, Expected};
use crate::wal::WalStatus;
use backstay_common::id::{Branch, LocationName, ObjectId};
use backstay_common::lsn::{Lsn, LsnRange, covered_until};
use backstay_common::name::{ObjectName, folder};
use backstay_common::segment::TimelineId;
use backstay_common::snapshot::{ManifestPlain, PackEntry};
use backstay_common::{Context, Error, Kind, Result};
use futures::FutureExt;
use futures::future::join_all;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long the WAL at a location may stand still before it is given up.
const WAL_STANDSTILL_MAX: Duration = Duration::from_secs(600);
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// When the WAL is said to be there, and is not listed yet.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(300);

/// A location that lacks more of what older snapshots stored, as a new one does, is left to sync: the next snapshot is not to
/// wait for that.
const FILLED_BYTES_MAX: u64 = 1 << 30;

/// Waits until the WAL of `timeline` has its branch.
pub async fn branch_of(wal: &watch::Receiver<WalStatus>, timeline: TimelineId) -> Result<Branch> {
    let mut wal = wal.clone();
    let is_known = |status: &WalStatus| status.branch.is_some_and(|b| b.timeline == timeline);
    let known = tokio::time::timeout(WAL_STANDSTILL_MAX, wal.wait_for(is_known)).await;
    let branch = known.ok().and_then(|status| status.ok()?.branch);
    branch.ok_or_else(|| {
        let number = timeline.get();
        Error::new(Kind::Postgres, format!("the WAL of timeline {number} is not being received"))
            .remedy(
                "see `backstay-agent status` for why; a snapshot without its WAL is worth nothing",
            )
    })
}

/// Fails if nobody has some of the WAL that the snapshot needs: it will never come.
pub fn no_gap_in(wal: &WalStatus, needed: LsnRange) -> Result<()> {
    let (Some(start), Some(end)) = (wal.gap_start, wal.gap_end) else { return Ok(()) };
    match start < needed.end && needed.start < end {
        false => Ok(()),
        true => {
            let gap = LsnRange::new(start, end);
            let reason = format!("the WAL of {gap} is lost, and the snapshot needs {needed}");
            Err(Error::new(Kind::Postgres, reason)
                .remedy("the next attempt begins behind the gap; see `backstay-agent status` for what was slow"))
        }
    }
}

/// How many of `missing`, and of how many bytes, are of the snapshot before, if they are too many to be waited for.
fn too_many(missing: &[&PackEntry], parent: &[PackEntry]) -> Option<(usize, u64)> {
    let of_parent: HashSet<ObjectId> = parent.iter().map(PackEntry::id).collect();
    let older = missing.iter().filter(|entry| of_parent.contains(&entry.id()));
    let sizes: Vec<u64> = older.map(|entry| entry.size).collect();
    let bytes = sizes.iter().sum();
    (bytes > FILLED_BYTES_MAX).then_some((sizes.len(), bytes))
}

/// A snapshot that is ready to be committed.
#[derive(Debug)]
pub struct Commit<'a> {
    pub fleet: &'a Fleet,
    pub wal: &'a watch::Receiver<WalStatus>,
    pub plain: &'a ManifestPlain,
    /// What it refers to.
    pub parent: Option<&'a Parent>,
    /// Sealed once, the same everywhere.
    pub manifest: &'a Parcel,
}

impl Commit<'_> {
    /// Commits wherever it can be, all locations side by side. What became of it, in the order of the config.
    pub async fn everywhere(&self) -> Vec<(LocationName, Result<()>)> {
        let at =
            |lane: Arc<Lane>| async move { (lane.name().clone(), self.at(&lane).await) }.boxed();
        join_all(self.fleet.lanes().iter().cloned().map(at)).await
    }

    async fn at(&self, lane: &Lane) -> Result<()> {
        lane.settled().await;
        if let Some(reason) = lane.left_behind() {
            tracing::info!(location = %lane.name(), "filling by copying, because: {reason}");
            put_patiently(lane.writer(), lane.begin()).await.context("begin the snapshot")?;
        }
        self.fill(lane).await?;
        self.wait_for_wal(lane).await?;
        self.parent_is_kept(lane).await?;
        put_patiently(lane.writer(), self.manifest).await.context("put the manifest")?;
        tracing::info!(location = %lane.name(), snapshot = %self.plain.snapshot, "snapshot committed");
        Ok(())
    }

    /// Makes sure that nobody deleted the parent meanwhile, whose packs would go with it.
    async fn parent_is_kept(&self, lane: &Lane) -> Result<()> {
        let Some(parent) = self.parent else { return Ok(()) };
        if parent::is_still_listed(parent, lane.writer().location()).await? {
            return Ok(());
        }
        for other in self.fleet.lanes().iter().filter(|other| other.name() != lane.name()) {
            let listed = parent::is_still_listed(parent, other.writer().location()).await;
            if listed.unwrap_or(false) {
                return Ok(());
            }
        }
        let reason = format!("snapshot {}, which this one refers to, is gone", parent.id());
        Err(Error::new(Kind::Storage, reason)
            .remedy("the next attempt compares with another snapshot"))
    }

    /// Makes sure that all packs are listed, by copying those that are not if they are not too many.
    async fn fill(&self, lane: &Lane) -> Result<()> {
        let missing = self.missing(lane).await?;
        let parent = self.parent.map_or(&[][..], |parent| &parent.plain.packs);
        if let Some((count, bytes)) = too_many(&missing, parent) {
            let place = lane.name();
            let reason =
                format!("location {place} lacks {count} older packs, of {} MiB", bytes >> 20);
            return Err(Error::new(Kind::Storage, reason).remedy(
                "nothing is to be done: they are copied there, and then the snapshot is committed",
            ));
        }
        for entry in &missing {
            self.copy(entry, lane).await.context("copy a pack from another location")?;
        }
        let missing = if missing.is_empty() { missing } else { self.missing(lane).await? };
        match missing.first() {
            None => Ok(()),
            Some(entry) => {
                let (place, name) = (lane.name(), entry.name(self.plain.system));
                let reason =
                    format!("location {place} does not list {name} with its {} bytes", entry.size);
                Err(Error::new(Kind::Storage, reason))
            }
        }
    }

    async fn missing(&self, lane: &Lane) -> Result<Vec<&PackEntry>> {
        let folder = folder::packs(self.plain.system);
        let listed = patiently(|| lane.writer().location().list(&folder)).await?;
        let sizes: HashMap<ObjectName, u64> =
            listed.into_iter().filter_map(|listed| Some((listed.name?, listed.size))).collect();
        let is_missing =
            |entry: &&PackEntry| sizes.get(&entry.name(self.plain.system)) != Some(&entry.size);
        Ok(self.plain.packs.iter().filter(is_missing).collect())
    }

    async fn copy(&self, entry: &PackEntry, to: &Lane) -> Result<()> {
        let name = entry.name(self.plain.system);
        let mut sources = Vec::new();
        for from in self.fleet.lanes().iter().filter(|from| from.name() != to.name()) {
            from.settled().await;
            if from.left_behind().is_none() {
                sources.push(from.writer().location());
            }
        }
        let fetch = async || {
            copy::fetch(&name, &sources, Some(Expected::from(entry)), &mut Vec::new()).await
        };
        let whole = match sources.is_empty() {
            false => patiently(fetch).await?,
            true => {
                let reason = format!("no location that was not left behind has {name}");
                return Err(Error::new(Kind::Storage, reason));
            }
        };
        patiently(|| copy::store(to.writer(), &whole, &sources)).await.map(drop)
    }

    /// Waits until the WAL that the snapshot needs is listed, as long as it keeps coming.
    async fn wait_for_wal(&self, lane: &Lane) -> Result<()> {
        let needed = self.plain.wal_needed();
        let (mut best, mut since) = (needed.start, Instant::now());
        loop {
            let covered = self.covered(lane, needed.start).await?;
            if covered >= needed.end {
                return Ok(());
            }
            no_gap_in(&self.wal.borrow(), needed)?;
            if covered > best {
                (best, since) = (covered, Instant::now());
            }
            if since.elapsed() > WAL_STANDSTILL_MAX {
                let reason = format!(
                    "location {} has the WAL from {} to {covered} only, and the snapshot needs it to {}",
                    lane.name(),
                    needed.start,
                    needed.end
                );
                return Err(Error::new(Kind::Storage, reason)
                    .remedy("see `backstay-agent status` for why WAL does not get there"));
            }
            tracing::debug!(location = %lane.name(), %covered, needed = %needed.end, "waiting for WAL");
            self.wait_for_word(lane.name(), needed.end).await;
        }
    }

    async fn covered(&self, lane: &Lane, from: Lsn) -> Result<Lsn> {
        let (system, branch) = (self.plain.system, self.plain.branch);
        let folder = folder::branch(system, branch);
        // A span that holds the first byte starts at its span's start or later.
        let after = folder::branch_from(system, branch, from.span_start());
        let listed = patiently(|| lane.writer().location().list_from(&folder, &after)).await?;
        let range = |name| match name {
            ObjectName::Wal { range, .. } => Some(range),
            _ => None,
        };
        let mut ranges: Vec<LsnRange> =
            listed.into_iter().filter_map(|listed| range(listed.name?)).collect();
        Ok(covered_until(from, &mut ranges))
    }

    /// Until the WAL's own task says that it is there, or it is time to look in any case.
    async fn wait_for_word(&self, location: &LocationName, end: Lsn) {
        let mut wal = self.wal.clone();
        let is_there = |status: &WalStatus| {
            status.locations.iter().any(|l| l.name == *location && l.stored >= end)
        };
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
        // Whether it was said or not, the listing decides.
        let _ = tokio::time::timeout(LOOK_EVERY, wal.wait_for(is_there)).await;
    }
}

#[cfg(test)]
mod tests;
