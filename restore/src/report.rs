//! What a restore did, for people and for programs.

use crate::plan::Plan;
use crate::replay::Reached;
use backstay_common::id::LocationName;
use backstay_common::pgtime::PgTime;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// One phase and how long it took.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    pub name: &'static str,
    pub seconds: f64,
}

/// What was done, and what is left to do.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub cluster: String,
    pub system: String,
    pub target: String,
    pub snapshot: String,
    pub directory: PathBuf,
    /// Where what was there before has gone.
    pub moved_to: Option<PathBuf>,
    pub files: u64,
    pub written_bytes: u64,
    /// There already, and equal to what is sealed.
    pub kept_bytes: u64,
    /// Files of the cluster that is restored over which the snapshot does not have.
    pub removed_files: u64,
    pub wal_bytes: u64,
    /// Where the cluster is now; none if it was not started.
    pub reached: Option<Reached>,
    /// The last transaction that the plan saw on the restored side.
    pub last_transaction: Option<PgTime>,
    /// The first transaction that is not in the restored cluster, if the plan saw one.
    pub first_lost: Option<PgTime>,
    pub phases: Vec<Phase>,
    /// From the command to the open cluster, or to the end of the command.
    pub total_seconds: f64,
    /// Bytes of the snapshot that each location gave.
    pub read_from: Vec<(String, u64)>,
    pub unreachable: Vec<(LocationName, String)>,
    /// Settings that were the original's or an earlier restore's, and hold no more.
    pub cleared: Vec<String>,
    pub notes: Vec<String>,
    /// What a person does next.
    pub next: Vec<String>,
}

impl Report {
    pub fn new(plan: &Plan, directory: PathBuf) -> Report {
        Report {
            cluster: plan.cluster.to_string(),
            system: plan.system.to_string(),
            target: plan.target.clone(),
            snapshot: plan.snapshot.to_string(),
            directory,
            moved_to: None,
            files: 0,
            written_bytes: 0,
            kept_bytes: 0,
            removed_files: 0,
            wal_bytes: plan.wal_bytes,
            reached: None,
            last_transaction: plan.last_transaction,
            first_lost: plan.first_lost,
            phases: Vec::new(),
            total_seconds: 0.0,
            read_from: Vec::new(),
            unreachable: plan.unreachable.clone(),
            cleared: Vec::new(),
            notes: Vec::new(),
            next: Vec::new(),
        }
    }

    pub fn phase(&mut self, name: &'static str, seconds: f64) {
        self.phases.push(Phase { name, seconds });
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Restored {} to {} in {}",
            self.cluster,
            self.target,
            self.directory.display()
        )?;
        if let Some(aside) = &self.moved_to {
            writeln!(f, "  what was there   is now {}", aside.display())?;
        }
        writeln!(f, "  snapshot         {}", self.snapshot)?;
        write!(f, "  files            {} ({:.1} MiB written", self.files, mib(self.written_bytes))?;
        match self.kept_bytes {
            0 => writeln!(f, ")")?,
            kept => writeln!(f, ", {:.1} MiB were there and are kept)", mib(kept))?,
        }
        if self.removed_files > 0 {
            writeln!(
                f,
                "  removed          {} files that are not in the snapshot",
                self.removed_files
            )?;
        }
        for (location, bytes) in self.read_from.iter().filter(|(_, bytes)| *bytes > 0) {
            writeln!(f, "  read from        {location}: {:.1} MiB", mib(*bytes))?;
        }
        for (location, reason) in &self.unreachable {
            writeln!(f, "  not asked        {location}: {reason}")?;
        }
        self.write_reached(f)?;
        self.write_list(f, "cleared", &self.cleared)?;
        self.write_list(f, "note", &self.notes)?;
        for phase in &self.phases {
            writeln!(f, "  {:<16} {:.1} s", phase.name, phase.seconds)?;
        }
        writeln!(f, "  total            {:.1} s", self.total_seconds)?;
        self.write_list(f, "next", &self.next)
    }
}

impl Report {
    fn write_reached(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reached) = &self.reached {
            writeln!(
                f,
                "  reached          {}, now on timeline {}",
                reached.lsn, reached.timeline
            )?;
            let none = "none replayed (the snapshot holds all)";
            writeln!(
                f,
                "  last transaction {}",
                reached.last_transaction.as_deref().unwrap_or(none)
            )?;
            for prepared in &reached.prepared {
                writeln!(
                    f,
                    "  left open        prepared transaction {:?} of {} in {}, since {}",
                    prepared.gid, prepared.owner, prepared.database, prepared.prepared_at
                )?;
            }
        } else if let Some(last) = self.last_transaction {
            writeln!(f, "  last transaction {last} (when recovery has run)")?;
        }
        match self.first_lost {
            Some(lost) => writeln!(f, "  not restored     transactions from {lost} on"),
            None => writeln!(f, "  not restored     no stored transaction was left out"),
        }
    }

    fn write_list(&self, f: &mut fmt::Formatter<'_>, name: &str, lines: &[String]) -> fmt::Result {
        lines.iter().try_for_each(|line| writeln!(f, "  {name:<16} {line}"))
    }
}
