use super::*;
use backstay_common::cluster::{AcceptedRecord, ClusterRecord};
use backstay_common::name::ObjectName;

fn cluster(name: &str, system: u64) -> ClusterRecord {
    ClusterRecord::new(name.parse().unwrap(), SystemId::new(system), jiff::Timestamp::UNIX_EPOCH)
}

struct Place {
    folder: tempfile::TempDir,
    key: PathBuf,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("orders.key");
        FileProvider::generate().write(&key).unwrap();
        Place { folder, key }
    }

    async fn location(&self, name: &str, record: Option<ClusterRecord>) -> String {
        let root = self.folder.path().join(name);
        std::fs::create_dir(&root).unwrap();
        let url = format!("file://{}", root.display());
        let location = LocationSettings::new(name.parse().unwrap(), url.as_str());
        if let Some(record) = record {
            let object = record.object();
            assert_eq!(object.name, ObjectName::Cluster);
            Location::open(&location).unwrap().put(&object.name, object.bytes).await.unwrap();
        }
        url
    }

    async fn access(&self, urls: &[String]) -> Result<Access> {
        Access::from_urls(urls, &self.key, &UrlOptions::default()).await
    }
}

#[tokio::test]
async fn a_location_without_the_cluster_object_is_set_aside() {
    let place = Place::new();
    let good = place.location("good", Some(cluster("orders", 7))).await;
    let empty = place.location("empty", None).await;
    let access = place.access(&[empty.clone(), good]).await.unwrap();
    assert_eq!((access.cluster.as_str(), access.system), ("orders", SystemId::new(7)));
    assert_eq!(access.location_names()[0].as_str(), "location-2");
    assert_eq!(access.unreachable[0].0.as_str(), "location-1");
    let unmounted = format!("file://{}", place.folder.path().join("unmounted").display());
    let error = place.access(&[empty, unmounted]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Storage);
    assert!(
        error.message().contains("location-1") && error.message().contains("location-2"),
        "{error}"
    );
}

#[tokio::test]
async fn two_clusters_are_refused_by_name() {
    let place = Place::new();
    let orders = place.location("orders", Some(cluster("orders", 7))).await;
    let billing = place.location("billing", Some(cluster("billing", 8))).await;
    let error = place.access(&[orders, billing]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config);
    assert!(error.message().contains("orders") && error.message().contains("billing"), "{error}");
}

#[tokio::test]
async fn the_newest_of_the_clusters_systems_is_meant_until_told_otherwise() {
    let place = Place::new();
    let old = place.location("old", Some(cluster("orders", 9))).await;
    let new = place.location("new", Some(cluster("orders", 7))).await;
    let error = place.access(&[old.clone(), new.clone()]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config, "nothing says that these are one cluster: {error}");
    let system = SystemId::new(7);
    let accepted = AcceptedRecord { cluster: "orders".parse().unwrap(), system, made: 5 }.object();
    let settings = LocationSettings::new("old".parse().unwrap(), old.as_str());
    let location = Location::open(&settings).unwrap();
    location.put(&accepted.name, accepted.bytes).await.unwrap();
    let access = place.access(std::slice::from_ref(&old)).await.unwrap();
    assert_eq!((access.system, &access.systems[..]), (system, &[system, SystemId::new(9)][..]));
    // The new location was made for the new system; its record is the older word on it.
    let both = place.access(&[new, old]).await.unwrap();
    assert_eq!(both.systems.len(), 2);
    assert_eq!(both.of(SystemId::new(9)).unwrap().system, SystemId::new(9));
    let error = both.of(SystemId::new(8)).unwrap_err();
    assert!(error.to_string().contains("never had the system 8"), "{error}");
}
