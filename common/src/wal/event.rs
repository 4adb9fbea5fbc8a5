//! The records that matter to a backup, read.

use super::record::{OPCODE, RM_XACT, RM_XLOG, RecordHeader};
use super::touch::Touch;
use super::version::WalVersion;
use super::{i32_at, i64_at, u32_at, u64_at};
use crate::lsn::Lsn;
use crate::segment::TimelineId;

/// A record that matters to a backup. Times are microseconds since 2000-01-01 00:00 UTC unless they say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The record's first byte: what PostgreSQL compares with `recovery_target_lsn`.
    pub start: Lsn,
    /// Where the next record may begin; after [`EventKind::Switch`], the next segment.
    pub end: Lsn,
    /// The record before.
    pub prev: Lsn,
    /// The transaction that wrote the record; 0 for none.
    pub xid: u32,
    pub kind: EventKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// The transaction [`Event::xid`] and its subtransactions have committed.
    Commit {
        time: i64,
    },
    Abort {
        time: i64,
    },
    /// `PREPARE TRANSACTION`. No time or xid target looks at it.
    Prepare {
        time: i64,
        xid: u32,
    },
    /// `xid` is the prepared transaction; 0 only in a record beyond 64 MiB, whose end is not kept.
    CommitPrepared {
        time: i64,
        xid: u32,
    },
    /// `xid` as in [`EventKind::CommitPrepared`].
    AbortPrepared {
        time: i64,
        xid: u32,
    },
    RestorePoint {
        time: i64,
        name: String,
    },
    /// The server has been started with other settings than before.
    ParameterChange {
        max_connections: i32,
        max_worker_processes: i32,
        max_wal_senders: i32,
        max_prepared_xacts: i32,
        max_locks_per_xact: i32,
        /// 0 minimal, 1 replica, 2 logical.
        wal_level: i32,
        wal_log_hints: bool,
    },
    Checkpoint {
        shutdown: bool,
        /// Where replay would begin.
        redo: Lsn,
        timeline: TimelineId,
        prev_timeline: TimelineId,
        full_page_writes: bool,
        /// 17 and later.
        wal_level: Option<i32>,
        /// The next transaction's id with its epoch in the upper half.
        next_xid: u64,
        /// Seconds since 1970.
        time: i64,
    },
    /// The redo point of an online checkpoint (17 and later).
    CheckpointRedo {
        wal_level: i32,
    },
    /// A promotion.
    EndOfRecovery {
        time: i64,
        timeline: TimelineId,
        prev_timeline: TimelineId,
        /// 17 and later.
        wal_level: Option<i32>,
    },
    /// The rest of the segment is empty.
    Switch,
    /// The backup that began at `start` is consistent from here on.
    BackupEnd {
        start: Lsn,
    },
    /// The server crashed inside the record at `lsn`, which was dropped.
    OverwriteContrecord {
        lsn: Lsn,
        time: i64,
    },
    /// `full_page_writes` has been changed to this.
    FullPageWrites(bool),
    /// What the record does to relations' files; only from a decoder that was asked to watch.
    Touches(Vec<Touch>),
}

impl Event {
    /// The time that `recovery_target_time` compares: that of a transaction's end, prepared or not.
    pub fn target_time(&self) -> Option<i64> {
        self.transaction_end().map(|(time, _)| time)
    }

    /// The transaction that `recovery_target_xid` compares.
    pub fn target_xid(&self) -> Option<u32> {
        self.transaction_end().map(|(_, xid)| xid).filter(|&xid| xid != 0)
    }

    fn transaction_end(&self) -> Option<(i64, u32)> {
        match self.kind {
            EventKind::Commit { time } | EventKind::Abort { time } => Some((time, self.xid)),
            EventKind::CommitPrepared { time, xid } | EventKind::AbortPrepared { time, xid } => {
                Some((time, xid))
            }
            _ => None,
        }
    }
}

/// Reads a record's main data, which may be cut short in records beyond 64 MiB. `Ok(None)` for a kind that does not matter.
pub(super) fn read(
    version: WalVersion,
    header: &RecordHeader,
    main: &[u8],
) -> Result<Option<EventKind>, &'static str> {
    const SHORT: &str = "it is shorter than its kind";
    match header.manager {
        RM_XACT => transaction(version, header.info, main).ok_or(SHORT),
        RM_XLOG => xlog(version, header.info & OPCODE, main).ok_or(SHORT),
        _ => Ok(None),
    }
}

/// "src/include/access/xact.h"
fn transaction(version: WalVersion, info: u8, main: &[u8]) -> Option<Option<EventKind>> {
    const OPCODE: u8 = 0x70;
    let time = || i64_at(main, 0);
    let prepared = || prepared_xid(version, info, main);
    Some(Some(match info & OPCODE {
        0x00 => EventKind::Commit { time: time()? },
        0x10 => EventKind::Prepare { xid: u32_at(main, 8)?, time: i64_at(main, 16)? },
        0x20 => EventKind::Abort { time: time()? },
        0x30 => EventKind::CommitPrepared { time: time()?, xid: prepared() },
        0x40 => EventKind::AbortPrepared { time: time()?, xid: prepared() },
        _ => return Some(None),
    }))
}

/// The prepared transaction that a commit or abort record ends, past the lists before it; 0 if it is not among the bytes.
fn prepared_xid(version: WalVersion, info: u8, main: &[u8]) -> u32 {
    const HAS_INFO: u8 = 0x80;
    const DATABASE: u32 = 1 << 0;
    const TWO_PHASE: u32 = 1 << 4;
    // (bit, bytes of one item) of the lists, in the order in which they stand.
    let lists = [(1, 4), (2, 12), (8, version.dropped_stat_bytes()), (3, 16)];
    let find = || {
        let present =
            u32_at(main, 8).filter(|bits| info & HAS_INFO != 0 && bits & TWO_PHASE != 0)?;
        let mut offset = if present & DATABASE != 0 { 20 } else { 12 };
        for (_, item_bytes) in lists.into_iter().filter(|(bit, _)| present & (1 << bit) != 0) {
            let items = u64::from(u32_at(main, offset)?);
            offset = offset.checked_add(usize::try_from(4 + items * item_bytes).ok()?)?;
        }
        u32_at(main, offset)
    };
    find().unwrap_or(0)
}

/// "src/include/access/xlog_internal.h", "src/include/catalog/pg_control.h"
fn xlog(version: WalVersion, opcode: u8, main: &[u8]) -> Option<Option<EventKind>> {
    let lsn = |n| u64_at(main, n).map(Lsn::new);
    Some(Some(match opcode {
        0x00 | 0x10 => checkpoint(version, opcode == 0x00, main)?,
        0x40 => EventKind::Switch,
        0x50 => EventKind::BackupEnd { start: lsn(0)? },
        0x60 => parameter_change(main)?,
        0x70 => EventKind::RestorePoint { time: i64_at(main, 0)?, name: text(main.get(8..72)?) },
        0x80 => EventKind::FullPageWrites(*main.first()? != 0),
        0x90 => EventKind::EndOfRecovery {
            time: i64_at(main, 0)?,
            timeline: timeline(main, 8)?,
            prev_timeline: timeline(main, 12)?,
            wal_level: wal_level(version, main, 16)?,
        },
        0xD0 => EventKind::OverwriteContrecord { lsn: lsn(0)?, time: i64_at(main, 8)? },
        0xE0 => EventKind::CheckpointRedo { wal_level: i32_at(main, 0)? },
        _ => return Some(None),
    }))
}

fn checkpoint(version: WalVersion, shutdown: bool, main: &[u8]) -> Option<EventKind> {
    Some(EventKind::Checkpoint {
        shutdown,
        redo: u64_at(main, 0).map(Lsn::new)?,
        timeline: timeline(main, 8)?,
        prev_timeline: timeline(main, 12)?,
        full_page_writes: *main.get(16)? != 0,
        wal_level: wal_level(version, main, 20)?,
        next_xid: u64_at(main, 24)?,
        time: i64_at(main, 64)?,
    })
}

fn parameter_change(main: &[u8]) -> Option<EventKind> {
    Some(EventKind::ParameterChange {
        max_connections: i32_at(main, 0)?,
        max_worker_processes: i32_at(main, 4)?,
        max_wal_senders: i32_at(main, 8)?,
        max_prepared_xacts: i32_at(main, 12)?,
        max_locks_per_xact: i32_at(main, 16)?,
        wal_level: i32_at(main, 20)?,
        wal_log_hints: *main.get(24)? != 0,
    })
}

fn timeline(main: &[u8], offset: usize) -> Option<TimelineId> {
    u32_at(main, offset).and_then(TimelineId::new)
}

/// `Some(None)` where the version does not have it.
fn wal_level(version: WalVersion, main: &[u8], offset: usize) -> Option<Option<i32>> {
    match version.checkpoints_tell_wal_level() {
        true => i32_at(main, offset).map(Some),
        false => Some(None),
    }
}

/// A C string. Bytes that are not UTF-8 are replaced: the server may have any encoding.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
