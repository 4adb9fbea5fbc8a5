//! A plan as a person reads it.

use super::{Plan, StopPoint};
use std::fmt;

/// Bytes with a unit that keeps the number short.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

impl fmt::Display for StopPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopPoint::Consistent => f.write_str("as soon as the snapshot is consistent"),
            StopPoint::AfterRecord(lsn) => write!(f, "after the record at {lsn}"),
            StopPoint::BeforeRecord(lsn) => write!(f, "before the record at {lsn}"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Cluster      {} (system {})", self.cluster, self.system)?;
        writeln!(f, "Target       {}", self.target)?;
        let major = self.server_version / 10_000;
        let from_snapshot = bytes(self.snapshot_bytes);
        writeln!(
            f,
            "Snapshot     {}, PostgreSQL {major}: {from_snapshot} to fetch, {} on disk",
            self.snapshot,
            bytes(self.database_bytes)
        )?;
        writeln!(f, "WAL          {} to replay", bytes(self.wal_bytes))?;
        for leg in &self.legs {
            writeln!(f, "             {} on branch {}", leg.range(), leg.branch)?;
        }
        writeln!(f, "Stops        {}; no WAL from {} on is used", self.stop, self.end)?;
        if let Some(time) = self.last_transaction {
            writeln!(f, "Last kept    the transaction that ended {time}")?;
        }
        if let Some(time) = self.first_lost {
            writeln!(f, "First lost   the transaction that ended {time}")?;
        }
        let names: Vec<&str> = self.locations.iter().map(|name| name.as_str()).collect();
        writeln!(f, "Reads from   {}", names.join(", "))?;
        if let Some(folder) = &self.wal_from {
            writeln!(f, "             and {}", folder.display())?;
        }
        for (name, reason) in &self.unreachable {
            writeln!(f, "Not asked    {name}: {reason}")?;
        }
        for note in &self.notes {
            writeln!(f, "Note         {note}")?;
        }
        write!(f, "Estimate     {}", duration(self.estimate_seconds))
    }
}
