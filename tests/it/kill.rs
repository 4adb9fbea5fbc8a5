//! Killed at any moment, the agent leaves nothing behind that it doesn't mend, and nothing acknowledged is lost.

use crate::folder;
use crate::site::{
    LOCATIONS, PATIENCE, Site, acknowledged, configuration, has_snapshot, load, stored,
};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::ledger::{Ledger, Target};
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Deployment};
use backstay_tests::scene::{Scene, full};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Killed again and again under load, during its start, its snapshots and between its PUTs to two locations: no name gets
/// two contents, the locations end up equal, the WAL has no hole, and each location alone restores every transaction.
async fn killed_again_and_again(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?.flush_interval("100ms");
    let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    ledger.start(&cluster);
    deployment.agent_command(&["init"]).await?.success()?;
    let mut random = scene.random().fork("moments");
    let [near, far] = LOCATIONS.map(|name| scene.path(name));

    for round in 0..if full() { 50 } else { 12 } {
        // Some die while they start; the others do some work first, and in part a snapshot.
        let mut agent = match round % 3 {
            0 => Agent::spawn(&deployment)?,
            _ => Agent::start(&deployment).await?,
        };
        let snapshot = (round % 4 == 1).then(|| {
            let deployment = deployment.clone();
            tokio::spawn(async move { deployment.agent_command(&["snapshot"]).await })
        });
        tokio::time::sleep(Duration::from_millis(random.range(20..1200))).await;
        ensure!(agent.is_running(), "round {round}: the agent ended by itself");
        agent.kill()?;
        folder::no_name_has_two_contents(&near, &far).with_context(|| format!("round {round}"))?;
        if let Some(snapshot) = snapshot {
            // It ends with its agent, in whatever way.
            snapshot.await??;
        }
    }

    let agent = Agent::start(&deployment).await?;
    let mut site = Site { scene, cluster, ledger, configuration, deployment, agent };
    site.first_snapshot().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    site.snapshot().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    no_alarm(&mut site).await?;
    site.locations_equal().await?;
    for name in LOCATIONS {
        folder::wal_without_holes(&site.location(name))?;
    }
    site.agent.terminate(PATIENCE).await?;
    for (name, other) in [("near", "far"), ("far", "near")] {
        site.deployment.configure(&site.configuration.clone().without(other))?;
        let (restored, _) = site.restore_and_start(&format!("from-{name}"), "latest", &[]).await?;
        site.judge(&restored, &Target::All).await.with_context(|| format!("from {name}"))?;
    }
    Ok(())
}
on_drawn_major!(killed_again_and_again);

/// Waits until all is well, as it soon must be.
async fn no_alarm(site: &mut Site<'_>) -> Result<Value> {
    let well = |status: &Value| status["alarms"].as_array().is_some_and(Vec::is_empty);
    site.agent.wait_until("no alarm is raised", PATIENCE, well).await
}

/// The state directory is lost when the server has been told that the spool has what no location has, and has moved the
/// slot on by more than a segment. The agent goes back to what is stored, below the slot, and there is no gap.
async fn a_lost_state_directory(scene: &Scene, major: Major) -> Result<()> {
    const SEGMENT: u64 = 16 << 20;
    // The server keeps what the slot no longer asks for.
    let cluster = Cluster::build(scene, &major).setting("wal_keep_size", "256MB").start().await?;
    let configuration = configuration(scene, &cluster)?.acknowledge("spool");
    let mut site = Site::of(scene, cluster, configuration).await?;
    let away = LOCATIONS.map(|name| scene.path(&format!("{name}.away")));
    for (name, away) in LOCATIONS.iter().zip(&away) {
        folder::unmount(&site.location(name), away)?;
    }
    for _ in 0..3 {
        site.ledger.wait_for(30, PATIENCE).await?;
        site.cluster.sql("SELECT pg_switch_wal()").await?;
    }
    let ahead = |status: &Value| {
        let stored = stored(status).unwrap_or_default().into_iter().max();
        acknowledged(status)
            .zip(stored)
            .is_some_and(|(a, s): (Lsn, Lsn)| a.get() > s.get() + 2 * SEGMENT)
    };
    site.agent.wait_until("the spool is ahead of the locations", PATIENCE, ahead).await?;
    site.agent.kill()?;
    let restart = site.cluster.value("SELECT restart_lsn FROM pg_replication_slots").await?;
    let restart: Lsn = restart.parse().context("the slot's position")?;
    for (name, away) in LOCATIONS.iter().zip(&away) {
        folder::mount_again(away, &site.location(name))?;
        let wal = folder::wal_without_holes(&site.location(name))?;
        let end = wal.values().map(|range| range.end).max().context("no WAL")?;
        ensure!(
            end.get() < restart.get() / SEGMENT * SEGMENT,
            "nothing is at stake: {name} has {end}, the slot is at {restart}"
        );
    }
    std::fs::remove_dir_all(site.deployment.state_dir())?;
    site.agent.restart().await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    no_alarm(&mut site).await?;
    for name in LOCATIONS {
        folder::wal_without_holes(&site.location(name))?;
    }
    site.locations_equal().await?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(a_lost_state_directory);

/// Server and host of the agent are gone when the spool has what no location has; then only the agent comes back. It stores what
/// waits without the server, tells that it is away, and nothing that was acknowledged is missing.
async fn restarted_without_a_server(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?.acknowledge("spool");
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.first_snapshot().await?;
    let away = LOCATIONS.map(|name| scene.path(&format!("{name}.away")));
    for (name, away) in LOCATIONS.iter().zip(&away) {
        folder::unmount(&site.location(name), away)?;
    }
    site.ledger.wait_for(100, PATIENCE).await?;
    let safe = Instant::now();
    let end = site.cluster.flushed().await?;
    let spooled = |status: &Value| acknowledged(status) >= Some(end);
    site.agent.wait_until("the spool has it", PATIENCE, spooled).await?;
    site.cluster.kill()?;
    site.agent.kill()?;
    site.ledger.stop().await?;
    std::fs::remove_dir_all(site.cluster.data())?;
    for (name, away) in LOCATIONS.iter().zip(&away) {
        folder::mount_again(away, &site.location(name))?;
        let wal = folder::wal_without_holes(&site.location(name))?;
        ensure!(wal.values().all(|range| range.end < end), "nothing is at stake at {name}");
    }
    site.agent.restart().await?;
    let all = |status: &Value| {
        let alarms = status["alarms"].as_array();
        stored(status).is_ok_and(|all| all.len() == 2 && all.iter().all(|lsn| *lsn >= end))
            && alarms.is_some_and(|all| all.iter().any(|alarm| alarm["name"] == "postgres-down"))
    };
    site.agent.wait_until("the locations have it", PATIENCE, all).await?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::Latest { acknowledged_until: safe }).await.map(|_| ())
}
on_drawn_major!(restarted_without_a_server);

/// The server drops WAL that the agent's slot held, because the agent was away for too long. The agent makes the slot anew,
/// records the gap, raises the alarm until a snapshot has closed it, and every moment outside of the gap can be reached.
async fn a_lost_slot(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major)
        .setting("max_slot_wal_keep_size", "16MB")
        .setting("min_wal_size", "32MB")
        .setting("max_wal_size", "48MB")
        .start()
        .await?;
    let configuration = configuration(scene, &cluster)?;
    let mut site = Site::of(scene, cluster, configuration).await?;
    let first = site.first_snapshot().await?;
    let session = site.cluster.connect().await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    let before = site.ledger.moment(&session).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.all_stored().await?;
    site.agent.kill()?;
    for _ in 0..6 {
        site.ledger.wait_for(20, PATIENCE).await?;
        site.cluster.sql("SELECT pg_switch_wal()").await?;
    }
    let inside = site.ledger.moment(&session).await?;
    site.cluster.sql("CHECKPOINT").await?;
    let slot = "SELECT wal_status FROM pg_replication_slots";
    ensure!(site.cluster.value(slot).await? == "lost", "nothing is at stake");
    site.ledger.wait_for(20, PATIENCE).await?;

    site.agent.restart().await?;
    let another =
        |status: &Value| has_snapshot(status) && status["snapshots"]["last"] != first.as_str();
    site.agent.wait_until("a snapshot closes the gap", PATIENCE, another).await?;
    no_alarm(&mut site).await?;
    ensure!(site.agent.log().contains("wal-gap"), "the gap was no alarm");
    site.told("gap", "").await?;
    ensure!(site.cluster.value(slot).await? == "reserved", "the slot holds nothing");
    tokio::time::sleep(Duration::from_secs(1)).await;
    site.ledger.wait_for(50, PATIENCE).await?;
    let after = site.ledger.moment(&session).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let lost = site.deployment.backstay(&["plan", "--to", &inside.rfc3339]).await?;
    lost.expect(3)?.says(&["WAL", "remedy"])?;
    for (name, moment) in [("before", &before), ("after", &after)] {
        let (restored, _) = site.restore_and_start(name, &moment.rfc3339, &[]).await?;
        let judged = site.judge(&restored, &Target::Time(moment.micros)).await;
        judged.with_context(|| format!("the moment {name} the gap"))?;
    }
    let (restored, _) = site.restore_and_start("latest", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(a_lost_slot);

/// Server and agent die together, and a location with them. The other has all that had been acknowledged
/// `flush-interval` and one PUT before.
async fn the_accident(scene: &Scene, major: Major) -> Result<()> {
    /// The interval, one PUT, and what a busy machine with a slow disk adds.
    const MAY_BE_LOST: Duration = Duration::from_millis(1000 + 7000);
    let mut site = Site::start(scene, &major).await?;
    site.ledger.wait_for(300, PATIENCE).await?;
    tokio::time::sleep(MAY_BE_LOST).await;
    let safe = Instant::now().checked_sub(MAY_BE_LOST).context("a young clock")?;
    site.cluster.kill()?;
    site.agent.kill()?;
    site.ledger.stop().await?;
    std::fs::remove_dir_all(site.cluster.data())?;
    std::fs::remove_dir_all(site.location("far"))?;
    std::fs::remove_dir_all(site.deployment.state_dir())?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::Latest { acknowledged_until: safe }).await.map(|_| ())
}
on_drawn_major!(the_accident);

/// With every location to acknowledge and the agent in `synchronous_standby_names`, COMMIT returns when the locations have
/// it: nothing at all is lost, not even with one of them.
async fn nothing_is_lost_when_commits_wait(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?.acknowledge("all").flush_interval("1m");
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.cluster.sql("ALTER SYSTEM SET synchronous_standby_names = '*'").await?;
    site.cluster.sql("SELECT pg_reload_conf()").await?;
    let deadline = Instant::now() + PATIENCE;
    while site
        .cluster
        .value("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")
        .await?
        != "1"
    {
        ensure!(Instant::now() < deadline, "the agent is no synchronous standby");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    site.ledger.wait_for(100, PATIENCE).await?;
    // In the last second one location is away: what it lacks must not have been acknowledged.
    let away = scene.path("away");
    folder::unmount(&site.location("far"), &away)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Commits under way when it became synchronous are over; from here on all wait.
    let safe = Instant::now() + Duration::from_secs(30);
    site.cluster.kill()?;
    site.agent.kill()?;
    site.ledger.stop().await?;
    std::fs::remove_dir_all(site.cluster.data())?;
    std::fs::remove_dir_all(site.location("near"))?;
    folder::mount_again(&away, &site.location("far"))?;
    std::fs::remove_dir_all(site.deployment.state_dir())?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::Latest { acknowledged_until: safe }).await.map(|_| ())
}
on_drawn_major!(nothing_is_lost_when_commits_wait);

/// An agent that was killed in its first start, with nothing stored, starts as if new.
async fn killed_before_anything_was_stored(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?;
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    deployment.agent_command(&["init"]).await?.success()?;
    for wait in [0, 40, 80, 160] {
        let mut agent = Agent::spawn(&deployment)?;
        tokio::time::sleep(Duration::from_millis(wait)).await;
        agent.kill()?;
    }
    let mut agent = Agent::start(&deployment).await?;
    agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
    let slots = cluster.value("SELECT count(*) FROM pg_replication_slots").await?;
    ensure!(slots == "1", "{slots} slots");
    Ok(())
}
on_drawn_major!(killed_before_anything_was_stored);
