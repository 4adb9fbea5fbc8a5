//! `head/<agent>/<seq>`: the agent's word that nothing more has happened on an idle server.
//!
//! Without it a server that commits nothing and an agent that is dead would look alike, and a time after the
//! last commit could not be promised.

use crate::Result;
use crate::cbor::{self, Fields};
use crate::id::{AgentName, Branch, SystemId};
use crate::keys::Epoch;
use crate::lsn::Lsn;
use crate::name::ObjectName;
use crate::pgtime::PgTime;
use crate::seal::{self, Draft, Object, ObjectKind, Sealed};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// All WAL before `covered` is stored here, and when the server's clock showed `clock` there was no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Head {
    #[n(0)]
    pub branch: Branch,
    #[n(1)]
    pub covered: Lsn,
    #[n(2)]
    pub clock: PgTime,
}

impl Fields for Head {
    const KNOWN: u64 = 3;
    const WHAT: &'static str = "a head";
}

impl Head {
    pub fn seal(&self, epoch: &Epoch, system: SystemId, agent: AgentName, seq: u64) -> Sealed {
        let draft = Draft {
            kind: ObjectKind::Head,
            plain: Vec::new(),
            frames: Vec::new(),
            meta: cbor::encode(self),
        };
        seal::seal(draft, epoch, |_| ObjectName::Head { system, agent, seq })
    }

    pub fn open(bytes: Bytes, name: &ObjectName, epoch: &Epoch) -> Result<Head> {
        cbor::decode(Object::open(bytes, name, epoch)?.meta())
    }
}
