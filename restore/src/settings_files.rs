//! The configuration files of a restored cluster: what is written, what is taken out, and what is said of it.
//!
//! Two blocks stand at the end of `postgresql.auto.conf`. *recovery* brings replay to its target and goes once the cluster is
//! open; *safety* stays: it keeps the copy from archiving, replicating or waiting in the name of the original. What earlier
//! restores left is removed first, so that a block is never there twice.

mod included;
mod text;

use crate::plan::{HotStandbyMinimums, Plan, StopPoint};
use backstay_common::control::ControlFile;
use backstay_common::snapshot::Root;
use backstay_common::snapshot::manifest::ConfigFile;
use backstay_common::snapshot::table::check_relative;
use backstay_common::{Context, Result};
use std::path::Path;

pub use text::{quote_config, quote_shell, setting, value_of};

use crate::directory::{make_directory, write_durably};
use crate::materialize::Existing;
use crate::owner::Owner;
use crate::recovery_commands::{recovery_end_command, restore_command};

const AUTO: &str = "postgresql.auto.conf";
pub const MAIN: &str = "postgresql.conf";
const RECOVERY: &str = "recovery";
const SAFETY: &str = "safety";

/// Left in `postgresql.auto.conf` they would send this recovery astray, or act in the original's name.
const CLEARED_IN_AUTO: [&str; 12] = [
    "restore_command",
    "recovery_end_command",
    "archive_cleanup_command",
    "recovery_min_apply_delay",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "archive_mode",
    "archive_command",
    "archive_library",
    "synchronous_standby_names",
    "data_directory",
];
/// In a copied `postgresql.conf` they point at the original's files; a recovery target there would make two.
const CLEARED_IN_MAIN: [&str; 4] =
    ["data_directory", "hba_file", "ident_file", "external_pid_file"];
/// Shown when they change: what the copy must not do that the original did.
const SAFETY_NAMES: [&str; 6] = [
    "archive_mode",
    "archive_command",
    "archive_library",
    "primary_conninfo",
    "primary_slot_name",
    "synchronous_standby_names",
];

/// What PostgreSQL does when it has reached the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtTarget {
    /// Waits, and is then promoted by us: the fast way to open.
    Pause,
    /// Opens by itself.
    Promote,
}

impl AtTarget {
    fn word(self) -> &'static str {
        match self {
            AtTarget::Pause => "pause",
            AtTarget::Promote => "promote",
        }
    }
}

/// What recovery needs to know, as lines of configuration. `ours` is the restored directory's own folder.
pub fn recovery_lines(plan: &Plan, ours: &Path, at_target: AtTarget) -> Vec<String> {
    // A restore that waits for the target clears up by itself.
    let at_end = match at_target {
        AtTarget::Pause => String::new(),
        AtTarget::Promote => recovery_end_command(ours),
    };
    let timeline = plan.legs.last().map_or(1, |leg| leg.timeline().get());
    let mut lines = vec![
        setting("restore_command", &restore_command(ours)),
        setting("recovery_target_timeline", &timeline.to_string()),
        setting("recovery_target_action", at_target.word()),
        setting("recovery_min_apply_delay", "0"),
        // Everything is on disk already: PostgreSQL need not open and sync each file again.
        setting("recovery_init_sync_method", "syncfs"),
        setting("recovery_end_command", &at_end),
        setting("archive_cleanup_command", ""),
    ];
    let (lsn, inclusive) = match plan.stop {
        // No target: WAL ends there, and `immediate` would want one more record to stop before.
        StopPoint::Consistent => return lines,
        StopPoint::AfterRecord(lsn) => (lsn, "on"),
        StopPoint::BeforeRecord(lsn) => (lsn, "off"),
    };
    lines.push(setting("recovery_target_lsn", &lsn.to_string()));
    lines.push(setting("recovery_target_inclusive", inclusive));
    lines
}

/// What stays: nothing is archived, replicated or waited for, and hot standby has what the WAL asks of it.
pub fn safety_lines(minimums: &HotStandbyMinimums, major: u32, port: Option<u16>) -> Vec<String> {
    let mut lines = vec![
        setting("archive_mode", "off"),
        setting("archive_command", ""),
        setting("primary_conninfo", ""),
        setting("primary_slot_name", ""),
        setting("synchronous_standby_names", ""),
        setting("max_connections", &minimums.max_connections.to_string()),
        setting("max_worker_processes", &minimums.max_worker_processes.to_string()),
        setting("max_wal_senders", &minimums.max_wal_senders.to_string()),
        setting("max_prepared_transactions", &minimums.max_prepared_transactions.to_string()),
        setting("max_locks_per_transaction", &minimums.max_locks_per_transaction.to_string()),
    ];
    if major >= 15 {
        lines.push(setting("archive_library", ""));
    }
    lines.extend(port.map(|port| setting("port", &port.to_string())));
    lines
}

/// The greater of what `pg_control` says and what the plan saw in the WAL.
pub fn minimums(control: &ControlFile, plan: &HotStandbyMinimums) -> HotStandbyMinimums {
    let at_backup = &control.hot_standby;
    HotStandbyMinimums {
        max_connections: at_backup.max_connections.max(plan.max_connections),
        max_worker_processes: at_backup.max_worker_processes.max(plan.max_worker_processes),
        max_wal_senders: at_backup.max_wal_senders.max(plan.max_wal_senders),
        max_prepared_transactions: at_backup
            .max_prepared_transactions
            .max(plan.max_prepared_transactions),
        max_locks_per_transaction: at_backup
            .max_locks_per_transaction
            .max(plan.max_locks_per_transaction),
    }
}

/// The settings files of one restored directory.
#[derive(Clone, Copy, Debug)]
pub struct SettingsFiles<'a> {
    pub dir: &'a Path,
    pub owner: Owner,
}

impl SettingsFiles<'_> {
    /// Puts the source's configuration from outside its data directory in place, where the directory has none of its own.
    /// Returns what was done, for people. Of a cluster that is restored over the configuration is its own, and keeps its
    /// paths.
    pub fn place_config(&self, root: &Root, existing: Existing) -> Result<Vec<String>> {
        let mut said = Vec::new();
        let is_own = existing == Existing::Cluster && self.dir.join(MAIN).exists();
        if !self.dir.join(MAIN).exists() {
            for file in &root.config_files {
                said.extend(self.place(file)?);
            }
        }
        for (name, content) in [
            (MAIN, "# PostgreSQL's defaults.\n"),
            ("pg_hba.conf", LOCAL_ONLY),
            ("pg_ident.conf", ""),
        ] {
            if !self.dir.join(name).exists() {
                self.write(name, content)?;
                said.push(format!("the snapshot has no {name}: a minimal one was written"));
            }
        }
        said.extend(self.clean_config(is_own)?);
        said.extend(self.missing_tls_files()?);
        Ok(said)
    }

    fn place(&self, file: &ConfigFile) -> Result<Option<String>> {
        check_relative(&file.name)?;
        let path = self.dir.join(&file.name);
        if path.exists() {
            return Ok(None);
        }
        if let Some(parent) = path.parent().filter(|parent| *parent != self.dir) {
            make_directory(parent, self.owner)?;
        }
        write_durably(&path, &file.content, self.owner)?;
        Ok(Some(format!("{} is the source's {}", file.name, file.source)))
    }

    /// Removes what earlier restores and the original's role left, writes both blocks and `recovery.signal`. Returns
    /// what was cleared, for people.
    pub fn prepare_recovery(&self, recovery: &[String], safety: &[String]) -> Result<Vec<String>> {
        let config = self.whole_config()?;
        let auto = self.read(AUTO)?;
        let mut cleared = Vec::new();
        let (kept, dropped) = text::clean(&auto, is_stale_in_auto);
        cleared.extend(dropped.into_iter().map(|line| format!("{AUTO}: {line}")));
        for name in SAFETY_NAMES {
            let in_main =
                value_of(&config, name).filter(|value| !value.is_empty() && value != "off");
            cleared.extend(in_main.map(|value| format!("{MAIN}: {name} = '{value}' (overridden)")));
        }
        let blocks = [text::block(RECOVERY, recovery), text::block(SAFETY, safety)];
        self.write(AUTO, &(kept + &blocks.concat()))?;
        let standby = self.dir.join("standby.signal");
        if standby.exists() {
            std::fs::remove_file(&standby).context("remove standby.signal")?;
            cleared.push("standby.signal".into());
        }
        self.write("recovery.signal", "")?;
        Ok(cleared)
    }

    /// Takes the recovery block away: the cluster is open. Its lines go one by one where `ALTER SYSTEM` took the marks.
    pub fn finish_recovery(&self, recovery: &[String]) -> Result<()> {
        let auto = self.read(AUTO)?;
        let after = match text::without_block(&auto, RECOVERY) {
            same if same == auto => text::without_lines(&auto, recovery),
            after => after,
        };
        self.write(AUTO, &after)
    }

    /// The port that the server will listen on.
    pub fn port(&self) -> Result<u16> {
        Ok(self.value("port")?.and_then(|value| value.parse().ok()).unwrap_or(5432))
    }

    /// Where the server's sockets will be, as the configuration says; none if it leaves that to the server.
    pub fn socket_directory(&self) -> Result<Option<String>> {
        let value = self.value("unix_socket_directories")?;
        let first = value.and_then(|v| v.split(',').next().map(|first| first.trim().to_string()));
        Ok(first.filter(|directory| !directory.is_empty()))
    }

    fn read(&self, name: impl AsRef<Path>) -> Result<String> {
        let name = name.as_ref();
        match std::fs::read(self.dir.join(name)) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error).context(format!("read {}", name.display())),
        }
    }

    fn write(&self, name: impl AsRef<Path>, content: &str) -> Result<()> {
        write_durably(&self.dir.join(name), content.as_bytes(), self.owner)
    }
}

/// For a cluster whose own file is not there: the same user on the same host, and nobody else.
const LOCAL_ONLY: &str = "local all all peer\n";

fn is_stale_in_auto(name: &str) -> bool {
    CLEARED_IN_AUTO.contains(&name) || name.starts_with("recovery_target")
}

#[cfg(test)]
pub(crate) mod tests;
