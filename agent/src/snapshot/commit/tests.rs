use super::super::fixture::{SYSTEM, Store};
use super::super::leftover::Journal;
use super::super::pack::Packs;
use super::super::progress::Meter;
use super::*;
use backstay_common::id::SnapshotId;
use backstay_common::seal::{self, Draft, Frame, ObjectKind, Packer};
use backstay_common::snapshot::{FrameUse, testing};
use std::path::Path;

const BRANCH: &str = "00000001-01020304";

fn id() -> SnapshotId {
    SnapshotId::new(jiff::Timestamp::UNIX_EPOCH, [1, 2, 3, 4])
}

/// Sends one pack to all locations; the manifest's plain section for it.
async fn shipped(store: &Store, fleet: &Arc<Fleet>) -> ManifestPlain {
    let meter = Arc::new(Meter::new(id(), watch::Sender::default()));
    let journal = Arc::new(Journal::none());
    let mut packs = Packs::new(SYSTEM, store.epochs.clone(), fleet.clone(), meter, journal);
    let frame = Frame::pack(&mut Packer::new(1).unwrap(), &[1; 8192]).unwrap();
    packs.add(frame, FrameUse::Image, vec![0; 8]);
    packs.seal().await.unwrap();
    packs.settle().await.unwrap();
    let sealed = packs.into_sealed();
    ManifestPlain {
        start: Lsn::new(0x1_0000_0028),
        stop: Lsn::new(0x1_0100_0100),
        epochs: sealed.epochs,
        stored_bytes: sealed.packs[0].size,
        packs: sealed.packs,
        database_bytes: 8192,
        files: 1,
        ..testing::plain(SYSTEM, id(), BRANCH.parse().unwrap())
    }
}

async fn store_wal(store: &Store, n: usize, start: u64, end: u64) {
    let epoch = store.epochs.current().await.unwrap();
    let range = LsnRange::new(Lsn::new(start), Lsn::new(end));
    let draft =
        Draft { kind: ObjectKind::Wal, plain: Vec::new(), frames: Vec::new(), meta: Vec::new() };
    let branch = BRANCH.parse().unwrap();
    let sealed =
        seal::seal(draft, &epoch, |id| ObjectName::Wal { system: SYSTEM, branch, range, id });
    store.writers[n].put(&sealed.name, epoch.id(), sealed.bytes).await.unwrap();
}

async fn commit(
    store: &Store,
    fleet: &Fleet,
    plain: &ManifestPlain,
) -> Vec<(LocationName, Result<()>)> {
    let name = ObjectName::Manifest { system: SYSTEM, snapshot: id() };
    let epoch = store.epochs.current().await.unwrap();
    let manifest = Parcel::new(name, epoch.id(), bytes::Bytes::from_static(b"manifest"), None);
    commit_with(fleet, plain, &manifest, WalStatus::default()).await
}

async fn commit_with(
    fleet: &Fleet,
    plain: &ManifestPlain,
    manifest: &Parcel,
    wal: WalStatus,
) -> Vec<(LocationName, Result<()>)> {
    let wal = watch::Sender::new(wal);
    Commit { fleet, wal: &wal.subscribe(), plain, parent: None, manifest }.everywhere().await
}

fn has_manifest(dir: &Path, location: &str) -> bool {
    dir.join(location).join(format!("7/snapshots/{}/manifest", id())).exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_location_that_was_down_is_filled_by_copying_once_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), &["here", "back", "down"]);
    store.init(0).await;
    let fleet = Arc::new(store.fleet(id()).await);
    let plain = shipped(&store, &fleet).await;
    for lane in fleet.lanes() {
        lane.settled().await;
    }
    let left: Vec<bool> = fleet.lanes().iter().map(|lane| lane.left_behind().is_some()).collect();
    assert_eq!(left, [false, true, true]);
    store.init(1).await;
    for n in [0, 1] {
        store_wal(&store, n, 0x1_0000_0000, 0x1_0100_0000).await;
        store_wal(&store, n, 0x1_0100_0000, 0x1_0100_0100).await;
    }
    let done = commit(&store, &fleet, &plain).await;
    let committed: Vec<_> = done.iter().map(|(name, done)| (name.as_str(), done.is_ok())).collect();
    assert_eq!(committed, [("here", true), ("back", true), ("down", false)]);
    let pack = plain.packs[0].name(SYSTEM);
    let copies = [0, 1].map(|n| store.writers[n].location().get(&pack));
    let copies = futures::future::try_join_all(copies).await.unwrap();
    assert_eq!(copies[0], copies[1]);
    assert!(has_manifest(dir.path(), "here") && has_manifest(dir.path(), "back"));
    assert!(!dir.path().join("down").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_long_to_copy_is_left_to_sync() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), &["here"]);
    store.init(0).await;
    let fleet = Arc::new(store.fleet(id()).await);
    let pack = shipped(&store, &fleet).await.packs.remove(0);
    let large = PackEntry { size: FILLED_BYTES_MAX + 1, ..pack.clone() };
    let parent = [large.clone()];
    assert_eq!(too_many(&[&large], &parent), Some((1, FILLED_BYTES_MAX + 1)));
    assert_eq!(too_many(&[&pack], &parent), None, "a little is copied at once");
    assert_eq!(too_many(&[&large], &[]), None, "so is what this snapshot stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manifest_waits_for_the_wal() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), &["here"]);
    store.init(0).await;
    let fleet = Arc::new(store.fleet(id()).await);
    let plain = shipped(&store, &fleet).await;
    // All but the last byte.
    store_wal(&store, 0, 0x1_0000_0000, 0x1_0100_00FF).await;
    let committing = commit(&store, &fleet, &plain);
    tokio::pin!(committing);
    let early = tokio::time::timeout(Duration::from_secs(1), &mut committing).await;
    assert!(early.is_err() && !has_manifest(dir.path(), "here"));
    store_wal(&store, 0, 0x1_0100_00FF, 0x1_0100_0100).await;
    assert!(committing.await[0].1.is_ok());
    assert!(has_manifest(dir.path(), "here"));
}

/// WAL that the server no longer has is not waited for. A gap elsewhere does no harm.
#[tokio::test(flavor = "multi_thread")]
async fn a_gap_in_the_wal_ends_it_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), &["here"]);
    store.init(0).await;
    let fleet = Arc::new(store.fleet(id()).await);
    let plain = shipped(&store, &fleet).await;
    store_wal(&store, 0, 0x1_0000_0000, 0x1_0080_0000).await;
    let name = ObjectName::Manifest { system: SYSTEM, snapshot: id() };
    let epoch = store.epochs.current().await.unwrap();
    let manifest = Parcel::new(name, epoch.id(), bytes::Bytes::from_static(b"manifest"), None);
    let wal = |start, end| WalStatus {
        gap_start: Some(Lsn::new(start)),
        gap_end: Some(Lsn::new(end)),
        ..WalStatus::default()
    };
    for (start, end) in
        [(0x1_0080_0000, 0x1_0200_0000), (0, 0x1_0000_0001), (0x1_0100_00FF, u64::MAX)]
    {
        let committing = commit_with(&fleet, &plain, &manifest, wal(start, end));
        let done = tokio::time::timeout(Duration::from_secs(20), committing).await.unwrap();
        let error = done[0].1.as_ref().unwrap_err();
        assert!(error.message().contains("is lost"), "{error}");
    }
    assert!(!has_manifest(dir.path(), "here"));
    for (start, end) in [(0, 0x1_0000_0000), (0x1_0100_0100, u64::MAX)] {
        let committing = commit_with(&fleet, &plain, &manifest, wal(start, end));
        let waits = tokio::time::timeout(Duration::from_secs(1), committing).await;
        assert!(waits.is_err(), "it waits for WAL that will come");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_of_another_size_is_never_committed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), &["here"]);
    store.init(0).await;
    let fleet = Arc::new(store.fleet(id()).await);
    let mut plain = shipped(&store, &fleet).await;
    store_wal(&store, 0, 0x1_0000_0000, 0x1_0200_0000).await;
    plain.packs[0].size += 1;
    assert!(commit(&store, &fleet, &plain).await[0].1.is_err());
    assert!(!has_manifest(dir.path(), "here"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_location_there_is_no_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), &["here", "there"]);
    let fleet = Arc::new(store.fleet(id()).await);
    for lane in fleet.lanes() {
        lane.settled().await;
    }
    let error = fleet.admit().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage);
    assert!(error.message().contains("here") && error.message().contains("there"), "{error}");
}
