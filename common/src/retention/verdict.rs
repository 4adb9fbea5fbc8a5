//! What came of a judgement, each object with its reason.

use crate::id::{Branch, SnapshotId};
use crate::lsn::LsnRange;
use crate::name::ObjectName;
use std::collections::BTreeMap;
use std::fmt;

/// Why a thing stays. Where several reasons hold, the first here is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stays {
    /// A moment inside the window needs it.
    Window,
    /// The newest snapshot never goes.
    Newest,
    KeepLast,
    Weekly,
    Monthly,
    Pinned,
    /// Damaged pages are whole in it.
    Damage,
    /// A snapshot is being taken.
    Running,
    /// It is a pin that holds, a list of what is condemned, a key, or an entry of the ledger.
    Bookkeeping,
}

impl fmt::Display for Stays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stays::Window => "a moment inside the window needs it",
            Stays::Newest => "the newest snapshot stays",
            Stays::KeepLast => "keep-last",
            Stays::Weekly => "kept for its week",
            Stays::Monthly => "kept for its month",
            Stays::Pinned => "pinned",
            Stays::Damage => "the last that has damaged pages whole",
            Stays::Running => "a snapshot is being taken",
            Stays::Bookkeeping => "in use",
        })
    }
}

/// Why a thing may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gone {
    /// No moment inside the window needs the snapshot.
    Snapshot,
    /// The snapshot was begun and never finished.
    Abandoned,
    /// No snapshot that stays has frames in the pack.
    Pack,
    /// WAL that nothing which stays replays.
    Wal,
    /// A longer object covers the WAL.
    Superseded,
    /// Nothing of the branch is needed.
    Branch,
    /// A head that later ones replace.
    Head,
    /// A lease that later ones replace, and that no snapshot is judged by.
    Lease,
    /// A gap in WAL that nothing which stays replays.
    Gap,
    /// An index of WAL of which nothing stays.
    Index,
    /// The pin has ended or been renewed.
    Pin,
    /// All that it condemned is gone.
    Condemned,
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Gone::Snapshot => "no moment inside the window needs the snapshot",
            Gone::Abandoned => "the snapshot was begun and never finished",
            Gone::Pack => "no snapshot that stays uses the pack",
            Gone::Wal => "nothing that stays replays the WAL",
            Gone::Superseded => "a longer object covers the WAL",
            Gone::Branch => "nothing of the branch is needed",
            Gone::Head => "later heads replace it",
            Gone::Lease => "no snapshot is older than the lease",
            Gone::Gap => "nothing that stays replays the WAL around the gap",
            Gone::Index => "nothing that stays replays the WAL that it indexes",
            Gone::Pin => "the pin has ended or was renewed",
            Gone::Condemned => "all that it condemned is gone",
        })
    }
}

/// `whole` is the last snapshot that has whole what is damaged in `damaged`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DamageHold {
    pub whole: SnapshotId,
    pub damaged: SnapshotId,
}

/// Nothing is damaged in `damaged` but what was so in its parent, and that is acknowledged. A pin of its own is to say so, given
/// back and with this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    pub damaged: SnapshotId,
    pub seq: u64,
}

/// What stays and what may go of everything that was listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub stays: BTreeMap<ObjectName, Stays>,
    pub goes: BTreeMap<ObjectName, Gone>,
    /// The snapshots that stay.
    pub snapshots: BTreeMap<SnapshotId, Stays>,
    /// The WAL that stays, by branch: disjoint and sorted. An end of [`crate::lsn::Lsn::MAX`] is "and all that comes".
    pub wal: BTreeMap<Branch, Vec<LsnRange>>,
    /// Pins that whoever may write should make, before the damaged snapshot goes and is forgotten.
    pub holds: Vec<DamageHold>,
    /// Others, before the parent goes and what was said of it is forgotten.
    pub acknowledged: Vec<Acknowledged>,
}
