//! Indexes of WAL: the agent writes and merges them, and a restore is right with them, without them, and with bad ones.

use crate::folder::{copy, named, objects};
use crate::site::{PATIENCE, Site, configuration, stored};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::bucket::{Bucket, Operation};
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::Agent;
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// Of the smallest blocks, as `[index] spans = 1` makes them.
const BLOCK_BYTES: u64 = 16 << 20;
/// So many make a block of the next size.
const FAN: u64 = 16;

/// Waits until a location has an index of the block that `is` the one.
async fn wait_for_index(location: &Path, what: &str, is: impl Fn(Lsn, Lsn) -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = named(location, "/walindex/")?;
        let blocks = found.iter().filter_map(|name| block(name));
        if blocks.clone().any(|(start, end)| is(start, end)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no index of {what} but {found:?}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn block(name: &str) -> Option<(Lsn, Lsn)> {
    let (range, _) = name.rsplit('/').next()?.split_once('.')?;
    let (start, end) = range.split_once('-')?;
    Some((Lsn::from_name(start)?, Lsn::from_name(end)?))
}

/// Enough WAL for a merge: a switch fills the rest of a segment.
async fn write_spans(cluster: &Cluster, count: u64) -> Result<()> {
    for _ in 0..count {
        cluster.value("SELECT pg_logical_emit_message(false, 'index', 'x')").await?;
        cluster.value("SELECT pg_switch_wal()").await?;
    }
    Ok(())
}

/// Written while streaming, merged, kept over a restart; and a restore is right whatever became of them.
async fn written_and_only_a_cache(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let settings = configuration(scene, &cluster)?.extra("[index]\nspans = 1");
    let mut site = Site::of(scene, cluster, settings).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    write_spans(&site.cluster, 2 * FAN + 2).await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    let middle = site.ledger.moment(&site.cluster.connect().await?).await?.rfc3339;
    site.ledger.wait_for(150, PATIENCE).await?;
    site.ledger.stop().await?;
    let end = site.all_stored().await?;
    let [near, far] = [site.location("near"), site.location("far")];
    for location in [&near, &far] {
        let newest = end.align_down(BLOCK_BYTES);
        wait_for_index(location, "the newest block", |_, end| end == newest).await?;
        let is_merged = |start: Lsn, end: Lsn| end.since(start) == FAN * BLOCK_BYTES;
        wait_for_index(location, "sixteen blocks", is_merged).await?;
    }
    // What was merged goes after what it was merged into has come.
    let deadline = Instant::now() + PATIENCE;
    let indexes = loop {
        site.locations_equal().await?;
        let indexes = named(&near, "/walindex/")?;
        let blocks: Vec<(Lsn, Lsn)> = indexes.iter().filter_map(|name| block(name)).collect();
        let covers = |one: &(Lsn, Lsn), other: &(Lsn, Lsn)| {
            one != other && one.0 <= other.0 && other.1 <= one.1
        };
        let merged = blocks.iter().find(|block| blocks.iter().any(|other| covers(other, block)));
        if merged.is_none() && indexes.len() as u64 <= 2 * FAN + 2 {
            break indexes;
        }
        ensure!(Instant::now() < deadline, "{merged:?} was merged and is left, of {indexes:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    site.agent.terminate(PATIENCE).await?;

    let ask = async |site: &Site<'_>| -> Result<Vec<Value>> {
        let mut plans = Vec::new();
        for target in ["latest", &middle] {
            plans.push(site.plan(target).await?);
        }
        Ok(plans)
    };
    let plans = ask(&site).await?;
    let whole = scene.path("whole");
    copy(&near, &whole)?;
    for name in &indexes {
        let path = near.join(name);
        let mut bytes = std::fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes)?;
        std::fs::remove_file(far.join(name))?;
    }
    ensure!(ask(&site).await? == plans, "damaged in one location and gone from the other");
    for name in &indexes {
        std::fs::remove_file(near.join(name))?;
    }
    ensure!(ask(&site).await? == plans, "without indexes");
    let (restored, _) = site.restore_and_start("restored", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await?;

    // Those of long ago, and not the newer ones.
    for name in indexes.iter().take(indexes.len() / 2) {
        for location in [&near, &far] {
            std::fs::copy(whole.join(name), location.join(name)).context("put an index back")?;
        }
    }
    ensure!(ask(&site).await? == plans, "stale indexes");

    // The next agent makes up for what is lacking.
    site.agent = Agent::start(&site.deployment).await?;
    let newest = end.align_down(BLOCK_BYTES);
    wait_for_index(&near, "the newest block again", |_, end| end == newest).await?;
    site.agent.terminate(PATIENCE).await?;
    // What is newest has moved on with the server; what was has not.
    ensure!(ask(&site).await?[1] == plans[1], "with new indexes");
    ensure!(!objects(&near)?.is_empty(), "the location is there");
    Ok(())
}

/// A location is asked to store at most once in 5 s, and once for each full span, whatever the policy is as long as no commit
/// waits; and `status` counts what the store counts.
async fn requests_are_counted_and_bounded(scene: &Scene, major: Major) -> Result<()> {
    let bucket = Bucket::start().await;
    let cluster = Cluster::build(scene, &major).start().await?;
    let settings = backstay_tests::programs::Configuration::default().server(&cluster);
    let settings = crate::s3::with_bucket(settings, &bucket, "store");
    let settings = settings.flush_interval("5s").acknowledge("all");
    let mut site = Site::of(scene, cluster, settings).await?;
    site.ledger.wait_for(30, PATIENCE).await?;
    let knows = |status: &Value| status["wal"]["slot"]["is_waited_for"] == false;
    site.agent.wait_until("it knows that no commit waits", PATIENCE, knows).await?;

    let before = site.agent.status().await?;
    let (puts_before, began) = (puts(&before)?, Instant::now());
    let from = stored(&before)?[0];
    tokio::time::sleep(Duration::from_secs(22)).await;
    site.ledger.stop().await?;
    let after = site.agent.status().await?;
    let (busy, seconds) = (puts(&after)? - puts_before, began.elapsed().as_secs_f64());
    let spans = stored(&after)?[0].get() / BLOCK_BYTES - from.get() / BLOCK_BYTES;
    // 17,280 a day; and what had waited at the first moment.
    let most = ((seconds / 5.0).ceil() as u64 + 1) + spans;
    ensure!(busy <= most, "{busy} PUTs in {seconds:.0} s with {spans} full spans, at most {most}");
    ensure!(busy >= 2, "{busy} PUTs in {seconds:.0} s: nothing was shipped");

    site.all_stored().await?;
    let idle_from = puts(&site.agent.status().await?)?;
    tokio::time::sleep(Duration::from_secs(12)).await;
    let status = site.agent.status().await?;
    let idle = puts(&status)? - idle_from;
    ensure!(idle <= 2, "{idle} PUTs in 12 s in which nothing was written");

    let counts = bucket.request_counts();
    for (kind, operation) in
        [("put", Operation::Put), ("list", Operation::List), ("delete", Operation::Delete)]
    {
        // `init` asked as well, in a process of its own.
        let counted = asked(&status, kind)?;
        let seen = counts.get(&operation).copied().unwrap_or(0);
        ensure!(counted <= seen && seen <= counted + 12, "{kind}: {counted} counted, {seen} seen");
    }
    site.deployment.agent_command(&["status"]).await?.says(&["store: put "])?;
    Ok(())
}

fn asked(status: &Value, kind: &str) -> Result<u64> {
    status["requests"][0][kind].as_u64().with_context(|| format!("no count of {kind}: {status}"))
}

fn puts(status: &Value) -> Result<u64> {
    asked(status, "put")
}

on_drawn_major!(written_and_only_a_cache);
on_drawn_major!(requests_are_counted_and_bounded);
