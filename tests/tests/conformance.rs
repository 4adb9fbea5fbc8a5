//! Every kind of location does what a location must do, and what a network does to a write is found
//! out.

// Clippy knows only the functions marked as tests, not the ones that they share.
#![allow(clippy::unwrap_used)]

use backstay_common::error::Kind;
use backstay_common::id::{ObjectId, SystemId};
use backstay_common::location::{
    Location, LocationSettings, Put, PutNew, Secret, TlsMin, conformance,
};
use backstay_common::name::ObjectName;
use backstay_tests::bucket::{Action, Bucket, Fault, Operation, Options};
use backstay_tests::gcs::Gcs;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use jiff::SignedDuration;
use sha2::{Digest, Sha256};
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

#[tokio::test]
async fn tls_1_2_is_spoken_unless_tls_min_is_1_3() {
    let old = Bucket::start_tls_with(Options { tls_is_old: true, ..Options::default() });
    let mut settings = old.settings("tls");
    assert_eq!(open(&settings).put(&name(), content(10)).await.unwrap(), Put::Created);
    settings.tls_min = TlsMin::Tls13;
    let error = open(&settings).put(&name(), content(10)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    assert!(error.remedy_text().unwrap().contains("tls-min"), "{error}");
    assert_eq!(old.objects().len(), 1);

    let new = Bucket::start_tls();
    let mut settings = new.settings("tls");
    settings.tls_min = TlsMin::Tls13;
    assert_eq!(open(&settings).put(&name(), content(10)).await.unwrap(), Put::Created);
}

/// No server of today speaks it any more, so this one says that it does, and no more than that.
#[tokio::test]
async fn tls_1_1_is_refused() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let bucket = Bucket::start_tls();
    let mut settings = bucket.settings("tls");
    settings.endpoint = Some(format!("https://{}", listener.local_addr().unwrap()));
    let location = open(&settings);
    let put = tokio::spawn(async move { location.put(&name(), content(10)).await });
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut hello = vec![0; 4096];
    let length = stream.read(&mut hello).await.unwrap();
    assert_eq!(hello[0], 22, "a handshake record");
    // The extension supported_versions: its number, its length, the length of the list; two bytes for each version.
    let mut windows = hello[..length].windows(9);
    let versions =
        windows.find(|w| w[..2] == [0, 43] && w[3] == w[4] + 1).expect("supported_versions");
    assert_eq!(versions[4..9], [4, 3, 4, 3, 3], "TLS 1.3 and 1.2, and nothing else");
    // ServerHello: version 1.1, random, no session, TLS_RSA_WITH_AES_128_CBC_SHA, no compression.
    let mut body = vec![3, 2];
    body.extend([7; 32]);
    body.extend([0, 0, 0x2f, 0]);
    let mut answer = vec![22, 3, 2, 0, body.len() as u8 + 4, 2, 0, 0, body.len() as u8];
    answer.extend(body);
    stream.write_all(&answer).await.unwrap();
    let mut alert = [0; 7];
    stream.read_exact(&mut alert).await.unwrap();
    assert_eq!((alert[0], alert[5]), (21, 2), "a fatal alert: {alert:?}");
    drop((stream, listener));
    let error = put.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
}

/// The server itself plays the proxy: it gets the requests that are for a host that does not exist.
#[tokio::test]
async fn a_proxy_is_asked_for_the_endpoint() {
    let bucket = Bucket::start().await;
    let mut settings = bucket.settings("a");
    settings.endpoint = Some("http://store.invalid:9".into());
    settings.proxy = Some(Secret::new(format!("{}/", bucket.endpoint())));
    let name = name();
    assert_eq!(open(&settings).put(&name, content(1000)).await.unwrap(), Put::Created);
    assert_eq!(bucket.objects().len(), 1);
    settings.proxy = None;
    assert_eq!(open(&settings).get(&name).await.unwrap_err().kind(), Kind::Storage);
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

/// Started and named by the test script, with the account and the key that it is known to have.
#[tokio::test]
async fn azurite_conforms() {
    let Ok(endpoint) = std::env::var("BACKSTAY_AZURITE") else {
        eprintln!("BACKSTAY_AZURITE does not name an Azurite server: not run");
        return;
    };
    let settings = azurite(&endpoint, "orders");
    let location = open(&settings);
    let error = location.get(&name()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    assert!(error.remedy_text().unwrap().contains("create the container"), "{error}");
    create_container(&endpoint, &settings).await;
    conformance::all(&location).await;
    let probe = location.probe().await.unwrap();
    assert!(probe.honours_conditions && probe.clock_ahead.abs() < SignedDuration::from_mins(1));

    let mut cool = settings.clone();
    cool.storage_class = Some("Cool".into());
    let put = open(&cool).put(&name(), content(200_000)).await.unwrap();
    assert_eq!(put, Put::Created);
    let mut stranger = settings;
    stranger.account_key = Some(Secret::new("c3RyYW5nZXI="));
    let error = open(&stranger).put(&name(), content(10)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    assert!(error.remedy_text().unwrap().contains("account-key"), "{error}");
}

/// The account and the key are Azurite's own, the same everywhere.
fn azurite(endpoint: &str, prefix: &str) -> LocationSettings {
    let container = format!("backstay-{}", ObjectId::random());
    let url = format!("az://{container}/{prefix}");
    let mut settings = LocationSettings::new("azurite".parse().unwrap(), url);
    settings.endpoint = Some(format!("{endpoint}/devstoreaccount1"));
    settings.allow_http = true;
    settings.account = Some("devstoreaccount1".into());
    settings.account_key = Some(Secret::new(
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    ));
    settings
}

/// Signed with the account's key, as Azure wants it.
async fn create_container(endpoint: &str, settings: &LocationSettings) {
    let account = settings.account.as_deref().unwrap();
    let container = settings.url.trim_start_matches("az://").split('/').next().unwrap();
    let date = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT");
    let headers = format!("x-ms-date:{date}\nx-ms-version:2021-12-02\n");
    let resource = format!("/{account}/{account}/{container}\nrestype:container");
    let signed = format!("PUT{}{headers}{resource}", "\n".repeat(12));
    let key = BASE64_STANDARD.decode(settings.account_key.as_ref().unwrap().expose()).unwrap();
    let signature = BASE64_STANDARD.encode(hmac_sha256(&key, signed.as_bytes()));
    let authorization = format!("Authorization:SharedKey {account}:{signature}\n");
    let headers = (headers + &authorization).replace('\n', "\r\n");
    let path = format!("/{account}/{container}?restype=container");
    let answer = request(endpoint, &format!("PUT {path}"), &headers).await;
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
}

fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut block = [0; 64];
    match key.len() > 64 {
        true => block[..32].copy_from_slice(&Sha256::digest(key)),
        false => block[..key.len()].copy_from_slice(key),
    }
    let pad = |byte: u8| block.map(|b| b ^ byte);
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().to_vec()
}

/// Moto takes requests without a signature.
async fn create_bucket(endpoint: &str, bucket: &str) {
    let answer = request(endpoint, &format!("PUT /{bucket}"), "").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// One request without a body, and its answer.
async fn request(endpoint: &str, what: &str, headers: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let host = endpoint.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let request = format!(
        "{what} HTTP/1.1\r\nHost: {host}\r\n{headers}Content-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
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
        Action::ResetAfterCommit,
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
        Action::Reset,
        Action::HalfRequest,
        Action::ErrorBefore(500),
        Action::ErrorBefore(503),
        Action::ErrorBefore(409),
    ] {
        assert_eq!(put_through(action, 2).await, (Put::Created, 1), "{action:?}");
    }
}

#[tokio::test]
async fn a_connection_that_is_cut_is_reset_and_not_closed() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let bucket = Bucket::start().await;
    let host = bucket.endpoint().trim_start_matches("http://").to_string();
    let mut idle = tokio::net::TcpStream::connect(&host).await.unwrap();
    let mut busy = tokio::net::TcpStream::connect(&host).await.unwrap();
    let hangs = bucket.faults().add(Fault::always(Action::Hang));
    busy.write_all(b"GET /backstay/a HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    // Connections are accepted in order: it knows the idle one too.
    while bucket.faults().fired(hangs) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bucket.faults().cut();
    for stream in [&mut idle, &mut busy] {
        let error = stream.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    bucket.faults().clear();
    let (name, bytes) = (name(), content(1000));
    assert_eq!(open(&bucket.settings("a")).put(&name, bytes).await.unwrap(), Put::Created);
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
async fn a_store_that_ignores_create_if_absent_is_refused_by_name() {
    let bucket = Bucket::start().await;
    bucket.faults().ignore_conditions(true);
    let gcs = Gcs::start().unwrap();
    gcs.state().ignores_conditions = true;
    for settings in [bucket.settings("a"), gcs.settings("a")] {
        let error = open(&settings).probe().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Storage, "{error}");
        assert!(error.message().contains("create-if-absent"), "{error}");
        assert!(error.message().contains(&settings.url), "{error}");
        assert!(error.remedy_text().unwrap().contains("single-writer = true"), "{error}");
    }
    assert_eq!(bucket.objects().len() + gcs.state().objects.len(), 0);
}

#[tokio::test]
async fn a_store_that_ignores_create_if_absent_conforms_for_a_single_writer() {
    let bucket = Bucket::start().await;
    bucket.faults().ignore_conditions(true);
    let gcs = Gcs::start().unwrap();
    gcs.state().ignores_conditions = true;
    for mut settings in [bucket.settings("a"), gcs.settings("a")] {
        settings.single_writer = true;
        conformance::all(&open(&settings)).await;
        assert!(!open(&settings).probe().await.unwrap().honours_conditions);
    }
    bucket.faults().ignore_conditions(false);
    let mut settings = bucket.settings("a");
    settings.single_writer = true;
    assert!(open(&settings).probe().await.unwrap().honours_conditions, "it does by now");
}

#[tokio::test]
async fn a_google_bucket_conforms() {
    let gcs = Gcs::start().unwrap();
    let location = open(&gcs.settings("plain"));
    conformance::all(&location).await;
    assert!(gcs.state().objects.keys().all(|key| key.starts_with("plain/7/pack/")));
    let probe = location.probe().await.unwrap();
    assert!(probe.honours_conditions && probe.lists_from_key && probe.deletes);
    assert_eq!(probe.checks_uploads, Some(true));
    assert!(gcs.state().checked > 1000, "uploads carry a checksum");
}

#[tokio::test]
async fn what_a_store_cannot_do_is_found_out() {
    let gcs = Gcs::start().unwrap();
    gcs.state().ignores_start = true;
    gcs.state().ignores_checksums = true;
    gcs.state().clock_ahead = SignedDuration::from_mins(20);
    let probe = open(&gcs.settings("a")).probe().await.unwrap();
    assert!(!probe.lists_from_key);
    assert_eq!(probe.checks_uploads, Some(false));
    assert_eq!((probe.clock_ahead.as_secs() + 30) / 60, 20, "{:?}", probe.clock_ahead);
    assert!(gcs.state().objects.is_empty(), "nothing is left behind");

    let bucket = Bucket::start_tls();
    let probe = open(&bucket.settings("a")).probe().await.unwrap();
    assert!(probe.lists_from_key && probe.clock_ahead.abs() < SignedDuration::from_secs(60));
    assert_eq!(probe.checks_uploads, Some(true));
    assert!(!probe.keeps_versions);
    bucket.faults().tell_versions(true);
    assert!(open(&bucket.settings("a")).probe().await.unwrap().keeps_versions);
    assert_eq!(bucket.objects().len(), 0);
}

#[tokio::test]
async fn google_overloaded_or_a_stranger_is_said_by_name() {
    let gcs = Gcs::start().unwrap();
    let location = open(&gcs.settings("a"));
    gcs.state().fails = (2, 429);
    let object = name();
    assert_eq!(location.put(&object, content(1000)).await.unwrap(), Put::Created);
    gcs.state().fails = (1, 503);
    assert_eq!(location.get(&object).await.unwrap(), content(1000));

    let other = Gcs::start().unwrap();
    let mut settings = gcs.settings("a");
    let key = std::fs::read_to_string(other.key_file()).unwrap().replace("agent@", "stranger@");
    std::fs::write(other.key_file(), key).unwrap();
    settings.credentials_file = Some(other.key_file());
    let error = open(&settings).put(&name(), content(10)).await.unwrap_err();
    assert!(error.remedy_text().unwrap().contains("credentials-file"), "{error}");
    settings = gcs.settings("a");
    settings.url = "gs://nowhere/a".into();
    let error = open(&settings).get(&name()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    assert!(error.remedy_text().unwrap().contains("create the bucket"), "{error}");
}

#[tokio::test]
async fn the_storage_class_is_for_what_is_not_small() {
    let gcs = Gcs::start().unwrap();
    let mut settings = gcs.settings("a");
    settings.storage_class = Some("NEARLINE".into());
    let (small, big) = (name(), name());
    let location = open(&settings);
    location.put(&small, content(1000)).await.unwrap();
    location.put(&big, content(200_000)).await.unwrap();
    let class = |name: &ObjectName| gcs.state().objects[&format!("a/{name}")].storage_class.clone();
    assert_eq!((class(&small), class(&big)), (None, Some("NEARLINE".into())));
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
