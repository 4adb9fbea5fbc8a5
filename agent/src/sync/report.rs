//! What a pass found and did, for people and programs.

use crate::prune::Amount;
use backstay_common::id::{LocationName, SystemId};
use backstay_common::name::ObjectName;
use backstay_common::{Error, Kind};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A report names no more differences of one location than this; it counts them all.
const NAMED_MAX: usize = 10_000;

/// All locations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncReport {
    /// Nothing was changed.
    pub check: bool,
    /// Every object was read.
    pub deep: bool,
    /// Each location that was compared, by system.
    pub locations: Vec<LocationSync>,
    /// Locations that were not compared, and why.
    pub failed: Vec<NotCompared>,
}

/// A location that could not be listed, or read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotCompared {
    pub location: LocationName,
    pub reason: String,
    pub exit_code: u8,
}

/// One location.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocationSync {
    pub location: LocationName,
    pub system: SystemId,
    /// Objects that were listed.
    pub objects: u64,
    /// What it lacked and has now.
    pub copied: Amount,
    /// What was damaged there and is whole now.
    pub repaired: Amount,
    /// Pieces of WAL whose span is there.
    pub deleted: u64,
    /// What is not as elsewhere, and was not put right.
    pub differences: Vec<Difference>,
    /// How many of them there are; not all may be named.
    pub different: u64,
}

/// What is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    Missing,
    Damaged,
}

/// One object at one location.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    pub name: String,
    pub what: What,
    /// What is known of it, or why it could not be put right.
    pub reason: String,
    pub exit_code: u8,
}

impl Difference {
    pub fn new(name: &ObjectName, what: What, error: &Error) -> Difference {
        let exit_code = error.kind().exit_code();
        Difference { name: name.to_string(), what, reason: error.message().to_string(), exit_code }
    }
}

impl LocationSync {
    pub fn new(location: &LocationName, system: SystemId, objects: usize) -> LocationSync {
        LocationSync {
            location: location.clone(),
            system,
            objects: objects as u64,
            copied: Amount::default(),
            repaired: Amount::default(),
            deleted: 0,
            differences: Vec::new(),
            different: 0,
        }
    }

    pub fn differs(&mut self, difference: Difference) {
        self.different += 1;
        if self.differences.len() < NAMED_MAX {
            self.differences.push(difference);
        }
    }

    /// The first of what could not be put right, and how many there are.
    pub fn summary(&self, what: What) -> Option<String> {
        let first = self.differences.iter().find(|difference| difference.what == what)?;
        let more = self.different.saturating_sub(1);
        let tail = if more > 0 { format!("; and {more} more") } else { String::new() };
        Some(format!("{}: {}{tail}", first.name, first.reason))
    }
}

impl SyncReport {
    pub fn fail(&mut self, location: &LocationName, error: &Error) {
        let exit_code = error.kind().exit_code();
        self.add(NotCompared { location: location.clone(), reason: error.to_string(), exit_code });
    }

    /// Takes over which locations could not be read.
    pub fn not_read(&mut self, other: SyncReport) {
        other.failed.into_iter().for_each(|failed| self.add(failed));
    }

    fn add(&mut self, failed: NotCompared) {
        if !self.failed.iter().any(|known| known.location == failed.location) {
            self.failed.push(failed);
        }
    }

    /// True if all locations were compared and are as they should be.
    pub fn is_clean(&self) -> bool {
        self.failed.is_empty() && self.locations.iter().all(|location| location.different == 0)
    }

    /// True if all locations were compared and none lacks anything.
    pub fn is_complete(&self) -> bool {
        let left = self.locations.iter().flat_map(|location| &location.differences);
        self.failed.is_empty() && !left.map(|left| left.what).any(|what| what == What::Missing)
    }

    /// Takes over what an earlier attempt did; what it left is what this one found.
    pub fn after(&mut self, before: &SyncReport) {
        for now in &mut self.locations {
            let same =
                |then: &&LocationSync| (&then.location, then.system) == (&now.location, now.system);
            if let Some(then) = before.locations.iter().find(same) {
                now.copied.join(then.copied);
                now.repaired.join(then.repaired);
                now.deleted += then.deleted;
            }
        }
    }

    /// 0 if all is well; an integrity fault counts more than a location that cannot be asked, and that more than the rest.
    pub fn exit_code(&self) -> u8 {
        let left = self.locations.iter().flat_map(|location| &location.differences);
        let failed = self.failed.iter().map(|failed| failed.exit_code);
        let codes: Vec<u8> = left.map(|left| left.exit_code).chain(failed).collect();
        let urgent = [Kind::Corrupt, Kind::Storage].map(Kind::exit_code);
        let first = urgent.into_iter().find(|code| codes.contains(code));
        first.or(codes.first().copied()).unwrap_or(0)
    }
}

impl fmt::Display for SyncReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for location in &self.locations {
            let LocationSync { location: name, system, objects, .. } = location;
            write!(f, "location {name}, system {system}: {objects} objects")?;
            match self.check {
                true => {}
                false => write!(
                    f,
                    "; copied: {}; repaired: {}; deleted: {}",
                    location.copied, location.repaired, location.deleted
                )?,
            }
            match location.different {
                0 => writeln!(f, "; nothing is missing")?,
                count => writeln!(f, "; {count} DIFFERENCES")?,
            }
            for difference in &location.differences {
                let what = match difference.what {
                    What::Missing => "missing",
                    What::Damaged => "DAMAGED",
                };
                writeln!(f, "  {what}  {}: {}", difference.name, difference.reason)?;
            }
            let unnamed = location.different - location.differences.len() as u64;
            if unnamed > 0 {
                writeln!(f, "  and {unnamed} more")?;
            }
        }
        for failed in &self.failed {
            writeln!(f, "location {}: NOT compared: {}", failed.location, failed.reason)?;
        }
        if self.check && self.is_clean() {
            writeln!(f, "all locations hold the same")?;
        }
        Ok(())
    }
}
