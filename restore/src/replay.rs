//! Replay, watched to its target, and the opening of the cluster.
//!
//! PostgreSQL pauses at the target and is then promoted: that writes one record and leaves the checkpoint for later, where
//! the action `promote` would write every changed page first ("src/backend/access/transam/xlog.c",
//! PerformRecoveryXLogAction). Where hot standby never became possible PostgreSQL cannot pause and opens by itself.

use crate::progress::Progress;
use crate::server::ReplayServer;
use backstay_common::lsn::Lsn;
use backstay_common::postgres::{Connection, Row};
use backstay_common::{Error, Kind, Result};
use serde::Serialize;
use std::time::{Duration, Instant};

const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(25);

/// Where the cluster is, now that it is open.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reached {
    /// The end of the last record that was replayed.
    pub lsn: Lsn,
    /// When the last transaction that was replayed ended, as PostgreSQL says it.
    pub last_transaction: Option<String>,
    /// The timeline that the cluster is on now.
    pub timeline: u32,
    /// Transactions that are prepared and wait for COMMIT PREPARED or ROLLBACK PREPARED.
    pub prepared: Vec<Prepared>,
    pub replay_seconds: f64,
    pub promote_seconds: f64,
}

/// A prepared transaction: it holds locks until somebody decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Prepared {
    pub gid: String,
    pub database: String,
    pub owner: String,
    pub prepared_at: String,
}

const STATE: &str = "SELECT pg_is_in_recovery() AS replaying, pg_last_wal_replay_lsn() AS lsn, \
     CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() END AS pause, \
     pg_last_xact_replay_timestamp() AT TIME ZONE 'UTC' AS transaction";
const PREPARED: &str = "SELECT gid, database, owner, prepared AT TIME ZONE 'UTC' AS at FROM pg_prepared_xacts ORDER BY prepared";

/// Watches replay from `start` on until the target, and promotes. `progress` counts bytes of WAL.
pub async fn run(server: &mut ReplayServer, start: Lsn, progress: &Progress) -> Result<Reached> {
    let begun = Instant::now();
    let mut connection = None;
    let state = loop {
        if let Some(state) = look(server, &mut connection).await? {
            progress.set(state.lsn.since(start));
            if state.is_at_target {
                break state;
            }
        }
        if let Some(status) = server.exited()? {
            return Err(server
                .failure(&format!("PostgreSQL ended before it reached the target ({status})")));
        }
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
    };
    if server.log_contains("insufficient parameter settings") {
        return Err(
            server.failure("replay cannot go on: a setting is lower than it was at the source")
        );
    }
    let replay_seconds = begun.elapsed().as_secs_f64();
    let promoting = Instant::now();
    let mut connection =
        connection.ok_or_else(|| Error::new(Kind::Bug, "the target was seen without a session"))?;
    open(server, &mut connection, state.is_replaying).await?;
    let timeline =
        connection.query_one("SELECT pg_walfile_name(pg_current_wal_lsn()) AS name").await?;
    let timeline = timeline_of(timeline.text("name")?)?;
    let prepared =
        connection.query(PREPARED).await?.iter().map(Prepared::read).collect::<Result<_>>()?;
    connection.close().await;
    Ok(Reached {
        lsn: state.lsn,
        last_transaction: state.transaction,
        timeline,
        prepared,
        replay_seconds,
        promote_seconds: promoting.elapsed().as_secs_f64(),
    })
}

struct State {
    lsn: Lsn,
    transaction: Option<String>,
    is_replaying: bool,
    /// Paused there, or open already.
    is_at_target: bool,
}

/// Asks the server how far it is; `None` while it does not answer.
async fn look(server: &ReplayServer, connection: &mut Option<Connection>) -> Result<Option<State>> {
    if connection.is_none() {
        match server.connect().await {
            Ok(new) => *connection = Some(new),
            Err(error) if error.kind() == Kind::Postgres && !is_refusal(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let Some(open) = connection.as_mut() else { return Ok(None) };
    match open.query_one(STATE).await {
        Ok(row) => state_of(&row).map(Some),
        // Replay may cancel a session; the next one tells more.
        Err(error) => {
            tracing::debug!(%error, "the replaying server");
            *connection = None;
            Ok(None)
        }
    }
}

/// The server answers, but will never let us in.
fn is_refusal(error: &Error) -> bool {
    error.sqlstate().is_some_and(|code| code.starts_with("28"))
}

fn state_of(row: &Row) -> Result<State> {
    let is_replaying = row.text("replaying")? == "t";
    let is_paused = row.by_name("pause") == Some("paused");
    let lsn = row.by_name("lsn").and_then(|text| text.parse().ok()).unwrap_or_default();
    let transaction = row.by_name("transaction").map(|text| format!("{text} UTC"));
    Ok(State { lsn, transaction, is_replaying, is_at_target: is_paused || !is_replaying })
}

async fn open(
    server: &mut ReplayServer,
    connection: &mut Connection,
    is_replaying: bool,
) -> Result<()> {
    if is_replaying {
        connection.query("SELECT pg_promote(false)").await?;
        // A paused startup process looks for the request once in a second; resuming wakes it.
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
        if let Err(error) = connection.query("SELECT pg_wal_replay_resume()").await {
            tracing::debug!(%error, "it has woken up by itself");
        }
    }
    loop {
        let row = connection.query_one("SELECT pg_is_in_recovery() AS replaying").await?;
        if row.text("replaying")? == "f" {
            return Ok(());
        }
        if let Some(status) = server.exited()? {
            return Err(
                server.failure(&format!("PostgreSQL ended while it was promoted ({status})"))
            );
        }
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
    }
}

fn timeline_of(segment: &str) -> Result<u32> {
    let digits = segment.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    digits.ok_or_else(|| Error::new(Kind::Bug, format!("{segment:?} is no segment's name")))
}

impl Prepared {
    fn read(row: &Row) -> Result<Prepared> {
        let text = |name| row.text(name).map(str::to_string);
        Ok(Prepared {
            gid: text("gid")?,
            database: text("database")?,
            owner: text("owner")?,
            prepared_at: format!("{} UTC", text("at")?),
        })
    }
}
