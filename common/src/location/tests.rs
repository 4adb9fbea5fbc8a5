use super::*;

fn location(url: &str) -> Location {
    Location::open(&LocationSettings::new("here".parse().unwrap(), url)).unwrap()
}

fn refused(change: impl FnOnce(&mut LocationSettings)) -> Error {
    let mut settings = LocationSettings::new("here".parse().unwrap(), "s3://acme-eu/orders");
    change(&mut settings);
    let error = Location::open(&settings).unwrap_err();
    assert_eq!(error.kind(), Kind::Config, "{error}");
    assert!(error.message().starts_with("location here: "), "{error}");
    assert!(error.remedy_text().is_some(), "{error}");
    error
}

#[tokio::test]
async fn memory_conforms() {
    conformance::all(&location("memory:")).await;
}

#[tokio::test]
async fn a_folder_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a b%20ü");
    let here = location(::url::Url::from_file_path(&root).unwrap().as_str());
    here.create_root().await.unwrap();
    conformance::all(&here).await;
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_unavailable_and_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("mnt");
    let here = location(&format!("file://{}", root.display()));
    let name = ObjectName::Cluster;
    let errors = [
        here.get(&name).await.unwrap_err(),
        here.size(&name).await.unwrap_err(),
        here.list("").await.unwrap_err(),
        here.put(&name, Bytes::new()).await.unwrap_err(),
        here.delete(&[name]).await.unwrap_err(),
        here.require_cluster().await.unwrap_err(),
        here.probe().await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), Kind::Storage, "{error}");
        assert!(error.message().contains("is not there"), "{error}");
    }
    assert!(!root.exists());
}

#[tokio::test]
async fn a_location_without_a_cluster_object_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let here = location(&format!("file://{}", dir.path().display()));
    let error = here.require_cluster().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage);
    assert!(error.message().contains("no cluster object at file://"), "{error}");
    here.put_new(&ObjectName::Cluster, Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(here.require_cluster().await.unwrap(), "x");
}

#[tokio::test]
async fn probes_that_were_left_are_deleted_once_they_are_old() {
    let dir = tempfile::tempdir().unwrap();
    let here = location(&format!("file://{}", dir.path().display()));
    for (name, hours) in [("old", 2), ("others", 0)] {
        let folder = dir.path().join("probe").join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let file = std::fs::File::create(folder.join("clock")).unwrap();
        let age = std::time::Duration::from_secs(hours * 3600);
        file.set_modified(std::time::SystemTime::now() - age).unwrap();
    }
    here.clock().await.unwrap();
    let left: Vec<String> = here.list("").await.unwrap().into_iter().map(|o| o.path).collect();
    assert_eq!(left, ["probe/others/clock"]);
}

#[tokio::test]
async fn what_a_crash_left_in_a_folder_is_no_object() {
    let dir = tempfile::tempdir().unwrap();
    let here = location(&format!("file://{}", dir.path().display()));
    std::fs::write(dir.path().join("cluster#1"), b"half").unwrap();
    assert_eq!(here.list("").await.unwrap(), []);
    here.put(&ObjectName::Cluster, Bytes::from_static(b"whole")).await.unwrap();
    assert_eq!(here.get(&ObjectName::Cluster).await.unwrap(), "whole");
    assert_eq!(here.list("").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_foreign_file_is_listed_without_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let here = location(&format!("file://{}", dir.path().display()));
    std::fs::write(dir.path().join("lost+found"), b"").unwrap();
    let listed = here.list("").await.unwrap();
    assert_eq!((listed[0].path.as_str(), &listed[0].name), ("lost+found", &None));
}

#[tokio::test]
async fn a_file_where_a_folder_must_be_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let here = location(&format!("file://{}", dir.path().display()));
    std::fs::write(dir.path().join("7"), b"").unwrap();
    let name: ObjectName = "7/pack/0011223344556677".parse().unwrap();
    let error = here.put(&name, Bytes::new()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    assert!(error.message().contains(&format!("{}/7/pack", dir.path().display())), "{error}");
}

#[tokio::test]
async fn more_than_an_object_may_have_is_refused() {
    let here = location("memory:");
    let bytes = Bytes::from(vec![0; OBJECT_BYTES_MAX as usize + 1]);
    assert_eq!(here.put(&ObjectName::Cluster, bytes).await.unwrap_err().kind(), Kind::Bug);
}

#[test]
fn settings_that_contradict_are_refused() {
    let error = refused(|s| s.endpoint = Some("http://localhost:9000".into()));
    assert!(error.message().contains("without TLS"), "{error}");
    assert!(error.remedy_text().unwrap().contains("allow-http"), "{error}");
    refused(|s| s.endpoint = Some("localhost:9000".into()));
    refused(|s| s.endpoint = Some("https://user:pass@localhost".into()));
    refused(|s| s.access_key_id = Some("AKIA".into()));
    refused(|s| s.secret_access_key = Some(Secret::new("x")));
    refused(|s| s.ca_file = Some("/nonexistent/ca.pem".into()));
    refused(|s| s.url = "ftp://acme".into());
}

#[test]
fn an_empty_ca_file_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = refused(|s| s.ca_file = Some(file.path().into()));
    assert!(error.message().contains("no certificate in it"), "{error}");
}

#[test]
fn secrets_are_not_printed() {
    let mut settings = LocationSettings::new("here".parse().unwrap(), "s3://acme-eu/orders");
    settings.access_key_id = Some("AKIA".into());
    settings.secret_access_key = Some(Secret::new("hunter22"));
    settings.session_token = Some(Secret::new("hunter22"));
    let here = Location::open(&settings).unwrap();
    assert!(!format!("{settings:?} {here:?}").contains("hunter22"));
}

#[tokio::test]
async fn a_store_that_cannot_be_reached_is_unavailable_with_a_remedy() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut settings = LocationSettings::new("here".parse().unwrap(), "s3://acme-eu/orders");
    settings.endpoint = Some(format!("http://127.0.0.1:{port}"));
    settings.allow_http = true;
    settings.access_key_id = Some("AKIA".into());
    settings.secret_access_key = Some(Secret::new("x"));
    let here = Location::open(&settings).unwrap();
    let error = here.put(&ObjectName::Cluster, Bytes::new()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage, "{error}");
    assert!(error.remedy_text().unwrap().contains("reached"), "{error}");
}
