//! What the fixtures hold.

use backstay_common::cluster::AcceptedRecord;
use backstay_common::condemned::Condemned;
use backstay_common::gap::{Cause, Gap};
use backstay_common::head::Head;
use backstay_common::id::{Branch, LedgerWriter, ObjectId, SnapshotId, SystemId};
use backstay_common::keys::Keyring;
use backstay_common::keys::file::FileProvider;
use backstay_common::lease::Lease;
use backstay_common::ledger::{Entry, Event};
use backstay_common::location::{Location, LocationSettings};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_common::origin::Beginnings;
use backstay_common::pgtime::PgTime;
use backstay_common::pin::{Hold, PinRecord, damage_pin};
use backstay_common::segment::TimelineId;
use backstay_common::snapshot::{Begin, FileDigest, PageHash, page_hash};
use backstay_common::span::SpanMeta;
use backstay_common::wal::{Minima, RestorePoint, Summary};
use backstay_common::walindex::{IndexEntry, WalIndex};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const SYSTEM: SystemId = SystemId::new(7_312_345_678_901_234_567);
pub const NEXT_SYSTEM: SystemId = SystemId::new(7_412_345_678_901_234_567);
pub const PAGE: usize = 8192;
pub const HASH_KEY: [u8; 32] = *b"a key for hashes of test pages..";
pub const WAL_BYTES: usize = (1 << 20) + 5000;

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1")
}

pub fn location(folder: &Path) -> Location {
    let url = format!("file://{}", folder.display());
    Location::open(&LocationSettings::new("fixtures".parse().unwrap(), url)).unwrap()
}

/// The key file, which git cannot keep from other users, where only we can read it.
pub fn keyring() -> Keyring {
    let private = tempfile::tempdir().unwrap();
    let path = private.path().join("orders.key");
    std::fs::copy(fixtures().join("orders.key"), &path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    Keyring::new(Arc::new(FileProvider::read(&path).unwrap()), "orders".parse().unwrap())
}

pub fn branches() -> [Branch; 2] {
    ["00000001-3fa9c1d2", "00000002-0badcafe"].map(|branch| branch.parse().unwrap())
}

pub fn beginnings() -> [Beginnings; 2] {
    let second = Beginnings {
        timeline: TimelineId::new(2).unwrap(),
        history: Some(b"1\t16/B3800148\tno recovery target specified\n".to_vec()),
        first_record: Some(b"the first record after the switch".to_vec()),
    };
    [Beginnings::of_first_timeline(), second]
}

pub fn range() -> LsnRange {
    let start = Lsn::new(0x16_B300_0000);
    LsnRange::new(start, start.add(WAL_BYTES as u64))
}

/// A part that compresses, and a last frame that does not.
pub fn wal() -> Vec<u8> {
    let mut noise = 0x2545_F491_4F6C_DD1Du64;
    let byte = |i: usize| {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        if i < 1 << 20 { (i / 7) as u8 } else { (noise >> 32) as u8 }
    };
    (0..WAL_BYTES).map(byte).collect()
}

pub fn span_meta() -> SpanMeta {
    let summary = Summary {
        first_record: Some(Lsn::new(0x16_B300_0028)),
        last_record: Some(Lsn::new(0x16_B310_0000)),
        last_record_end: Some(Lsn::new(0x16_B310_0100)),
        least_time: Some(848_541_600_000_000),
        greatest_time: Some(848_541_605_000_000),
        least_xid: Some(740),
        greatest_xid: Some(761),
        restore_points: vec![RestorePoint {
            name: "before the upgrade".into(),
            lsn: Lsn::new(0x16_B308_0000),
            time: 848_541_603_000_000,
        }],
        more_restore_points: false,
        parameter_change: Some(Minima {
            max_connections: 100,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_xacts: 0,
            max_locks_per_xact: 64,
        }),
        checkpoint: true,
        end_of_recovery: false,
        full_page_writes_off: false,
        wal_level_minimal: false,
    };
    let clock = Some(PgTime(848_541_606_000_000));
    SpanMeta { summary, clock, major: 17, segment_bytes: 16 << 20 }
}

/// Of a block of four spans: that of the fixtures, and one that is gone.
pub fn index(id: ObjectId, size: u64) -> WalIndex {
    let block = LsnRange::new(Lsn::new(0x16_B000_0000), Lsn::new(0x16_B400_0000));
    let gone = LsnRange::new(Lsn::new(0x16_B200_0000), Lsn::new(0x16_B300_0000));
    let plain = SpanMeta { summary: Summary::default(), clock: None, ..span_meta() };
    let entries = vec![
        IndexEntry::new(range(), id, size, span_meta()),
        IndexEntry::new(gone, ObjectId::from_bytes(*b"long ago"), 4711, plain),
    ];
    WalIndex::new(block, entries)
}

pub fn head() -> (ObjectName, Head) {
    let name = ObjectName::Head { system: SYSTEM, agent: "db1".parse().unwrap(), seq: 42 };
    let [branch, _] = branches();
    (name, Head { branch, covered: range().end, clock: PgTime(848_541_900_000_000) })
}

pub fn lease() -> Lease {
    Lease {
        generation: 3,
        agent: "db1".parse().unwrap(),
        slot: "backstay_db1".into(),
        holder: *b"a state folder's",
        begun: vec!["20261121T020000Z-00c0ffee".parse().unwrap()],
        is_complete: true,
        made: 1_795_312_800,
    }
}

pub fn gap() -> Gap {
    let [_, branch] = branches();
    Gap {
        branch,
        start: Lsn::new(0x16_B500_0000),
        end: Lsn::new(0x16_B700_0000),
        cause: Cause::Removed.word().into(),
        agent: "db1".parse().unwrap(),
        noticed: 1_795_312_900,
        detail: "the server no longer has the WAL after 16/B5000000".into(),
    }
}

/// Two entries of one chain, the second with the number 2.
pub fn entries() -> [Entry; 2] {
    let copied = Entry {
        at: 1_795_312_900_250,
        event: Event::Copied.word().into(),
        subject: "virginia".into(),
        detail: "system 7312345678901234567: 3 objects, 4.5 MiB".into(),
    };
    let gap = Entry {
        event: Event::Gap.word().into(),
        subject: gap().branch.to_string(),
        detail: gap().detail,
        ..copied.clone()
    };
    [copied, gap]
}

pub fn writer() -> LedgerWriter {
    "db1-4c6564676572a001".parse().unwrap()
}

pub fn snapshot() -> SnapshotId {
    "20261122T020000Z-1f2e3d4c".parse().unwrap()
}

pub fn begin() -> Begin {
    let parent = Some("20261121T020000Z-00c0ffee".parse().unwrap());
    Begin { snapshot: snapshot(), agent: "db1".parse().unwrap(), parent, generation: 3 }
}

/// A pin for the sake of damage, and the same given back, with their numbers.
pub fn pins() -> [(ObjectName, PinRecord); 2] {
    let pin = PinRecord {
        snapshot: "20261121T020000Z-00c0ffee".parse().unwrap(),
        hold: Hold::Onwards,
        reason: "one page of base/1259".into(),
        by: "db1".into(),
        made: 1_795_312_800,
        until: Some(1_795_399_200),
        released: false,
        damage: Some(snapshot()),
        restore: None,
    };
    let name = |seq| ObjectName::Pin { system: SYSTEM, pin: damage_pin(snapshot()), seq };
    [(name(0), pin.clone()), (name(1), PinRecord { until: None, damage: None, ..pin.given_back() })]
}

/// What `pg_upgrade` made of the cluster.
pub fn accepted() -> AcceptedRecord {
    AcceptedRecord { cluster: "orders".parse().unwrap(), system: NEXT_SYSTEM, made: 1_795_399_200 }
}

pub fn condemned() -> Condemned {
    Condemned {
        agent: "db1".parse().unwrap(),
        generation: 3,
        window: 604_800,
        made: 1_795_312_800,
        names: vec![format!("{SYSTEM}/pack/0000000000000001")],
    }
}

/// Four pages; the third was taken again in a delta frame.
pub fn pages() -> [Vec<u8>; 4] {
    [1u8, 2, 3, 4].map(|n| (0..PAGE).map(|i| n.wrapping_mul((i / 64) as u8)).collect())
}

pub fn small_file() -> &'static [u8] {
    b"17\n"
}

pub fn hashes(pages: &[&[u8]]) -> Vec<PageHash> {
    pages.iter().map(|page| page_hash(&HASH_KEY, page)).collect()
}

pub fn digest(pages: &[&[u8]]) -> [u8; 32] {
    let mut digest = FileDigest::new();
    digest.push(&hashes(pages));
    digest.finish(pages.iter().map(|page| page.len() as u64).sum())
}
