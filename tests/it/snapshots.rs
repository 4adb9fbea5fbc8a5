//! Snapshots that refer to each other: each costs what changed, and says which pages are damaged. What they restore to is
//! in `mixed`.

use crate::site::{PATIENCE, Site, configuration, restore};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Configuration, Deployment};
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What an unchanged database may cost.
const UNCHANGED_BYTES_MAX: u64 = 1_000_000;
/// What a change of some pages may cost.
const LITTLE_BYTES_MAX: u64 = 3_000_000;

/// What `backstay-agent snapshot --json` said.
#[derive(Debug)]
struct Taken {
    id: String,
    parent: Option<String>,
    stored: u64,
    corrupt: u64,
    database: u64,
    read: u64,
    changed: u64,
}

async fn take(site: &Site<'_>) -> Result<Taken> {
    let outcome =
        site.deployment.agent_command(&["snapshot", "--json"]).await?.success()?.json()?;
    let text = |field: &str| outcome[field].as_str().map(str::to_owned);
    let number =
        |field: &str| outcome[field].as_u64().with_context(|| format!("{field} of {outcome}"));
    Ok(Taken {
        id: text("id").context("the snapshot's name")?,
        parent: text("parent"),
        database: number("database_bytes")?,
        read: number("read_bytes")?,
        changed: number("changed_bytes")?,
        stored: number("stored_bytes")?,
        corrupt: number("corrupt_pages")?,
    })
}

/// Nothing changed, little changed; and the same when the cache is gone, cut off, an old one, or another cluster's.
async fn what_a_snapshot_costs(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.cluster
        .sql("CREATE TABLE bulk AS SELECT n AS id, md5(n::text) AS t FROM generate_series(1, 300000) n")
        .await?;
    site.ledger.wait_for(20, PATIENCE).await?;
    site.ledger.stop().await?;
    site.cluster.sql("VACUUM").await?;
    site.cluster.sql("CHECKPOINT").await?;
    let first = take(&site).await?;
    let bulk: u64 = site.cluster.value("SELECT pg_relation_size('bulk')").await?.parse()?;
    ensure!(first.changed >= bulk && first.read >= first.changed, "{bulk} are new: {first:?}");
    let second = take(&site).await?;
    ensure!(second.changed < UNCHANGED_BYTES_MAX, "unchanged: {second:?}");
    ensure!(second.stored < UNCHANGED_BYTES_MAX, "unchanged: {second:?}");
    ensure!(second.parent.as_deref() == Some(first.id.as_str()), "{second:?} after {}", first.id);

    let cache = cache_of(&site.deployment.state_dir())?;
    let old = std::fs::read(&cache)?;
    let foreign = cache_of_another_cluster(scene, &major).await?;
    let mut last = second.id;
    for (name, spoil) in [
        ("deleted", None),
        ("cut off", Some(old[..old.len() / 2].to_vec())),
        ("garbage", Some(vec![7; 100_000])),
        ("of an older snapshot", Some(old)),
        ("of another cluster", Some(foreign)),
    ] {
        match spoil {
            None => std::fs::remove_file(&cache)?,
            Some(bytes) => std::fs::write(&cache, bytes)?,
        }
        site.cluster.sql("UPDATE bulk SET t = md5(t) WHERE id % 30011 = 0").await?;
        let taken = take(&site).await.with_context(|| format!("the cache is {name}"))?;
        ensure!(taken.parent.as_deref() == Some(&last), "{name}: {taken:?} after {last}");
        ensure!(taken.stored < LITTLE_BYTES_MAX, "{name}: {taken:?}");
        // Nine rows, and where their new versions lie.
        ensure!((2 * 8192..bulk / 2).contains(&taken.changed), "{name}: {taken:?}");
        ensure!((bulk..=taken.database).contains(&taken.read), "{name}: {taken:?}");
        last = taken.id;
        let again = take(&site).await?;
        ensure!(again.stored < UNCHANGED_BYTES_MAX, "after {name}: {again:?}");
        last.clone_from(&again.id);
    }
    // A new host: nothing is left but the key and the locations.
    site.agent.kill()?;
    std::fs::remove_dir_all(site.deployment.state_dir())?;
    site.agent.restart().await?;
    site.first_snapshot().await?;
    let taken = take(&site).await?;
    ensure!(taken.stored < LITTLE_BYTES_MAX, "on a new host: {taken:?}");

    let query = "SELECT count(*) || md5(string_agg(t, '' ORDER BY id)) FROM bulk";
    let expected = site.cluster.value(query).await?;
    site.all_stored().await?;
    let to = format!("snapshot:{}", taken.id);
    let (restored, _) = site.restore_and_start("restored", &to, &[]).await?;
    ensure!(restored.value(query).await? == expected, "the restored table is another");
    site.judge(&restored, &Target::All).await.map(|_: Lsn| ())
}
on_drawn_major!(what_a_snapshot_costs);

/// `<system>.pages` in a state directory.
fn cache_of(state_dir: &Path) -> Result<PathBuf> {
    let names = std::fs::read_dir(state_dir)?.map(|entry| Ok(entry?.path()));
    let paths = names.collect::<Result<Vec<PathBuf>>>()?;
    let mut caches =
        paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "pages"));
    caches.next().with_context(|| format!("no cache in {}", state_dir.display()))
}

async fn cache_of_another_cluster(scene: &Scene, major: &Major) -> Result<Vec<u8>> {
    let mut cluster = Cluster::build(scene, major).name("other").start().await?;
    let configuration = Configuration::new("other").server(&cluster);
    let configuration = configuration.folder("alone", &scene.path("alone"))?;
    let deployment = Deployment::new(scene, "other-backup", &configuration).await?;
    let mut agent = deployment.init_and_run().await?;
    agent.wait_until("there is a snapshot", PATIENCE, crate::site::has_snapshot).await?;
    agent.terminate(PATIENCE).await?;
    let cache = std::fs::read(cache_of(&deployment.state_dir())?)?;
    cluster.destroy()?;
    Ok(cache)
}

/// A page that turns corrupt at the source is told of in every snapshot that has it, whether its file is read again or
/// not, until it is whole. The last snapshot that has it whole is held until somebody says that he knows.
async fn a_corrupt_page_stays_reported(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.stop().await?;
    site.cluster.sql("CREATE TABLE victim AS SELECT n FROM generate_series(1, 20000) n").await?;
    site.cluster.sql("CHECKPOINT").await?;
    let whole = take(&site).await?;
    ensure!(whole.corrupt == 0);
    let path = site.cluster.value("SELECT pg_relation_filepath('victim')").await?;
    let file = File::options().read(true).write(true).open(site.cluster.data().join(&path))?;
    let flip = || -> Result<()> {
        let mut byte = [0];
        let at = 3 * 8192 + 5000;
        file.read_exact_at(&mut byte, at)?;
        Ok(file.write_all_at(&[byte[0] ^ 1], at)?)
    };
    flip()?;
    for round in 0..3 {
        // From the second on the file may be one that needs no reading.
        let taken = take(&site).await?;
        ensure!(taken.corrupt == 1, "round {round}: {taken:?}");
        let told = |status: &Value| {
            let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
            alarms.iter().any(|alarm| {
                alarm["name"] == "page-corrupt"
                    && alarm["subject"] == path.as_str()
                    && alarm.to_string().contains(": block 3 fails its checksum")
            })
        };
        site.agent.wait_until("the page is told of", PATIENCE, told).await?;
        tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    }
    site.deployment.agent_command(&["prune"]).await?.success()?;
    let held = "has damaged pages that are whole here";
    site.deployment.backstay(&["list"]).await?.success()?.says(&["1 damaged pages", held])?;
    let given_back = format!("of snapshot {}", whole.id);
    site.deployment.agent_command(&["ack-damage"]).await?.success()?.says(&[&given_back])?;
    site.deployment.agent_command(&["prune"]).await?.success()?;
    let list = site.deployment.backstay(&["list"]).await?.success()?;
    ensure!(list.says(&[held]).is_err(), "it is held again");
    let again = site.deployment.agent_command(&["ack-damage"]).await?.success()?;
    again.says(&["nothing was to be done"])?;
    ensure!(take(&site).await?.corrupt == 1, "it is still bad");
    site.deployment.agent_command(&["prune"]).await?.success()?;
    let list = site.deployment.backstay(&["list"]).await?.success()?;
    ensure!(list.says(&[held]).is_err(), "it is held again for what was acknowledged");
    flip()?;
    ensure!(take(&site).await?.corrupt == 0, "it is whole again");
    Ok(())
}
on_drawn_major!(a_corrupt_page_stays_reported);

/// The page that is torn.
const TORN: u64 = 3;
const PAGE: usize = 8192;
/// The agent must be stopped between the backup's start and the reading of one page; it may be too fast.
const TEARS_MAX: usize = 6;

/// One half of a page is written after the backup has begun, and the other half after the backup has read it.
async fn a_torn_page_is_no_damage(scene: &Scene, major: Major) -> Result<()> {
    // No page is written to the disk but by a checkpoint.
    let cluster = Cluster::build(scene, &major)
        .setting("bgwriter_lru_maxpages", "0")
        .setting("shared_buffers", "64MB")
        .setting("autovacuum", "off")
        .start()
        .await?;
    let configuration = configuration(scene, &cluster)?;
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.ledger.stop().await?;
    for number in 1..=TEARS_MAX {
        for statement in [
            "DROP TABLE IF EXISTS torn",
            "CREATE TABLE torn AS SELECT n, md5(n::text) AS m FROM generate_series(1, 2000) n",
            "CHECKPOINT",
        ] {
            site.cluster.sql(statement).await?;
        }
        let torn = snapshot_with_a_tear(&mut site).await?;
        site.all_stored().await?;
        let dir = scene.path(&format!("restored-{number}"));
        restore(&site.deployment, &dir, "latest", &[]).await?.success()?;
        let path = site.cluster.value("SELECT pg_relation_filepath('torn')").await?;
        if page_of(&File::open(dir.join(path))?, TORN)? != torn {
            continue;
        }
        let mut restored = Cluster::of(scene, &major, &dir)?;
        restored.start().await?;
        restored.wait_until_writable(PATIENCE).await?;
        let query = "SELECT count(*) || md5(string_agg(n || m, ',' ORDER BY n)) FROM torn";
        let expected = site.cluster.value(query).await?;
        ensure!(restored.value(query).await? == expected, "replay has not mended the page");
        return site.judge(&restored, &Target::All).await.map(drop);
    }
    anyhow::bail!("no snapshot of {TEARS_MAX} has a torn page")
}
on_drawn_major!(a_torn_page_is_no_damage);

/// A snapshot for which half of a page of `torn` is as it was and half is new; the page so. Nothing may be said to be damaged.
async fn snapshot_with_a_tear(site: &mut Site<'_>) -> Result<Vec<u8>> {
    const HAS_BEGUN: &str = "SELECT count(*) FROM pg_stat_activity \
         WHERE state = 'idle' AND query ~ '^select pg_(backup_start|start_backup)'";
    let session = site.cluster.connect().await?;
    // Read before the table: it lies in an earlier folder, and is of new pages.
    let early = site.cluster.data().join("base/1/999999");
    File::create(&early)?.set_len(1 << 30)?;
    site.scene.give(&early)?;
    let path = session.value("SELECT pg_relation_filepath('torn')").await?;
    let file = File::options().read(true).write(true).open(site.cluster.data().join(path))?;
    let old = page_of(&file, TORN)?;

    let deployment = site.deployment.clone();
    let taking =
        tokio::spawn(async move { deployment.agent_command(&["snapshot", "--json"]).await });
    let deadline = Instant::now() + PATIENCE;
    while session.value(HAS_BEGUN).await? == "0" {
        ensure!(Instant::now() < deadline, "no backup begins");
    }
    site.agent.freeze()?;
    session.batch_execute("UPDATE torn SET n = -n").await?;
    session.batch_execute("CHECKPOINT").await?;
    let new = page_of(&file, TORN)?;
    let torn = [&new[..PAGE / 2], &old[PAGE / 2..]].concat();
    ensure!(torn != old && torn != new, "the update has not changed both halves of the page");
    file.write_all_at(&torn, TORN * PAGE as u64)?;
    site.agent.thaw()?;
    let outcome = taking.await??.success()?.json()?;
    file.write_all_at(&new, TORN * PAGE as u64)?;
    ensure!(outcome["corrupt_pages"] == 0, "{outcome}");
    let status = site.agent.status().await?;
    ensure!(!status["alarms"].to_string().contains("page-corrupt"), "{}", status["alarms"]);
    Ok(torn)
}

fn page_of(file: &File, number: u64) -> Result<Vec<u8>> {
    let mut page = vec![0; PAGE];
    file.read_exact_at(&mut page, number * PAGE as u64)?;
    Ok(page)
}
