//! An event in the words of `pg_waldump` and `pg_walinspect` ("src/backend/access/rmgrdesc").

use backstay_common::wal::{Event, EventKind};

/// What PostgreSQL calls the record of an event, and says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    pub manager: &'static str,
    pub kind: &'static str,
    /// Microseconds since 2000-01-01 00:00 UTC, where PostgreSQL prints the time.
    pub time: Option<i64>,
    /// Parts of the description.
    pub details: Vec<String>,
}

impl Words {
    pub fn of(event: &Event) -> Words {
        let level = |level: &Option<i32>| level.map(|n| format!("wal_level {}", wal_level(n)));
        match &event.kind {
            EventKind::Commit { time } => transaction("COMMIT", *time, []),
            EventKind::Abort { time } => transaction("ABORT", *time, []),
            EventKind::Prepare { time, .. } => transaction("PREPARE", *time, []),
            EventKind::CommitPrepared { time, xid } => {
                transaction("COMMIT_PREPARED", *time, [xid.to_string()])
            }
            EventKind::AbortPrepared { time, xid } => {
                transaction("ABORT_PREPARED", *time, [xid.to_string()])
            }
            EventKind::RestorePoint { name, .. } => xlog("RESTORE_POINT", None, [name.clone()]),
            EventKind::ParameterChange { .. } => {
                xlog("PARAMETER_CHANGE", None, parameters(&event.kind))
            }
            EventKind::Checkpoint {
                shutdown,
                redo,
                timeline,
                prev_timeline,
                full_page_writes,
                wal_level,
                next_xid,
                ..
            } => {
                let kind = if *shutdown { "CHECKPOINT_SHUTDOWN" } else { "CHECKPOINT_ONLINE" };
                let details = [
                    format!("redo {redo}"),
                    format!("tli {timeline}"),
                    format!("prev tli {prev_timeline}"),
                    format!("fpw {full_page_writes}"),
                    format!("xid {}:{}", next_xid >> 32, *next_xid as u32),
                ];
                xlog(kind, None, details.into_iter().chain(level(wal_level)))
            }
            EventKind::CheckpointRedo { wal_level } => {
                xlog("CHECKPOINT_REDO", None, level(&Some(*wal_level)))
            }
            EventKind::EndOfRecovery { time, timeline, prev_timeline, wal_level } => {
                let details = [format!("tli {timeline}"), format!("prev tli {prev_timeline}")];
                xlog("END_OF_RECOVERY", Some(*time), details.into_iter().chain(level(wal_level)))
            }
            EventKind::Switch => xlog("SWITCH", None, []),
            EventKind::BackupEnd { start } => xlog("BACKUP_END", None, [start.to_string()]),
            EventKind::OverwriteContrecord { lsn, time } => {
                xlog("OVERWRITE_CONTRECORD", Some(*time), [format!("lsn {lsn}")])
            }
            EventKind::FullPageWrites(on) => xlog("FPW_CHANGE", None, [on.to_string()]),
            other => xlog("?", None, [format!("{other:?}")]),
        }
    }
}

fn transaction(kind: &'static str, time: i64, details: impl IntoIterator<Item = String>) -> Words {
    let details = details.into_iter().collect();
    Words { manager: "Transaction", kind, time: Some(time), details }
}

fn xlog(kind: &'static str, time: Option<i64>, details: impl IntoIterator<Item = String>) -> Words {
    Words { manager: "XLOG", kind, time, details: details.into_iter().collect() }
}

fn parameters(kind: &EventKind) -> Vec<String> {
    let EventKind::ParameterChange {
        max_connections,
        max_worker_processes,
        max_wal_senders,
        max_prepared_xacts,
        max_locks_per_xact,
        wal_level: level,
        wal_log_hints,
    } = kind
    else {
        return Vec::new();
    };
    vec![
        format!("max_connections={max_connections}"),
        format!("max_worker_processes={max_worker_processes}"),
        format!("max_wal_senders={max_wal_senders}"),
        format!("max_prepared_xacts={max_prepared_xacts}"),
        format!("max_locks_per_xact={max_locks_per_xact}"),
        format!("wal_level={}", wal_level(*level)),
        format!("wal_log_hints={}", if *wal_log_hints { "on" } else { "off" }),
    ]
}

fn wal_level(level: i32) -> &'static str {
    ["minimal", "replica", "logical"].get(level as usize).copied().unwrap_or("?")
}
