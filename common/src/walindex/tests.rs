use super::*;
use crate::lsn::SPAN_BYTES;
use crate::wal::{RestorePoint, Summary};
use proptest::prelude::*;

const SYSTEM: SystemId = SystemId::new(7);

fn branch() -> Branch {
    "00000001-01020304".parse().unwrap()
}

fn spans(start: u64, end: u64) -> LsnRange {
    LsnRange::new(Lsn::new(start * SPAN_BYTES), Lsn::new(end * SPAN_BYTES))
}

fn meta(time: i64, points: usize) -> SpanMeta {
    let point = |n| RestorePoint { name: format!("{n:063}"), lsn: Lsn::new(n as u64), time };
    let summary = Summary {
        least_time: Some(time),
        restore_points: (0..points).map(point).collect(),
        ..Summary::default()
    };
    SpanMeta { summary, clock: None, major: 15, segment_bytes: 16 << 20 }
}

fn entry(range: LsnRange, id: u8) -> IndexEntry {
    IndexEntry::new(range, ObjectId::from_bytes([id; 8]), 1000, meta(5, 0))
}

/// Sealed as it is, whatever it says.
fn sealed(index: &WalIndex, epoch: &Epoch) -> Sealed {
    index.seal(epoch, SYSTEM, branch()).unwrap().unwrap()
}

fn reopened(index: &WalIndex) -> Result<WalIndex> {
    let epoch = Epoch::generate();
    let sealed = sealed(index, &epoch);
    WalIndex::open(sealed.bytes, &sealed.name, &epoch)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_is_sealed_is_opened(
        objects in proptest::collection::vec((0u64..64, 0u64..SPAN_BYTES, 1u64..SPAN_BYTES, any::<[u8; 8]>(), 0usize..257), 0..60)
    ) {
        let entries = objects.iter().map(|&(span, from, bytes, id, points)| {
            let start = Lsn::new(span * SPAN_BYTES + from);
            let range = LsnRange::new(start, start.add(bytes).min(start.next_span()));
            IndexEntry::new(range, ObjectId::from_bytes(id), bytes, meta(from as i64, points))
        });
        let index = WalIndex::new(spans(0, 64), entries.collect());
        prop_assert_eq!(reopened(&index).unwrap(), index);
    }
}

#[test]
fn many_frames_are_one_index() {
    let entries = (0..20_000).map(|n| entry(spans(n, n + 1), n as u8)).collect();
    let index = WalIndex::new(spans(0, 32_768), entries);
    let epoch = Epoch::generate();
    let sealed = sealed(&index, &epoch);
    assert!(sealed.spans.len() > 1);
    assert_eq!(index.entries().len(), 20_000);
    assert_eq!(WalIndex::open(sealed.bytes, &sealed.name, &epoch).unwrap(), index);
}

#[test]
fn what_would_be_too_long_is_not_made() {
    let points = meta(1, 256);
    let entries = (0..2048)
        .map(|n| IndexEntry::new(spans(n, n + 1), ObjectId::from_bytes([1; 8]), 1, points.clone()));
    let index = WalIndex::new(spans(0, 2048), entries.collect());
    assert!(index.seal(&Epoch::generate(), SYSTEM, branch()).unwrap().is_none());
}

#[test]
fn what_lies_outside_the_block_is_left_out() {
    let index = WalIndex::new(spans(2, 4), vec![entry(spans(1, 2), 1), entry(spans(3, 4), 2)]);
    assert_eq!(index.entries(), [entry(spans(3, 4), 2)]);
}

/// Whoever has the key can seal anything; what cannot be is refused as a whole.
#[test]
fn hostile_contents_are_refused() {
    let piece = |from: u64, bytes: u64| IndexEntry {
        start: Lsn::new(from),
        bytes,
        ..entry(spans(0, 1), 1)
    };
    let good = entry(spans(1, 2), 2);
    let huge = IndexEntry { size: OBJECT_BYTES_MAX as u64 + 1, ..good.clone() };
    for (bad, why) in [
        (vec![entry(spans(8, 9), 1)], "outside the block"),
        (vec![entry(spans(0, 2), 1)], "longer than a span"),
        (vec![piece(100, SPAN_BYTES)], "over a span's border"),
        (vec![piece(0, 0)], "without bytes"),
        (vec![piece(SPAN_BYTES, u64::MAX)], "beyond the end of all WAL"),
        (vec![huge], "larger than an object"),
        (vec![good.clone(), good.clone()], "twice"),
        (vec![good.clone(), entry(spans(0, 1), 1)], "out of order"),
    ] {
        let error = reopened(&WalIndex { block: spans(0, 4), entries: bad }).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{why}: {error}");
    }
    let overlapping = vec![piece(0, 100), entry(spans(0, 1), 3), piece(50, 100), good];
    reopened(&WalIndex { block: spans(0, 4), entries: overlapping }).unwrap();
}

#[test]
fn a_wrong_count_or_junk_is_refused() {
    let epoch = Epoch::generate();
    let plain = encode_part(&[entry(spans(0, 1), 1)]);
    let seal_as = |plain: &[u8], entries| {
        let draft = Draft {
            kind: ObjectKind::WalIndex,
            plain: Vec::new(),
            frames: Frame::pack_all(&mut Packer::new(1).unwrap(), plain).unwrap(),
            meta: cbor::encode(&IndexMeta { entries }),
        };
        let range = spans(0, 4);
        seal::seal(draft, &epoch, |id| ObjectName::WalIndex {
            system: SYSTEM,
            branch: branch(),
            range,
            id,
        })
    };
    for (sealed, is_good) in [
        (seal_as(&plain, 1), true),
        (seal_as(&plain, 2), false),
        (seal_as(b"junk", 1), false),
        (seal_as(&[0xA1, 0x00, 0x9B, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF], 1), false),
    ] {
        let opened = WalIndex::open(sealed.bytes, &sealed.name, &epoch);
        assert_eq!(opened.is_ok(), is_good, "{opened:?}");
    }
}

#[test]
fn an_index_of_another_branch_or_block_is_refused() {
    let epoch = Epoch::generate();
    let index = WalIndex::new(spans(0, 4), vec![entry(spans(0, 1), 1)]);
    let sealed = sealed(&index, &epoch);
    let ObjectName::WalIndex { system, branch, range, id } = sealed.name.clone() else { panic!() };
    let other: Branch = "00000002-01020304".parse().unwrap();
    for name in [
        ObjectName::WalIndex { system, branch: other, range, id },
        ObjectName::WalIndex { system, branch, range: spans(0, 8), id },
    ] {
        let error = WalIndex::open(sealed.bytes.clone(), &name, &epoch).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{name}");
    }
}
