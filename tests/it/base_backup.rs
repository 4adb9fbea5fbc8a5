//! Snapshots without file access, over the replication protocol, and snapshots of a standby.

use crate::folder;
use crate::site::{
    PATIENCE, Site, all_stored, configuration, has_snapshot, judge, restore_and_start,
};
use anyhow::{Context, Result, ensure};
use backstay_tests::ledger::{Ledger, Target};
use backstay_tests::major::Major;

use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Configuration, Deployment};
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// What a role needs that never sees the data directory.
pub const ROLE: &str = "CREATE ROLE backup LOGIN REPLICATION; GRANT pg_read_all_settings TO backup";

/// What a snapshot must bring back, and what it must not.
const TABLES: &str = "
    CREATE TABLE placed (n int PRIMARY KEY, m text) TABLESPACE outside;
    INSERT INTO placed SELECT n, md5(n::text) FROM generate_series(1, 5000) n;
    CREATE UNLOGGED TABLE fleeting (n int PRIMARY KEY);
    INSERT INTO fleeting SELECT generate_series(1, 5000);";

/// Backs this server up over the network, as a role with no more rights than that takes.
pub fn over_the_network(scene: &Scene, cluster: &Cluster) -> Result<Configuration> {
    let conninfo = format!(
        "host={} port={} user=backup dbname=postgres",
        cluster.socket_dir().display(),
        cluster.port()
    );
    Ok(configuration(scene, cluster)?.conninfo(&conninfo).data_dir(None))
}

/// Two snapshots under load, with a tablespace, an unlogged table and changes between; then the server is lost. Both grammars.
async fn without_file_access(scene: &Scene, major: Major) -> Result<()> {
    let place = scene.folder("ts")?;
    let cluster = Cluster::build(scene, &major).start().await?;
    cluster.sql(&format!("CREATE TABLESPACE outside LOCATION '{}'", place.display())).await?;
    cluster.sql(ROLE).await?;
    cluster.sql(TABLES).await?;
    let configuration = over_the_network(scene, &cluster)?;
    let mut site = Site::of(scene, cluster, configuration).await?;
    let check = site.deployment.agent_command(&["check"]).await?.success()?;
    check.says(&["over the network, with page checksums", "may replicate and read settings"])?;
    let session = site.cluster.connect().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    let moment = site.ledger.moment(&session).await?;
    for statement in
        ["CREATE DATABASE later", "VACUUM FULL placed", "DELETE FROM placed WHERE n > 4000"]
    {
        session.batch_execute(statement).await?;
    }
    let second = site.snapshot().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.locations_equal().await?;
    let peak = site.agent.memory_peak_bytes()?;
    ensure!(peak < 512 << 20, "the agent took {} MiB", peak >> 20);
    drop(session);
    site.cluster.destroy()?;
    std::fs::rename(&place, place.with_extension("lost"))?;

    let (early, _) = site.restore_then_start("early", &moment.rfc3339, &[]).await?;
    site.judge(&early, &Target::Time(moment.micros)).await?;
    ensure!(early.value("SELECT count(*) FROM placed").await? == "5000");
    let (late, finished) = site.restore_and_start("late", "latest", &[]).await?;
    finished.says(&[&second])?;
    site.judge(&late, &Target::All).await?;
    let session = late.connect().await?;
    ensure!(session.value("SELECT count(*) FROM placed WHERE m = md5(n::text)").await? == "4000");
    ensure!(
        session.value("SELECT count(*) FROM fleeting").await? == "0",
        "unlogged rows came back"
    );
    session.batch_execute("INSERT INTO fleeting VALUES (1)").await?;
    let names = "SELECT count(*) FROM pg_database WHERE datname = 'later'";
    ensure!(session.value(names).await? == "1");
    let place = "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'outside'";
    let place = session.value(place).await?;
    ensure!(Path::new(&place).starts_with(late.data()), "the tablespace is at {place}");
    Ok(())
}
mod without_file_access_on {
    backstay_tests::on_each_major!(@ without_file_access pg14 14, pg18 18);
}

/// The file of a relation, below the data directory.
async fn file_of(cluster: &Cluster, table: &str) -> Result<String> {
    cluster.value(&format!("SELECT pg_relation_filepath('{table}')")).await
}

/// Flips a bit in a block, on the disk alone.
fn flip(cluster: &Cluster, file: &str, block: u64) -> Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(cluster.data().join(file))?;
    let (mut byte, at) = ([0], block * 8192 + 5000);
    file.read_exact_at(&mut byte, at)?;
    byte[0] ^= 1;
    Ok(file.write_all_at(&byte, at)?)
}

/// Waits until a snapshot reads.
async fn reading(agent: &mut Agent) -> Result<()> {
    let is_reading = |status: &Value| status["snapshots"]["running"]["phase"] == "reading";
    agent.wait_until("a snapshot reads", PATIENCE, is_reading).await.map(drop)
}

/// A page that is wrong on the disk is reported, with its file and block. One that is as wrong, but was written to since
/// the backup began, is as a torn page is: replay mends it. The rate is kept meanwhile.
async fn damage_is_told_from_tears(scene: &Scene, major: Major) -> Result<()> {
    const RATE: u64 = 6 << 20;
    // No page is written to the disk but by a checkpoint, and there is none before the next snapshot.
    let cluster = Cluster::build(scene, &major)
        .setting("bgwriter_lru_maxpages", "0")
        .setting("shared_buffers", "64MB")
        .setting("autovacuum", "off")
        .start()
        .await?;
    cluster.sql(ROLE).await?;
    for table in ["damaged", "torn"] {
        let rows = "SELECT n, repeat(md5(n::text), 8) AS m FROM generate_series(1, 2000) n";
        cluster.sql(&format!("CREATE TABLE {table} AS {rows}")).await?;
    }
    let configuration = over_the_network(scene, &cluster)?.snapshot("max-rate", "6MiB");
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.ledger.stop().await?;
    site.cluster.sql("CHECKPOINT").await?;
    let (damaged, torn) =
        (file_of(&site.cluster, "damaged").await?, file_of(&site.cluster, "torn").await?);
    flip(&site.cluster, &damaged, 3)?;
    flip(&site.cluster, &torn, 3)?;

    let deployment = site.deployment.clone();
    let started = Instant::now();
    let taking =
        tokio::spawn(async move { deployment.agent_command(&["snapshot", "--json"]).await });
    reading(&mut site.agent).await?;
    site.cluster.sql("UPDATE torn SET n = -n").await?;
    let outcome = taking.await??.success()?.json()?;
    let bytes = outcome["database_bytes"].as_u64().context("database_bytes")?;
    let least = Duration::from_secs_f64(bytes as f64 / RATE as f64 * 0.8);
    let took = started.elapsed();
    ensure!(took > least, "{} MiB came in {took:?}, faster than 6 MiB/s", bytes >> 20);
    ensure!(took < least * 3 + Duration::from_secs(60), "{} MiB took {took:?}", bytes >> 20);
    // All of it was sent again, and little of it stored.
    let stored = outcome["stored_bytes"].as_u64().context("stored_bytes")?;
    ensure!(outcome["parent"].is_string() && stored < bytes / 12, "{outcome}");
    ensure!(outcome["corrupt_pages"] == 1, "{outcome}");
    let status = site.agent.status().await?;
    let alarms = status["alarms"].as_array().context("alarms")?;
    let alarm = alarms.iter().find(|alarm| alarm["name"] == "page-corrupt").context("no alarm")?;
    ensure!(alarm["subject"] == damaged.as_str(), "{alarm}");
    ensure!(alarm.to_string().contains("block 3 fails its checksum;"), "{alarm}");

    site.all_stored().await?;
    site.cluster.destroy()?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    let sound = "SELECT count(*) FROM torn WHERE n < 0 AND m = repeat(md5((-n)::text), 8)";
    ensure!(restored.value(sound).await? == "2000", "the torn page was not mended");
    let read = restored.value("SELECT count(*) FROM damaged").await;
    let error = read.err().context("the damaged page was read without a word")?;
    ensure!(format!("{error:#}").contains("invalid page in block 3"), "{error:#}");
    Ok(())
}
mod damage_is_told_from_tears_on {
    backstay_tests::on_each_major!(@ damage_is_told_from_tears pg14 14, pg15 15);
}

/// A primary under load, its standby, and an agent beside the standby.
struct Pair<'s> {
    scene: &'s Scene,
    primary: Cluster,
    standby: Cluster,
    ledger: Ledger,
    deployment: Deployment,
    agent: Agent,
}

impl<'s> Pair<'s> {
    async fn start(scene: &'s Scene, major: &Major) -> Result<Pair<'s>> {
        let primary = Cluster::build(scene, major).start().await?;
        primary.sql(ROLE).await?;
        let mut ledger = Ledger::create(&primary, crate::site::load(), scene.random()).await?;
        let standby = primary.standby(scene, "standby").await?;
        ledger.start(&primary);
        let configuration = configuration(scene, &standby)?;
        let deployment = Deployment::new(scene, "backup", &configuration).await?;
        deployment.agent_command(&["init"]).await?.success()?;
        let check = deployment.agent_command(&["check"]).await?.success()?;
        check.says(&["standby: WAL and snapshots are taken from it"])?;
        let mut agent = Agent::start(&deployment).await?;
        agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
        Ok(Pair { scene, primary, standby, ledger, deployment, agent })
    }

    /// Everything that the primary has written is at both locations.
    async fn all_stored(&mut self) -> Result<()> {
        all_stored(&mut self.agent, &self.primary).await.map(drop)
    }

    async fn restored(&self, name: &str, to: &str, target: &Target) -> Result<String> {
        let major = self.primary.major();
        let (restored, finished) =
            restore_and_start(self.scene, &self.deployment, major, name, to, &[]).await?;
        judge(&self.ledger, &restored, target).await?;
        ensure!(!restored.data().join("standby.signal").exists(), "it would follow the primary");
        Ok(finished.stdout)
    }
}

/// With file access and without, from the standby alone; the primary's agent is none. A promotion spoils a backup.
async fn from_a_standby(scene: &Scene, major: Major) -> Result<()> {
    let mut pair = Pair::start(scene, &major).await?;
    pair.ledger.wait_for(200, PATIENCE).await?;
    let session = pair.primary.connect().await?;
    let moment = pair.ledger.moment(&session).await?;
    pair.primary.sql("CHECKPOINT").await?;
    pair.ledger.wait_for(100, PATIENCE).await?;
    pair.all_stored().await?;
    pair.restored("early", &moment.rfc3339, &Target::Time(moment.micros)).await?;

    let network = over_the_network(scene, &pair.standby)?.snapshot("max-rate", "8MiB");
    pair.agent.terminate(PATIENCE).await?;
    pair.deployment.configure(&network)?;
    pair.agent = Agent::start(&pair.deployment).await?;
    let taken = pair.deployment.agent_command(&["snapshot", "--json"]).await?.success()?.json()?;
    let id = taken["id"].as_str().context("id")?.to_owned();
    pair.ledger.wait_for(100, PATIENCE).await?;
    pair.ledger.stop().await?;
    pair.all_stored().await?;
    let said = pair.restored("late", "latest", &Target::All).await?;
    ensure!(said.contains(&id), "not restored from {id}: {said}");

    let manifests = folder::named(&scene.path("near"), "/manifest")?;
    let deployment = pair.deployment.clone();
    let taking = tokio::spawn(async move { deployment.agent_command(&["snapshot"]).await });
    reading(&mut pair.agent).await?;
    pair.standby.promote().await?;
    let spoiled = taking.await??;
    ensure!(spoiled.code == Some(6), "{spoiled:?}");
    spoiled.says(&["promoted during"])?;
    let after = folder::named(&scene.path("near"), "/manifest")?;
    ensure!(manifests.iter().all(|name| after.contains(name)), "a snapshot is gone");
    ensure!(after.len() <= manifests.len() + 1, "the spoiled snapshot was committed");
    Ok(())
}
mod from_a_standby_on {
    backstay_tests::on_each_major!(@ from_a_standby pg15 15);
}
