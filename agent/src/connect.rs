//! The first words with PostgreSQL: who it is, and whether it can be backed up at all.

use backstay_common::config::Settings;
use backstay_common::id::SystemId;
use backstay_common::postgres::{Connection, Conninfo, Mode};
use backstay_common::segment::SegmentSize;
use backstay_common::{Context, Error, Kind, Result};

/// The PostgreSQL majors that Backstay knows.
pub const MAJORS: std::ops::RangeInclusive<u32> = 14..=18;

/// object_not_in_prerequisite_state: what PostgreSQL says of itself when it is not set up for what is asked. It does not
/// pass by itself.
const UNFIT: &str = "55000";

/// What never changes while a server keeps its data directory and version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Server {
    pub system: SystemId,
    /// `server_version_num`, such as 150018.
    pub version: u32,
    pub segment_size: SegmentSize,
}

/// The config's conninfo; the agent's name is what the server shows for it. Of several hosts it is the primary, unless
/// `target_session_attrs` says otherwise; a single one may be a standby, whose agent stands by.
pub fn conninfo(settings: &Settings) -> Result<Conninfo> {
    let conninfo = Conninfo::parse(settings.postgres.conninfo.expose())?.preferring_the_primary();
    Ok(conninfo.with_default_application_name(&settings.postgres.slot))
}

/// Asks the server who it is. Fails with [`Kind::Postgres`] if it cannot be reached or cannot be backed up.
pub async fn identify(settings: &Settings) -> Result<Server> {
    let conninfo = conninfo(settings)?;
    let mut sql = Connection::connect(&conninfo, Mode::Sql).await?;
    let version = sql.server_version_num()?;
    if !MAJORS.contains(&(version / 10_000)) {
        let reason =
            format!("the server is PostgreSQL {}, which is not supported", version / 10_000);
        let remedy = format!("use PostgreSQL {} to {}", MAJORS.start(), MAJORS.end());
        return Err(Error::new(Kind::Postgres, reason).with_sqlstate(UNFIT).remedy(remedy));
    }
    let row = sql
        .query_one(
            "select (select system_identifier from pg_control_system()) as system, \
             (select setting from pg_settings where name = 'wal_segment_size') as segment, \
             current_setting('wal_level') as wal_level",
        )
        .await
        .context("ask the server who it is")?;
    if row.text("wal_level")? == "minimal" {
        return Err(Error::new(
            Kind::Postgres,
            "the server runs with wal_level = minimal: its WAL cannot restore it",
        )
        .with_sqlstate(UNFIT)
        .remedy("alter system set wal_level = replica; then restart the server"));
    }
    let system = row.text("system")?.parse::<i64>();
    let system =
        system.map_err(|e| Error::new(Kind::Postgres, format!("system identifier: {e}")))?;
    let segment_size = SegmentSize::new(row.parse("segment")?).ok_or_else(|| {
        Error::new(Kind::Postgres, "the server names an impossible WAL segment size")
    })?;
    let server = Server { system: SystemId::new(system as u64), version, segment_size };
    sql.close().await;
    Ok(server)
}

/// True for faults that pass by themselves: the server is not there yet, is starting, or is full.
pub fn is_transient(error: &Error) -> bool {
    match error.sqlstate() {
        // Connection exceptions, operator intervention, insufficient resources.
        Some(code) => ["08", "57", "53"].iter().any(|class| code.starts_with(class)),
        None => error.kind() == Kind::Postgres,
    }
}
