//! What all schedules on one major begin with, made once and copied: a primary that is backed up to three locations, the first
//! snapshot at each, and a standby.

use super::draw::LOCATIONS;
use crate::folder;
use crate::s3::with_bucket;
use crate::site::PATIENCE;
use anyhow::{Context, Result, ensure};
use backstay_tests::bucket::Bucket;
use backstay_tests::ledger::{Ledger, Load};
use backstay_tests::major::Major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Configuration, Deployment};
use backstay_tests::random::Random;
use backstay_tests::scene::{Scene, play};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The locations' names, by number.
pub const NAMES: [&str; LOCATIONS] = ["one", "two", "three"];
/// The primary's and the standby's data directories, and the names of the agents beside them.
pub const SERVERS: [&str; 2] = ["main", "sb"];
pub const AGENTS: [&str; 2] = ["a", "b"];

/// A prepared site, at rest.
#[derive(Debug)]
pub struct Template {
    dir: tempfile::TempDir,
    /// What each location holds.
    pub objects: [BTreeMap<String, Bytes>; LOCATIONS],
}

/// Enough to write all the time; two cores carry two schedules.
pub fn load() -> Load {
    Load { clients: 3, accounts: 50, pause: Duration::from_millis(8) }
}

/// A configuration with these buckets.
pub fn locations(start: Configuration, buckets: &[Bucket; LOCATIONS]) -> Configuration {
    buckets.iter().zip(NAMES).fold(start, |c, (bucket, name)| with_bucket(c, bucket, name))
}

impl Template {
    /// Makes one.
    ///
    /// # Panics
    /// If that fails: no schedule can be played then.
    pub fn make(major: &Major) -> Template {
        let made = Mutex::new(None);
        play(&format!("schedules::template::pg{major}"), async |scene: &Scene| {
            let template = make(scene, major).await?;
            *made.lock().expect("nobody else has it") = Some(template);
            Ok(())
        });
        made.into_inner().ok().flatten().expect("a template, or a panic")
    }

    /// A server's data directory.
    pub fn data(&self, host: usize) -> PathBuf {
        self.dir.path().join(SERVERS[host])
    }

    pub fn key(&self) -> PathBuf {
        self.dir.path().join("key")
    }

    /// Of the primary's agent.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }
}

async fn make(scene: &Scene, major: &Major) -> Result<Template> {
    let buckets = [Bucket::start().await, Bucket::start().await, Bucket::start().await];
    let dir = folder_beside(scene)?;
    let sockets = dir.path().join("s");
    std::fs::create_dir(&sockets)?;
    scene.give(&sockets)?;
    let made = Cluster::build(scene, major)
        .name(SERVERS[0])
        // Whoever comes back later finds the WAL since then.
        .setting("wal_keep_size", "1GB")
        // What is restored is started with the template's settings, when the scene is gone.
        .setting("unix_socket_directories", &sockets.display().to_string())
        .make()?;
    let mut primary = Cluster::of(scene, major, made.data())?;
    primary.start().await?;
    drop(Ledger::create(&primary, load(), Random::from_seed(0)).await?);
    let configuration = Configuration::default().server(&primary).agent(AGENTS[0]);
    let configuration = locations(configuration, &buckets);
    let deployment = Deployment::new(scene, AGENTS[0], &configuration).await?;
    let mut agent = deployment.init_and_run().await?;
    let deadline = Instant::now() + PATIENCE;
    let is_there = |bucket: &Bucket| bucket.objects().keys().any(|key| key.ends_with("/manifest"));
    while !buckets.iter().all(is_there) {
        ensure!(Instant::now() < deadline, "the first snapshot is not everywhere");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut standby = primary.standby(scene, SERVERS[1]).await?;
    standby.catch_up(&primary, PATIENCE).await?;
    let status = agent.terminate(PATIENCE).await?;
    ensure!(status.success(), "the agent ended with {status}");
    standby.stop().await?;
    primary.stop().await?;
    for cluster in [&primary, &standby] {
        let name = cluster.data().file_name().context("a name")?;
        std::fs::rename(cluster.data(), dir.path().join(name))?;
    }
    std::fs::rename(deployment.state_dir(), dir.path().join("state"))?;
    folder::copy(deployment.key(), &dir.path().join("key"))?;
    Ok(Template { dir, objects: buckets.map(|bucket| bucket.objects()) })
}

/// It outlives the scene. Servers may enter it.
fn folder_beside(scene: &Scene) -> Result<tempfile::TempDir> {
    let base = scene.dir().parent().context("a scene's folder is in another")?;
    let dir = tempfile::Builder::new().prefix("bst").tempdir_in(base)?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}
