//! `lease/<generation>`: who takes snapshots, indexes and prunes.
//!
//! Each generation is created once and never renewed. Whoever finds its holder dead (PostgreSQL is asked, no clock is
//! compared) creates the next one. A holder that was only asleep goes on without knowing; so a lease names the
//! snapshots that had been begun when it was made, and readers ignore a snapshot of an older generation that is not
//! among them ([`is_superseded`]): it began when its generation was over.
//!
//! Two agents that see different locations can create the same generation twice. Then each holds it where it created it,
//! and readers take what both knew.

use crate::cbor::{self, Fields};
use crate::id::{AgentName, SnapshotId, SystemId};
use crate::keys::Epoch;
use crate::name::ObjectName;
use crate::seal::{self, Draft, Header, ObjectKind, Sealed};
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// The plain section of a lease; it needs no key to be read.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Lease {
    /// From 1 on.
    #[n(0)]
    pub generation: u64,
    #[n(1)]
    pub agent: AgentName,
    /// The holder lives as long as a server shows that it streams through this slot.
    #[n(2)]
    pub slot: String,
    /// Of the holder's state directory: agents may share a name.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub holder: [u8; 16],
    /// The snapshots that had been begun when it was made, as far as locations answered.
    #[n(4)]
    pub begun: Vec<SnapshotId>,
    /// Every location answered. A lease that may have missed a snapshot supersedes none.
    #[n(5)]
    pub is_complete: bool,
    /// Unix seconds by the holder's clock, for people only.
    #[n(6)]
    pub made: i64,
}

impl Fields for Lease {
    const KNOWN: u64 = 7;
    const WHAT: &'static str = "a lease";
}

impl Lease {
    /// The plain section, after the trailer has been checked. Needs no key.
    pub fn read(bytes: &Bytes, name: &ObjectName) -> Result<Lease> {
        let header = Header::check(bytes, name)?;
        let lease: Lease = cbor::decode(header.plain())?;
        match name {
            ObjectName::Lease { generation, .. } if *generation == lease.generation => Ok(lease),
            _ => Err(Error::new(Kind::Corrupt, format!("object {name} is of another generation"))),
        }
    }

    pub fn seal(&self, epoch: &Epoch, system: SystemId) -> Sealed {
        let draft = Draft {
            kind: ObjectKind::Lease,
            plain: cbor::encode(self),
            frames: Vec::new(),
            meta: Vec::new(),
        };
        seal::seal(draft, epoch, |_| ObjectName::Lease { system, generation: self.generation })
    }
}

/// True if a snapshot of `generation` was begun when that generation had been superseded: nobody may use it. Generation 0
/// was taken without a lease, and is superseded by the first.
pub fn is_superseded(snapshot: SnapshotId, generation: u64, leases: &[Lease]) -> bool {
    let later = leases.iter().filter(|lease| lease.generation > generation && lease.is_complete);
    let Some(next) = later.clone().map(|lease| lease.generation).min() else { return false };
    let mut of_next = later.filter(|lease| lease.generation == next);
    !of_next.any(|lease| lease.begun.contains(&snapshot))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(generation: u64, begun: &[SnapshotId]) -> Lease {
        Lease {
            generation,
            agent: "db1".parse().unwrap(),
            slot: "backstay_db1".into(),
            holder: [1; 16],
            begun: begun.to_vec(),
            is_complete: true,
            made: 1,
        }
    }

    fn id(second: i64) -> SnapshotId {
        SnapshotId::new(jiff::Timestamp::from_second(second).unwrap(), [1; 4])
    }

    #[test]
    fn what_had_begun_stays_and_what_began_later_does_not() {
        let leases = [lease(1, &[]), lease(2, &[id(10)]), lease(3, &[id(10), id(30)])];
        assert!(!is_superseded(id(10), 1, &leases), "begun under 1, known to 2");
        assert!(is_superseded(id(20), 1, &leases), "the holder of 1 had been asleep");
        assert!(!is_superseded(id(30), 2, &leases));
        assert!(!is_superseded(id(40), 3, &leases), "nothing supersedes the last");
        assert!(is_superseded(id(30), 1, &leases), "what 3 knows does not make up for 2");
        assert!(!is_superseded(id(20), 1, &[]), "no lease, no fence");
    }

    #[test]
    fn a_generation_made_twice_knows_what_either_knew() {
        let leases = [lease(2, &[id(10)]), lease(2, &[id(11)])];
        assert!(!is_superseded(id(10), 1, &leases) && !is_superseded(id(11), 1, &leases));
        assert!(is_superseded(id(12), 1, &leases));
    }

    #[test]
    fn a_lease_that_may_have_missed_a_snapshot_supersedes_none() {
        let blind = Lease { is_complete: false, ..lease(2, &[]) };
        assert!(!is_superseded(id(10), 1, std::slice::from_ref(&blind)));
        assert!(is_superseded(id(10), 1, &[blind, lease(3, &[])]));
    }

    #[test]
    fn a_lease_reads_back_under_its_own_name_only() {
        let epoch = Epoch::generate();
        let sealed = lease(2, &[id(10)]).seal(&epoch, SystemId::new(7));
        assert_eq!(Lease::read(&sealed.bytes, &sealed.name).unwrap(), lease(2, &[id(10)]));
        let other = ObjectName::Lease { system: SystemId::new(7), generation: 3 };
        assert_eq!(Lease::read(&sealed.bytes, &other).unwrap_err().kind(), Kind::Corrupt);
    }
}
