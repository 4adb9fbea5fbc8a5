//! Every kind of location does what a location must do, and what a network does to a write is found
//! out.

// Clippy knows only the functions marked as tests, not the ones that they share.
#![allow(clippy::unwrap_used)]

use backstay_common::error::Kind;
use backstay_common::id::{ObjectId, SystemId};
use backstay_common::location::{Location, LocationSettings, Put, PutNew, Secret, conformance};
use backstay_common::name::ObjectName;
use backstay_tests::bucket::{Action, Bucket, Fault, Operation, Options};
use bytes::Bytes;
use std::time::{Duration, Instant};

fn open(settings: &LocationSettings) -> Location {
    Location::open(settings).unwrap()
}

fn name() -> ObjectName {
    ObjectName::Pack { system: SystemId::new(7), id: ObjectId::random() }
}

fn content(len: usize) -> Bytes {
    (0..len).map(|i| (i * 7 + (i >> 8)) as u8).collect()
}

#[tokio::test]
async fn a_folder_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}", dir.path().join("root").display());
    let location = open(&LocationSettings::new("disk".parse().unwrap(), url));
    location.create_root().await.unwrap();
    conformance::all(&location).await;
}

#[tokio::test]
async fn a_bucket_conforms() {
    let bucket = Bucket::start().await;
    conformance::all(&open(&bucket.settings("plain"))).await;
    assert!(bucket.objects().keys().all(|key| key.starts_with("plain/7/pack/")));
}

#[tokio::test]
async fn a_bucket_in_a_folder_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { dir: Some(dir.path().into()), ..Options::default() };
    let bucket = Bucket::with(options).unwrap();
    conformance::all(&open(&bucket.settings("kept"))).await;
}

#[tokio::test]
async fn a_bucket_without_a_prefix_conforms() {
    let bucket = Bucket::start().await;
    let mut settings = bucket.settings("whole");
    settings.url = "s3://backstay".into();
    conformance::all(&open(&settings)).await;
}

#[tokio::test]
async fn a_bucket_behind_tls_with_an_authority_of_its_own_conforms() {
    let bucket = Bucket::start_tls();
    assert!(bucket.endpoint().starts_with("https://"));
    conformance::all(&open(&bucket.settings("tls"))).await;
}

#[tokio::test]
async fn an_unknown_authority_is_refused_with_a_remedy() {
    let bucket = Bucket::start_tls();
    let mut settings = bucket.settings("tls");
    settings.ca_file = None;
    let error = open(&settings).put(&name(), content(10)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    assert!(error.remedy_text().unwrap().contains("ca-file"), "{error}");
    assert_eq!(bucket.objects().len(), 0);
}

/// Started and named by the test script; a second judge of our client.
#[tokio::test]
async fn moto_conforms() {
    let Ok(endpoint) = std::env::var("BACKSTAY_MOTO") else {
        eprintln!("BACKSTAY_MOTO does not name a moto server: not run");
        return;
    };
    let bucket = format!("backstay-{}", ObjectId::random());
    let mut settings =
        LocationSettings::new("moto".parse().unwrap(), format!("s3://{bucket}/orders"));
    settings.endpoint = Some(endpoint.clone());
    settings.allow_http = true;
    settings.access_key_id = Some("test".into());
    settings.secret_access_key = Some(Secret::new("test"));
    let error = open(&settings).get(&name()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    create_bucket(&endpoint, &bucket).await;
    conformance::all(&open(&settings)).await;
}

/// Moto takes requests without a signature.
async fn create_bucket(endpoint: &str, bucket: &str) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let host = endpoint.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let request = format!(
        "PUT /{bucket} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// One write, at which `action` happens: what `put` says, and how many objects there are.
async fn put_through(action: Action, times: u64) -> (Put, usize) {
    let bucket = Bucket::start().await;
    let fault = Fault::on(Operation::Put, action).key("/pack/").times(times);
    let id = bucket.faults().add(fault);
    let (name, bytes) = (name(), content(200_000));
    let put = open(&bucket.settings("a")).put(&name, bytes.clone()).await.unwrap();
    assert_eq!(bucket.faults().fired(id), times);
    assert_eq!(bucket.objects()[&format!("a/{name}")], bytes);
    (put, bucket.objects().len())
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_is_found_to_be_ours() {
    for action in [
        Action::DropAfterCommit,
        Action::ErrorAfterCommit(500),
        Action::ErrorAfterCommit(503),
        Action::ErrorAfterCommit(409),
    ] {
        assert_eq!(put_through(action, 1).await, (Put::Present, 1), "{action:?}");
    }
}

#[tokio::test]
async fn a_write_that_did_not_happen_is_done_again() {
    for action in [
        Action::DropBefore,
        Action::ErrorBefore(500),
        Action::ErrorBefore(503),
        Action::ErrorBefore(409),
    ] {
        assert_eq!(put_through(action, 2).await, (Put::Created, 1), "{action:?}");
    }
}

#[tokio::test]
async fn a_store_that_hangs_is_given_up_and_asked_what_it_did() {
    let bucket = Bucket::start().await;
    let mut settings = bucket.settings("a");
    settings.request_timeout = Duration::from_secs(1);
    let location = open(&settings);
    let start = Instant::now();
    bucket.faults().add(Fault::on(Operation::Put, Action::HangAfterCommit).times(1));
    assert_eq!(location.put(&name(), content(1000)).await.unwrap(), Put::Present);
    bucket.faults().add(Fault::on(Operation::Put, Action::Hang).times(1));
    assert_eq!(location.put(&name(), content(1000)).await.unwrap(), Put::Created);
    bucket.faults().add(Fault::on(Operation::Get, Action::Hang).times(1));
    let name = name();
    location.put(&name, content(1000)).await.unwrap();
    assert_eq!(location.get(&name).await.unwrap(), content(1000));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[tokio::test]
async fn an_upload_may_take_longer_than_a_silence() {
    let bucket = Bucket::start().await;
    let mut settings = bucket.settings("a");
    settings.request_timeout = Duration::from_secs(2);
    bucket.faults().add(Fault::on(Operation::Put, Action::Delay(Duration::from_millis(1500))));
    let put = open(&settings).put(&name(), content(1000)).await.unwrap();
    assert_eq!(put, Put::Created);
    assert_eq!(bucket.request_counts()[&Operation::Put], 1);
}

#[tokio::test]
async fn somebody_elses_object_is_never_taken_for_ours() {
    for action in [Action::DropBefore, Action::ErrorBefore(503)] {
        let bucket = Bucket::start().await;
        let name = name();
        bucket.replace(&format!("a/{name}"), content(1000));
        bucket.faults().add(Fault::on(Operation::Put, action).times(1));
        let location = open(&bucket.settings("a"));
        let other = Bytes::from(vec![0; 1000]);
        let error = location.put(&name, other.clone()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert_eq!(location.put_new(&name, other).await.unwrap(), PutNew::Conflict);
    }
}

#[tokio::test]
async fn a_location_that_is_down_says_so_soon_and_comes_back() {
    let bucket = Bucket::start().await;
    let location = open(&bucket.settings("a"));
    let name = name();
    location.put(&name, content(1000)).await.unwrap();
    bucket.faults().refuse(true);
    let start = Instant::now();
    for error in [
        location.put(&name, content(1000)).await.unwrap_err(),
        location.get(&name).await.unwrap_err(),
        location.size(&name).await.unwrap_err(),
        location.list("").await.unwrap_err(),
        location.require_cluster().await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::Storage, "{error}");
        assert!(error.message().contains("location a"), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    bucket.faults().refuse(false);
    assert_eq!(location.put(&name, content(1000)).await.unwrap(), Put::Present);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_read_on() {
    let bucket = Bucket::start().await;
    let location = open(&bucket.settings("a"));
    let (name, bytes) = (name(), content(500_000));
    location.put(&name, bytes.clone()).await.unwrap();
    let id = bucket.faults().add(Fault::on(Operation::Get, Action::Truncate).times(1));
    assert_eq!(location.get(&name).await.unwrap(), bytes);
    assert_eq!(bucket.faults().fired(id), 1);
}

#[tokio::test]
async fn a_flipped_bit_comes_through_and_is_for_the_trailer_to_find() {
    let bucket = Bucket::start().await;
    let location = open(&bucket.settings("a"));
    let name = name();
    location.put(&name, content(1000)).await.unwrap();
    bucket.faults().add(Fault::on(Operation::Get, Action::Corrupt).times(1));
    assert_ne!(location.get(&name).await.unwrap(), content(1000));
    assert_eq!(location.get(&name).await.unwrap(), content(1000));
}

#[tokio::test]
async fn a_missing_bucket_and_wrong_keys_are_refused_by_name() {
    let bucket = Bucket::start().await;
    let mut settings = bucket.settings("a");
    settings.url = "s3://nowhere/a".into();
    let location = open(&settings);
    for error in [
        location.size(&name()).await.unwrap_err(),
        location.get(&name()).await.unwrap_err(),
        location.put(&name(), content(10)).await.unwrap_err(),
        location.list("").await.unwrap_err(),
        location.delete(&[name()]).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::Storage, "{error}");
        assert!(error.remedy_text().unwrap().contains("create the bucket"), "{error}");
    }
    for wrong in [("backstay", "wrong"), ("nobody", "wrong")] {
        let mut settings = bucket.settings("a");
        settings.access_key_id = Some(wrong.0.into());
        settings.secret_access_key = Some(Secret::new(wrong.1));
        let error = open(&settings).put(&name(), content(10)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Storage, "{error}");
        assert!(error.remedy_text().unwrap().contains("access-key-id"), "{error}");
    }
    bucket.faults().add(Fault::always(Action::ErrorBefore(403)));
    let error = open(&bucket.settings("a")).put(&name(), content(10)).await.unwrap_err();
    assert!(error.remedy_text().unwrap().contains("allow this identity"), "{error}");
    assert_eq!(bucket.objects().len(), 0);
}

#[tokio::test]
async fn a_store_that_ignores_create_if_absent_is_refused_by_the_probe() {
    let bucket = Bucket::start().await;
    bucket.faults().ignore_conditions(true);
    let error = open(&bucket.settings("a")).probe().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    assert!(error.message().contains("create-if-absent"), "{error}");
    assert!(error.message().contains("s3://backstay/a"), "{error}");
    assert_eq!(bucket.objects().len(), 0);
}

#[tokio::test]
async fn an_identity_that_may_not_delete_is_told_by_the_probe() {
    let bucket = Bucket::start().await;
    bucket.faults().add(Fault::on(Operation::Delete, Action::ErrorBefore(403)));
    let probe = open(&bucket.settings("a")).probe().await.unwrap();
    assert!(!probe.deletes);
}

#[tokio::test]
async fn a_bucket_counts_and_can_lose_an_object() {
    let bucket = Bucket::start().await;
    let location = open(&bucket.settings("a"));
    let name = name();
    location.put(&name, content(10)).await.unwrap();
    assert!(bucket.remove(&format!("a/{name}")));
    assert_eq!(location.get(&name).await.unwrap_err().kind(), Kind::Missing);
    let counts = bucket.request_counts();
    assert_eq!((counts[&Operation::Put], counts[&Operation::Get]), (1, 1));
}
