use super::super::compare;
use super::*;
use crate::snapshot::fixture::{SYSTEM, Store};
use backstay_common::id::SnapshotId;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::folder;
use backstay_common::seal::{self, Draft, ObjectKind, Sealed};
use backstay_common::snapshot::{Manifest, ManifestPlain, PackEntry, testing};
use std::path::Path;

const BRANCH: &str = "00000001-01020304";
const START: u64 = 0x1_0000_0000;

/// Two locations, of which only the first holds anything.
struct World {
    dir: tempfile::TempDir,
    store: Store,
}

impl World {
    async fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &["near", "far"]);
        store.init(0).await;
        store.init(1).await;
        World { dir, store }
    }

    async fn seal(
        &self,
        kind: ObjectKind,
        name: impl FnOnce(backstay_common::id::ObjectId) -> ObjectName,
    ) -> Sealed {
        let epoch = self.store.epochs.current().await.unwrap();
        let draft = Draft { kind, plain: Vec::new(), frames: Vec::new(), meta: Vec::new() };
        let sealed = seal::seal(draft, &epoch, name);
        self.put(&sealed).await;
        sealed
    }

    async fn put(&self, sealed: &Sealed) {
        let epoch = self.store.epochs.current().await.unwrap();
        let near = &self.store.writers[0];
        near.put(&sealed.name, epoch.id(), sealed.bytes.clone()).await.unwrap();
    }

    async fn wal(&self, from: u64, to: u64) -> ObjectName {
        let range = LsnRange::new(Lsn::new(START + from), Lsn::new(START + to));
        let branch = BRANCH.parse().unwrap();
        let name = |id| ObjectName::Wal { system: SYSTEM, branch, range, id };
        self.seal(ObjectKind::Wal, name).await.name
    }

    async fn origin(&self) -> ObjectName {
        let name = |_| ObjectName::Origin { system: SYSTEM, branch: BRANCH.parse().unwrap() };
        self.seal(ObjectKind::Origin, name).await.name
    }

    async fn pack(&self) -> Sealed {
        self.seal(ObjectKind::Pack, |id| ObjectName::Pack { system: SYSTEM, id }).await
    }

    /// A manifest that needs these packs, and the WAL from START on.
    async fn manifest(&self, second: i64, packs: &[&Sealed]) -> ObjectName {
        let epoch = self.store.epochs.current().await.unwrap();
        let entry = |sealed: &&Sealed| {
            let header = seal::Header::check(&sealed.bytes, &sealed.name).unwrap();
            PackEntry {
                epoch: 0,
                salt: *header.salt(),
                commitment: *header.commitment(),
                size: sealed.bytes.len() as u64,
                hash: sealed.hash(),
                live_bytes: 0,
                frame_bytes: None,
            }
        };
        let moment = jiff::Timestamp::from_second(second).unwrap();
        let snapshot = SnapshotId::new(moment, [1, 2, 3, 4]);
        let plain = ManifestPlain {
            start: Lsn::new(START + 0x28),
            stop: Lsn::new(START + 0x1000),
            epochs: vec![epoch.id()],
            packs: packs.iter().map(entry).collect(),
            ..testing::plain(SYSTEM, snapshot, BRANCH.parse().unwrap())
        };
        let root = testing::root();
        let sealed = Manifest { plain, root }.seal(&epoch).unwrap();
        self.put(&sealed).await;
        sealed.name
    }

    async fn place(&self, n: usize) -> Place {
        let writer = self.store.writers[n].clone();
        let listed = writer.location().list(&folder::system(SYSTEM)).await.unwrap();
        let listed = listed.into_iter().filter_map(|one| Some((one.name?, one.size))).collect();
        Place { writer, listed, damaged: BTreeMap::new() }
    }

    /// Puts the second location right by the first, which has this damaged for all that is known.
    async fn mend(&self, damaged: &[&ObjectName]) -> Mended {
        let places = [self.place(0).await, self.place(1).await];
        let mut all = places[0].whole();
        all.retain(|name| !damaged.contains(&name));
        let missing = compare::missing(&places[1].whole(), &all);
        let (expected, strays) = (Expectations::new(), Strays::default());
        let mending = Mending::new(&places, &places[1], &all, &expected, &strays);
        mending.run(missing).await;
        mending.done()
    }

    fn flip(&self, location: &str, name: &ObjectName) {
        let path = self.path(location, name);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }

    fn path(&self, location: &str, name: &ObjectName) -> std::path::PathBuf {
        Path::new(self.dir.path()).join(location).join(name.to_string())
    }

    fn is_at_far(&self, name: &ObjectName) -> bool {
        self.path("far", name).exists()
    }
}

fn named(mended: &Mended) -> Vec<String> {
    mended.left.iter().map(|left| left.name.clone()).collect()
}

#[tokio::test]
async fn one_bad_object_keeps_back_only_what_needs_it() {
    let world = World::new().await;
    world.origin().await;
    let wal = [world.wal(0, 0x1000).await, world.wal(0x1000, 0x2000).await];
    let (good, bad) = (world.pack().await, world.pack().await);
    let first = world.manifest(1, &[&good]).await;
    let second = world.manifest(2, &[&good, &bad]).await;
    world.flip("near", &bad.name);
    world.flip("near", &wal[1]);
    let mended = world.mend(&[]).await;
    for name in [&wal[0], &good.name, &first] {
        assert!(world.is_at_far(name), "{name}");
    }
    for name in [&wal[1], &bad.name, &second] {
        assert!(!world.is_at_far(name), "{name}");
        assert!(named(&mended).contains(&name.to_string()), "{mended:?}");
    }
    assert_eq!(mended.left.len(), 3);
    let found: Vec<&ObjectName> = mended.damaged.values().flat_map(|names| names.keys()).collect();
    assert_eq!(found.len(), 2, "{found:?}");
    let told = mended.left.iter().find(|left| left.name == second.to_string()).unwrap();
    assert!(told.reason.contains(&bad.name.to_string()), "{told:?}");
}

#[tokio::test]
async fn without_its_wal_or_its_origin_no_manifest_is_copied() {
    let world = World::new().await;
    let origin = world.origin().await;
    let wal = world.wal(0, 0x1000).await;
    let pack = world.pack().await;
    let manifest = world.manifest(1, &[&pack]).await;
    let bytes = std::fs::read(world.path("near", &wal)).unwrap();
    world.flip("near", &wal);
    let mended = world.mend(&[]).await;
    assert!(world.is_at_far(&pack.name) && !world.is_at_far(&manifest), "{mended:?}");
    std::fs::write(world.path("near", &wal), bytes).unwrap();

    std::fs::remove_file(world.path("far", &origin)).unwrap();
    let bytes = std::fs::read(world.path("near", &origin)).unwrap();
    world.flip("near", &origin);
    let mended = world.mend(&[]).await;
    assert!(!world.is_at_far(&wal) && !world.is_at_far(&manifest), "{mended:?}");
    std::fs::write(world.path("near", &origin), bytes).unwrap();
    let mended = world.mend(&[]).await;
    assert_eq!(named(&mended), Vec::<String>::new());
    assert!(world.is_at_far(&manifest));
}

/// What nobody else has damaged comes first, and is replaced in the same order as what is missing is copied.
#[tokio::test]
async fn what_is_damaged_is_replaced() {
    let world = World::new().await;
    world.origin().await;
    world.wal(0, 0x1000).await;
    let pack = world.pack().await;
    let manifest = world.manifest(1, &[&pack]).await;
    assert_eq!(named(&world.mend(&[]).await), Vec::<String>::new());
    let names = [&pack.name, &manifest];
    names.iter().for_each(|name| world.flip("far", name));
    let places = [world.place(0).await, world.place(1).await];
    let [near, mut far] = places;
    names.iter().for_each(|name| drop(far.damaged.insert((*name).clone(), "flipped".into())));
    let all = near.whole();
    let missing = compare::missing(&far.whole(), &all);
    let places = [near, far];
    let (expected, strays) = (Expectations::new(), Strays::default());
    let mending = Mending::new(&places, &places[1], &all, &expected, &strays);
    mending.run(missing).await;
    let mended = mending.done();
    assert_eq!(named(&mended), Vec::<String>::new());
    assert_eq!((mended.repaired.len(), mended.copied.objects), (2, 0));
    for name in names {
        let [near, far] = ["near", "far"].map(|l| std::fs::read(world.path(l, name)).unwrap());
        assert_eq!(near, far);
    }
}

#[tokio::test]
async fn a_location_that_refuses_is_left_after_some_tries() {
    let world = World::new().await;
    for _ in 0..20 {
        world.pack().await;
    }
    let far = world.dir.path().join("far");
    let places = [world.place(0).await, world.place(1).await];
    std::fs::rename(&far, world.dir.path().join("away")).unwrap();
    let all = places[0].whole();
    let missing = compare::missing(&places[1].whole(), &all);
    let (expected, strays) = (Expectations::new(), Strays::default());
    let mending = Mending::new(&places, &places[1], &all, &expected, &strays);
    mending.run(missing).await;
    let mended = mending.done();
    assert_eq!(mended.left.len(), all.len());
    let tried = mended.left.iter().filter(|left| !left.reason.contains("not tried")).count();
    assert!(tried <= 5 + COPIES_MAX, "{tried}");
    assert!(!far.exists());
}
