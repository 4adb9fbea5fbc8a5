//! `snapshots/<id>/begin`: a snapshot has been started, from this parent, which it thereby keeps.

use crate::cbor::{self, Fields};
use crate::id::{AgentName, SnapshotId, SystemId};
use crate::keys::Epoch;
use crate::name::ObjectName;
use crate::seal::{self, Draft, Header, ObjectKind, Sealed};
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// The plain section of `begin`; it needs no key to be read.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Begin {
    #[n(0)]
    pub snapshot: SnapshotId,
    #[n(1)]
    pub agent: AgentName,
    #[n(2)]
    pub parent: Option<SnapshotId>,
    /// Of the lease under which it was begun; 0 where there was none.
    #[n(3)]
    pub generation: u64,
}

impl Fields for Begin {
    const KNOWN: u64 = 4;
    const WHAT: &'static str = "the beginning of a snapshot";
}

impl Begin {
    /// The plain section, after the trailer has been checked. Needs no key.
    pub fn read(bytes: &Bytes, name: &ObjectName) -> Result<Begin> {
        let header = Header::check(bytes, name)?;
        let begin: Begin = cbor::decode(header.plain())?;
        match name {
            ObjectName::Begin { snapshot, .. } if *snapshot == begin.snapshot => Ok(begin),
            _ => Err(Error::new(Kind::Corrupt, format!("object {name} is of another snapshot"))),
        }
    }

    pub fn seal(&self, epoch: &Epoch, system: SystemId) -> Sealed {
        let draft = Draft {
            kind: ObjectKind::Begin,
            plain: cbor::encode(self),
            frames: Vec::new(),
            meta: Vec::new(),
        };
        seal::seal(draft, epoch, |_| ObjectName::Begin { system, snapshot: self.snapshot })
    }
}
