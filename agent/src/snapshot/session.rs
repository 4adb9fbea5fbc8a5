//! The backup session: the one connection that must stay open from backup start to backup stop.
//!
//! While it is open PostgreSQL writes full page images, which is what makes pages that were read half-written
//! whole again in replay. When it closes before [`Session::stop`], the backup is void, and nothing is to be undone.
//!
//! A standby cannot make its primary do that. There the backup starts at the last restartpoint, and PostgreSQL refuses it
//! if WAL without full pages was replayed since; it is consistent from the copied `pg_control`'s minimum recovery point on. It
//! fails if the standby is promoted meanwhile, or follows its primary to another timeline.

use super::label::BackupLabel;
use crate::connect;
use crate::context::AgentContext;
use crate::wal::WalStatus;
use backstay_common::control::{self, ControlFile};
use backstay_common::id::SnapshotId;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::postgres::{Connection, Mode, literal};
use backstay_common::segment::TimelineId;
use backstay_common::{Context, Error, Kind, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

/// How often the backup session is looked after while files are read.
const SESSION_CHECKED_EVERY: Duration = Duration::from_secs(15);
/// How far `postmaster.pid` and the server may differ about when it started, in seconds.
const START_TOLERANCE: i64 = 60;

/// An open session in which a backup may be running.
#[derive(Debug)]
pub struct Session {
    sql: Connection,
    major: u32,
    is_standby: bool,
}

/// What the server says before the backup begins.
#[derive(Clone, Debug)]
pub struct Source {
    pub data_dir: PathBuf,
    pub control: ControlFile,
    /// The name of the role that initdb made.
    pub superuser: String,
    /// Where the main config file, the HBA and the ident file are, as far as the server says, under the names that they
    /// have in a data directory.
    pub config_files: Vec<(&'static str, PathBuf)>,
    /// Other files that the main config file includes, as far as the server says.
    pub included_files: Vec<PathBuf>,
}

impl Session {
    /// Connects, and makes sure that the server can be backed up from its data directory.
    pub async fn open(context: &AgentContext) -> Result<(Session, Source)> {
        let data_dir = context.settings.postgres.data_dir.clone().ok_or_else(|| {
            Error::new(Kind::Config, "[postgres] does not say where the data directory is")
                .remedy("add: data-dir = \"/var/lib/postgresql/17/main\"")
        })?;
        let conninfo = connect::conninfo(&context.settings)?;
        let sql = Connection::connect(&conninfo, Mode::Sql).await?;
        let mut session = Session { sql, major: context.major(), is_standby: false };
        let source = session.examine(context, data_dir).await.context("prepare the backup")?;
        Ok((session, source))
    }

    async fn examine(&mut self, context: &AgentContext, data_dir: PathBuf) -> Result<Source> {
        // The session idles while files are read, and a spread checkpoint takes minutes.
        let settings =
            "set statement_timeout = 0; set idle_session_timeout = 0; set lock_timeout = 0";
        self.sql.query(settings).await?;
        let row = self
            .sql
            .query_one(
                "select pg_is_in_recovery()::text as standby, current_setting('wal_level') as wal_level, \
                 (select system_identifier from pg_control_system()) as system, \
                 extract(epoch from pg_postmaster_start_time())::bigint as started, \
                 current_setting('port') as port, \
                 (select rolname from pg_roles where oid = 10) as superuser",
            )
            .await?;
        self.is_standby = row.text("standby")? == "true";
        if row.text("wal_level")? == "minimal" {
            return Err(Error::new(Kind::Postgres, "the server runs with wal_level = minimal")
                .remedy("alter system set wal_level = replica; then restart the server"));
        }
        let control = read_control(&data_dir).await?;
        let server =
            (row.parse::<i64>("system")? as u64, row.parse("started")?, row.parse("port")?);
        if server.0 != context.system.get() || control.system != context.system {
            let dir = data_dir.display();
            let reason = format!(
                "data-dir {dir} is of system {}, the server of system {}, and the agent was started for {}",
                control.system, server.0, context.system
            );
            return Err(Error::new(Kind::Config, reason)
                .remedy("correct data-dir or conninfo in [postgres], and restart the agent"));
        }
        is_served(&data_dir, server.1, server.2)?;
        let superuser = row.text("superuser")?.to_string();
        let config_files = self.config_files().await?;
        let included_files = self.included_files().await;
        Ok(Source { data_dir, control, superuser, config_files, included_files })
    }

    /// Values that a role without `pg_read_all_settings` may not see are left out.
    async fn config_files(&mut self) -> Result<Vec<(&'static str, PathBuf)>> {
        let sql = "select name, setting from pg_settings where name in ('config_file', 'hba_file', 'ident_file')";
        let rows = self.sql.query(sql).await?;
        let file = |row: &backstay_common::postgres::Row| {
            let name = match row.get(0)? {
                "config_file" => "postgresql.conf",
                "hba_file" => "pg_hba.conf",
                _ => "pg_ident.conf",
            };
            row.get(1).filter(|path| !path.is_empty()).map(|path| (name, PathBuf::from(path)))
        };
        Ok(rows.iter().filter_map(file).collect())
    }

    /// Only some roles may ask; the folder `conf.d` is looked into in any case.
    async fn included_files(&mut self) -> Vec<PathBuf> {
        let sql = "select distinct sourcefile from pg_file_settings where sourcefile is not null order by 1";
        match self.sql.query(sql).await {
            Ok(rows) => rows.iter().filter_map(|row| row.get(0).map(PathBuf::from)).collect(),
            Err(error) => {
                tracing::debug!("files included by the config are not known: {error}");
                Vec::new()
            }
        }
    }

    /// Starts the backup, and waits for the checkpoint that it begins with. Where replay will start.
    pub async fn start(&mut self, id: SnapshotId, fast: bool) -> Result<Lsn> {
        let label = literal(&format!("backstay {id}"));
        let sql = match self.major {
            ..15 => format!("select pg_start_backup({label}, {fast}, false) as lsn"),
            _ => format!("select pg_backup_start({label}, {fast}) as lsn"),
        };
        let row = self.sql.query_one(&sql).await.map_err(granted).context("start the backup")?;
        row.parse("lsn")
    }

    /// Fails when the session, and with it the backup, is lost. Keeps the connection from looking idle.
    pub async fn check(&mut self) -> Result<()> {
        self.sql.query("select 1").await.map(drop).context("keep the backup session")
    }

    /// Ends the backup, and the session.
    pub async fn stop(mut self) -> Result<BackupLabel> {
        let function = match self.major {
            ..15 => "pg_stop_backup(false, false)",
            _ => "pg_backup_stop(false)",
        };
        let sql = format!("select lsn, labelfile from {function}");
        let row = self.sql.query_one(&sql).await.map_err(granted).context("stop the backup")?;
        let label = BackupLabel::parse(row.text("labelfile")?, row.parse("lsn")?)?;
        if self.is_standby {
            self.stayed_on(label.timeline).await?;
        }
        self.sql.close().await;
        Ok(label)
    }

    /// A standby follows its primary to another timeline without a word, and the WAL up to the stop is then of two.
    async fn stayed_on(&mut self, timeline: TimelineId) -> Result<()> {
        let sql = "select min_recovery_end_timeline as timeline from pg_control_recovery()";
        let now: u32 = self.sql.query_one(sql).await?.parse("timeline")?;
        match now == timeline.get() {
            true => Ok(()),
            false => {
                let from = timeline.get();
                let reason =
                    format!("the standby went from timeline {from} to {now} during the backup");
                Err(Error::new(Kind::Postgres, reason).remedy("take another snapshot"))
            }
        }
    }
}

fn granted(error: Error) -> Error {
    match error.sqlstate() {
        Some("42501") => error.remedy(
            "grant execute on function pg_backup_start, pg_backup_stop (pg_start_backup, pg_stop_backup before \
             PostgreSQL 15) to the agent's role",
        ),
        _ => error,
    }
}

async fn read_control(data_dir: &Path) -> Result<ControlFile> {
    let path = data_dir.join("global/pg_control");
    let read = tokio::task::spawn_blocking(move || control::read(&path)).await;
    let read = read.map_err(|e| Error::new(Kind::Bug, format!("read pg_control: {e}")))?;
    read.map_err(|e| e.remedy("correct data-dir in [postgres]; the agent must be able to read it"))
}

/// Refuses a data directory that the server does not run from: a copy of it has the same system identifier.
fn is_served(data_dir: &Path, started: i64, port: i64) -> Result<()> {
    let path = data_dir.join("postmaster.pid");
    let fault = |reason: String| {
        Error::new(Kind::Config, format!("data-dir {}: {reason}", data_dir.display()))
            .remedy("give the directory that this very server runs from, as seen from the agent")
    };
    let text = std::fs::read_to_string(&path).map_err(|e| fault(format!("postmaster.pid: {e}")))?;
    // Process, data directory, start time, port ("src/include/utils/pidfile.h").
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let number = |line: usize| lines.get(line).and_then(|text| text.parse::<i64>().ok());
    match (number(2), number(3)) {
        (Some(at), Some(on)) if (at - started).abs() <= START_TOLERANCE && on == port => Ok(()),
        _ => Err(fault("its postmaster.pid is of another server than the one asked".into())),
    }
}

/// What must hold while files are read.
pub struct Watch<'a> {
    pub session: &'a mut Session,
    pub wal: &'a watch::Receiver<WalStatus>,
    /// From where on the snapshot needs WAL.
    pub needed: Lsn,
}

impl Watch<'_> {
    /// Does `work`, and fails as soon as the backup session or WAL that it needs is lost.
    pub async fn during<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(SESSION_CHECKED_EVERY) => {
                    // What is lost by now was written before the backup ends.
                    super::commit::no_gap_in(&self.wal.borrow(), LsnRange::new(self.needed, Lsn::MAX))?;
                    self.session.check().await?;
                }
            }
        }
    }
}
