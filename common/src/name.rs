//! The names of stored objects: the one place where they are written and read.
//!
//! Names are relative to a location's prefix. `FORMAT.md` has the grammar.

use crate::id::{AgentName, Branch, EpochId, LedgerWriter, ObjectId, SnapshotId, SystemId};
use crate::lsn::{Lsn, LsnRange};
use std::fmt;
use std::str::FromStr;

/// The name of one stored object, relative to the prefix of its location.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectName {
    /// What `init` makes; a location without it is unavailable.
    Cluster,
    /// The location also takes the backups of another system of the same cluster: that of after pg_upgrade.
    Accepted { system: SystemId },
    /// An epoch key as one provider holds it.
    Wrap { system: SystemId, epoch: EpochId, wrap: ObjectId },
    /// What a branch grew from.
    Origin { system: SystemId, branch: Branch },
    /// A span or a piece of WAL.
    Wal { system: SystemId, branch: Branch, range: LsnRange, id: ObjectId },
    /// A cache: what the footers of all WAL objects in the range say.
    WalIndex { system: SystemId, branch: Branch, range: LsnRange, id: ObjectId },
    /// "Covered until": the agent's word for an idle server.
    Head { system: SystemId, agent: AgentName, seq: u64 },
    /// Frames of snapshots.
    Pack { system: SystemId, id: ObjectId },
    /// A snapshot has been started.
    Begin { system: SystemId, snapshot: SnapshotId },
    /// A snapshot is complete here.
    Manifest { system: SystemId, snapshot: SnapshotId },
    /// Somebody holds a snapshot; the greatest `seq` of a pin speaks for it.
    Pin { system: SystemId, pin: ObjectId, seq: u64 },
    /// What prune is about to delete.
    Condemned { system: SystemId, run: ObjectId },
    /// Who takes snapshots, indexes and prunes.
    Lease { system: SystemId, generation: u64 },
    /// WAL that nobody has, and why.
    Gap { system: SystemId, branch: Branch, range: LsnRange, id: ObjectId },
    /// One thing that happened.
    Ledger { system: SystemId, writer: LedgerWriter, seq: u64 },
}

/// Folders of a location, for listings. Each ends in `/`.
pub mod folder {
    use super::*;

    /// The systems that have been accepted besides the one that the location was made for.
    pub const ACCEPTED: &str = "accepted/";

    /// All of one system.
    pub fn system(system: SystemId) -> String {
        format!("{system}/")
    }

    pub fn keys(system: SystemId) -> String {
        format!("{system}/keys/")
    }

    pub fn epoch(system: SystemId, epoch: EpochId) -> String {
        format!("{system}/keys/{epoch}/")
    }

    /// All branches' WAL.
    pub fn wal(system: SystemId) -> String {
        format!("{system}/wal/")
    }

    pub fn branch(system: SystemId, branch: Branch) -> String {
        format!("{system}/wal/{branch}/")
    }

    /// Sorts directly before every object of the branch that starts at `lsn` or later.
    pub fn branch_from(system: SystemId, branch: Branch, lsn: Lsn) -> String {
        format!("{system}/wal/{branch}/{:08X}/{}", lsn.get() >> 32, lsn.name())
    }

    /// All branches' indexes of WAL.
    pub fn walindexes(system: SystemId) -> String {
        format!("{system}/walindex/")
    }

    pub fn walindex(system: SystemId, branch: Branch) -> String {
        format!("{system}/walindex/{branch}/")
    }

    pub fn heads(system: SystemId) -> String {
        format!("{system}/head/")
    }

    pub fn packs(system: SystemId) -> String {
        format!("{system}/pack/")
    }

    pub fn snapshots(system: SystemId) -> String {
        format!("{system}/snapshots/")
    }

    pub fn pins(system: SystemId) -> String {
        format!("{system}/pins/")
    }

    pub fn condemned(system: SystemId) -> String {
        format!("{system}/condemned/")
    }

    pub fn leases(system: SystemId) -> String {
        format!("{system}/lease/")
    }

    pub fn gaps(system: SystemId) -> String {
        format!("{system}/gap/")
    }

    pub fn ledger(system: SystemId) -> String {
        format!("{system}/ledger/")
    }
}

impl ObjectName {
    /// The system whose object it is; `None` for `cluster`.
    pub fn system(&self) -> Option<SystemId> {
        match self {
            ObjectName::Cluster => None,
            ObjectName::Accepted { system }
            | ObjectName::Wrap { system, .. }
            | ObjectName::Origin { system, .. }
            | ObjectName::Wal { system, .. }
            | ObjectName::WalIndex { system, .. }
            | ObjectName::Head { system, .. }
            | ObjectName::Pack { system, .. }
            | ObjectName::Begin { system, .. }
            | ObjectName::Manifest { system, .. }
            | ObjectName::Pin { system, .. }
            | ObjectName::Condemned { system, .. }
            | ObjectName::Lease { system, .. }
            | ObjectName::Gap { system, .. }
            | ObjectName::Ledger { system, .. } => Some(*system),
        }
    }
}

impl ObjectName {
    /// The id at the end of the name, where there is one: the first eight bytes of the object's salt.
    pub fn id(&self) -> Option<ObjectId> {
        match self {
            ObjectName::Wrap { wrap: id, .. }
            | ObjectName::Wal { id, .. }
            | ObjectName::WalIndex { id, .. }
            | ObjectName::Gap { id, .. }
            | ObjectName::Pack { id, .. }
            | ObjectName::Condemned { run: id, .. } => Some(*id),
            _ => None,
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectName::Cluster => f.write_str("cluster"),
            ObjectName::Accepted { system } => write!(f, "accepted/{system}"),
            ObjectName::Wrap { system, epoch, wrap } => write!(f, "{system}/keys/{epoch}/{wrap}"),
            ObjectName::Origin { system, branch } => write!(f, "{system}/wal/{branch}/origin"),
            ObjectName::Wal { system, branch, range, id } => write!(
                f,
                "{system}/wal/{branch}/{:08X}/{}-{}.{id}",
                range.start.get() >> 32,
                range.start.name(),
                range.end.name()
            ),
            ObjectName::WalIndex { system, branch, range, id } => write!(
                f,
                "{system}/walindex/{branch}/{}-{}.{id}",
                range.start.name(),
                range.end.name()
            ),
            ObjectName::Head { system, agent, seq } => {
                write!(f, "{system}/head/{agent}/{seq:020}")
            }
            ObjectName::Pack { system, id } => write!(f, "{system}/pack/{id}"),
            ObjectName::Begin { system, snapshot } => {
                write!(f, "{system}/snapshots/{snapshot}/begin")
            }
            ObjectName::Manifest { system, snapshot } => {
                write!(f, "{system}/snapshots/{snapshot}/manifest")
            }
            ObjectName::Pin { system, pin, seq } => write!(f, "{system}/pins/{pin}/{seq:020}"),
            ObjectName::Condemned { system, run } => write!(f, "{system}/condemned/{run}"),
            ObjectName::Lease { system, generation } => {
                write!(f, "{system}/lease/{generation:020}")
            }
            ObjectName::Gap { system, branch, range, id } => {
                write!(f, "{system}/gap/{branch}/{}-{}.{id}", range.start.name(), range.end.name())
            }
            ObjectName::Ledger { system, writer, seq } => {
                write!(f, "{system}/ledger/{writer}/{seq:020}")
            }
        }
    }
}

/// A name that is none of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of a stored object")]
pub struct BadName(pub String);

impl FromStr for ObjectName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<ObjectName, BadName> {
        parse(text).filter(|name| name.to_string() == text).ok_or_else(|| BadName(text.to_string()))
    }
}

fn parse(text: &str) -> Option<ObjectName> {
    if text == "cluster" {
        return Some(ObjectName::Cluster);
    }
    if let Some(system) = text.strip_prefix(folder::ACCEPTED) {
        return Some(ObjectName::Accepted { system: system.parse().ok()? });
    }
    let parts: Vec<&str> = text.split('/').collect();
    let system = parts[0].parse().ok()?;
    Some(match parts[1..] {
        ["keys", epoch, wrap] => {
            ObjectName::Wrap { system, epoch: epoch.parse().ok()?, wrap: wrap.parse().ok()? }
        }
        ["wal", branch, "origin"] => ObjectName::Origin { system, branch: branch.parse().ok()? },
        ["wal", branch, _, file] => {
            let (range, id) = range_and_id(file)?;
            ObjectName::Wal { system, branch: branch.parse().ok()?, range, id }
        }
        ["gap", branch, file] => {
            let (range, id) = range_and_id(file)?;
            ObjectName::Gap { system, branch: branch.parse().ok()?, range, id }
        }
        ["lease", generation] => ObjectName::Lease { system, generation: generation.parse().ok()? },
        ["ledger", writer, seq] => {
            ObjectName::Ledger { system, writer: writer.parse().ok()?, seq: seq.parse().ok()? }
        }
        ["walindex", branch, file] => {
            let (range, id) = range_and_id(file)?;
            ObjectName::WalIndex { system, branch: branch.parse().ok()?, range, id }
        }
        ["head", agent, seq] => {
            ObjectName::Head { system, agent: agent.parse().ok()?, seq: seq.parse().ok()? }
        }
        ["pack", id] => ObjectName::Pack { system, id: id.parse().ok()? },
        ["snapshots", snapshot, "begin"] => {
            ObjectName::Begin { system, snapshot: snapshot.parse().ok()? }
        }
        ["snapshots", snapshot, "manifest"] => {
            ObjectName::Manifest { system, snapshot: snapshot.parse().ok()? }
        }
        ["pins", pin, seq] => {
            ObjectName::Pin { system, pin: pin.parse().ok()?, seq: seq.parse().ok()? }
        }
        ["condemned", run] => ObjectName::Condemned { system, run: run.parse().ok()? },
        _ => return None,
    })
}

/// `<start>-<end>.<id>`
fn range_and_id(file: &str) -> Option<(LsnRange, ObjectId)> {
    let (range, id) = file.split_once('.')?;
    let (start, end) = range.split_once('-')?;
    let range = LsnRange::new(Lsn::from_name(start)?, Lsn::from_name(end)?);
    let id = id.parse().ok()?;
    (!range.is_empty()).then_some((range, id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::BranchId;
    use crate::segment::TimelineId;
    use proptest::prelude::*;

    prop_compose! {
        fn any_name()(
            which in 0..15, system: u64, bytes: [u8; 16], timeline in 1u32..,
            start in 0..u64::MAX, length in 1..u64::MAX, second in 0i64..4_000_000_000,
            agent in "[a-z][a-zA-Z0-9_.-]{0,20}", seq: u64,
        ) -> ObjectName {
            let system = SystemId::new(system);
            let id = ObjectId::from_bytes(bytes[..8].try_into().unwrap());
            let four: [u8; 4] = bytes[..4].try_into().unwrap();
            let branch =
                Branch { timeline: TimelineId::new(timeline).unwrap(), id: BranchId::from_bytes(four) };
            let range = LsnRange::new(Lsn::new(start), Lsn::new(start).add(length));
            let snapshot = SnapshotId::new(jiff::Timestamp::from_second(second).unwrap(), four);
            match which {
                0 => ObjectName::Cluster,
                1 => ObjectName::Wrap { system, epoch: EpochId::from_bytes(bytes), wrap: id },
                2 => ObjectName::Origin { system, branch },
                3 => ObjectName::Wal { system, branch, range, id },
                11 => ObjectName::WalIndex { system, branch, range, id },
                4 => ObjectName::Head { system, agent: agent.parse().unwrap(), seq },
                5 => ObjectName::Pack { system, id },
                6 => ObjectName::Begin { system, snapshot },
                7 => ObjectName::Pin { system, pin: id, seq },
                8 => ObjectName::Condemned { system, run: id },
                9 => ObjectName::Lease { system, generation: seq },
                10 => ObjectName::Gap { system, branch, range, id },
                12 => ObjectName::Accepted { system },
                13 => {
                    let writer = LedgerWriter { agent: agent.parse().unwrap(), chain: id };
                    ObjectName::Ledger { system, writer, seq }
                }
                _ => ObjectName::Manifest { system, snapshot },
            }
        }
    }

    proptest! {
        #[test]
        fn text_is_inverse(name in any_name()) {
            prop_assert_eq!(name.to_string().parse(), Ok(name));
        }

        #[test]
        fn whatever_parses_is_spelt_that_way(text in "[0-9a-fA-F/.-]{0,60}") {
            if let Ok(name) = text.parse::<ObjectName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }

    #[test]
    fn wal_sorts_by_position_and_a_listing_can_begin_anywhere() {
        let system = SystemId::new(7);
        let branch = Branch { timeline: TimelineId::FIRST, id: BranchId::from_bytes([1, 2, 3, 4]) };
        let name = |start: u64| {
            let range = LsnRange::new(Lsn::new(start), Lsn::new(start + 100));
            ObjectName::Wal { system, branch, range, id: ObjectId::from_bytes([0; 8]) }.to_string()
        };
        let starts = [0u64, 1, 0xFFFF_FFFF, 0x1_0000_0000, 0xABCD_0000_0000];
        let names: Vec<String> = starts.iter().map(|&start| name(start)).collect();
        assert!(names.is_sorted());
        for &start in &starts {
            let from = folder::branch_from(system, branch, Lsn::new(start));
            let seen = names.iter().filter(|n| **n > from).count();
            assert_eq!(seen, starts.iter().filter(|&&s| s >= start).count());
        }
    }

    #[test]
    fn look_alikes_are_not_names() {
        for bad in [
            "",
            "cluster/",
            "accepted/07",
            "accepted/7/x",
            "7/pack/../x",
            "7/pack/ABCDEF0123456789",
            "07/pack/0000000000000000",
            "7/wal/00000001-01020304/00000001/0000000000000000-0000000000000010.0000000000000000",
        ] {
            assert!(bad.parse::<ObjectName>().is_err(), "{bad}");
        }
    }
}
