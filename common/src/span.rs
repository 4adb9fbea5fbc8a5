//! Spans and pieces: WAL as it is stored.
//!
//! A span is 16 MiB of WAL, aligned, whatever the cluster's segment size; a piece is a part of one, stored early.
//! Both are the raw bytes of the WAL in frames, with a footer that says what is in them, so that a time can be
//! turned into a position without opening every object. Several objects may cover one range: all hold the same bytes.

use crate::cbor::{self, Fields};
use crate::id::{Branch, SystemId};
use crate::keys::Epoch;
use crate::lsn::{Lsn, LsnRange};
use crate::name::ObjectName;
use crate::pgtime::PgTime;
use crate::seal::{self, Draft, Frame, Object, ObjectKind, Packer, Sealed, Unpacker};
use crate::wal::Summary;
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// The footer of a span or a piece.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct SpanMeta {
    /// What the records that end in this range say.
    #[n(0)]
    pub summary: Summary,
    /// The server's clock when it had no WAL beyond the end of this range, if it said so: every commit with
    /// an earlier time lies before the end.
    #[n(1)]
    pub clock: Option<PgTime>,
    /// PostgreSQL's major version, to decode the range with.
    #[n(2)]
    pub major: u32,
    /// Bytes of one WAL segment.
    #[n(3)]
    pub segment_bytes: u32,
}

impl Fields for SpanMeta {
    const KNOWN: u64 = 4;
    const WHAT: &'static str = "a span's footer";
}

impl SpanMeta {
    /// Reads a footer's metadata, once opened.
    pub fn read(meta: &[u8]) -> Result<SpanMeta> {
        cbor::decode(meta)
    }
}

/// Compresses and seals the WAL `bytes` of `range`, which lies within one span.
pub fn seal_wal(
    epoch: &Epoch,
    system: SystemId,
    branch: Branch,
    range: LsnRange,
    bytes: &[u8],
    meta: &SpanMeta,
    packer: &mut Packer,
) -> Result<Sealed> {
    assert_eq!(bytes.len() as u64, range.len(), "the bytes of {range}");
    let is_within = range.end <= range.start.next_span() && !range.is_empty();
    assert!(is_within, "{range} is not within a span");
    let draft = Draft {
        kind: ObjectKind::Wal,
        plain: Vec::new(),
        frames: Frame::pack_all(packer, bytes)?,
        meta: cbor::encode(meta),
    };
    Ok(seal::seal(draft, epoch, |id| ObjectName::Wal { system, branch, range, id }))
}

/// A span or piece, opened: its footer is read, its bytes on demand.
#[derive(Debug)]
pub struct WalObject {
    pub range: LsnRange,
    pub meta: SpanMeta,
    object: Object,
}

impl WalObject {
    /// `name` is what it was fetched as; it must be that of a WAL object.
    pub fn open(bytes: Bytes, name: &ObjectName, epoch: &Epoch) -> Result<WalObject> {
        let ObjectName::Wal { range, .. } = name else {
            return Err(Error::new(Kind::Bug, format!("{name} is no WAL")));
        };
        if range.end > range.start.next_span() {
            let reason = format!("object {name} is longer than the span that it begins in");
            return Err(Error::new(Kind::Corrupt, reason));
        }
        let object = Object::open(bytes, name, epoch)?;
        let plain: u64 = object.spans().iter().map(|s| u64::from(s.plain_bytes)).sum();
        if plain != range.len() {
            let reason = format!("object {name} holds {plain} bytes of WAL");
            return Err(Error::new(Kind::Corrupt, reason));
        }
        let meta = SpanMeta::read(object.meta())?;
        Ok(WalObject { range: *range, meta, object })
    }

    /// All of its WAL.
    pub fn wal(&self) -> Result<Vec<u8>> {
        self.object.contents()
    }

    /// The WAL of `part`, which lies in the range; only the frames that hold it are opened.
    pub fn part(&self, part: LsnRange) -> Result<Vec<u8>> {
        assert!(self.range.covers(&part), "{part} is not in {}", self.range);
        let mut unpacker = Unpacker::new();
        let mut wal = Vec::with_capacity(part.len() as usize);
        let mut at = self.range.start;
        for (number, span) in self.object.spans().iter().enumerate() {
            let frame = LsnRange::new(at, at.add(u64::from(span.plain_bytes)));
            at = frame.end;
            let (from, to) = (part.start.max(frame.start), part.end.min(frame.end));
            if from < to {
                let plain = self.object.frame(number, &mut unpacker)?;
                let offset = |lsn: Lsn| lsn.since(frame.start) as usize;
                wal.extend_from_slice(&plain[offset(from)..offset(to)]);
            }
        }
        Ok(wal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn meta() -> SpanMeta {
        let summary = Summary::default();
        SpanMeta { summary, clock: Some(PgTime(5)), major: 15, segment_bytes: 16 << 20 }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn parts_are_parts(length in 1usize..3_000_000, a: usize, b: usize) {
            let wal: Vec<u8> = (0..length).map(|i| (i / 7) as u8).collect();
            let (a, b) = (a % length, b % length);
            let (from, to) = (a.min(b), a.max(b) + 1);
            let epoch = Epoch::generate();
            let start = Lsn::new(0x1_0000_0000);
            let range = LsnRange::new(start, start.add(length as u64));
            let branch = "00000001-01020304".parse().unwrap();
            let mut packer = Packer::new(1).unwrap();
            let sealed = seal_wal(&epoch, SystemId::new(7), branch, range, &wal, &meta(), &mut packer).unwrap();
            let object = WalObject::open(sealed.bytes, &sealed.name, &epoch).unwrap();
            prop_assert_eq!(&object.meta, &meta());
            let part = LsnRange::new(start.add(from as u64), start.add(to as u64));
            prop_assert_eq!(&object.part(part).unwrap()[..], &wal[from..to]);
            prop_assert!(object.wal().unwrap() == wal);
        }
    }
}
