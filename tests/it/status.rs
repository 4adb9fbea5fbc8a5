//! What the running agent tells, and when it takes snapshots.

use crate::site::{PATIENCE, Site, configuration, has_snapshot, stored};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Deployment};
use backstay_tests::scene::{Scene, full};
use serde_json::Value;
use std::time::Duration;

/// The frontier, the lag, the spool, the snapshots; a snapshot at the first start, and one by hand, which `list` shows.
async fn the_frontier_and_the_snapshots(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let first = site.first_snapshot().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    let by_hand = site.snapshot().await?;
    ensure!(by_hand > first, "{by_hand} is not later than {first}");
    site.ledger.stop().await?;
    let end = site.all_stored().await?;
    let caught_up = |status: &Value| {
        let locations = status["wal"]["locations"].as_array().cloned().unwrap_or_default();
        locations.iter().all(|location| location["behind_bytes"] == 0)
    };
    let status = site.agent.wait_until("nothing is behind", PATIENCE, caught_up).await?;
    let position = |path: &str| -> Result<Lsn> {
        let text = status.pointer(path).and_then(Value::as_str);
        let text = text.with_context(|| format!("{path} of {status}"))?;
        text.parse().map_err(|_| anyhow::anyhow!("{path} is no position: {text}"))
    };
    let (received, spooled) = (position("/wal/received")?, position("/wal/spooled")?);
    let acknowledged = position("/wal/acknowledged")?;
    ensure!(received >= spooled && spooled >= acknowledged && acknowledged >= end, "{status}");
    ensure!(stored(&status)?.iter().all(|stored| *stored <= spooled), "{status}");
    ensure!(position("/wal/server_end")? >= received, "{status}");
    ensure!(status["cluster"] == "orders" && status["wal"]["connected"] == true, "{status}");
    ensure!(status["wal"]["timeline"] == 1, "{status}");
    let system = site.cluster.value("SELECT system_identifier FROM pg_control_system()").await?;
    ensure!(status["system"].to_string().contains(&system), "{status} is not of {system}");
    ensure!(status["wal"]["spool_bytes"].is_u64(), "{status}");
    ensure!(status["snapshots"]["last"] == by_hand.as_str() && has_snapshot(&status), "{status}");
    ensure!(status["snapshots"]["last_error"].is_null(), "{status}");
    let next: jiff::Timestamp = status["snapshots"]["next"].as_str().context("next")?.parse()?;
    let next = next.to_zoned(jiff::tz::TimeZone::UTC);
    let parts = (next.month(), next.day(), next.hour(), next.minute());
    ensure!(parts == (1, 1, 3, 0), "next at {next} and not as scheduled");
    ensure!(status["alarms"] == Value::Array(Vec::new()), "{status}");
    for location in status["wal"]["locations"].as_array().context("locations")? {
        ensure!(location["behind_seconds"].is_number(), "{location}");
    }

    let people = site.deployment.agent_command(&["status"]).await?.success()?;
    people.says(&["orders", "near", "far", &by_hand, "streaming"])?;
    let list = site.deployment.backstay(&["list"]).await?.success()?;
    list.says(&[&first, &by_hand, "near", "far"])?;
    let list = site.deployment.backstay(&["list", "--json"]).await?.success()?.json()?.to_string();
    ensure!(list.contains(&first) && list.contains(&by_hand), "{list}");

    // The server goes away and comes back: an alarm, and then none.
    site.cluster.stop().await?;
    let down = |status: &Value| {
        status["wal"]["connected"] == false
            && !status["alarms"].as_array().is_some_and(Vec::is_empty)
    };
    site.agent.wait_until("an alarm says that the server is gone", PATIENCE, down).await?;
    site.deployment.agent_command(&["status"]).await?.expect(10)?.says(&["ALARM"])?;
    site.cluster.start().await?;
    let up = |status: &Value| {
        status["wal"]["connected"] == true && status["alarms"].as_array().is_some_and(Vec::is_empty)
    };
    site.agent.wait_until("it streams again", PATIENCE, up).await?;
    let status = site.agent.terminate(PATIENCE).await?;
    ensure!(status.success(), "SIGTERM ends it with {status}");
    Ok(())
}
on_drawn_major!(the_frontier_and_the_snapshots);

/// A run of the schedule that fell into a time without an agent is caught up at the next start, one that did not is not;
/// and a schedule is kept.
async fn a_missed_run_is_caught_up(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?.snapshot("schedule", "* * * * *");
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    // Early in a minute, so that the first snapshot and the restart fall into the same one.
    while !(1..5).contains(&utc().second()) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut minute = utc().minute();
    let mut agent = deployment.init_and_run().await?;
    let first = last(&agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?)?;
    if full() {
        let next =
            |status: &Value| has_snapshot(status) && last(status).is_ok_and(|id| id != first);
        agent.wait_until("the schedule's snapshot", Duration::from_secs(90), next).await?;
        minute = utc().minute();
    }
    let newest = last(&agent.status().await?)?;
    agent.terminate(PATIENCE).await?;
    agent.restart().await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let now = last(&agent.status().await?)?;
    // When the next minute has come it has its run.
    let is_over = utc().minute() != minute;
    ensure!(is_over || now == newest, "a snapshot that nobody missed was caught up");
    let newest = now;
    agent.terminate(PATIENCE).await?;

    wait_for_another_minute().await;
    let restarted = jiff::Timestamp::now();
    agent.restart().await?;
    let caught_up =
        |status: &Value| has_snapshot(status) && last(status).is_ok_and(|id| id != newest);
    let status =
        agent.wait_until("the missed run is caught up", Duration::from_secs(50), caught_up).await?;
    let began = last(&status)?.parse::<backstay_common::id::SnapshotId>();
    let began = began.map_err(|_| anyhow::anyhow!("not a snapshot: {status}"))?.began();
    let after = began.duration_since(restarted).as_secs();
    ensure!((-1..50).contains(&after), "it began {after} s after the restart");
    Ok(())
}
on_drawn_major!(a_missed_run_is_caught_up);

fn last(status: &Value) -> Result<String> {
    Ok(status["snapshots"]["last"].as_str().context("no snapshot")?.to_owned())
}

fn utc() -> jiff::Zoned {
    jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC)
}

/// Waits until another minute has begun, so that a run that every minute has was missed.
async fn wait_for_another_minute() {
    let minute = utc().minute();
    while utc().minute() == minute || utc().second() < 1 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// One agent for one state directory; and none: 9.
async fn one_agent_or_none(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?;
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    for verb in ["status", "snapshot"] {
        let nobody = deployment.agent_command(&[verb]).await?.expect(9)?;
        nobody.says(&["no agent answers", "agent.sock", "remedy", "run"])?;
    }
    let mut agent = deployment.init_and_run().await?;
    let mut second = Agent::spawn(&deployment)?;
    let status = second.wait(PATIENCE).await?;
    ensure!(status.code() == Some(2), "the second agent ended with {status}");
    ensure!(agent.log().contains("another agent uses"), "{}", agent.log());
    agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
    agent.kill()?;
    deployment.agent_command(&["status"]).await?.expect(9)?;
    Ok(())
}
on_drawn_major!(one_agent_or_none);
