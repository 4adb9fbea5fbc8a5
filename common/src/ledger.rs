//! `ledger/<writer>/<seq>`: what happened, one entry after the other.
//!
//! The entries of one writer are a chain: each names the hash of the one before. So none can be altered, left out or put
//! elsewhere without the next one telling, and that is seen without a key; what an entry says needs one. That the
//! last ones of a chain are missing nobody can see.

use crate::cbor::{self, Fields};
use crate::id::{LedgerWriter, SystemId};
use crate::keys::Epoch;
use crate::name::ObjectName;
use crate::seal::{self, Draft, Header, Object, ObjectKind, Sealed};
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// The hash of a whole object: its trailer.
pub type Hash = [u8; 32];

/// Before the first entry of a chain.
pub const NOTHING_BEFORE: Hash = [0; 32];

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize)]
#[cbor(map)]
pub struct Entry {
    /// Unix milliseconds by the agent's clock.
    #[n(0)]
    pub at: i64,
    /// [`Event::word`], or that of a later version.
    #[n(1)]
    pub event: String,
    /// What it happened to: a location, or a branch.
    #[n(2)]
    pub subject: String,
    /// The rest, for people.
    #[n(3)]
    pub detail: String,
}

/// What this version knows to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// WAL is lost, or a history was left.
    Gap,
    /// A location got what it lacked from another.
    Copied,
    /// Damaged objects of a location were replaced from another.
    Replaced,
}

impl Event {
    pub fn word(self) -> &'static str {
        match self {
            Event::Gap => "gap",
            Event::Copied => "copied",
            Event::Replaced => "replaced",
        }
    }
}

impl Fields for Entry {
    const KNOWN: u64 = 4;
    const WHAT: &'static str = "a ledger entry";
}

/// An entry, with its place in a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chained {
    /// The trailer of the entry before, or [`NOTHING_BEFORE`].
    pub previous: Hash,
    /// Its own trailer.
    pub hash: Hash,
    pub entry: Entry,
}

impl Entry {
    /// Seals the entry `seq`, from 1 on, of a chain.
    pub fn seal(
        &self,
        epoch: &Epoch,
        system: SystemId,
        writer: &LedgerWriter,
        seq: u64,
        previous: Hash,
    ) -> Sealed {
        let draft = Draft {
            kind: ObjectKind::Ledger,
            plain: previous.to_vec(),
            frames: Vec::new(),
            meta: cbor::encode(self),
        };
        let name = ObjectName::Ledger { system, writer: writer.clone(), seq };
        seal::seal(draft, epoch, |_| name)
    }

    pub fn open(bytes: Bytes, name: &ObjectName, epoch: &Epoch) -> Result<Chained> {
        let previous = previous_of(&bytes, name)?;
        let hash = seal::trailer_of(&bytes);
        let entry = cbor::decode(Object::open(bytes, name, epoch)?.meta())?;
        Ok(Chained { previous, hash, entry })
    }
}

/// The hash of the entry before, after the trailer has been checked. Needs no key.
pub fn previous_of(bytes: &Bytes, name: &ObjectName) -> Result<Hash> {
    let header = Header::check(bytes, name)?;
    header.plain().as_ref().try_into().map_err(|_| {
        Error::new(Kind::Corrupt, format!("object {name} does not name the entry before it"))
    })
}

/// What is wrong with a chain, of which these entries are there: `seq`, hash of the one before, own hash, in the order of
/// `seq`.
pub fn breaks(chain: &[(u64, Hash, Hash)]) -> Vec<String> {
    let mut found = Vec::new();
    let (mut next, mut before) = (1, NOTHING_BEFORE);
    for &(seq, previous, hash) in chain {
        match seq - next {
            0 if previous == before => {}
            0 => found.push(format!("entry {seq} follows another than the one before it")),
            1 => found.push(format!("entry {next} is missing")),
            _ => found.push(format!("entries {next} to {} are missing", seq - 1)),
        }
        (next, before) = (seq.saturating_add(1), hash);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(detail: &str) -> Entry {
        Entry {
            at: 1_795_312_900_000,
            event: Event::Copied.word().into(),
            subject: "far".into(),
            detail: detail.into(),
        }
    }

    /// Three entries, each as it is stored.
    fn chain(epoch: &Epoch) -> Vec<Sealed> {
        let writer = "db1-0011223344556677".parse().unwrap();
        let mut previous = NOTHING_BEFORE;
        let mut sealed = Vec::new();
        for seq in 1..=3 {
            let one = entry(&seq.to_string()).seal(epoch, SystemId::new(7), &writer, seq, previous);
            previous = one.hash();
            sealed.push(one);
        }
        sealed
    }

    fn links(chain: &[Sealed]) -> Vec<(u64, Hash, Hash)> {
        let link = |sealed: &Sealed| {
            let ObjectName::Ledger { seq, .. } = sealed.name else { panic!("{}", sealed.name) };
            (seq, previous_of(&sealed.bytes, &sealed.name).unwrap(), sealed.hash())
        };
        chain.iter().map(link).collect()
    }

    #[test]
    fn an_entry_reads_back() {
        let epoch = Epoch::generate();
        let chain = chain(&epoch);
        let opened = Entry::open(chain[1].bytes.clone(), &chain[1].name, &epoch).unwrap();
        assert_eq!(opened.entry, entry("2"));
        assert_eq!((opened.previous, opened.hash), (chain[0].hash(), links(&chain)[1].2));
    }

    #[test]
    fn what_was_left_out_or_altered_is_seen() {
        let epoch = Epoch::generate();
        let whole = links(&chain(&epoch));
        assert!(breaks(&whole).is_empty() && breaks(&[]).is_empty());
        assert_eq!(breaks(&whole[1..]), ["entry 1 is missing"]);
        assert_eq!(breaks(&whole[2..]), ["entries 1 to 2 are missing"]);
        assert_eq!(breaks(&[whole[0], whole[2]]), ["entry 2 is missing"]);
        // Sealed anew by somebody who has the key, it has another hash.
        let again = links(&chain(&epoch));
        let forged = [whole[0], again[1], whole[2]];
        assert_eq!(breaks(&forged).len(), 2, "{:?}", breaks(&forged));
        // Nobody can tell that there was more.
        assert!(breaks(&whole[..2]).is_empty());
    }
}
