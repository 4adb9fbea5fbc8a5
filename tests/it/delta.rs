//! `restore --delta`: back to an earlier moment over the cluster's own directory.

use crate::site::{PATIENCE, Site, configuration, restore};
use anyhow::{Context, Result, ensure};
use backstay_tests::ledger::{Moment, Target};
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Finished, backstay_program};
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// What does not change until the accident: most of the database.
const BEFORE: &str = "
    CREATE TABLE bulk AS SELECT n, md5(n::text) AS m, md5((n * 7)::text) AS k FROM generate_series(1, 300000) n;
    CREATE TABLE shrinking AS SELECT n, md5(n::text) AS m FROM generate_series(1, 50000) n;
    CREATE TABLE dropped AS SELECT n, md5(n::text) AS m FROM generate_series(1, 20000) n;
    CREATE TABLE placed TABLESPACE outside AS SELECT n, md5(n::text) AS m FROM generate_series(1, 50000) n;
    CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 5000) n;";
/// What must be undone.
const AFTER: [&str; 8] = [
    "UPDATE bulk SET m = 'wrong' WHERE n < 300",
    "TRUNCATE shrinking",
    "INSERT INTO shrinking SELECT n, 'wrong' FROM generate_series(1, 10) n",
    "DROP TABLE dropped",
    "UPDATE placed SET m = 'wrong' WHERE n < 100",
    "CREATE TABLE made AS SELECT n, md5(n::text) AS m FROM generate_series(1, 20000) n",
    "CREATE DATABASE strange",
    "SELECT pg_create_physical_replication_slot('stale', true)",
];

/// A cluster with a past, a moment to go back to, an accident since, and things in its directory that are not PostgreSQL's.
struct Accident<'s> {
    site: Site<'s>,
    moment: Moment,
    /// Files that must stay as they are.
    foreign: Vec<(PathBuf, String)>,
    /// `--tablespace` for where the tablespace is.
    mapping: String,
}

impl<'s> Accident<'s> {
    async fn happen(scene: &'s Scene, major: &Major) -> Result<Accident<'s>> {
        let place = scene.folder("ts")?;
        let cluster = Cluster::build(scene, major).start().await?;
        cluster.sql(&format!("CREATE TABLESPACE outside LOCATION '{}'", place.display())).await?;
        cluster.sql(BEFORE).await?;
        // Vacuumed later, every page would be another one.
        for statement in ["VACUUM (FREEZE, ANALYZE)", "CHECKPOINT"] {
            cluster.sql(statement).await?;
        }
        let configuration = configuration(scene, &cluster)?;
        let mut site = Site::of(scene, cluster, configuration).await?;
        let session = site.cluster.connect().await?;
        site.ledger.wait_for(60, PATIENCE).await?;
        let moment = site.ledger.moment(&session).await?;
        site.ledger.wait_for(60, PATIENCE).await?;
        for statement in AFTER {
            site.cluster.sql(statement).await?;
        }
        site.ledger.wait_for(60, PATIENCE).await?;
        site.ledger.stop().await?;
        drop(session);
        site.all_stored().await?;
        let foreign = foreign_files(scene, site.cluster.data(), &place)?;
        let mapping = format!("{}={}", place.display(), place.display());
        Ok(Accident { site, moment, foreign, mapping })
    }

    fn data(&self) -> PathBuf {
        self.site.cluster.data().to_owned()
    }

    async fn stop_all(&mut self) -> Result<()> {
        self.site.agent.terminate(PATIENCE).await?;
        self.site.cluster.stop().await
    }

    fn arguments(&self) -> [&str; 4] {
        ["--delta", "--tablespace", &self.mapping, "--json"]
    }

    async fn restore(&self) -> Result<Finished> {
        restore(&self.site.deployment, &self.data(), &self.moment.rfc3339, &self.arguments()).await
    }

    /// The cluster is at the moment, and nothing that is not PostgreSQL's was touched.
    async fn judge(&mut self) -> Result<()> {
        self.site.cluster.start().await?;
        self.site.cluster.wait_until_writable(PATIENCE).await?;
        self.judge_running(&self.site.cluster).await
    }

    async fn judge_running(&self, restored: &Cluster) -> Result<()> {
        self.site.judge(restored, &Target::Time(self.moment.micros)).await?;
        for (query, expected) in [
            ("SELECT count(*) FROM bulk WHERE m = md5(n::text)", "300000"),
            ("SELECT count(*) FROM shrinking WHERE m = md5(n::text)", "50000"),
            ("SELECT count(*) FROM dropped WHERE m = md5(n::text)", "20000"),
            ("SELECT count(*) FROM placed WHERE m = md5(n::text)", "50000"),
            ("SELECT count(*) FROM fleeting", "0"),
            ("SELECT to_regclass('made') IS NULL", "t"),
            ("SELECT count(*) FROM pg_database WHERE datname = 'strange'", "0"),
            ("SELECT count(*) FROM pg_replication_slots", "0"),
            ("SHOW work_mem", "9MB"),
        ] {
            let found = restored.value(query).await?;
            ensure!(found == expected, "{query}: {found}");
        }
        for (path, content) in &self.foreign {
            let found =
                std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            ensure!(found == *content, "{} was changed", path.display());
        }
        Ok(())
    }
}

/// Configuration, a log, and what people leave about; noted as they are.
fn foreign_files(scene: &Scene, data: &Path, place: &Path) -> Result<Vec<(PathBuf, String)>> {
    let main = data.join("postgresql.conf");
    std::fs::write(&main, std::fs::read_to_string(&main)? + "include = 'own.conf'\n")?;
    std::fs::create_dir(data.join("log"))?;
    for (path, content) in [
        (data.join("own.conf"), "work_mem = '9MB'\n"),
        (data.join("log/yesterday.log"), "all was well\n"),
        (place.join("notes.txt"), "mine\n"),
        (data.join("base/notes.txt"), "mine\n"),
    ] {
        std::fs::write(path, content)?;
    }
    scene.give(data)?;
    let paths =
        ["postgresql.conf", "pg_hba.conf", "own.conf", "log/yesterday.log", "base/notes.txt"];
    let paths = paths.map(|name| data.join(name)).into_iter().chain([place.join("notes.txt")]);
    paths.map(|path| Ok((path.clone(), std::fs::read_to_string(&path)?))).collect()
}

/// Bytes of the snapshot that the locations gave.
fn fetched(report: &Value) -> Result<u64> {
    let from = report["read_from"].as_array().context("read_from")?;
    from.iter().map(|place| place[1].as_u64().context("bytes")).sum()
}

/// Refused while the server runs, without `--delta`, and without a word on its tablespace; then done, with few bytes.
async fn back_over_the_cluster(scene: &Scene, major: Major) -> Result<()> {
    let mut accident = Accident::happen(scene, &major).await?;
    let (data, to) = (accident.data(), accident.moment.rfc3339.clone());
    accident.restore().await?.expect(2)?.says(&["runs in it", "stop that server"])?;
    accident.stop_all().await?;
    let deployment = &accident.site.deployment;
    restore(deployment, &data, &to, &[]).await?.expect(2)?.says(&["not empty", "--delta"])?;
    let bare = restore(deployment, &data, &to, &["--delta"]).await?.expect(2)?;
    bare.says(&["tablespace", "--tablespace"])?;
    ensure!(data.join("global/pg_control").exists(), "a refused restore has begun");

    let full =
        restore(deployment, &scene.path("full"), &to, &["--json"]).await?.success()?.json()?;
    let delta = accident.restore().await?.success()?.json()?;
    accident.judge().await?;
    let (all, some) = (fetched(&full)?, fetched(&delta)?);
    ensure!(some < all / 2, "{some} bytes were fetched, {all} by a full restore");
    let bytes = |report: &Value, name: &str| report[name].as_u64().context("bytes");
    let (written, kept) = (bytes(&delta, "written_bytes")?, bytes(&delta, "kept_bytes")?);
    ensure!(written < kept / 2, "{written} bytes written, {kept} kept");
    ensure!(bytes(&delta, "removed_files")? > 0, "nothing was removed");
    Ok(())
}
on_drawn_major!(back_over_the_cluster);

/// In one command, to a server that takes writes.
async fn back_and_started(scene: &Scene, major: Major) -> Result<()> {
    let mut accident = Accident::happen(scene, &major).await?;
    accident.stop_all().await?;
    let (data, to) = (accident.data(), accident.moment.rfc3339.clone());
    let name = data.file_name().and_then(|name| name.to_str()).context("its folder")?;
    let arguments = ["--delta", "--tablespace", &accident.mapping];
    let (mut restored, _) = accident.site.restore_and_start(name, &to, &arguments).await?;
    ensure!(restored.data() == data, "{} was restored", restored.data().display());
    accident.judge_running(&restored).await?;
    // Nothing is left to be done: it comes up again by itself, and goes on.
    restored.sql("INSERT INTO shrinking VALUES (50001, md5('50001'))").await?;
    restored.restart().await?;
    let found = restored.value("SELECT count(*) FROM shrinking WHERE m = md5(n::text)").await?;
    ensure!(found == "50001", "{found} rows after a restart");
    Ok(())
}
on_drawn_major!(back_and_started);

/// Killed at any moment, the cluster cannot be started by accident, and the same command finishes.
async fn killed_in_the_middle(scene: &Scene, major: Major) -> Result<()> {
    let mut accident = Accident::happen(scene, &major).await?;
    accident.stop_all().await?;
    let (data, to) = (accident.data(), accident.moment.rfc3339.clone());
    let mut random = scene.random();
    let mark = data.join("backstay-restore/incomplete");
    for patience in [0, 60, 150, 300] {
        let mut child = std::process::Command::new(backstay_program())
            .arg("--config")
            .arg(accident.site.deployment.config())
            .args(["restore", "--to", &to, "--into", &data.display().to_string()])
            .args(accident.arguments())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        // An earlier try has left its mark: then the wait alone decides when this one is killed.
        let deadline = Instant::now() + PATIENCE;
        while !mark.exists() && child.try_wait()?.is_none() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(random.range(0..patience + 1))).await;
        child.kill()?;
        child.wait()?;
        if !mark.exists() {
            ensure!(
                patience > 0,
                "the restore was not killed between its first change and its last"
            );
            break;
        }
        let refused = restore(&accident.site.deployment, &data, &to, &[]).await?;
        refused.expect(2)?.says(&["interrupted", "--delta"])?;
    }
    accident.restore().await?.success()?;
    ensure!(!mark.exists(), "it is done, and says that it is not");
    accident.judge().await
}
on_drawn_major!(killed_in_the_middle);

/// Another cluster's directory, and what is no cluster's.
async fn another_directory_is_refused(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let other = Cluster::build(scene, &major).name("other").make()?;
    let control = other.data().join("global/pg_control");
    let before = std::fs::read(&control)?;
    let refused = restore(&site.deployment, other.data(), "latest", &["--delta"]).await?;
    refused.expect(2)?.says(&["another cluster", "system identifier", "remedy"])?;
    ensure!(std::fs::read(&control)? == before, "it was touched");
    ensure!(!other.data().join("backstay-restore").exists(), "it was touched");
    let folder = scene.folder("papers")?;
    std::fs::write(folder.join("letter"), "dear")?;
    let refused = restore(&site.deployment, &folder, "latest", &["--delta"]).await?;
    refused.expect(2)?.says(&["no data directory"])?;
    let both = restore(&site.deployment, &folder, "latest", &["--delta", "--force"]).await?;
    both.expect(2)?;
    ensure!(std::fs::read_to_string(folder.join("letter"))? == "dear");
    Ok(())
}
on_drawn_major!(another_directory_is_refused);
