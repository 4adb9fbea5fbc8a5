//! What prune did, or would do, for people and programs.

use backstay_common::id::{LocationName, SnapshotId, SystemId};
use backstay_common::{Error, Kind};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// A dry run names no more objects than this; it counts them all.
pub const NAMED_MAX: usize = 20_000;

/// All locations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PruneReport {
    /// Nothing was changed.
    pub dry_run: bool,
    pub locations: Vec<LocationReport>,
    /// Locations where nothing was pruned, and why.
    pub failed: Vec<(LocationName, String)>,
    /// Those among them that could not be reached.
    #[serde(skip)]
    pub unavailable: BTreeSet<LocationName>,
}

impl PruneReport {
    pub fn fail(&mut self, location: &LocationName, error: &Error) {
        if error.kind() == Kind::Storage {
            self.unavailable.insert(location.clone());
        }
        self.failed.push((location.clone(), error.to_string()));
    }
}

/// One location.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LocationReport {
    pub location: LocationName,
    pub system: SystemId,
    /// It is not the server's own any more, and goes when its last commit has left the window.
    pub is_succeeded: bool,
    /// The window that was applied, in seconds.
    pub window: u64,
    /// The shorter window of the config, in seconds, that nobody has accepted yet.
    pub window_refused: Option<u64>,
    pub snapshots: Vec<SnapshotWord>,
    /// What stays, whatever its kind.
    pub kept: Amount,
    /// What may go, by reason; the sum of what follows.
    pub goes: Vec<(String, Amount)>,
    /// Deleted now. A dry run says what would be.
    pub deleted: Amount,
    /// Condemned now.
    pub condemned: Amount,
    /// Condemned before, and not yet due.
    pub waiting: Amount,
    /// Due, but the store would not delete it, as under object lock; it is tried again.
    pub left: Amount,
    /// Why it would not, where it does not let this identity delete.
    pub refused: Option<String>,
    /// Objects that are damaged here, and were read from another location to judge.
    pub damaged: Vec<String>,
    /// When the next of what is condemned is due.
    pub next_due: Option<Timestamp>,
    /// In a dry run: what may go, and why.
    pub objects: Vec<ObjectWord>,
}

/// Objects and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    pub objects: u64,
    pub bytes: u64,
}

impl Amount {
    pub fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }

    pub fn join(&mut self, other: Amount) {
        self.objects += other.objects;
        self.bytes += other.bytes;
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.bytes as f64 / f64::from(1 << 20);
        write!(f, "{} objects, {mib:.1} MiB", self.objects)
    }
}

/// A snapshot, and why it stays or may go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotWord {
    pub id: SnapshotId,
    pub stays: bool,
    pub reason: String,
}

/// An object that may go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectWord {
    pub name: String,
    pub reason: String,
    pub bytes: u64,
}

impl PruneReport {
    /// Takes over what became of another system.
    pub fn add(&mut self, other: PruneReport) {
        self.locations.extend(other.locations);
        for (location, reason) in other.failed {
            if !self.failed.iter().any(|(known, _)| *known == location) {
                self.failed.push((location, reason));
            }
        }
        self.unavailable.extend(other.unavailable);
    }

    /// What the systems' objects at a location leave undeleted although no lock holds them, and why.
    pub fn refused_at(&self, location: &LocationName) -> Option<(Amount, &str)> {
        let mut left = Amount::default();
        let mut reason = None;
        for done in self.locations.iter().filter(|done| done.location == *location) {
            let Some(refused) = &done.refused else { continue };
            left.join(done.left);
            reason = reason.or(Some(refused.as_str()));
        }
        reason.map(|reason| (left, reason))
    }

    /// When something that is condemned is next due.
    pub fn next_due(&self) -> Option<Timestamp> {
        self.locations.iter().filter_map(|location| location.next_due).min()
    }
}

impl fmt::Display for PruneReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, location) in self.locations.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            location.show(self.dry_run, f)?;
        }
        for (location, reason) in &self.failed {
            writeln!(f, "location {location}: NOT pruned: {reason}")?;
        }
        Ok(())
    }
}

impl LocationReport {
    fn show(&self, dry_run: bool, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let window = |seconds| humantime::format_duration(Duration::from_secs(seconds));
        write!(f, "location {}, window {}", self.location, window(self.window))?;
        match self.is_succeeded {
            true => writeln!(f, ", earlier system {}", self.system)?,
            false => writeln!(f)?,
        }
        if let Some(refused) = self.window_refused {
            let refused = window(refused);
            writeln!(
                f,
                "  the config's window of {refused} is shorter: --accept-window applies it"
            )?;
        }
        for name in &self.damaged {
            writeln!(f, "  DAMAGED here, and read from another location: {name}")?;
        }
        for snapshot in &self.snapshots {
            let word = if snapshot.stays { "stays" } else { "goes " };
            writeln!(f, "  {word}  {}  {}", snapshot.id, snapshot.reason)?;
        }
        for (reason, amount) in &self.goes {
            writeln!(f, "  goes: {amount}: {reason}")?;
        }
        let would = if dry_run { "would be " } else { "" };
        writeln!(f, "  kept: {}", self.kept)?;
        writeln!(f, "  {would}deleted: {}; {would}condemned: {}", self.deleted, self.condemned)?;
        if self.waiting.objects > 0 {
            writeln!(f, "  condemned before, and not yet due: {}", self.waiting)?;
        }
        if self.left.objects > 0 {
            writeln!(f, "  the store does not let go of {}; tried again later", self.left)?;
        }
        if let Some(reason) = &self.refused {
            writeln!(f, "  REFUSED: {reason}")?;
        }
        match self.next_due {
            Some(due) => writeln!(f, "  next due: {due}"),
            None => Ok(()),
        }
    }
}
