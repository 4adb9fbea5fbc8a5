//! What a restore will do, decided before anything is touched, and frozen.
//!
//! [`make`] loads the catalog, lets `resolve` turn the target into a position, and puts down what follows from that:
//! the WAL of each branch, the settings that replay must not fall below, how many bytes and how long. A plan is
//! plain data: `restore` keeps it beside the restored directory, and `wal-fetch` answers by it.

mod make;
mod print;

pub use make::{PlanRequest, choose, make, make_with};
pub use print::bytes;

use backstay_common::id::{Branch, ClusterName, LocationName, SnapshotId, SystemId};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::pgtime::PgTime;
use backstay_common::segment::TimelineId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything that a restore needs to know, and all that `plan --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub cluster: ClusterName,
    pub system: SystemId,
    /// The target as it was typed.
    pub target: String,
    pub snapshot: SnapshotId,
    /// `server_version_num` of the server that was backed up.
    pub server_version: u32,
    pub segment_bytes: u32,
    /// The branches that replay passes through, oldest first; the last one is where it ends.
    pub legs: Vec<Leg>,
    pub stop: StopPoint,
    /// No WAL from here on is served: `restore_command` says "not found" there and nowhere else.
    pub end: Lsn,
    /// The last transaction that ends on the restored side of the stop, if the plan saw one.
    pub last_transaction: Option<PgTime>,
    /// The first transaction that is not restored, if the plan saw one.
    pub first_lost: Option<PgTime>,
    /// `.history` files of all timelines known, so that the restored cluster chooses a fresh number.
    pub histories: Vec<History>,
    /// The server settings that replay must not fall below.
    pub minimums: HotStandbyMinimums,
    /// Best first.
    pub locations: Vec<LocationName>,
    /// Locations that could not be asked, with the reason.
    pub unreachable: Vec<(LocationName, String)>,
    /// Bytes of the restored files.
    pub database_bytes: u64,
    /// Bytes to fetch for the snapshot.
    pub snapshot_bytes: u64,
    /// Bytes of WAL to replay.
    pub wal_bytes: u64,
    /// An estimate for the whole, in seconds, from stated rates.
    pub estimate_seconds: u64,
    /// The damaged server's `pg_wal`, if WAL up to the end is only there.
    #[serde(default)]
    pub wal_from: Option<PathBuf>,
    /// What a person should know of the choices made.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// The WAL of one branch that the restore needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leg {
    pub branch: Branch,
    pub start: Lsn,
    /// The switch to the next leg's timeline, or the plan's end.
    pub end: Lsn,
}

impl Leg {
    pub fn timeline(&self) -> TimelineId {
        self.branch.timeline
    }

    pub fn range(&self) -> LsnRange {
        LsnRange::new(self.start, self.end)
    }
}

/// Where replay stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopPoint {
    /// As soon as the snapshot is consistent.
    Consistent,
    /// After the first record that starts at or after this position (PostgreSQL's inclusive LSN target).
    AfterRecord(Lsn),
    /// Before the first record that starts at or after this position (PostgreSQL's exclusive LSN target).
    BeforeRecord(Lsn),
}

/// One timeline's `.history` file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    pub timeline: TimelineId,
    pub content: String,
}

/// Settings that hot standby needs to be at least as high as they were on the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotStandbyMinimums {
    pub max_connections: i32,
    pub max_worker_processes: i32,
    pub max_wal_senders: i32,
    pub max_prepared_transactions: i32,
    pub max_locks_per_transaction: i32,
}
