//! The part of `check` that asks PostgreSQL.

use super::Finding;
use crate::connect;
use backstay_common::config::Settings;
use backstay_common::id::SystemId;
use backstay_common::postgres::{Connection, Mode, literal};
use backstay_common::{Context, Error, Kind, Result, control};
use std::path::Path;

/// Adds what the server shows; `None` if it cannot even say which system it is.
pub async fn run(settings: &Settings, findings: &mut Vec<Finding>) -> Option<SystemId> {
    let server = match connect::identify(settings).await {
        Ok(server) => server,
        Err(error) => {
            findings.push(Finding::of("postgresql", Err(error)));
            return None;
        }
    };
    let (major, minor) = (server.version / 10_000, server.version % 10_000);
    let seen = format!("version {major}.{minor}, system {}", server.system);
    findings.push(Finding::good("postgresql", seen));
    match Session::open(settings, server).await {
        Err(error) => findings.push(Finding::of("postgresql", Err(error))),
        Ok(mut session) => {
            findings.push(Finding::of("role", session.role().await));
            findings.push(Finding::of("replication connection", session.replication().await));
            findings.push(session.slot().await.unwrap_or_else(|e| Finding::of("slot", Err(e))));
            let keep = session.keep_size().await;
            findings.push(keep.unwrap_or_else(|e| Finding::of("max_slot_wal_keep_size", Err(e))));
            findings.push(Finding::of("data directory", session.data_dir().await));
            match session.standby().await {
                Ok(finding) => findings.extend(finding),
                Err(error) => findings.push(Finding::of("standby", Err(error))),
            }
        }
    }
    Some(server.system)
}

struct Session<'s> {
    settings: &'s Settings,
    server: connect::Server,
    sql: Connection,
}

impl<'s> Session<'s> {
    async fn open(settings: &'s Settings, server: connect::Server) -> Result<Session<'s>> {
        let sql = Connection::connect(&connect::conninfo(settings)?, Mode::Sql).await?;
        Ok(Session { settings, server, sql })
    }

    /// The role has REPLICATION, may read all settings, and may start and stop a backup; the last only where it is to.
    async fn role(&mut self) -> Result<String> {
        let over_network = self.settings.postgres.data_dir.is_none();
        let (start, stop) = match self.server.version / 10_000 {
            14 => ("pg_start_backup(text, boolean, boolean)", "pg_stop_backup(boolean, boolean)"),
            _ => ("pg_backup_start(text, boolean)", "pg_backup_stop(boolean)"),
        };
        let row = self
            .sql
            .query_one(&format!(
                "select current_user as role, \
                 (select rolreplication or rolsuper from pg_roles where rolname = current_user) as replication, \
                 has_function_privilege({}, 'execute') and has_function_privilege({}, 'execute') as backup, \
                 pg_has_role('pg_read_all_settings', 'member') as settings",
                literal(start),
                literal(stop)
            ))
            .await
            .context("ask for the role's rights")?;
        let role = row.text("role")?.to_string();
        let needs = [
            (
                "replication",
                "the attribute REPLICATION",
                format!("alter role \"{role}\" replication;"),
            ),
            (
                "backup",
                "the right to start and stop a backup",
                format!("grant execute on function {start}, {stop} to \"{role}\";"),
            ),
            (
                "settings",
                "the right to read all settings",
                format!("grant pg_read_all_settings to \"{role}\";"),
            ),
        ];
        for (column, right, remedy) in needs {
            if over_network && column == "backup" {
                continue;
            }
            if row.text(column)? != "t" {
                let reason = format!("role {role:?} lacks {right}");
                return Err(Error::new(Kind::Postgres, reason).remedy(remedy));
            }
        }
        Ok(match over_network {
            true => format!("{role:?} may replicate and read settings"),
            false => format!("{role:?} may replicate, take backups and read settings"),
        })
    }

    /// pg_hba lets us in, and a walsender is free.
    async fn replication(&mut self) -> Result<String> {
        let conninfo = connect::conninfo(self.settings)?;
        let mut replication = Connection::connect(&conninfo, Mode::Replication).await?;
        let identity = replication.identify_system().await?;
        if identity.system != self.server.system {
            return Err(Error::new(
                Kind::Postgres,
                "SQL and replication reach two different servers",
            )
            .remedy("let `conninfo` name one host, or set target_session_attrs"));
        }
        if self.settings.postgres.data_dir.is_none() {
            // The WAL goes on beside a base backup.
            let second = Connection::connect(&conninfo, Mode::Replication).await;
            second.context("open a second one, for snapshots")?.close().await;
        }
        Ok(format!("timeline {}, WAL end {}", identity.timeline, identity.flush))
    }

    async fn slot(&mut self) -> Result<Finding> {
        let name = &self.settings.postgres.slot;
        let rows = self
            .sql
            .query(&format!(
                "select slot_type, active_pid, coalesce(wal_status, 'reserved') as wal_status \
                 from pg_replication_slots where slot_name = {}",
                literal(name)
            ))
            .await?;
        let Some(row) = rows.first() else { return self.room_for_a_slot().await };
        if row.text("slot_type")? != "physical" {
            return Err(Error::new(Kind::Config, format!("slot {name:?} is a logical slot"))
                .remedy("choose another name with [postgres] slot"));
        }
        let status = row.text("wal_status")?.to_string();
        if status == "lost" || status == "unreserved" {
            return Ok(Finding::warning(
                format!("slot {name}"),
                format!(
                    "wal_status is {status}: the server has removed, or is about to remove, WAL that it held"
                ),
                "start the agent now; raise max_slot_wal_keep_size; a new snapshot closes the gap",
            ));
        }
        let seen = match row.by_name("active_pid") {
            Some(pid) => format!("in use by backend {pid}: an agent is connected"),
            None => format!("there, {status}"),
        };
        Ok(Finding::good(format!("slot {name}"), seen))
    }

    async fn room_for_a_slot(&mut self) -> Result<Finding> {
        let row = self
            .sql
            .query_one(
                "select current_setting('max_replication_slots')::int - \
                 (select count(*) from pg_replication_slots) as free",
            )
            .await?;
        if row.parse::<i64>("free")? < 1 {
            return Err(Error::new(
                Kind::Postgres,
                "every replication slot of the server is in use",
            )
            .remedy("raise max_replication_slots and restart, or drop a slot that nobody needs"));
        }
        Ok(Finding::good("slot", "not there yet; the agent makes it when it starts"))
    }

    /// A dead agent must not be able to fill the server's disk.
    async fn keep_size(&mut self) -> Result<Finding> {
        let row =
            self.sql.query_one("select current_setting('max_slot_wal_keep_size') as size").await?;
        let size = row.text("size")?;
        Ok(match size {
            "-1" => Finding::warning(
                "max_slot_wal_keep_size",
                "not set: while no agent runs, the slot lets WAL fill the server's disk",
                "alter system set max_slot_wal_keep_size = '64GB' (less than the free disk); then select pg_reload_conf()",
            ),
            size => Finding::good("max_slot_wal_keep_size", size),
        })
    }

    /// It is this server's, and this operating-system user may read it.
    async fn data_dir(&mut self) -> Result<String> {
        let Some(path) = &self.settings.postgres.data_dir else { return self.no_data_dir().await };
        let control = control::read(&path.join("global/pg_control")).map_err(|error| {
            error.remedy("run the agent as a user that may read the data directory: the one PostgreSQL runs as, or one in its group (initdb --allow-group-access)")
        })?;
        if control.system != self.server.system {
            let reason = format!("{} belongs to system {}", path.display(), control.system);
            return Err(Error::new(Kind::Config, reason).remedy(
                "set data-dir to what `show data_directory` says on the server that conninfo names",
            ));
        }
        let checksums = if control.has_checksums() { "with" } else { "without" };
        Ok(format!("{} readable, {checksums} page checksums", path.display()))
    }

    /// Snapshots come over the replication connection.
    async fn no_data_dir(&mut self) -> Result<String> {
        let row = self
            .sql
            .query_one(
                "select current_setting('data_checksums') as checksums, \
                 (select setting from pg_settings where name = 'config_file') as config, \
                 (select setting from pg_settings where name = 'data_directory') as data_dir",
            )
            .await?;
        let checksums = if row.text("checksums")? == "on" { "with" } else { "without" };
        let elsewhere = match (row.by_name("config"), row.by_name("data_dir")) {
            (Some(config), Some(data_dir)) if !Path::new(config).starts_with(data_dir) => {
                format!("; the configuration at {config} is outside of it, and in no snapshot")
            }
            _ => String::new(),
        };
        Ok(format!(
            "not given: snapshots are base backups over the network, {checksums} page checksums{elsewhere}"
        ))
    }

    /// What is special about a standby; none for a primary.
    async fn standby(&mut self) -> Result<Option<Finding>> {
        let row = self
            .sql
            .query_one(
                "select pg_is_in_recovery() as standby, \
                 (select full_page_writes from pg_control_checkpoint()) as full_pages",
            )
            .await?;
        Ok(match (row.text("standby")?, row.text("full_pages")?) {
            ("t", "t") => Some(Finding::good(
                "standby",
                "WAL and snapshots are taken from it, unless another agent holds the lease",
            )),
            ("t", _) => {
                let reason =
                    "the primary runs with full_page_writes = off: a standby can't be backed up";
                let error = Error::new(Kind::Postgres, reason)
                    .remedy("on the primary: alter system set full_page_writes = on; select pg_reload_conf()");
                Some(Finding::of("standby", Err(error)))
            }
            _ => None,
        })
    }
}
