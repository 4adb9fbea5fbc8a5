//! Snapshots that refer to each other: each restores to what it was, and costs what changed.

use crate::site::{PATIENCE, Site};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Configuration, Deployment};
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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
    database: u64,
    corrupt: u64,
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
        stored: number("stored_bytes")?,
        database: number("database_bytes")?,
        corrupt: number("corrupt_pages")?,
    })
}

/// Everything that gives files new names, new sizes, or other content under an old name, while the load goes on: each of
/// three snapshots restores to exactly what was there, and so does a moment after them.
async fn each_snapshot_under_all_ddl(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let session = site.cluster.connect().await?;
    let space = scene.folder("space")?.display().to_string();
    site.cluster.sql(&format!("CREATE TABLESPACE space LOCATION '{space}'")).await?;
    for statement in PREPARATION {
        site.cluster.sql(statement).await.with_context(|| (*statement).to_owned())?;
    }
    let mut cases: Vec<(String, Target, BTreeMap<String, String>)> = Vec::new();
    for round in ROUNDS {
        for &statement in round {
            // CREATE DATABASE has no strategies before 15, and knows only one.
            let statement = match major.number() {
                ..15 => statement.split(" STRATEGY").next().unwrap_or(statement),
                _ => statement,
            };
            site.cluster.sql(statement).await.with_context(|| statement.to_owned())?;
        }
        let contents = contents(&site.cluster).await?;
        site.ledger.wait_for(40, PATIENCE).await?;
        let before = site.ledger.moment(&session).await?;
        let taken = take(&site).await?;
        ensure!(taken.parent.is_some() && taken.stored < taken.database / 2, "{taken:?}");
        let target = Target::Snapshot { stop: before.lsn };
        cases.push((format!("snapshot:{}", taken.id), target, contents));
    }
    site.ledger.wait_for(40, PATIENCE).await?;
    let last = contents(&site.cluster).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    cases.push(("latest".to_owned(), Target::All, last));
    for (number, (to, target, expected)) in cases.iter().enumerate() {
        let name = format!("restored-{number}");
        let (mut restored, _) = site.restore_and_start(&name, to, &[]).await?;
        site.judge(&restored, target).await.with_context(|| format!("--to {to}"))?;
        let found = contents(&restored).await?;
        ensure!(found == *expected, "--to {to}: {found:#?} and not {expected:#?}");
        restored.stop().await?;
    }
    Ok(())
}
on_drawn_major!(each_snapshot_under_all_ddl);

const PREPARATION: &[&str] = &[
    "CREATE TABLE mixed AS SELECT n AS id, md5(n::text) AS t FROM generate_series(1, 30000) n",
    "ALTER TABLE mixed ADD PRIMARY KEY (id)",
    "CREATE INDEX mixed_t ON mixed (t)",
    "CREATE TABLE moved AS SELECT n AS id, repeat('m', 50) AS t FROM generate_series(1, 8000) n",
    "CREATE TABLE dropped AS SELECT n AS id, repeat('d', 50) AS t FROM generate_series(1, 8000) n",
    "CREATE TABLE shrinks AS SELECT n AS id, repeat('s', 90) AS t FROM generate_series(1, 9000) n",
    "CREATE TABLE refilled AS SELECT n AS id, repeat('r', 90) AS t FROM generate_series(1, 9000) n",
    "CREATE TABLE wide AS SELECT n AS id, (SELECT string_agg(md5((n * k)::text), '') FROM generate_series(1, 200) k) AS t \
     FROM generate_series(1, 200) n",
    "CREATE UNLOGGED TABLE volatile AS SELECT n AS id, 'x' AS t FROM generate_series(1, 5000) n",
    "CHECKPOINT",
];

const ROUNDS: [&[&str]; 3] = [
    &[
        "CREATE DATABASE copied STRATEGY wal_log",
        "UPDATE mixed SET t = md5(t) WHERE id % 97 = 0",
        "TRUNCATE refilled",
        "INSERT INTO refilled SELECT n, repeat('q', 40) FROM generate_series(1, 500) n",
        "VACUUM FULL mixed",
    ],
    &[
        "CREATE DATABASE cloned STRATEGY file_copy",
        "DELETE FROM shrinks WHERE id > 3000",
        "VACUUM shrinks",
        "CLUSTER mixed USING mixed_t",
        "REINDEX TABLE mixed",
        "ALTER TABLE moved SET TABLESPACE space",
        "UPDATE wide SET t = t || 'x' WHERE id % 9 = 0",
        "CHECKPOINT",
    ],
    &[
        "DROP DATABASE copied",
        "DROP TABLE dropped",
        "CREATE TABLE dropped AS SELECT n AS id, repeat('e', 20) AS t FROM generate_series(1, 300) n",
        "INSERT INTO shrinks SELECT n, repeat('t', 90) FROM generate_series(9001, 12000) n",
        "ALTER TABLE moved SET TABLESPACE pg_default",
        "UPDATE mixed SET t = md5(t) WHERE id % 201 = 0",
        "ALTER TABLE volatile SET LOGGED",
        "VACUUM",
    ],
];

/// A digest of each table that only the test writes to, and the databases. Of an unlogged table nothing is left after recovery.
async fn contents(cluster: &Cluster) -> Result<BTreeMap<String, String>> {
    let mut contents = BTreeMap::new();
    for table in ["mixed", "moved", "dropped", "shrinks", "refilled", "wide", "volatile"] {
        let kind = format!("SELECT relpersistence FROM pg_class WHERE relname = '{table}'");
        if cluster.value(&kind).await? == "u" {
            continue;
        }
        let query = format!(
            "SELECT count(*) || ' ' || md5(string_agg(id || t, ',' ORDER BY id)) FROM {table}"
        );
        contents.insert(table.to_owned(), cluster.value(&query).await?);
    }
    let databases = "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database";
    contents.insert("databases".to_owned(), cluster.value(databases).await?);
    Ok(contents)
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
    let second = take(&site).await?;
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
/// not, until it is whole.
async fn a_corrupt_page_stays_reported(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.stop().await?;
    site.cluster.sql("CREATE TABLE victim AS SELECT n FROM generate_series(1, 20000) n").await?;
    site.cluster.sql("CHECKPOINT").await?;
    ensure!(take(&site).await?.corrupt == 0);
    let path = site.cluster.value("SELECT pg_relation_filepath('victim')").await?;
    let file =
        std::fs::File::options().read(true).write(true).open(site.cluster.data().join(&path))?;
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
            alarms
                .iter()
                .any(|alarm| alarm["name"] == "page-corrupt" && alarm["subject"] == path.as_str())
        };
        site.agent.wait_until("the page is told of", PATIENCE, told).await?;
        tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    }
    flip()?;
    ensure!(take(&site).await?.corrupt == 0, "it is whole again");
    Ok(())
}
on_drawn_major!(a_corrupt_page_stays_reported);
