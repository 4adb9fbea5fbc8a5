use super::*;
use crate::testing::{Repo, micros};

#[tokio::test]
async fn any_range_comes_from_whichever_objects_and_locations_are_whole() {
    let repo = Repo::new(2).await;
    let mut writer = repo.first_branch(&[0, 1]).await;
    let mut names = Vec::new();
    for xid in 10..20 {
        writer.wal.ordinary(xid, 3000);
        writer.wal.commit(xid, micros(i64::from(xid)));
        names.push(writer.ship(&repo).await);
    }
    // Half of the objects are damaged at one location, half are gone from the other.
    for (number, name) in names.iter().enumerate() {
        match number % 2 {
            0 => repo.damage(0, name),
            _ => std::fs::remove_file(repo.path(1, name)).unwrap(),
        }
    }
    let catalog = Catalog::load(&repo.access.locations, repo.access.system).await.unwrap();
    let source = Arc::new(WalSource::new(repo.access.clone(), Arc::new(catalog), None));
    let whole = LsnRange::new(writer.wal.start(), writer.position());
    let reads =
        (0..8).map(|n| {
            let range = LsnRange::new(whole.start.add(n * 111), Lsn::new(whole.end.get() - n * 77));
            let source = source.clone();
            async move {
                (range, source.read("00000001-0000000a".parse().unwrap(), range).await.unwrap())
            }
        });
    for (range, wal) in futures::future::join_all(reads).await {
        assert!(wal == writer.bytes(range), "{range}");
    }
    let beyond = LsnRange::new(whole.start, whole.end.add(1));
    let error = source.read(writer.branch, beyond).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Missing);
    assert!(error.message().contains(&whole.end.to_string()), "{error}");
}

#[tokio::test]
async fn an_object_that_is_damaged_everywhere_is_named() {
    let repo = Repo::new(2).await;
    let mut writer = repo.first_branch(&[0, 1]).await;
    writer.wal.ordinary(9, 3000);
    let name = writer.ship(&repo).await;
    repo.damage(0, &name);
    repo.damage(1, &name);
    let catalog = Catalog::load(&repo.access.locations, repo.access.system).await.unwrap();
    let source = WalSource::new(repo.access.clone(), Arc::new(catalog), None);
    let range = LsnRange::new(writer.wal.start(), writer.position());
    let error = source.read(writer.branch, range).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.message().contains(&name.to_string()), "{error}");
}

/// An agent replaces pieces by longer objects while a restore goes on.
#[tokio::test]
async fn what_has_gone_since_it_was_listed_is_read_from_what_took_its_place() {
    let repo = Repo::new(2).await;
    let mut writer = repo.first_branch(&[0, 1]).await;
    let mut pieces = Vec::new();
    for xid in 10..16 {
        writer.wal.ordinary(xid, 3000);
        pieces.push(writer.ship(&repo).await);
    }
    let whole = LsnRange::new(writer.wal.start(), writer.position());
    let catalog = Catalog::load(&repo.access.locations, repo.access.system).await.unwrap();
    let source = WalSource::new(repo.access.clone(), Arc::new(catalog), None);
    let of = |name: &ObjectName| {
        let ObjectName::Wal { range, .. } = name else { unreachable!() };
        *range
    };
    // The last piece is all that is left of them; the others went twice over.
    let groups = [
        LsnRange::new(whole.start, of(&pieces[2]).end),
        LsnRange::new(of(&pieces[3]).start, of(&pieces[4]).end),
    ];
    let longer = groups.map(|range| writer.sealed(&repo, range));
    repo.put(&longer[0], &[1]).await;
    repo.put(&longer[1], &[0]).await;
    for name in &pieces[..5] {
        (0..2).for_each(|place| std::fs::remove_file(repo.path(place, name)).unwrap());
    }
    let gone = source.usable(writer.branch)[1];
    let error = Error::new(Kind::Missing, "gone");
    assert!(source.pass_over(writer.branch, &gone, &error).await, "a footer is looked for there");
    assert!(source.read(writer.branch, whole).await.unwrap() == writer.bytes(whole));

    // What nothing took the place of is missing.
    (0..2).for_each(|place| std::fs::remove_file(repo.path(place, &pieces[5])).unwrap());
    let catalog = source.catalog().clone();
    let source = WalSource::new(repo.access.clone(), catalog, None);
    let error = source.read(writer.branch, whole).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Missing);
    assert!(error.message().contains(&pieces[5].to_string()), "{error}");
}
