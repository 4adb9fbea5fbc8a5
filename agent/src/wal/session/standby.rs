//! Standing by: the agent of a standby stores nothing, and is ready to take over. Unless it is the cluster's only one, as far as
//! leases tell: then it takes all from the standby.
//!
//! It holds a slot on its own server, and moves it on to what is stored, so that the server keeps what no location has: when
//! the primary dies and this server leaves recovery, the agent goes on where the stored WAL ends. It never needs to be told.

use super::Session;
use crate::connect;
use crate::wal::branch::Stock;
use backstay_common::id::Branch;
use backstay_common::lsn::Lsn;
use backstay_common::name::{ObjectName, folder};
use backstay_common::postgres::{Connection, Mode, literal};
use backstay_common::segment::TimelineId;
use backstay_common::{Context, Result};
use std::time::{Duration, Instant};

/// How often the server is asked whether it is still in recovery.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// How often the slot is moved on.
const ADVANCE_EVERY: Duration = Duration::from_secs(5);
/// How long a location that does not answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// The branch that the standby follows, and how far it is stored.
#[derive(Clone, Copy, Debug)]
struct Followed {
    timeline: TimelineId,
    branch: Branch,
    stored: Lsn,
}

impl Session {
    /// Until the server leaves recovery, or is gone; or until it is known that there is no other agent, which `is_sure` says
    /// that there is.
    pub(super) async fn stand_by(&mut self, connection: Connection, is_sure: bool) -> Result<()> {
        tracing::info!(is_sure, "the server is a standby: standing by");
        self.path.context.alarms.clear("postgres-down", "");
        self.path.board.update(|state| {
            state.server.standing_by = true;
            state.server.last_error = None;
        });
        let ended = self.watch(connection, is_sure).await;
        self.path.board.update(|state| state.server.standing_by = false);
        if ended.is_ok() {
            tracing::info!("standing by no longer");
        }
        ended
    }

    async fn watch(&self, mut connection: Connection, is_sure: bool) -> Result<()> {
        let mut sql =
            Connection::connect(&connect::conninfo(&self.path.context.settings)?, Mode::Sql)
                .await?;
        let (mut followed, mut advance_at) = (None, Instant::now());
        while sql.query_one("SELECT pg_is_in_recovery() AS is").await?.text("is")? == "t" {
            if advance_at <= Instant::now() {
                advance_at = Instant::now() + ADVANCE_EVERY;
                if !is_sure && matches!(self.path.leasing.is_free().await, Ok(true)) {
                    return Ok(());
                }
                // What stands in the way of it stands in the way of nothing else.
                if let Err(error) = self.advance(&mut connection, &mut sql, &mut followed).await {
                    tracing::warn!(%error, "the slot stays where it is");
                    if error.sqlstate().is_none_or(|code| code.starts_with("57")) {
                        connection = self.connect(Mode::Replication).await?;
                    }
                }
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
        Ok(())
    }

    /// Moves the slot on to what every required location that answers has.
    async fn advance(
        &self,
        connection: &mut Connection,
        sql: &mut Connection,
        followed: &mut Option<Followed>,
    ) -> Result<()> {
        let identity = connection.identify_system().await?;
        if followed.is_none_or(|followed| followed.timeline != identity.timeline) {
            *followed = self.find(connection, identity.timeline).await?;
        }
        let Some(now) = followed else { return Ok(()) };
        now.stored = self.stored(now.branch, now.stored).await.unwrap_or(now.stored);
        let slot = literal(&self.path.context.settings.postgres.slot);
        let to = literal(&now.stored.to_string());
        // The server itself goes no further than it has replayed, and never back.
        let move_on = format!(
            "SELECT pg_catalog.pg_replication_slot_advance(slot_name, {to}) \
             FROM pg_catalog.pg_replication_slots WHERE slot_name = {slot} AND NOT active \
             AND restart_lsn < least({to}::pg_lsn, pg_last_wal_replay_lsn())"
        );
        sql.query(&move_on).await.map(drop).context("move the slot on")
    }

    async fn find(
        &self,
        connection: &mut Connection,
        timeline: TimelineId,
    ) -> Result<Option<Followed>> {
        let beginnings = self.beginnings(connection, timeline).await?;
        let found = Stock::list(&self.path).await.joinable(&self.path, &beginnings).await;
        let found = found.into_iter().filter(|found| found.least.is_valid());
        let found = found.max_by_key(|found| found.frontier());
        Ok(found.map(|found| Followed { timeline, branch: found.branch, stored: found.least }))
    }

    /// How far every required location that answers has the branch, all of them at least to `from`.
    async fn stored(&self, branch: Branch, from: Lsn) -> Option<Lsn> {
        let system = self.path.context.system;
        let folder = &folder::branch(system, branch);
        let after = &folder::branch_from(system, branch, from.span_start());
        let required = self.path.context.writers.iter().filter(|w| w.location().is_required());
        let asked = required.map(|writer| async move {
            let listing = writer.location().list_from(folder, after);
            let listed = tokio::time::timeout(PATIENCE, listing).await.ok()?.ok()?;
            let mut ranges: Vec<_> = listed
                .into_iter()
                .filter_map(|object| match object.name {
                    Some(ObjectName::Wal { range, .. }) => Some(range),
                    _ => None,
                })
                .collect();
            Some(backstay_common::lsn::covered_until(from, &mut ranges))
        });
        futures::future::join_all(asked).await.into_iter().flatten().min()
    }
}
