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
