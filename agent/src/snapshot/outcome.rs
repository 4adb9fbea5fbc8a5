//! What is asked of a snapshot, how far it is, and what comes of it: as the keeper and those who ask see it.

use backstay_common::id::{LocationName, SnapshotId};
use backstay_common::lsn::Lsn;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is asked of a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotRequest {
    /// An immediate checkpoint; else PostgreSQL spreads it over minutes.
    pub fast_checkpoint: bool,
    pub reason: Reason,
    /// Of the lease that is held.
    pub generation: u64,
}

/// Why a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    FirstStart,
    Scheduled,
    /// One was due while the agent was down.
    CaughtUp,
    /// The server is on another timeline than the newest snapshot: after a restore or a promotion.
    NewTimeline,
    /// WAL is missing, and only a snapshot makes moments after the gap reachable.
    AfterGap,
    Asked,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting for PostgreSQL's checkpoint.
    #[default]
    Starting,
    Reading,
    /// Waiting for packs and WAL to be at the locations.
    Committing,
    Done,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Starting => "starting",
            Phase::Reading => "reading",
            Phase::Committing => "committing",
            Phase::Done => "done",
        })
    }
}

/// How far a snapshot has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// None before the first.
    pub id: Option<SnapshotId>,
    pub phase: Phase,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub files_done: u64,
    pub files_total: u64,
    /// Bytes of the packs so far, counted once whatever the number of locations.
    pub stored_bytes: u64,
    pub started: Option<jiff::Timestamp>,
}

/// A snapshot that is committed at one location at least.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotOutcome {
    pub id: SnapshotId,
    /// The snapshot that it was compared with.
    pub parent: Option<SnapshotId>,
    /// Where replay begins.
    pub start: Lsn,
    /// From here on it is consistent.
    pub stop: Lsn,
    pub committed: Vec<LocationName>,
    /// Where it is not committed, and why.
    pub pending: Vec<(LocationName, String)>,
    pub database_bytes: u64,
    /// Bytes that were read of its files, or came over the network: files that are known to be unchanged are not read.
    pub read_bytes: u64,
    /// Bytes of the pages that are not as the parent has them; without a parent, of all.
    pub changed_bytes: u64,
    pub stored_bytes: u64,
    pub seconds: f64,
    pub corrupt_pages: u64,
}

impl fmt::Display for SnapshotOutcome {
    /// Several lines, for a person.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let committed: Vec<&str> = self.committed.iter().map(LocationName::as_str).collect();
        writeln!(f, "snapshot {} taken in {:.1} s", self.id, self.seconds)?;
        writeln!(f, "  start {}, consistent from {}", self.start, self.stop)?;
        let (database, read) = (mib(self.database_bytes), mib(self.read_bytes));
        let (changed, stored) = (mib(self.changed_bytes), mib(self.stored_bytes));
        if let Some(parent) = self.parent {
            writeln!(f, "  {database:.1} MiB compared with {parent}, {changed:.1} MiB changed")?;
        }
        writeln!(f, "  {read:.1} MiB read, {stored:.1} MiB stored")?;
        write!(f, "  committed at {}", committed.join(", "))?;
        for (location, reason) in &self.pending {
            write!(f, "\n  NOT committed at {location}: {reason}")?;
        }
        match self.corrupt_pages {
            0 => Ok(()),
            pages => write!(f, "\n  {pages} pages fail their checksum at the source"),
        }
    }
}
