//! Servers that take over from each other: nothing that was stored is lost, no two histories mix, and each can be restored.

use crate::folder;
use crate::s3::{objects, with_bucket};
use crate::site::{
    LOCATIONS, PATIENCE, Site, acknowledged, all_stored, configuration, has_snapshot, judge,
    restore_and_start,
};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::bucket::{Action, Bucket, Fault, Operation};
use backstay_tests::ledger::{Ledger, Target};
use backstay_tests::major::{Major, Majors};
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Configuration, Deployment};
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::time::{Duration, Instant};

async fn standing_by(agent: &mut Agent) -> Result<Value> {
    let is = |status: &Value| status["wal"]["standing_by"] == true;
    agent.wait_until("it stands by", PATIENCE, is).await
}

/// Waits until the agent streams a timeline and has its own snapshot of it.
async fn takes_over(agent: &mut Agent, timeline: u64, before: &Value) -> Result<String> {
    let over = |status: &Value| {
        let last = &status["snapshots"]["last"];
        status["wal"]["timeline"] == timeline && has_snapshot(status) && last != before
    };
    let status = agent.wait_until("it takes over, with a snapshot", PATIENCE, over).await?;
    Ok(status["wal"]["branch"].as_str().context("a branch")?.to_owned())
}

async fn streams_from_the_new_primary(agent: &mut Agent) -> Result<Value> {
    let is = |status: &Value| status["wal"]["timeline"] == 2 && status["wal"]["connected"] == true;
    agent.wait_until("it streams from the new primary", PATIENCE, is).await
}

/// The ledger of a server that took over, at work there.
async fn goes_on(ledger: &Ledger, scene: &Scene, server: &Cluster) -> Result<Ledger> {
    let mut forked = ledger.forked(&server.connect().await?, scene.random().fork("on")).await?;
    forked.start(server);
    forked.wait_for(60, PATIENCE).await?;
    Ok(forked)
}

/// Restores with a deployment's configuration, and judges.
async fn restores(
    site: &Site<'_>,
    deployment: &Deployment,
    name: &str,
    (to, more): (&str, &[&str]),
    (ledger, target): (&Ledger, &Target),
) -> Result<()> {
    let (restored, _) =
        restore_and_start(site.scene, deployment, site.major(), name, to, more).await?;
    judge(ledger, &restored, target).await.with_context(|| name.to_owned())?;
    Ok(())
}

/// The oldest snapshot at a location.
fn first_snapshot(site: &Site<'_>, location: &str) -> Result<String> {
    let manifests = folder::named(&site.location(location), "/manifest")?;
    let first = manifests.first().and_then(|name| name.rsplit('/').nth(1)).context("a snapshot")?;
    Ok(first.to_owned())
}

fn branches(site: &Site<'_>) -> Result<usize> {
    let [near, far] = LOCATIONS.map(|name| folder::named(&site.location(name), "/origin"));
    let (near, far) = (near?, far?);
    ensure!(near == far, "{near:?} and {far:?}");
    Ok(near.len())
}

/// The primary dies with commits that its standby never got. The standby is promoted, and its agent, which stood by,
/// takes over with a snapshot. What only the dead primary had stays on a branch of its own, and can be restored. The old
/// primary is rewound, follows, and in its turn takes over.
async fn there_and_back(scene: &Scene, _: Major) -> Result<()> {
    let Some(major) = Majors::available().iter().find(|m| m.program("pg_rewind").exists()) else {
        return Ok(());
    };
    // The old primary wants WAL from where the two parted.
    let cluster = Cluster::build(scene, major).setting("wal_keep_size", "256MB").start().await?;
    let configuration = configuration(scene, &cluster)?;
    let mut site = Site::of(scene, cluster, configuration).await?;
    let mut standby = site.cluster.standby(scene, "sb").await?;
    let b = site.deploy("b", &standby).await?;
    let mut agent = Agent::start(&b).await?;
    standing_by(&mut agent).await?;

    site.ledger.wait_for(100, PATIENCE).await?;
    standby.catch_up(&site.cluster, PATIENCE).await?;
    standby.cut_off(PATIENCE).await?;
    site.ledger.wait_for(600, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let before = agent.status().await?["snapshots"]["last"].clone();
    site.cluster.kill()?;
    standby.promote().await?;
    takes_over(&mut agent, 2, &before).await?;
    let mut second = goes_on(&site.ledger, scene, &standby).await?;
    let slots =
        "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'backstay_b' AND active";
    ensure!(standby.value(slots).await? == "1", "the agent's slot is not on the new primary");
    second.stop().await?;
    all_stored(&mut agent, &standby).await?;
    ensure!(second.acknowledged() < site.ledger.acknowledged(), "nothing was lost: no test");
    ensure!(branches(&site)? == 2, "{} branches", branches(&site)?);
    restores(&site, &b, "two", ("latest", &[]), (&second, &Target::All)).await?;
    let dead: (&str, &[&str]) = ("latest", &["--timeline", "1"]);
    restores(&site, &b, "dead", dead, (&site.ledger, &Target::All)).await?;

    site.cluster.rewind(scene, &standby, "main").await?;
    standing_by(&mut site.agent).await?;
    second.start(&standby);
    second.wait_for(60, PATIENCE).await?;
    second.stop().await?;
    all_stored(&mut agent, &standby).await?;
    site.cluster.catch_up(&standby, PATIENCE).await?;
    agent.kill()?;
    standby.kill()?;
    let before = site.agent.status().await?["snapshots"]["last"].clone();
    site.cluster.promote().await?;
    takes_over(&mut site.agent, 3, &before).await?;
    let mut third = goes_on(&second, scene, &site.cluster).await?;
    third.stop().await?;
    site.all_stored().await?;
    ensure!(branches(&site)? == 3, "{} branches", branches(&site)?);
    let gaps = folder::named(&site.location("near"), "/gap/")?;
    ensure!(gaps.is_empty(), "{gaps:?}");
    let own = &site.deployment;
    restores(&site, own, "three", ("latest", &[]), (&third, &Target::All)).await?;
    restores(&site, own, "dead-too", dead, (&site.ledger, &Target::All)).await
}
on_drawn_major!(there_and_back);

/// A location can be read and takes nothing but WAL, for lack of a right or of room. The lease is not created there, and that keeps
/// nobody from taking over, and from taking a snapshot.
async fn a_location_that_takes_no_lease(scene: &Scene, major: Major) -> Result<()> {
    let (one, two) = (Bucket::start().await, Bucket::start().await);
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = Configuration::default().server(&cluster);
    let configuration = with_bucket(with_bucket(configuration, &one, "one"), &two, "two");
    let refused = Fault::on(Operation::Put, Action::ErrorBefore(403)).key("/lease/");
    let refused = two.faults().add(refused);
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.first_snapshot().await?;
    ensure!(two.faults().fired(refused) > 0, "nobody tried");
    two.faults().remove(refused);
    site.snapshot().await?;
    ensure!(objects(&two, "two").keys().any(|name| name.contains("/lease/")), "no lease later");
    Ok(())
}
on_drawn_major!(a_location_that_takes_no_lease);

/// The agent of the primary is gone for a while before the primary dies. The agent of the standby stores the rest of the old
/// timeline from there, for it has held it by a slot that it moved on to what was stored, and no further.
async fn the_rest_comes_from_the_standby(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let standby = site.cluster.standby(scene, "sb").await?;
    let b = site.deploy("b", &standby).await?;
    let mut agent = Agent::start(&b).await?;
    standing_by(&mut agent).await?;
    let held = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'backstay_b'";
    let first = standby.value(held).await?;
    for _ in 0..3 {
        site.ledger.wait_for(30, PATIENCE).await?;
        site.cluster.sql("SELECT pg_switch_wal()").await?;
    }
    site.all_stored().await?;
    standby.catch_up(&site.cluster, PATIENCE).await?;
    let deadline = Instant::now() + PATIENCE;
    while standby.value(held).await? == first {
        ensure!(Instant::now() < deadline, "the slot on the standby stays at {first}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    site.agent.kill()?;
    for _ in 0..3 {
        site.ledger.wait_for(30, PATIENCE).await?;
        site.cluster.sql("SELECT pg_switch_wal()").await?;
    }
    // Restartpoints remove what no slot holds.
    site.cluster.sql("CHECKPOINT").await?;
    site.ledger.wait_for(30, PATIENCE).await?;
    site.ledger.stop().await?;
    let end = standby.catch_up(&site.cluster, PATIENCE).await?;
    standby.sql("CHECKPOINT").await?;
    let now: Lsn = standby.value(held).await?.parse().ok().context("the slot's position")?;
    let mut stored = Lsn::INVALID;
    for name in LOCATIONS {
        let wal = folder::wal_without_holes(&site.location(name))?;
        stored = wal.values().map(|range| range.end).fold(stored, Lsn::max);
    }
    ensure!(now <= stored && now < end, "the slot is at {now}, stored is {stored} of {end}");
    let before = agent.status().await?["snapshots"]["last"].clone();
    site.cluster.kill()?;
    standby.promote().await?;
    takes_over(&mut agent, 2, &before).await?;
    let mut second = goes_on(&site.ledger, scene, &standby).await?;
    second.stop().await?;
    all_stored(&mut agent, &standby).await?;
    for name in LOCATIONS {
        folder::wal_without_holes(&site.location(name))?;
    }
    restores(&site, &b, "two", ("latest", &[]), (&second, &Target::All)).await?;
    let rest: (&str, &[&str]) = (&format!("lsn:{end}"), &["--timeline", "1"]);
    restores(&site, &b, "rest", rest, (&site.ledger, &Target::All)).await
}
on_drawn_major!(the_rest_comes_from_the_standby);

/// Names both servers; whichever is the primary is meant.
fn either(one: &Cluster, other: &Cluster) -> String {
    let hosts = [one, other].map(|c| c.socket_dir().display().to_string()).join(",");
    let ports = [one, other].map(|c| c.port().to_string()).join(",");
    format!("host={hosts} port={ports} user=postgres dbname=postgres")
}

/// One agent, told of several hosts, goes on at whichever is the primary, where it makes its slot.
async fn several_hosts(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let standby = cluster.standby(scene, "sb").await?;
    let configuration = configuration(scene, &cluster)?.conninfo(&either(&standby, &cluster));
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.ledger.wait_for(60, PATIENCE).await?;
    site.ledger.stop().await?;
    standby.catch_up(&site.cluster, PATIENCE).await?;
    site.cluster.kill()?;
    standby.promote().await?;
    streams_from_the_new_primary(&mut site.agent).await?;
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE active";
    ensure!(standby.value(slots).await? == "1", "no slot is in use on the new primary");
    let mut second = goes_on(&site.ledger, scene, &standby).await?;
    second.stop().await?;
    all_stored(&mut site.agent, &standby).await?;
    for name in LOCATIONS {
        folder::wal_without_holes(&site.location(name))?;
    }
    restores(&site, &site.deployment, "two", ("latest", &[]), (&second, &Target::All)).await
}
on_drawn_major!(several_hosts);

/// The server's timeline switches while a store is slow to take the wrap of an epoch: what is on its way there, and what the
/// new timeline needs first, do not wait for each other for ever.
async fn a_switch_while_a_store_is_slow(scene: &Scene, major: Major) -> Result<()> {
    let bucket = Bucket::start().await;
    let cluster = Cluster::build(scene, &major).start().await?;
    let standby = cluster.standby(scene, "sb").await?;
    let conninfo = either(&standby, &cluster);
    let configuration = Configuration::default().server(&cluster).conninfo(&conninfo);
    let configuration = with_bucket(configuration, &bucket, "slow");
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.all_stored().await?;
    let put = |key: &str, after: Duration| {
        bucket.faults().add(Fault::on(Operation::Put, Action::Delay(after)).key(key))
    };
    // The epoch of the origin is stored at once.
    for name in objects(&bucket, "slow").into_keys().filter(|name| name.contains("/keys/")) {
        put(&name, Duration::ZERO);
    }
    // Under the next one WAL is sealed that cannot be stored yet.
    site.agent.kill()?;
    bucket.faults().refuse(true);
    site.agent.restart().await?;
    site.ledger.wait_for(60, PATIENCE).await?;
    site.ledger.stop().await?;
    let end = standby.catch_up(&site.cluster, PATIENCE).await?;
    let waits = |status: &Value| {
        let spooled = status["wal"]["spooled"].as_str().and_then(|text| text.parse().ok());
        spooled.is_some_and(|spooled: Lsn| spooled >= end)
    };
    site.agent.wait_until("WAL waits in the spool", PATIENCE, waits).await?;
    site.agent.kill()?;
    site.cluster.kill()?;
    standby.promote().await?;
    bucket.faults().refuse(false);
    let slow = put("/keys/", Duration::from_secs(6));
    site.agent.restart().await?;
    streams_from_the_new_primary(&mut site.agent).await?;
    ensure!(bucket.faults().fired(slow) > 0, "no epoch was delayed");
    let mut second = goes_on(&site.ledger, scene, &standby).await?;
    second.stop().await?;
    all_stored(&mut site.agent, &standby).await?;
    restores(&site, &site.deployment, "two", ("latest", &[]), (&second, &Target::All)).await
}
on_drawn_major!(a_switch_while_a_store_is_slow);

/// A server comes back as a fresh copy of the one that took over, and takes over in its turn: it never had the beginning of
/// the timeline between. Its agent, whose spool ends on the one before, goes on where the other agent's WAL ends; nothing
/// that is stored is told to be a gap.
async fn a_fresh_copy_takes_over(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let mut standby = site.cluster.standby(scene, "sb").await?;
    let b = site.deploy("b", &standby).await?;
    let mut agent = Agent::start(&b).await?;
    standing_by(&mut agent).await?;
    site.ledger.wait_for(40, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    standby.catch_up(&site.cluster, PATIENCE).await?;
    let before = agent.status().await?["snapshots"]["last"].clone();
    site.cluster.kill()?;
    standby.promote().await?;
    takes_over(&mut agent, 2, &before).await?;
    let mut second = goes_on(&site.ledger, scene, &standby).await?;
    for _ in 0..2 {
        standby.sql("SELECT pg_switch_wal()").await?;
        second.wait_for(20, PATIENCE).await?;
    }
    site.cluster.copy_anew(scene, &standby, "again").await?;
    second.wait_for(40, PATIENCE).await?;
    second.stop().await?;
    all_stored(&mut agent, &standby).await?;
    // The end of the timeline is for the copy's agent to store.
    agent.kill()?;
    second.start(&standby);
    second.wait_for(20, PATIENCE).await?;
    second.stop().await?;
    site.cluster.catch_up(&standby, PATIENCE).await?;
    standby.kill()?;
    let before = site.agent.status().await?["snapshots"]["last"].clone();
    site.cluster.promote().await?;
    takes_over(&mut site.agent, 3, &before).await?;
    let mut third = goes_on(&second, scene, &site.cluster).await?;
    third.stop().await?;
    site.all_stored().await?;
    let gaps = folder::named(&site.location("near"), "/gap/")?;
    ensure!(gaps.is_empty(), "{gaps:?}");
    ensure!(branches(&site)? == 3, "{} branches", branches(&site)?);
    for name in LOCATIONS {
        folder::wal_without_holes(&site.location(name))?;
    }
    // Across both switches.
    let first = first_snapshot(&site, "near")?;
    let more = ["--snapshot", first.as_str()];
    restores(&site, &site.deployment, "three", ("latest", &more), (&third, &Target::All)).await
}
on_drawn_major!(a_fresh_copy_takes_over);

/// A location is away when the old timeline ends. It counts for no acknowledgement on the new one until it has got that end from
/// elsewhere, although it has all of the new one: alone, it restores all that is acknowledged.
async fn a_location_counts_with_all_that_came_before(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?.acknowledge("all");
    let mut site = Site::of(scene, cluster, configuration).await?;
    let mut standby = site.cluster.standby(scene, "sb").await?;
    let b = site.deploy("b", &standby).await?;
    let mut agent = Agent::start(&b).await?;
    standing_by(&mut agent).await?;
    let away = scene.path("away");
    folder::unmount(&site.location("far"), &away)?;
    for _ in 0..3 {
        site.ledger.wait_for(30, PATIENCE).await?;
        site.cluster.sql("SELECT pg_switch_wal()").await?;
    }
    site.ledger.stop().await?;
    let end = standby.catch_up(&site.cluster, PATIENCE).await?;
    let near = |status: &Value| crate::site::stored(status).is_ok_and(|stored| stored[0] >= end);
    site.agent.wait_until("the near location has it all", PATIENCE, near).await?;
    site.cluster.kill()?;
    site.agent.kill()?;
    standby.promote().await?;
    let mut second = goes_on(&site.ledger, scene, &standby).await?;
    second.stop().await?;
    let end = standby.flushed().await?;
    let is_near = |status: &Value| {
        status["wal"]["timeline"] == 2
            && crate::site::stored(status).is_ok_and(|stored| stored[0] >= end)
    };
    agent.wait_until("the near location has the new timeline", PATIENCE, is_near).await?;
    folder::mount_again(&away, &site.location("far"))?;
    let is_told = |status: &Value| acknowledged(status) >= Some(end);
    agent.wait_until("all is acknowledged", PATIENCE, is_told).await?;
    agent.kill()?;
    standby.kill()?;
    std::fs::remove_dir_all(site.location("near"))?;
    b.configure(&site.configuration.clone().without("near").key(site.deployment.key()))?;
    let first = first_snapshot(&site, "far")?;
    let more = ["--snapshot", first.as_str()];
    restores(&site, &b, "copy", ("latest", &more), (&second, &Target::All)).await
}
on_drawn_major!(a_location_counts_with_all_that_came_before);
