//! Watches what holds WAL for us at the server: our slot, and the room that is left.
//!
//! Every [`EVERY`] one short query, over a connection that is kept. It raises `slot-at-risk` before the server drops WAL that
//! we still need or its disk fills, and says how many minutes are left at the present rate. It also tells whether commits wait for
//! us; if they do not, none is stored for its own sake. Nothing else depends on the answers; a server that does not answer is
//! reported by the session.

use super::WalPath;
use crate::connect;
use crate::synchronous;
use backstay_common::lsn::Lsn;
use backstay_common::postgres::{Connection, Mode, literal};
use backstay_common::{Kind, Result};
use serde::Serialize;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(10);
/// An answer that takes longer does not come.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// The present rate is that since so many looks ago.
const LOOKS: usize = 12;
/// Less time than this is left: the alarm.
const LEFT_MIN: Duration = Duration::from_secs(60 * 60);
/// Until the slot holds more than this nothing is at risk: a checkpoint's worth comes and goes.
const HELD_BYTES: u64 = 32 << 20;

/// What the server says of our slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SlotStatus {
    /// PostgreSQL's `wal_status`: "reserved", "extended", "unreserved" or "lost".
    pub wal_status: Option<String>,
    /// WAL that the slot holds at the server.
    pub held_bytes: u64,
    /// WAL that can still be written before the server drops what the slot holds, or its disk is full; none where neither
    /// is known.
    pub room_bytes: Option<u64>,
    /// Until then, at the present rate; none while the slot keeps up.
    pub minutes_left: Option<u64>,
    /// PostgreSQL's `sync_state`: "async", "potential", "sync" or "quorum"; none while no stream runs, and for a role without
    /// `pg_read_all_stats`.
    pub sync_state: Option<String>,
    /// `synchronous_standby_names` names us: commits wait, or may at any moment.
    pub is_waited_for: bool,
}

/// Runs until it is dropped.
pub async fn run(path: Arc<WalPath>) -> Result<()> {
    let mut connection = None;
    let mut looks = VecDeque::new();
    loop {
        let asked = tokio::time::timeout(ANSWER_MAX, ask(&path, &mut connection)).await;
        match asked {
            Ok(Ok(Some(slot))) => {
                path.context.is_asynchronous.store(!slot.is_waited_for, Ordering::Relaxed);
                note(&path, slot, &mut looks);
            }
            Ok(Err(error)) if error.kind() == Kind::Bug => return Err(error),
            other => {
                path.context.is_asynchronous.store(false, Ordering::Relaxed);
                if !matches!(other, Ok(Ok(None))) {
                    connection = None;
                }
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// `None` if the slot is not there.
async fn ask(path: &WalPath, connection: &mut Option<Connection>) -> Result<Option<SlotStatus>> {
    let settings = &path.context.settings;
    let conninfo = connect::conninfo(settings)?;
    let sql = match connection {
        Some(sql) => sql,
        None => connection.insert(Connection::connect(&conninfo, Mode::Sql).await?),
    };
    let asked = format!(
        "select s.wal_status, s.safe_wal_size, s.restart_lsn, \
         case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn() \
         else pg_catalog.pg_current_wal_lsn() end, r.sync_state, \
         pg_catalog.current_setting('synchronous_standby_names') \
         from pg_catalog.pg_replication_slots s \
         left join pg_catalog.pg_stat_replication r on r.pid = s.active_pid where s.slot_name = {}",
        literal(&settings.postgres.slot)
    );
    let rows = sql.query(&asked).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let text = |n: usize| row.get(n).map(str::to_string);
    let lsn = |n: usize| row.get(n).and_then(|lsn| lsn.parse::<Lsn>().ok());
    // Negative once the WAL may go at the next checkpoint.
    let safe = row.get(1).and_then(|n| n.parse::<i64>().ok()).map(|n| n.max(0) as u64);
    let free = settings.postgres.data_dir.as_deref().and_then(free_bytes);
    let names = row.get(5).unwrap_or_default();
    Ok(Some(SlotStatus {
        wal_status: text(0),
        held_bytes: lsn(3).zip(lsn(2)).map_or(0, |(end, restart)| end.since(restart)),
        room_bytes: safe.into_iter().chain(free).min(),
        minutes_left: None,
        sync_state: text(4),
        is_waited_for: synchronous::names(names, conninfo.application_name().unwrap_or_default()),
    }))
}

/// On the disk of the server's WAL, if it is this host's.
fn free_bytes(data_dir: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(data_dir.join("pg_wal")).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

fn note(path: &WalPath, mut slot: SlotStatus, looks: &mut VecDeque<(Instant, u64)>) {
    let now = Instant::now();
    let oldest = looks.front().copied();
    looks.push_back((now, slot.held_bytes));
    looks.drain(..looks.len().saturating_sub(LOOKS));
    let left = oldest.and_then(|(then, held)| time_left(&slot, held, now - then));
    slot.minutes_left = left.map(|left| left.as_secs() / 60);
    path.board.update(|state| state.server.slot = Some(slot.clone()));
    let alarms = &path.context.alarms;
    match risk(&slot, left) {
        Some(reason) => alarms.raise("slot-at-risk", "", reason),
        None => alarms.clear("slot-at-risk", ""),
    }
}

/// How long the room lasts if the slot goes on to hold more as it did, from `held` bytes, in the time that `passed`; none if
/// it does not, or if the room is not known.
fn time_left(slot: &SlotStatus, held: u64, passed: Duration) -> Option<Duration> {
    let grown = slot.held_bytes.checked_sub(held).filter(|grown| *grown > 0)?;
    let seconds = slot.room_bytes? as f64 * passed.as_secs_f64() / grown as f64;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Why somebody must know, if so.
fn risk(slot: &SlotStatus, left: Option<Duration>) -> Option<String> {
    let held = slot.held_bytes >> 20;
    match slot.wal_status.as_deref() {
        Some("lost") => return Some("the server has dropped WAL that the slot held".into()),
        Some("unreserved") => {
            return Some(format!(
                "the next checkpoint of the server drops WAL that we have not acknowledged: the slot holds {held} MiB, \
                 more than max_slot_wal_keep_size"
            ));
        }
        _ => {}
    }
    let left = left.filter(|left| *left < LEFT_MIN && slot.held_bytes > HELD_BYTES)?;
    let room = slot.room_bytes? >> 20;
    Some(format!(
        "the slot holds {held} MiB at the server, and has room for {room} MiB: at the present rate {} minutes are left",
        left.as_secs() / 60
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn slot(held: u64, room: Option<u64>) -> SlotStatus {
        let room_bytes = room.map(|room| room * MIB);
        SlotStatus { held_bytes: held * MIB, room_bytes, ..SlotStatus::default() }
    }

    #[test]
    fn the_time_left_is_that_of_the_present_rate() {
        let minute = Duration::from_secs(60);
        assert_eq!(time_left(&slot(160, Some(600)), 100 * MIB, minute), Some(minute * 10));
        assert_eq!(time_left(&slot(100, Some(600)), 100 * MIB, minute), None, "it keeps up");
        assert_eq!(time_left(&slot(60, Some(600)), 100 * MIB, minute), None, "it catches up");
        assert_eq!(time_left(&slot(160, None), 100 * MIB, minute), None, "nothing bounds it");
        assert_eq!(time_left(&slot(160, Some(0)), 100 * MIB, minute), Some(Duration::ZERO));
    }

    #[test]
    fn the_alarm_comes_early_and_names_the_minutes() {
        let ten = Some(Duration::from_secs(600));
        let said = risk(&slot(160, Some(600)), ten).unwrap();
        assert!(said.contains("160 MiB") && said.contains("10 minutes"), "{said}");
        assert_eq!(risk(&slot(160, Some(600)), None), None);
        assert_eq!(risk(&slot(160, Some(600)), Some(LEFT_MIN)), None);
        assert_eq!(risk(&slot(20, Some(600)), ten), None, "a checkpoint's worth");
        for status in ["unreserved", "lost"] {
            let gone = SlotStatus { wal_status: Some(status.into()), ..slot(0, None) };
            assert!(risk(&gone, None).is_some(), "{status}");
        }
        let fine = SlotStatus { wal_status: Some("extended".into()), ..slot(500, None) };
        assert_eq!(risk(&fine, None), None);
    }
}
