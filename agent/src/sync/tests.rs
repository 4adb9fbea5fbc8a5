use super::compare::{Newest, missing, unequal};
use super::superseded::superseded;
use super::*;
use backstay_common::id::{ObjectId, SystemId};
use backstay_common::lsn::{Lsn, LsnRange};

const SYSTEM: SystemId = SystemId::new(7);

fn wal(start: u64, end: u64, id: u8) -> ObjectName {
    ObjectName::Wal {
        system: SYSTEM,
        branch: "00000001-01020304".parse().unwrap(),
        range: LsnRange::new(Lsn::new(start), Lsn::new(end)),
        id: ObjectId::from_bytes([id; 8]),
    }
}

#[test]
fn copies_go_in_the_order_of_the_format() {
    let snapshot = "20261122T020000Z-1f2e3d4c".parse().unwrap();
    let names = [
        ObjectName::Manifest { system: SYSTEM, snapshot },
        ObjectName::Pack { system: SYSTEM, id: ObjectId::from_bytes([1; 8]) },
        ObjectName::Begin { system: SYSTEM, snapshot },
        "7/keys/00000000000000000000000000000000/0000000000000000".parse().unwrap(),
    ];
    let groups = missing(&BTreeSet::new(), &names.iter().cloned().collect());
    let flat: Vec<ObjectName> = groups.concat();
    assert_eq!(flat, names.into_iter().rev().collect::<Vec<_>>());
}

#[test]
fn the_newest_snapshot_and_its_wal_go_before_the_others() {
    let manifest = |day: u8| ObjectName::Manifest {
        system: SYSTEM,
        snapshot: format!("202611{day}T020000Z-1f2e3d4c").parse().unwrap(),
    };
    let pack = |id: u8| ObjectName::Pack { system: SYSTEM, id: ObjectId::from_bytes([id; 8]) };
    let wraps = "7/keys/00000000000000000000000000000000/0000000000000000".parse().unwrap();
    let names: BTreeSet<ObjectName> = [
        [manifest(21), pack(1), wal(0, 100, 1)],
        [manifest(22), pack(2), wal(100, 200, 2)],
        [pack(3), wal(200, 300, 3), wraps],
    ]
    .concat()
    .into_iter()
    .collect();
    let newest = Newest {
        manifest: manifest(22),
        packs: [pack(2), pack(3)].into(),
        branch: "00000001-01020304".parse().unwrap(),
        from: Lsn::new(150),
    };
    let order = newest.first(missing(&BTreeSet::new(), &names)).concat();
    assert_eq!(order.len(), names.len());
    let end = order.iter().position(|name| *name == manifest(22)).unwrap();
    let late = [wal(0, 100, 1), pack(1), manifest(21)];
    let first: BTreeSet<_> = order[..end].iter().cloned().collect();
    assert_eq!(
        first,
        names.into_iter().filter(|n| !late.contains(n) && *n != manifest(22)).collect()
    );
    assert_eq!(order.last(), Some(&manifest(21)));
}

#[test]
fn superseded_pieces_do_not_come_back() {
    let has: BTreeSet<_> = [wal(0, 100, 1)].into();
    let all: BTreeSet<_> =
        [wal(0, 100, 1), wal(0, 40, 2), wal(40, 100, 3), wal(100, 120, 4)].into();
    assert_eq!(missing(&has, &all).concat(), [wal(100, 120, 4)]);
}

#[test]
fn pieces_go_when_their_span_is_there() {
    let names: BTreeSet<_> =
        [wal(0, 100, 1), wal(0, 40, 2), wal(40, 100, 3), wal(100, 120, 4)].into();
    let gone = vec![wal(0, 40, 2), wal(40, 100, 3)];
    assert_eq!(superseded(&names), [(wal(0, 100, 1), gone)]);
    let equal: BTreeSet<_> = [wal(16, 32, 1), wal(16, 32, 2), wal(20, 40, 3)].into();
    assert_eq!(superseded(&equal), [], "of equal ranges none goes, nor what reaches further");
}

#[test]
fn a_hole_is_filled() {
    let has: BTreeSet<_> = [wal(0, 40, 1), wal(60, 100, 2)].into();
    let all: BTreeSet<_> = has.iter().cloned().chain([wal(30, 70, 3)]).collect();
    assert_eq!(missing(&has, &all).concat(), [wal(30, 70, 3)]);
}

#[test]
fn copies_of_another_size_are_found() {
    let listing = |sizes: &[(u8, u64)]| -> BTreeMap<ObjectName, u64> {
        sizes.iter().map(|(id, size)| (wal(0, 100, *id), *size)).collect()
    };
    let (one, other) = (listing(&[(1, 10), (2, 20), (3, 30)]), listing(&[(1, 10), (2, 21)]));
    assert_eq!(unequal(&[&one, &other]), [wal(0, 100, 2)].into());
}

#[test]
fn a_difference_is_told_only_if_it_lasts() {
    let told = |names: &[&str]| {
        let mut told = LocationSync::new(&"near".parse().unwrap(), SYSTEM, 1);
        for name in names {
            let (name, error) = (name.parse().unwrap(), Error::new(Kind::Missing, "at far"));
            told.differs(Difference::new(&name, What::Missing, &error));
        }
        Found { locations: vec![told], failed: Vec::new() }
    };
    let [a, b, c] =
        ["7/pack/0000000000000001", "7/pack/0000000000000002", "7/pack/0000000000000003"];
    let left = told(&[a, b]).still(told(&[b, c]));
    let names: Vec<&str> = left.locations[0].differences.iter().map(|d| &d.name[..]).collect();
    assert_eq!((names, left.locations[0].different), (vec![b], 1));
}

#[test]
fn an_integrity_fault_decides_the_exit_code() {
    let mut report = SyncReport::default();
    assert_eq!(report.exit_code(), 0);
    let near = "near".parse().unwrap();
    report.fail(&near, &Error::new(Kind::Storage, "down"));
    assert_eq!(report.exit_code(), 5);
    let mut told = LocationSync::new(&near, SYSTEM, 1);
    let error = Error::new(Kind::Missing, "at far");
    told.differs(Difference::new(&wal(0, 100, 1), What::Missing, &error));
    report.locations.push(told);
    assert_eq!(report.exit_code(), 4);
    assert!(!report.is_complete() && !report.is_clean());
}

#[test]
fn an_index_that_a_larger_one_has_replaced_does_not_come_back() {
    let index = |start: u64, end: u64| -> ObjectName {
        let branch = "00000001-01020304".parse().unwrap();
        let range = LsnRange::new(Lsn::new(start), Lsn::new(end));
        ObjectName::WalIndex { system: SYSTEM, branch, range, id: ObjectId::random() }
    };
    let has: BTreeSet<_> = [index(0, 16)].into();
    let all: BTreeSet<_> = has.iter().cloned().chain([index(0, 4), index(16, 20)]).collect();
    let lacked = missing(&has, &all).concat();
    assert!(
        matches!(lacked[..], [ObjectName::WalIndex { range, .. }] if range.end == Lsn::new(20))
    );
}
