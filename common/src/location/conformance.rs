//! What every location must do, as functions that run over any of them.
//!
//! Each wants a location of its own or shares one with the others: none leaves or expects objects
//! of the same name. They panic where the location falls short. `all` runs them.

#![allow(clippy::unwrap_used)]

use super::{Location, Put, PutNew};
use crate::error::Kind;
use crate::id::{Branch, BranchId, ObjectId, SystemId};
use crate::lsn::{Lsn, LsnRange};
use crate::name::{ObjectName, folder};
use crate::segment::TimelineId;
use bytes::Bytes;
use futures::future::join_all;

/// Runs every function below.
pub async fn all(location: &Location) {
    create_once(location).await;
    other_bytes_are_refused(location).await;
    big_objects_are_compared_by_their_ends(location).await;
    ranges(location).await;
    listings(location).await;
    deletion(location).await;
    missing(location).await;
    big_object(location).await;
    one_of_many_writers_creates(location).await;
    empty_object(location).await;
    probe(location).await;
    clock(location).await;
}

fn pack() -> ObjectName {
    ObjectName::Pack { system: SystemId::new(7), id: ObjectId::random() }
}

fn bytes(len: usize, seed: u8) -> Bytes {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed).collect()
}

/// The first put creates, the same again is content, and the object reads back.
pub async fn create_once(location: &Location) {
    let (name, content) = (pack(), bytes(5000, 1));
    assert_eq!(location.put(&name, content.clone()).await.unwrap(), Put::Created);
    assert_eq!(location.put(&name, content.clone()).await.unwrap(), Put::Present);
    assert_eq!(location.put_new(&name, content.clone()).await.unwrap(), PutNew::Present);
    assert_eq!(location.get(&name).await.unwrap(), content);
    assert_eq!(location.size(&name).await.unwrap(), Some(5000));
}

/// Other bytes under a name are corruption to `put`, a conflict to `put_new`, and change nothing.
pub async fn other_bytes_are_refused(location: &Location) {
    let (name, content) = (pack(), bytes(5000, 1));
    assert_eq!(location.put_new(&name, content.clone()).await.unwrap(), PutNew::Created);
    for other in [bytes(5000, 2), bytes(4999, 1), bytes(5001, 1), Bytes::new()] {
        let error = location.put(&name, other.clone()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert!(error.message().contains("two contents under one name"), "{error}");
        assert_eq!(location.put_new(&name, other).await.unwrap(), PutNew::Conflict);
    }
    assert_eq!(location.get(&name).await.unwrap(), content);
}

/// Of big objects, the size, the head and the trailer tell.
pub async fn big_objects_are_compared_by_their_ends(location: &Location) {
    let (name, content) = (pack(), bytes(3 << 20, 3));
    assert_eq!(location.put(&name, content.clone()).await.unwrap(), Put::Created);
    assert_eq!(location.put(&name, content.clone()).await.unwrap(), Put::Present);
    for at in [0, 4095, content.len() - 36, content.len() - 1] {
        let mut other = content.to_vec();
        other[at] ^= 1;
        let error = location.put(&name, other.into()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "byte {at}: {error}");
    }
}

/// Ranges are exact, and never shorter than asked for.
pub async fn ranges(location: &Location) {
    let (name, content) = (pack(), bytes(100_000, 4));
    location.put(&name, content.clone()).await.unwrap();
    for range in [0..1, 0..100_000, 99_999..100_000, 8191..8193, 500..500] {
        let got = location.get_range(&name, range.clone()).await.unwrap();
        assert_eq!(got, content.slice(range.start as usize..range.end as usize), "{range:?}");
    }
    for range in [0..100_001, 99_999..100_001, 100_000..100_001, 200_000..200_010] {
        let error = location.get_range(&name, range.clone()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{range:?}: {error}");
    }
}

/// Listings are complete, in order, sized, and can begin anywhere; more than a store's page of them
/// too.
pub async fn listings(location: &Location) {
    let system = SystemId::new(u64::from_be_bytes(crate::id::random_bytes()));
    let branch = Branch { timeline: TimelineId::FIRST, id: BranchId::random() };
    let name = |start: u64| ObjectName::Wal {
        system,
        branch,
        range: LsnRange::new(Lsn::new(start), Lsn::new(start + 16)),
        id: ObjectId::random(),
    };
    let starts: Vec<u64> = (0..1050).map(|i| i * 16 + ((i % 3) << 32)).collect();
    let mut names: Vec<ObjectName> = starts.iter().map(|&start| name(start)).collect();
    for chunk in names.chunks(16) {
        let puts = chunk.iter().map(|name| location.put(name, Bytes::from_static(b"wal")));
        join_all(puts).await.into_iter().for_each(|put| assert_eq!(put.unwrap(), Put::Created));
    }
    names.sort_by_key(ToString::to_string);
    let listed = location.list(&folder::branch(system, branch)).await.unwrap();
    let found: Vec<_> = listed.iter().map(|object| object.name.clone().unwrap()).collect();
    assert!(found == names, "{} of {}", found.len(), names.len());
    assert!(listed.iter().all(|object| object.size == 3));
    let age = jiff::Timestamp::now().as_second() - listed[0].modified.as_second();
    assert!((-600..600).contains(&age), "modified {age} s ago");
    assert_eq!(location.list(&folder::system(system)).await.unwrap(), listed);

    let middle = Lsn::new((1 << 32) + 16 * 100);
    let after = folder::branch_from(system, branch, middle);
    let rest = location.list_from(&folder::branch(system, branch), &after).await.unwrap();
    let expected = listed.iter().filter(|object| object.path > after).cloned();
    assert_eq!(rest, expected.collect::<Vec<_>>());
    assert!(!rest.is_empty() && rest.len() < listed.len());
    let last = &listed[listed.len() - 1].path;
    assert_eq!(location.list_from(&folder::branch(system, branch), last).await.unwrap(), []);

    location.delete(&names).await.unwrap();
    assert_eq!(location.list(&folder::system(system)).await.unwrap(), []);
    assert_eq!(location.list(&folder::packs(system)).await.unwrap(), []);
}

/// Deletion deletes what is there, and is content with what is not.
pub async fn deletion(location: &Location) {
    let names = [pack(), pack(), pack()];
    for name in &names {
        location.put(name, bytes(10, 5)).await.unwrap();
    }
    location.delete(&[]).await.unwrap();
    location.delete(&[names[0].clone(), pack(), names[1].clone()]).await.unwrap();
    location.delete(&names[..1]).await.unwrap();
    assert_eq!(location.size(&names[0]).await.unwrap(), None);
    assert_eq!(location.size(&names[1]).await.unwrap(), None);
    assert_eq!(location.size(&names[2]).await.unwrap(), Some(10));
}

/// What is not there is `Missing`, by name.
pub async fn missing(location: &Location) {
    let name = pack();
    let whole = location.get(&name).await.unwrap_err();
    let part = location.get_range(&name, 0..10).await.unwrap_err();
    for error in [whole, part] {
        assert_eq!(error.kind(), Kind::Missing, "{error}");
        assert!(error.message().contains(&name.to_string()), "{error}");
        assert!(error.message().contains(location.name().as_str()), "{error}");
    }
    assert_eq!(location.size(&name).await.unwrap(), None);
}

/// 20 MiB go and come in one piece.
pub async fn big_object(location: &Location) {
    let (name, content) = (pack(), bytes(20 << 20, 6));
    assert_eq!(location.put(&name, content.clone()).await.unwrap(), Put::Created);
    assert!(location.get(&name).await.unwrap() == content);
    let range = (8 << 20) - 7..(16 << 20) + 5;
    let part = location.get_range(&name, range.start as u64..range.end as u64).await.unwrap();
    assert!(part == content.slice(range));
}

/// Of 16 that store the same object at once, exactly one creates it; of 16 with their own, one
/// wins.
pub async fn one_of_many_writers_creates(location: &Location) {
    let (name, content) = (pack(), bytes(40_000, 7));
    let puts = join_all((0..16).map(|_| location.put(&name, content.clone()))).await;
    let created = puts.into_iter().filter(|put| *put.as_ref().unwrap() == Put::Created).count();
    assert_eq!(created, 1);
    assert_eq!(location.get(&name).await.unwrap(), content);

    let name = pack();
    let puts = join_all((0..16).map(|i| location.put_new(&name, bytes(100, i)))).await;
    let puts: Vec<PutNew> = puts.into_iter().map(Result::unwrap).collect();
    let winner = puts.iter().position(|put| *put == PutNew::Created).unwrap();
    assert_eq!(puts.iter().filter(|put| **put == PutNew::Conflict).count(), 15, "{puts:?}");
    assert_eq!(location.get(&name).await.unwrap(), bytes(100, winner as u8));
}

/// An object may be empty.
pub async fn empty_object(location: &Location) {
    let name = pack();
    assert_eq!(location.put(&name, Bytes::new()).await.unwrap(), Put::Created);
    assert_eq!(location.put(&name, Bytes::new()).await.unwrap(), Put::Present);
    assert_eq!(location.get(&name).await.unwrap(), Bytes::new());
    assert_eq!(location.size(&name).await.unwrap(), Some(0));
}

/// The store is fit to be a location, and the probe leaves nothing behind.
pub async fn probe(location: &Location) {
    let probe = location.probe().await.unwrap();
    assert!(probe.deletes);
    assert_eq!(location.list("probe/").await.unwrap(), []);
}

/// The store's clock goes on, is near ours here, and leaves nothing behind.
pub async fn clock(location: &Location) {
    let first = location.clock().await.unwrap();
    assert!(location.clock().await.unwrap() >= first);
    let off = jiff::Timestamp::now().as_second() - first.as_second();
    assert!((-600..600).contains(&off), "{off} s off");
    let left = location.list("probe/").await.unwrap();
    assert!(left.iter().all(|object| !object.path.ends_with("/clock")), "{left:?}");
}
