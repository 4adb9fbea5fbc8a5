//! `gap/<branch>/<start>-<end>.<id>`: WAL that nobody has, or that cannot be replayed, and why.
//!
//! That WAL is missing can be seen from listings too. This tells what happened, and it also tells of a history that was left
//! where no byte is missing. No moment in the range can be recovered; behind it, only from a later snapshot.

use crate::Result;
use crate::cbor::{self, Fields};
use crate::id::{AgentName, Branch, SystemId};
use crate::keys::Epoch;
use crate::lsn::{Lsn, LsnRange};
use crate::name::ObjectName;
use crate::seal::{self, Draft, Object, ObjectKind, Sealed};
use bytes::Bytes;
use minicbor::{Decode, Encode};
use std::fmt;

/// What became of the WAL of a range.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize)]
#[cbor(map)]
pub struct Gap {
    #[n(0)]
    pub branch: Branch,
    #[n(1)]
    pub start: Lsn,
    #[n(2)]
    pub end: Lsn,
    /// [`Cause::word`], or that of a later version.
    #[n(3)]
    pub cause: String,
    #[n(4)]
    pub agent: AgentName,
    /// Unix seconds by the agent's clock.
    #[n(5)]
    pub noticed: i64,
    /// The thing and the reason, for people.
    #[n(6)]
    pub detail: String,
}

/// What this version knows to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The server no longer has it: the slot was lost, or a segment removed.
    Removed,
    /// The server's records do not continue what came before, each time that they are asked for.
    Broken,
    /// The server went back to an older state, and on with other bytes.
    Diverged,
}

impl Cause {
    pub fn word(self) -> &'static str {
        match self {
            Cause::Removed => "removed",
            Cause::Broken => "broken",
            Cause::Diverged => "diverged",
        }
    }
}

impl Fields for Gap {
    const KNOWN: u64 = 7;
    const WHAT: &'static str = "a gap";
}

impl Gap {
    pub fn range(&self) -> LsnRange {
        LsnRange::new(self.start, self.end)
    }

    pub fn seal(&self, epoch: &Epoch, system: SystemId) -> Sealed {
        let draft = Draft {
            kind: ObjectKind::Gap,
            plain: Vec::new(),
            frames: Vec::new(),
            meta: cbor::encode(self),
        };
        let (branch, range) = (self.branch, self.range());
        seal::seal(draft, epoch, |id| ObjectName::Gap { system, branch, range, id })
    }

    pub fn open(bytes: Bytes, name: &ObjectName, epoch: &Epoch) -> Result<Gap> {
        cbor::decode(Object::open(bytes, name, epoch)?.meta())
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noticed = jiff::Timestamp::from_second(self.noticed).unwrap_or_default();
        let Gap { branch, cause, agent, detail, .. } = self;
        let range = self.range();
        write!(f, "{range} of branch {branch}: {cause}: {detail} (noticed {noticed} by {agent})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_reads_back_and_says_what_happened() {
        let gap = Gap {
            branch: "00000001-01020304".parse().unwrap(),
            start: Lsn::new(0x100_0000),
            end: Lsn::new(0x300_0000),
            cause: Cause::Removed.word().into(),
            agent: "db1".parse().unwrap(),
            noticed: 0,
            detail: "the slot was lost".into(),
        };
        let epoch = Epoch::generate();
        let sealed = gap.seal(&epoch, SystemId::new(7));
        assert_eq!(Gap::open(sealed.bytes, &sealed.name, &epoch).unwrap(), gap);
        let text = gap.to_string();
        assert!(
            text.contains("0/1000000..0/3000000") && text.contains("the slot was lost"),
            "{text}"
        );
    }
}
