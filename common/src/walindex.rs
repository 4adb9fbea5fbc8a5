//! `walindex/<branch>/<start>-<end>.<id>`: what the footers of many spans and pieces say, in one object.
//!
//! To find a time in a month of WAL, a restore wants the footer of every span: two requests for each, or one for thousands
//! of them from here. An index is a cache and nothing else: what it names may have been deleted since, and what it does
//! not name may be stored all the same. So **whether WAL is there is never taken from an index, only from a listing**
//! ([`crate::catalog`]); an entry counts only for an object that is listed under exactly its range and id, and then says what
//! the footer of that object says. That keeps two things true that trust in an index would cost: a hole is found before
//! anything is restored, and nothing needs to be deleted in step with an index. An index that is missing, damaged or
//! old costs requests.
//!
//! Indexes are of blocks, aligned as spans are ([`blocks`]). Who holds the epoch's key could make one that lies, and could
//! make spans whose footers lie just as well.

pub mod blocks;

use crate::cbor::{self, Fields};
use crate::id::{Branch, ObjectId, SystemId};
use crate::keys::Epoch;
use crate::lsn::{Lsn, LsnRange};
use crate::name::ObjectName;
use crate::pool;
use crate::seal::{self, Draft, FRAME_BYTES_MAX, Frame, ObjectKind};
use crate::seal::{OBJECT_BYTES_MAX, Object, Packer, Sealed, Unpacker};
use crate::span::SpanMeta;
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};
use rayon::prelude::*;

/// No index is longer before compression: 32 MiB.
pub const INDEX_BYTES_MAX: usize = 32 << 20;
/// Frames are filled up to here, so that the largest entry (256 restore points) still fits.
const FRAME_BYTES_FULL: usize = FRAME_BYTES_MAX - (128 << 10);
/// zstd's level: an index is written once and read often.
const LEVEL: i32 = 6;

/// The footer of one stored object.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[cbor(array)]
pub struct IndexEntry {
    #[n(0)]
    pub start: Lsn,
    /// Bytes of WAL in the object's range.
    #[n(1)]
    pub bytes: u64,
    #[n(2)]
    pub id: ObjectId,
    /// Bytes of the stored object.
    #[n(3)]
    pub size: u64,
    #[n(4)]
    pub meta: SpanMeta,
}

impl IndexEntry {
    pub fn new(range: LsnRange, id: ObjectId, size: u64, meta: SpanMeta) -> IndexEntry {
        IndexEntry { start: range.start, bytes: range.len(), id, size, meta }
    }

    /// The range in the object's name.
    pub fn range(&self) -> LsnRange {
        LsnRange::new(self.start, self.start.add(self.bytes))
    }

    fn key(&self) -> (LsnRange, ObjectId) {
        (self.range(), self.id)
    }

    /// Says nothing that cannot be of an object in `block`.
    fn is_possible(&self, block: &LsnRange) -> bool {
        let end = self.start.get().checked_add(self.bytes).map(Lsn::new);
        self.bytes > 0
            && self.size <= OBJECT_BYTES_MAX as u64
            && end.is_some_and(|end| end <= self.start.next_span())
            && block.covers(&self.range())
    }
}

/// One frame of an index.
#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct IndexPart {
    #[n(0)]
    entries: Vec<IndexEntry>,
}

impl Fields for IndexPart {
    const KNOWN: u64 = 1;
    const WHAT: &'static str = "a part of an index";
}

/// The footer of an index.
#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct IndexMeta {
    #[n(0)]
    entries: u64,
}

impl Fields for IndexMeta {
    const KNOWN: u64 = 1;
    const WHAT: &'static str = "the footer of an index";
}

/// What is stored of one block of a branch, with its footers.
#[derive(Clone, Debug, PartialEq)]
pub struct WalIndex {
    pub block: LsnRange,
    /// Sorted by range, then id, and none twice.
    entries: Vec<IndexEntry>,
}

impl WalIndex {
    /// Entries in any order, some of them twice; those outside `block` are left out.
    pub fn new(block: LsnRange, mut entries: Vec<IndexEntry>) -> WalIndex {
        entries.retain(|entry| entry.is_possible(&block));
        entries.sort_by_key(IndexEntry::key);
        entries.dedup_by_key(|entry| entry.key());
        WalIndex { block, entries }
    }

    pub fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }

    pub fn into_entries(self) -> Vec<IndexEntry> {
        self.entries
    }

    /// Compresses and seals it. `None` if it would be longer than [`INDEX_BYTES_MAX`]: then it is better not made, for
    /// a cache may lack anything.
    pub fn seal(&self, epoch: &Epoch, system: SystemId, branch: Branch) -> Result<Option<Sealed>> {
        let parts = self.parts();
        if parts.iter().map(Vec::len).sum::<usize>() > INDEX_BYTES_MAX {
            return Ok(None);
        }
        let mut packer = Packer::new(LEVEL)?;
        let frames = parts.iter().map(|part| Frame::pack(&mut packer, part));
        let draft = Draft {
            kind: ObjectKind::WalIndex,
            plain: Vec::new(),
            frames: frames.collect::<Result<_>>()?,
            meta: cbor::encode(&IndexMeta { entries: self.entries.len() as u64 }),
        };
        let range = self.block;
        let name = |id| ObjectName::WalIndex { system, branch, range, id };
        Ok(Some(seal::seal(draft, epoch, name)))
    }

    /// Encoded, and cut into frames.
    fn parts(&self) -> Vec<Vec<u8>> {
        let mut parts = Vec::new();
        let (mut from, mut bytes) = (0, 0);
        for (number, entry) in self.entries.iter().enumerate() {
            let entry_bytes = cbor::encode(entry).len();
            if bytes + entry_bytes > FRAME_BYTES_FULL && number > from {
                parts.push(encode_part(&self.entries[from..number]));
                (from, bytes) = (number, 0);
            }
            bytes += entry_bytes;
        }
        if from < self.entries.len() {
            parts.push(encode_part(&self.entries[from..]));
        }
        parts
    }

    /// Opens and checks an index; uses all cores of the pool. What it says is not believed beyond its block.
    pub fn open(bytes: Bytes, name: &ObjectName, epoch: &Epoch) -> Result<WalIndex> {
        let ObjectName::WalIndex { range: block, .. } = *name else {
            return Err(Error::new(Kind::Bug, format!("{name} is no index")));
        };
        let corrupt =
            |reason: &str| Error::new(Kind::Corrupt, format!("object {name}: its index {reason}"));
        let object = Object::open(bytes, name, epoch)?;
        let plain: usize = object.spans().iter().map(|span| span.plain_bytes as usize).sum();
        if plain > INDEX_BYTES_MAX {
            return Err(corrupt("unpacks to more than it may"));
        }
        let numbers = 0..object.spans().len();
        let part = |number| -> Result<Vec<IndexEntry>> {
            let plain = object.frame(number, &mut Unpacker::new())?;
            Ok(cbor::decode::<IndexPart>(&plain)?.entries)
        };
        let parts: Vec<Vec<IndexEntry>> =
            pool::pool().install(|| numbers.into_par_iter().map(part).collect::<Result<_>>())?;
        let entries: Vec<IndexEntry> = parts.into_iter().flatten().collect();
        if cbor::decode::<IndexMeta>(object.meta())?.entries != entries.len() as u64 {
            return Err(corrupt("has another number of entries than it states"));
        }
        if !entries.iter().all(|entry| entry.is_possible(&block)) {
            return Err(corrupt("names what cannot be of its block"));
        }
        if !entries.windows(2).all(|two| two[0].key() < two[1].key()) {
            return Err(corrupt("is out of order, or names an object twice"));
        }
        Ok(WalIndex { block, entries })
    }
}

fn encode_part(entries: &[IndexEntry]) -> Vec<u8> {
    cbor::encode(&IndexPart { entries: entries.to_vec() })
}

#[cfg(test)]
mod tests;
