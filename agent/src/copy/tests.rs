use super::*;
use crate::snapshot::fixture::{SYSTEM, Store};
use backstay_common::id::SnapshotId;
use backstay_common::seal::{self, Draft, ObjectKind, Sealed};
use backstay_common::snapshot::Begin;
use std::path::Path;

/// Two ready locations.
async fn two(dir: &Path) -> Store {
    let store = Store::new(dir, &["near", "far"]);
    store.init(0).await;
    store.init(1).await;
    store
}

async fn pack(store: &Store) -> (Sealed, Whole) {
    let epoch = store.epochs.current().await.unwrap();
    let draft =
        Draft { kind: ObjectKind::Pack, plain: Vec::new(), frames: Vec::new(), meta: Vec::new() };
    let sealed = seal::seal(draft, &epoch, |id| ObjectName::Pack { system: SYSTEM, id });
    let whole = Whole { name: sealed.name.clone(), epoch: epoch.id(), bytes: sealed.bytes.clone() };
    (sealed, whole)
}

fn flip(dir: &Path, location: &str, name: &ObjectName) {
    let path = dir.join(location).join(name.to_string());
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn names(faults: &[Fault]) -> Vec<(&str, Kind)> {
    faults.iter().map(|(at, error)| (at.as_str(), error.kind())).collect()
}

#[tokio::test]
async fn the_first_location_that_has_it_whole_is_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), &["down", "empty", "near", "far"]);
    let (sealed, whole) = pack(&store).await;
    for n in 1..4 {
        store.init(n).await;
    }
    for n in 2..4 {
        super::store(&store.writers[n], &whole, &[]).await.unwrap();
    }
    flip(dir.path(), "near", &sealed.name);
    let sources: Vec<&Location> = store.writers.iter().map(|w| w.location()).collect();
    let mut faults = Vec::new();
    let found = fetch(&sealed.name, &sources, None, &mut faults).await.unwrap();
    assert_eq!(found.bytes, whole.bytes);
    let expected = [("down", Kind::Storage), ("empty", Kind::Missing), ("near", Kind::Corrupt)];
    assert_eq!(names(&faults), expected);

    // Whole nowhere: the reason names each location, and whether to try again.
    flip(dir.path(), "far", &sealed.name);
    let kind = async |sources: &[&Location]| {
        fetch(&sealed.name, sources, None, &mut Vec::new()).await.unwrap_err().kind()
    };
    assert_eq!(kind(&sources).await, Kind::Storage);
    assert_eq!(kind(&sources[1..]).await, Kind::Corrupt);
    assert_eq!(kind(&sources[1..2]).await, Kind::Missing);
}

#[tokio::test]
async fn what_a_manifest_names_is_compared_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = two(dir.path()).await;
    let (sealed, whole) = pack(&store).await;
    super::store(&store.writers[0], &whole, &[]).await.unwrap();
    let near = store.writers[0].location();
    let right = Expected { size: sealed.bytes.len() as u64, hash: sealed.hash() };
    read(near, &sealed.name, Some(right)).await.unwrap();
    for wrong in [Expected { size: 1, ..right }, Expected { hash: [0; 32], ..right }] {
        let error = read(near, &sealed.name, Some(wrong)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    }
}

#[tokio::test]
async fn a_damaged_object_is_replaced_and_a_whole_one_never() {
    let dir = tempfile::tempdir().unwrap();
    let store = two(dir.path()).await;
    let (sealed, whole) = pack(&store).await;
    let to = &store.writers[1];
    assert_eq!(replace(to, &whole, &[]).await.unwrap(), Put::Created, "it is not there at all");
    assert_eq!(replace(to, &whole, &[]).await.unwrap(), Put::Present);
    flip(dir.path(), "far", &sealed.name);
    let error = super::store(to, &whole, &[]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    assert_eq!(replace(to, &whole, &[]).await.unwrap(), Put::Created);
    assert_eq!(to.location().get(&sealed.name).await.unwrap(), whole.bytes);

    // Two whole objects of one name: neither goes.
    let epoch = store.epochs.current().await.unwrap();
    let snapshot = SnapshotId::new(jiff::Timestamp::UNIX_EPOCH, [1, 2, 3, 4]);
    let begin = Begin { snapshot, agent: "a".parse().unwrap(), parent: None, generation: 0 };
    let [one, other] = [(), ()].map(|()| begin.seal(&epoch, SYSTEM));
    to.put(&one.name, epoch.id(), one.bytes.clone()).await.unwrap();
    let whole = Whole { name: other.name, epoch: epoch.id(), bytes: other.bytes };
    let error = replace(to, &whole, &[]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    assert_eq!(to.location().get(&one.name).await.unwrap(), one.bytes);
}

#[tokio::test]
async fn the_wraps_that_another_agent_stored_go_first() {
    let (dir, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = two(dir.path()).await;
    let other = two(theirs.path()).await;
    let (sealed, whole) = pack(&other).await;
    super::store(&other.writers[0], &whole, &[]).await.unwrap();
    let (source, to) = (other.writers[0].location(), &store.writers[0]);
    let error = super::store(to, &whole, &[]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Key, "{error}");
    assert_eq!(to.location().size(&sealed.name).await.unwrap(), None);
    let empty = other.writers[1].location();
    super::store(to, &whole, &[empty, source]).await.unwrap();
    for wrap in other.epochs.wraps(whole.epoch).unwrap() {
        assert_eq!(to.location().get(&wrap.name).await.unwrap(), wrap.bytes);
    }
    assert_eq!(to.location().get(&sealed.name).await.unwrap(), whole.bytes);
}
