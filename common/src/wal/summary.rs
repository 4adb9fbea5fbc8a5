//! What the footer of a stored object says about the WAL in it.

use super::decode::Decoder;
use super::event::{Event, EventKind};
use crate::lsn::Lsn;
use minicbor::{Decode, Encode};

/// Restore points that one summary names; of more it only says that there are more.
pub const RESTORE_POINTS_MAX: usize = 256;

/// The facts about a run of WAL that a restore plans with. A record belongs to the run in which it ends.
///
/// Times are microseconds since 2000-01-01 00:00 UTC. Bounds hold the records that a target compares: commits and
/// aborts, of prepared transactions too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Summary {
    /// The first record that ends in the run. It may begin before the run.
    #[n(0)]
    pub first_record: Option<Lsn>,
    /// The last record that ends in the run,
    #[n(1)]
    pub last_record: Option<Lsn>,
    /// and where it ends.
    #[n(2)]
    pub last_record_end: Option<Lsn>,
    #[n(3)]
    pub least_time: Option<i64>,
    #[n(4)]
    pub greatest_time: Option<i64>,
    /// Ids wrap around: this one precedes `greatest_xid` as PostgreSQL compares them.
    #[n(5)]
    pub least_xid: Option<u32>,
    #[n(6)]
    pub greatest_xid: Option<u32>,
    /// In WAL order, at most [`RESTORE_POINTS_MAX`].
    #[n(7)]
    pub restore_points: Vec<RestorePoint>,
    /// There are restore points that `restore_points` had no room for.
    #[n(8)]
    pub more_restore_points: bool,
    /// The greatest settings that a parameter change in the run names.
    #[n(9)]
    pub parameter_change: Option<Minima>,
    #[n(10)]
    pub checkpoint: bool,
    #[n(11)]
    pub end_of_recovery: bool,
    /// `full_page_writes` was off somewhere.
    #[n(12)]
    pub full_page_writes_off: bool,
    /// `wal_level` was `minimal` somewhere: data may have changed without WAL.
    #[n(13)]
    pub wal_level_minimal: bool,
}

/// A name given by `pg_create_restore_point`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RestorePoint {
    #[n(0)]
    pub name: String,
    /// The record's start.
    #[n(1)]
    pub lsn: Lsn,
    #[n(2)]
    pub time: i64,
}

/// Settings that a hot standby refuses to start with less of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Minima {
    #[n(0)]
    pub max_connections: i32,
    #[n(1)]
    pub max_worker_processes: i32,
    #[n(2)]
    pub max_wal_senders: i32,
    #[n(3)]
    pub max_prepared_xacts: i32,
    #[n(4)]
    pub max_locks_per_xact: i32,
}

impl Minima {
    /// The greater of each.
    pub fn max(self, other: Minima) -> Minima {
        Minima {
            max_connections: self.max_connections.max(other.max_connections),
            max_worker_processes: self.max_worker_processes.max(other.max_worker_processes),
            max_wal_senders: self.max_wal_senders.max(other.max_wal_senders),
            max_prepared_xacts: self.max_prepared_xacts.max(other.max_prepared_xacts),
            max_locks_per_xact: self.max_locks_per_xact.max(other.max_locks_per_xact),
        }
    }
}

impl Summary {
    /// Notes an event of the run.
    pub fn note(&mut self, event: &Event) {
        if let Some(time) = event.target_time() {
            self.least_time = Some(self.least_time.map_or(time, |least| least.min(time)));
            self.greatest_time = Some(self.greatest_time.map_or(time, |most| most.max(time)));
        }
        if let Some(xid) = event.target_xid() {
            self.least_xid = self.least_xid.filter(|&least| precedes(least, xid)).or(Some(xid));
            self.greatest_xid = self.greatest_xid.filter(|&most| precedes(xid, most)).or(Some(xid));
        }
        self.note_kind(event);
    }

    fn note_kind(&mut self, event: &Event) {
        let level = match &event.kind {
            EventKind::RestorePoint { time, name } => {
                self.note_restore_point(name, event.start, *time);
                None
            }
            &EventKind::ParameterChange {
                max_connections,
                max_worker_processes,
                max_wal_senders,
                max_prepared_xacts,
                max_locks_per_xact,
                wal_level,
                ..
            } => {
                let minima = Minima {
                    max_connections,
                    max_worker_processes,
                    max_wal_senders,
                    max_prepared_xacts,
                    max_locks_per_xact,
                };
                self.parameter_change =
                    Some(self.parameter_change.map_or(minima, |before| before.max(minima)));
                Some(wal_level)
            }
            &EventKind::Checkpoint { full_page_writes, wal_level, .. } => {
                self.checkpoint = true;
                self.full_page_writes_off |= !full_page_writes;
                wal_level
            }
            &EventKind::CheckpointRedo { wal_level } => Some(wal_level),
            &EventKind::EndOfRecovery { wal_level, .. } => {
                self.end_of_recovery = true;
                wal_level
            }
            &EventKind::FullPageWrites(on) => {
                self.full_page_writes_off |= !on;
                None
            }
            _ => None,
        };
        self.wal_level_minimal |= level == Some(0);
    }

    fn note_restore_point(&mut self, name: &str, lsn: Lsn, time: i64) {
        if self.restore_points.len() == RESTORE_POINTS_MAX {
            self.more_restore_points = true;
            return;
        }
        self.restore_points.push(RestorePoint { name: name.to_string(), lsn, time });
    }

    /// Ends the run: adds the records that `decoder` has completed since the run before ended, and begins a new run.
    pub fn finish(&mut self, decoder: &mut Decoder) -> Summary {
        let mut done = std::mem::take(self);
        done.first_record = decoder.take_first_record();
        if done.first_record.is_some() {
            done.last_record = decoder.last_record();
            done.last_record_end = Some(decoder.record_end());
        }
        done
    }
}

/// `TransactionIdPrecedes` for ids of ordinary transactions.
fn precedes(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}
