//! `wal/<TLI>-<branch>/origin`: what a branch grew from, and who may add to it.
//!
//! Two servers can both become timeline 2. Their WAL must never mix, so each history gets a branch of its own:
//! a writer joins an existing branch only if its history file, its switch point and the first record after the
//! switch agree with the branch's origin; else it opens another.

use crate::cbor::{self, Fields};
use crate::id::{Branch, SystemId, random_bytes};
use crate::keys::Epoch;
use crate::lsn::Lsn;
use crate::name::ObjectName;
use crate::seal::{self, Draft, Object, ObjectKind, Sealed};
use crate::segment::{Ancestor, TimelineId, parse_history};
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// The beginnings of one branch.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Origin {
    /// The `.history` file, byte for byte; none on the first timeline.
    #[cbor(n(0), with = "minicbor::bytes")]
    history: Option<Vec<u8>>,
    /// Where this timeline left its parent; 0/0 on the first timeline.
    #[n(1)]
    switch: Lsn,
    /// Keys the hash of the first record.
    #[cbor(n(2), with = "minicbor::bytes")]
    key: [u8; 32],
    #[cbor(n(3), with = "minicbor::bytes")]
    first_record: Option<[u8; 32]>,
}

impl std::fmt::Debug for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Origin").field("switch", &self.switch).finish_non_exhaustive()
    }
}

impl Fields for Origin {
    const KNOWN: u64 = 4;
    const WHAT: &'static str = "an origin";
}

/// What a writer knows of the timeline that it is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beginnings {
    pub timeline: TimelineId,
    /// The `.history` file; none on the first timeline.
    pub history: Option<Vec<u8>>,
    /// The bytes of the first record after the switch, header and all; none on the first timeline.
    pub first_record: Option<Vec<u8>>,
}

impl Beginnings {
    /// The first timeline has no history: all that is on it is one branch.
    pub fn of_first_timeline() -> Beginnings {
        Beginnings { timeline: TimelineId::FIRST, history: None, first_record: None }
    }

    /// True if there is a first record and the server no longer has it.
    pub fn is_first_record_unknown(&self) -> bool {
        self.timeline != TimelineId::FIRST && self.first_record.is_none()
    }

    /// Where the timeline left its parent; 0/0 on the first one.
    pub fn switch(&self) -> Result<Lsn> {
        let Some(history) = &self.history else { return Ok(Lsn::INVALID) };
        Ok(ancestors_of(history)?.last().map_or(Lsn::INVALID, |parent| parent.switch))
    }
}

fn ancestors_of(history: &[u8]) -> Result<Vec<Ancestor>> {
    let text = String::from_utf8_lossy(history);
    parse_history(&text).map_err(|reason| Error::new(Kind::Corrupt, reason))
}

impl Origin {
    pub fn new(beginnings: &Beginnings) -> Result<Origin> {
        let key = random_bytes();
        let hash = |record: &Vec<u8>| *blake3::keyed_hash(&key, record).as_bytes();
        Ok(Origin {
            history: beginnings.history.clone(),
            switch: beginnings.switch()?,
            first_record: beginnings.first_record.as_ref().map(hash),
            key,
        })
    }

    /// True if a writer with these beginnings may add to the branch.
    pub fn agrees(&self, beginnings: &Beginnings) -> Result<bool> {
        let hash = |record: &Vec<u8>| *blake3::keyed_hash(&self.key, record).as_bytes();
        Ok(self.history == beginnings.history
            && self.switch == beginnings.switch()?
            && self.first_record == beginnings.first_record.as_ref().map(hash))
    }

    /// The same, when it is not known what the first record is.
    pub fn may_agree(&self, beginnings: &Beginnings) -> Result<bool> {
        Ok(self.history == beginnings.history && self.switch == beginnings.switch()?)
    }

    /// The `.history` file, byte for byte.
    pub fn history(&self) -> Option<&[u8]> {
        self.history.as_deref()
    }

    /// The timelines before this one, oldest first.
    pub fn ancestors(&self) -> Result<Vec<Ancestor>> {
        self.history.as_deref().map_or(Ok(Vec::new()), ancestors_of)
    }

    /// Where this timeline left its parent; 0/0 on the first one.
    pub fn switch(&self) -> Lsn {
        self.switch
    }

    pub fn seal(&self, epoch: &Epoch, system: SystemId, branch: Branch) -> Sealed {
        let draft = Draft {
            kind: ObjectKind::Origin,
            plain: Vec::new(),
            frames: Vec::new(),
            meta: cbor::encode(self),
        };
        seal::seal(draft, epoch, |_| ObjectName::Origin { system, branch })
    }

    pub fn open(bytes: Bytes, name: &ObjectName, epoch: &Epoch) -> Result<Origin> {
        cbor::decode(Object::open(bytes, name, epoch)?.meta())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(record: &[u8]) -> Beginnings {
        Beginnings {
            timeline: TimelineId::new(2).unwrap(),
            history: Some(b"1\t0/3000148\tno recovery target specified\n".to_vec()),
            first_record: Some(record.to_vec()),
        }
    }

    #[test]
    fn only_the_same_history_may_join() {
        let origin = Origin::new(&second(b"promoted here")).unwrap();
        assert!(origin.agrees(&second(b"promoted here")).unwrap());
        assert!(!origin.agrees(&second(b"promoted there")).unwrap());
        let mut elsewhere = second(b"promoted here");
        elsewhere.history = Some(b"1\t0/4000148\tno recovery target specified\n".to_vec());
        assert!(!origin.agrees(&elsewhere).unwrap());
        assert!(origin.may_agree(&second(b"whatever it was")).unwrap());
        assert!(!origin.may_agree(&elsewhere).unwrap());
        assert_eq!(origin.switch(), Lsn::new(0x300_0148));
        let first = Origin::new(&Beginnings::of_first_timeline()).unwrap();
        assert!(first.agrees(&Beginnings::of_first_timeline()).unwrap());
    }

    #[test]
    fn an_origin_reads_back() {
        let epoch = Epoch::generate();
        let origin = Origin::new(&second(b"record")).unwrap();
        let branch = "00000002-01020304".parse().unwrap();
        let sealed = origin.seal(&epoch, SystemId::new(7), branch);
        assert!(Origin::open(sealed.bytes, &sealed.name, &epoch).unwrap() == origin);
    }
}
