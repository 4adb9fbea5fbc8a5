//! The agent's memory in a snapshot has a bound, however many files the database has and however large it is.
//!
//! With `--full` there are 100,000 relations and 64 GiB; else less. Each case prints what it measured: run it with
//! `--nocapture`. The agents are of the profile under test; memory hardly depends on that, time does.

use crate::site::{PATIENCE, configuration, has_snapshot};
use anyhow::{Context, Result, ensure};
use backstay_tests::major::Major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Deployment};
use backstay_tests::scene::{Scene, full};
use serde_json::Value;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const MEMORY_BYTES_MAX: u64 = 512 << 20;
/// For the first snapshot of the largest database, on a machine that is busy.
const FIRST_SNAPSHOT: Duration = Duration::from_secs(600);
/// The locks of so many new tables fit into one transaction.
const TABLES_AT_ONCE: u64 = 1000;
/// Bytes of one segment of a relation.
const SEGMENT_BYTES: u64 = 1 << 30;

/// Each with a page, so that none is an empty file.
async fn many_relations(scene: &Scene, major: Major) -> Result<()> {
    let relations = if full() { 100_000 } else { 3_000 };
    let cluster = small_server(scene, &major).await?;
    for first in (0..relations).step_by(TABLES_AT_ONCE as usize) {
        let last = first + TABLES_AT_ONCE - 1;
        let make = "EXECUTE format('CREATE TABLE small_%s AS SELECT %s AS n', n, n);";
        let block = format!("DO $$ BEGIN FOR n IN {first}..{last} LOOP {make} END LOOP; END $$");
        cluster.sql(&block).await.context("make tables")?;
    }
    cluster.sql("CHECKPOINT").await?;
    let found = two_snapshots(scene, &cluster, "many").await?;
    let [first, second] = &found;
    ensure!(first.database > relations * 8192, "{first}");
    println!("{relations} relations, PostgreSQL {major}: {first}; unchanged: {second}");
    Ok(())
}
mod many_relations_on {
    backstay_tests::on_each_major!(@ many_relations pg15 15);
}

/// One table, of nothing but holes: pages that are all zeros are new ones, and valid.
async fn a_sparse_giant(scene: &Scene, major: Major) -> Result<()> {
    let segments = if full() { 64 } else { 3 };
    let cluster = small_server(scene, &major).await?;
    cluster.sql("CREATE TABLE giant (n int)").await?;
    let path = cluster.value("SELECT pg_relation_filepath('giant')").await?;
    cluster.sql("CHECKPOINT").await?;
    for number in 0..segments {
        let name = if number == 0 { path.clone() } else { format!("{path}.{number}") };
        let path: PathBuf = cluster.data().join(name);
        File::options().create(true).append(true).open(&path)?.set_len(SEGMENT_BYTES)?;
        scene.give(&path)?;
    }
    let found = two_snapshots(scene, &cluster, "giant").await?;
    let [first, second] = &found;
    ensure!(first.database > segments * SEGMENT_BYTES, "{first}");
    println!("{segments} GiB of holes, PostgreSQL {major}: {first}; again: {second}");
    Ok(())
}
mod a_sparse_giant_on {
    backstay_tests::on_each_major!(@ a_sparse_giant pg15 15);
}

async fn small_server(scene: &Scene, major: &Major) -> Result<Cluster> {
    let locks = (TABLES_AT_ONCE * 4 / 40).to_string();
    let server = Cluster::build(scene, major).setting("max_locks_per_transaction", &locks);
    server.setting("autovacuum", "off").start().await
}

/// What one snapshot took.
struct Took {
    database: u64,
    stored: u64,
    seconds: f64,
    /// The most that the agent had in memory since its start.
    memory: u64,
}

impl std::fmt::Display for Took {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (database, stored, memory) = (mib(self.database), mib(self.stored), mib(self.memory));
        write!(f, "{database:.0} MiB in {:.1} s, {stored:.1} MiB stored, ", self.seconds)?;
        write!(f, "VmHWM {memory:.0} MiB")
    }
}

/// The first snapshot of a database; and one more by another agent process that finds nothing changed.
async fn two_snapshots(scene: &Scene, cluster: &Cluster, name: &str) -> Result<[Took; 2]> {
    let configuration = configuration(scene, cluster)?.snapshot("schedule", "0 3 1 1 *");
    let deployment = Deployment::new(scene, name, &configuration).await?;
    let started = Instant::now();
    let mut agent = deployment.init_and_run().await?;
    let status = agent.wait_until("there is a snapshot", FIRST_SNAPSHOT, has_snapshot).await?;
    let seconds = started.elapsed().as_secs_f64();
    let memory = within_bounds(&agent)?;
    agent.terminate(PATIENCE).await?;
    let last = status["snapshots"]["last"].as_str().context("a snapshot")?.to_owned();
    let first = listed(&deployment, &last).await?;
    let first = Took { seconds, memory, ..first };

    let agent = Agent::start(&deployment).await?;
    let taken = deployment.agent_command(&["snapshot", "--json"]).await?.success()?.json()?;
    let memory = within_bounds(&agent)?;
    let id = taken["id"].as_str().context("id")?;
    ensure!(taken["parent"] == last.as_str(), "compared with another than {last}: {taken}");
    let seconds = taken["seconds"].as_f64().context("seconds")?;
    let second = Took { seconds, memory, ..listed(&deployment, id).await? };
    ensure!(second.stored < 2_000_000, "nothing changed: {second}");
    Ok([first, second])
}

fn within_bounds(agent: &Agent) -> Result<u64> {
    let memory = agent.memory_peak_bytes()?;
    ensure!(memory < MEMORY_BYTES_MAX, "the agent took {} MiB", memory >> 20);
    Ok(memory)
}

/// What `list` says of a snapshot.
async fn listed(deployment: &Deployment, id: &str) -> Result<Took> {
    let list = deployment.backstay(&["list", "--json"]).await?.success()?.json()?;
    let snapshots = list["snapshots"].as_array().with_context(|| format!("snapshots: {list}"))?;
    let is_it = |snapshot: &&Value| snapshot["id"] == id;
    let found = snapshots.iter().find(is_it).with_context(|| format!("{id} in {list}"))?;
    let number = |field: &str| {
        found["complete"][field].as_u64().with_context(|| format!("{field} of {found}"))
    };
    let (database, stored) = (number("database_bytes")?, number("stored_bytes")?);
    Ok(Took { database, stored, seconds: 0.0, memory: 0 })
}
