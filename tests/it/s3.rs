//! The main job over S3, with faults: nothing that a store does to us loses or doubles anything.

use crate::site::{PATIENCE, Site, has_snapshot, load, stored};
use anyhow::{Context, Result, ensure};
use backstay_tests::bucket::{Action, Bucket, Fault, Operation};
use backstay_tests::ledger::{Ledger, Target};
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Configuration, Deployment};
use backstay_tests::scene::Scene;
use bytes::Bytes;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// A location of this name in the bucket.
pub fn with_bucket(configuration: Configuration, bucket: &Bucket, name: &str) -> Configuration {
    let settings = bucket.settings(name);
    let mut lines = String::new();
    let mut line = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = writeln!(lines, "{key} = {}", Value::from(value));
        }
    };
    line("endpoint", settings.endpoint.clone());
    line("region", settings.region.clone());
    line("access-key-id", settings.access_key_id.clone());
    line("secret-access-key", settings.secret_access_key.as_ref().map(|s| s.expose().to_owned()));
    line("ca-file", settings.ca_file.as_ref().map(|path| path.display().to_string()));
    if settings.allow_http {
        lines.push_str("allow-http = true\n");
    }
    configuration.location_with(name, &settings.url, &lines)
}

/// Objects of one location, by their names.
pub fn objects(bucket: &Bucket, name: &str) -> BTreeMap<String, Bytes> {
    let prefix = format!("{name}/");
    let all = bucket.objects().into_iter();
    all.filter_map(|(key, bytes)| Some((key.strip_prefix(&prefix)?.to_owned(), bytes))).collect()
}

/// Waits until two locations in buckets hold the same, except for the `cluster` that each got by itself.
pub async fn wait_until_equal(one: (&Bucket, &str), other: (&Bucket, &str)) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (mut mine, mut theirs) = (objects(one.0, one.1), objects(other.0, other.1));
        let clusters = (mine.remove("cluster"), theirs.remove("cluster"));
        for side in [&mut mine, &mut theirs] {
            // Lists of what is condemned and probes speak of one location; a restore pins where it reads.
            let of_one = ["/condemned/", "/pins/", "probe/"];
            side.retain(|name, _| !of_one.iter().any(|folder| name.contains(folder)));
        }
        ensure!(clusters.0.is_some() && clusters.1.is_some(), "a location isn't initialised");
        for (name, bytes) in &mine {
            let differs = theirs.get(name).is_some_and(|other| other != bytes);
            ensure!(!differs, "{name} has two contents");
        }
        if mine == theirs {
            return Ok(());
        }
        let only = |a: &BTreeMap<String, Bytes>, b: &BTreeMap<String, Bytes>| {
            a.keys().filter(|name| !b.contains_key(*name)).cloned().collect::<Vec<_>>()
        };
        ensure!(
            Instant::now() < deadline,
            "not equal: only in {}: {:?}; only in {}: {:?}",
            one.1,
            only(&mine, &theirs),
            other.1,
            only(&theirs, &mine)
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Two stores that drop connections after they have stored, are overloaded and slow, the second of them over TLS with a
/// private authority. What is restored is right, and both hold the same.
async fn faulty_stores(scene: &Scene, major: Major) -> Result<()> {
    let (plain, tls) = (Bucket::start().await, Bucket::start_tls());
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = Configuration::default().server(&cluster);
    let configuration = with_bucket(configuration, &plain, "plain");
    let configuration = with_bucket(configuration, &tls, "tls").flush_interval("200ms");
    let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
    ledger.start(&cluster);
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    deployment.agent_command(&["init"]).await?.success()?;
    let mut faulted = Vec::new();
    for (bucket, seed) in [(&plain, 1), (&tls, 2)] {
        bucket.faults().seed(scene.random().fork("chance").next() + seed);
        let mut fault = |fault: Fault| faulted.push((bucket, bucket.faults().add(fault)));
        // Some for sure, more by chance.
        fault(Fault::on(Operation::Put, Action::DropAfterCommit).key("/wal/").skip(1).times(2));
        fault(Fault::on(Operation::Put, Action::DropAfterCommit).key("/pack/").times(1));
        fault(Fault::on(Operation::Put, Action::ErrorAfterCommit(500)).key("manifest").times(1));
        fault(Fault::on(Operation::Put, Action::ErrorBefore(503)).skip(3).times(4));
        fault(Fault::on(Operation::List, Action::ErrorBefore(503)).skip(2).times(1));
        fault(
            Fault::on(Operation::Put, Action::Delay(Duration::from_millis(400))).probability(0.2),
        );
        fault(Fault::always(Action::DropBefore).skip(20).probability(0.05));
    }
    let agent = Agent::start(&deployment).await?;
    let mut site = Site { scene, cluster, ledger, configuration, deployment, agent };
    site.first_snapshot().await?;
    site.ledger.wait_for(200, PATIENCE).await?;
    site.snapshot().await?;
    site.ledger.wait_for(300, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let fired = |wanted: &Bucket| {
        faulted
            .iter()
            .filter(|(b, _)| std::ptr::eq(*b, wanted))
            .map(|(b, id)| b.faults().fired(*id))
            .sum::<u64>()
    };
    ensure!(
        fired(&plain) > 5 && fired(&tls) > 5,
        "only {} and {} faults",
        fired(&plain),
        fired(&tls)
    );

    plain.faults().add(Fault::on(Operation::Get, Action::Truncate).key("/pack/").times(2));
    tls.faults().add(Fault::on(Operation::Get, Action::Corrupt).key("/pack/").times(1));
    plain.faults().add(Fault::on(Operation::Get, Action::Truncate).key("/wal/").times(2));
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await?;
    drop(restored);
    plain.faults().clear();
    tls.faults().clear();
    wait_until_equal((&plain, "plain"), (&tls, "tls")).await?;
    plain.faults().refuse(true);
    let (restored, finished) = site.restore_and_start("tls-only", "latest", &[]).await?;
    finished.says(&["plain"])?;
    site.judge(&restored, &Target::All).await?;

    // Without the authority's certificate nobody is trusted.
    let text = std::fs::read_to_string(site.deployment.config())?;
    let without: Vec<&str> = text.lines().filter(|line| !line.starts_with("ca-file")).collect();
    std::fs::write(site.deployment.config(), without.join("\n"))?;
    let refused = site.deployment.backstay(&["list"]).await?.expect(5)?;
    refused.says(&["tls", "ca-file"])?;
    Ok(())
}
on_drawn_major!(faulty_stores);

/// Under `all` a location that is down holds acknowledgements back and costs the other one nothing; once back, it is
/// filled, and acknowledgements go on.
async fn a_location_that_is_down_and_comes_back(scene: &Scene, major: Major) -> Result<()> {
    let (one, two) = (Bucket::start().await, Bucket::start().await);
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = Configuration::default().server(&cluster).acknowledge("all");
    let configuration = with_bucket(with_bucket(configuration, &one, "one"), &two, "two");
    let mut site = Site::of(scene, cluster, configuration).await?;
    two.faults().refuse(true);
    let deadline = |status: &Value| {
        let alarms = status["alarms"].as_array().map(Vec::as_slice).unwrap_or_default();
        alarms.iter().any(|alarm| alarm["subject"] == "two")
    };
    let status = site.agent.wait_until("an alarm names the location", PATIENCE, deadline).await?;
    let held = status["wal"]["acknowledged"].clone();
    let before = stored(&status)?;
    site.ledger.wait_for(200, PATIENCE).await?;
    let end = site.cluster.flushed().await?;
    let status = site
        .agent
        .wait_until("the other location goes on", PATIENCE, |status| {
            stored(status).is_ok_and(|stored| stored[0] >= end)
        })
        .await?;
    ensure!(status["wal"]["acknowledged"] == held, "acknowledged without the second: {status}");
    ensure!(stored(&status)?[1] == before[1], "the second location is down: {status}");

    // A snapshot is committed where it can be, and that is told.
    let outcome =
        site.deployment.agent_command(&["snapshot", "--json"]).await?.expect(5)?.json()?;
    ensure!(outcome["pending"].to_string().contains("two"), "{outcome}");

    // The server's shutdown does not wait for the dead location.
    site.ledger.stop().await?;
    let took = site.cluster.stop_with(Signal::INT, Duration::from_secs(60)).await?;
    ensure!(took < SHUTDOWN_MAX, "the shutdown took {took:?}");
    site.cluster.start().await?;
    site.ledger.start(&site.cluster);
    site.ledger.wait_for(100, PATIENCE).await?;
    site.ledger.stop().await?;

    two.faults().refuse(false);
    site.all_stored().await?;
    let well = |status: &Value| {
        status["alarms"].as_array().is_some_and(Vec::is_empty)
            && status["wal"]["acknowledged"] != held
    };
    // The snapshot that it missed is copied there too.
    site.agent.wait_until("all is well again", PATIENCE * 2, well).await?;
    wait_until_equal((&one, "one"), (&two, "two")).await?;
    one.faults().refuse(true);
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(a_location_that_is_down_and_comes_back);

/// One that is held up takes a minute: until PostgreSQL or the agent gives the connection up.
const SHUTDOWN_MAX: Duration = Duration::from_secs(15);

/// A shutdown is not held up by an agent that is well either, whatever the policy, and the shutdown checkpoint is shipped.
async fn a_shutdown_is_not_delayed(scene: &Scene, major: Major) -> Result<()> {
    let (one, two) = (Bucket::start().await, Bucket::start().await);
    let mut cluster = Cluster::build(scene, &major).start().await?;
    let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
    for (policy, two_is_up) in [("spool", true), ("all", true), ("all", false), ("any", false)] {
        let context = format!("{policy}, second location up: {two_is_up}");
        two.faults().refuse(false);
        let configuration =
            Configuration::default().server(&cluster).acknowledge(policy).flush_interval("10m");
        let configuration = with_bucket(with_bucket(configuration, &one, "one"), &two, "two");
        let deployment = Deployment::new(scene, "backup", &configuration).await?;
        deployment.agent_command(&["init"]).await?.success()?;
        let mut agent = Agent::start(&deployment).await?;
        agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
        two.faults().refuse(!two_is_up);
        ledger.start(&cluster);
        ledger.wait_for(50, PATIENCE).await?;
        ledger.stop().await?;
        let took = cluster.stop_with(Signal::INT, Duration::from_secs(60)).await?;
        ensure!(took < SHUTDOWN_MAX, "{context}: the shutdown took {took:?}");
        ensure!(agent.is_running(), "{context}: the agent ended with the server");
        cluster.start().await?;
        agent
            .wait_until("it streams again", PATIENCE, |status| status["wal"]["connected"] == true)
            .await
            .with_context(|| context.clone())?;
        agent.terminate(PATIENCE).await?;
    }
    Ok(())
}
on_drawn_major!(a_shutdown_is_not_delayed);
