//! Commits that wait for locations; outages that last; a full spool, and a slot in danger.

use crate::folder;
use crate::s3::{wait_until_equal, with_bucket};
use crate::site::{
    LOCATIONS, PATIENCE, Site, acknowledged, configuration, has_snapshot, load, stored,
};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::bucket::{Action, Bucket, Fault, Operation};
use backstay_tests::ledger::{Ledger, Target};
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Configuration, Deployment};
use backstay_tests::scene::Scene;
use rustix::process::Signal;
use serde_json::Value;
use std::time::{Duration, Instant};

/// Commits wait for these from now on.
async fn synchronous(cluster: &Cluster, names: &str, state: &str) -> Result<()> {
    cluster.sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'")).await?;
    cluster.sql("SELECT pg_reload_conf()").await?;
    let deadline = Instant::now() + PATIENCE;
    let count = format!("SELECT count(*) FROM pg_stat_replication WHERE sync_state = '{state}'");
    while cluster.value(&count).await? == "0" {
        ensure!(Instant::now() < deadline, "nobody is {state}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn alarm(status: &Value, name: &str) -> Option<String> {
    let alarms = status["alarms"].as_array()?;
    let alarm = alarms.iter().find(|alarm| alarm["name"] == name)?;
    alarm["message"].as_str().map(str::to_owned)
}

fn well(status: &Value) -> bool {
    status["alarms"].as_array().is_some_and(Vec::is_empty)
}

/// Under `majority` of three, server, agent and spool die together while one location is slow and another is away.
/// Whichever location is lost with them, the other two restore every transaction whose COMMIT returned.
async fn every_commit_is_in_two_of_three(scene: &Scene, major: Major) -> Result<()> {
    let buckets = [Bucket::start().await, Bucket::start().await, Bucket::start().await];
    let names = ["one", "two", "three"];
    let cluster = Cluster::build(scene, &major)
        .setting("max_prepared_transactions", "5")
        .setting("synchronous_commit", "remote_apply")
        .start()
        .await?;
    let start = Configuration::default().server(&cluster);
    let start = start.acknowledge("majority").flush_interval("10m");
    let configuration =
        buckets.iter().zip(names).fold(start, |c, (b, name)| with_bucket(c, b, name));
    let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    let agent = deployment.init_and_run().await?;
    let mut site = Site { scene, cluster, ledger, configuration, deployment, agent };
    site.first_snapshot().await?;
    synchronous(&site.cluster, "*", "sync").await?;

    // Nothing else is written: each of these must be shipped for its own sake, and `remote_apply` comes true.
    let session = site.cluster.connect().await?;
    let steps = [
        "CREATE TABLE prepared (n int)",
        "BEGIN; INSERT INTO prepared VALUES (1); PREPARE TRANSACTION 'waits'",
        "COMMIT PREPARED 'waits'",
        "INSERT INTO prepared VALUES (2)",
    ];
    for step in steps {
        let done = tokio::time::timeout(PATIENCE, session.batch_execute(step));
        done.await.with_context(|| format!("hangs: {step}"))??;
    }

    let slow = Fault::on(Operation::Put, Action::Delay(Duration::from_millis(300)));
    buckets[1].faults().add(slow.key("/wal/"));
    ledger = site.ledger;
    ledger.start(&site.cluster);
    ledger.wait_for(30, PATIENCE).await?;
    buckets[2].faults().refuse(true);
    ledger.wait_for(30, PATIENCE).await?;
    let safe = Instant::now() + Duration::from_secs(30);
    site.cluster.kill()?;
    site.agent.kill()?;
    ledger.stop().await?;
    std::fs::remove_dir_all(site.cluster.data())?;
    std::fs::remove_dir_all(site.deployment.state_dir())?;
    buckets[2].faults().refuse(false);
    site.ledger = ledger;
    for lost in names {
        // A majority of two would be refused, and nothing acknowledges here.
        let left = site.configuration.clone().without(lost).acknowledge("all");
        site.deployment.configure(&left)?;
        let name = format!("without-{lost}");
        let (restored, _) = site.restore_and_start(&name, "latest", &[]).await?;
        let judged = site.judge(&restored, &Target::Latest { acknowledged_until: safe }).await;
        judged.with_context(|| format!("without {lost}"))?;
        ensure!(restored.value("SELECT count(*) FROM prepared").await? == "2", "without {lost}");
    }
    Ok(())
}
on_drawn_major!(every_commit_is_in_two_of_three);

/// A machine that does other things as well may take longer for one shutdown, not for each of these.
const STOPS_MAX: usize = 5;
const STOP_MAX: Duration = Duration::from_secs(2);

/// A fast shutdown of a server whose only synchronous standby is the agent ends within two seconds, though commits wait;
/// with one location down under `all`, where they can never be answered, too.
async fn a_fast_stop_with_waiting_commits(scene: &Scene, major: Major) -> Result<()> {
    let (one, two) = (Bucket::start().await, Bucket::start().await);
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration =
        Configuration::default().server(&cluster).acknowledge("all").flush_interval("10m");
    let configuration = with_bucket(with_bucket(configuration, &one, "one"), &two, "two");
    let mut site = Site::of(scene, cluster, configuration).await?;
    for two_is_up in [true, false] {
        let mut quickest = Duration::MAX;
        for _ in 0..STOPS_MAX {
            quickest = quickest.min(stop_and_start(&mut site, &two, two_is_up).await?);
            if quickest < STOP_MAX {
                break;
            }
        }
        ensure!(quickest < STOP_MAX, "{quickest:?}; second location up: {two_is_up}");
    }
    site.ledger.stop().await?;
    site.all_stored().await?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(a_fast_stop_with_waiting_commits);

/// A shutdown that is held up ends here.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// A standby whose agent is the cluster's only one is shut down, and writes no checkpoint at its end; a location that the policy needs
/// is away. It is not held up.
async fn a_standby_stops_while_a_location_is_away(scene: &Scene, major: Major) -> Result<()> {
    let (one, two) = (Bucket::start().await, Bucket::start().await);
    let primary = Cluster::build(scene, &major).start().await?;
    let mut ledger = Ledger::create(&primary, load(), scene.random()).await?;
    let mut standby = primary.standby(scene, "standby").await?;
    ledger.start(&primary);
    let configuration = Configuration::default().server(&standby).acknowledge("all");
    let configuration = with_bucket(with_bucket(configuration, &one, "one"), &two, "two");
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    let mut agent = deployment.init_and_run().await?;
    agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
    two.faults().refuse(true);
    ledger.wait_for(50, PATIENCE).await?;
    let waits = |status: &Value| stored(status).is_ok_and(|stored| stored[0] > stored[1]);
    agent.wait_until("one has more than two", PATIENCE, waits).await?;
    ledger.stop().await?;
    standby.stop_with(Signal::INT, STOP_PATIENCE).await?;
    two.faults().refuse(false);
    standby.start().await?;
    crate::site::all_stored(&mut agent, &primary).await.map(drop)
}
on_drawn_major!(a_standby_stops_while_a_location_is_away);

/// How long a fast shutdown of the server takes while commits wait.
async fn stop_and_start(site: &mut Site<'_>, two: &Bucket, two_is_up: bool) -> Result<Duration> {
    synchronous(&site.cluster, "*", "sync").await?;
    site.ledger.wait_for(20, PATIENCE).await?;
    // So that what is left at the end is not the writing of pages.
    site.cluster.sql("CHECKPOINT").await?;
    two.faults().refuse(!two_is_up);
    tokio::time::sleep(Duration::from_millis(700)).await;
    let took = site.cluster.stop_with(Signal::INT, Duration::from_secs(60)).await?;
    two.faults().refuse(false);
    site.cluster.start().await?;
    let streams = |status: &Value| status["wal"]["connected"] == true;
    site.agent.wait_until("it streams again", PATIENCE, streams).await?;
    site.ledger.wait_for(20, PATIENCE).await?;
    Ok(took)
}

/// Two agents, `ANY 1`: one is killed, later the other is frozen. No commit waits for longer than ten seconds, and
/// nothing is lost.
async fn two_agents_and_one_is_lost(scene: &Scene, major: Major) -> Result<()> {
    const STALL_MAX: Duration = Duration::from_secs(10);
    let cluster = Cluster::build(scene, &major).start().await?;
    let start = configuration(scene, &cluster)?.acknowledge("all").flush_interval("10m");
    let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
    let key = scene.path("both.key");
    let first = Deployment::new(scene, "a", &start.clone().agent("a")).await?;
    std::fs::copy(first.key(), &key)?;
    let mut a = first.init_and_run().await?;
    a.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
    let second = Deployment::new(scene, "b", &start.agent("b").key(&key)).await?;
    let mut b = second.init_and_run().await?;
    b.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
    synchronous(&cluster, "ANY 1 (backstay_a, backstay_b)", "quorum").await?;
    ledger.start(&cluster);
    ledger.wait_for(50, PATIENCE).await?;

    a.kill()?;
    ledger.wait_for(20, STALL_MAX).await.context("when the first was killed")?;
    a.restart().await?;
    a.wait_until("it streams again", PATIENCE, |s| s["wal"]["connected"] == true).await?;
    ledger.wait_for(50, PATIENCE).await?;
    let end = cluster.flushed().await?;
    let has_all = |status: &Value| acknowledged(status) >= Some(end);
    a.wait_until("it has caught up", PATIENCE, has_all).await?;
    let caught_up = ledger.acknowledged();
    b.freeze()?;
    let stalled = longest_stall(&ledger, Duration::from_secs(12)).await;
    ensure!(stalled < STALL_MAX, "commits waited for {stalled:?} when the second froze");
    ensure!(ledger.acknowledged() > caught_up + 20, "hardly any commit came through");
    ledger.stop().await?;
    b.thaw()?;
    let safe = Instant::now();
    drop((a, b));
    drop(cluster);
    std::fs::remove_dir_all(scene.path("near"))?;
    let name = "copy";
    let (restored, _) =
        crate::site::restore_and_start(scene, &first, &major, name, "latest", &[]).await?;
    let target = Target::Latest { acknowledged_until: safe };
    crate::site::judge(&ledger, &restored, &target).await.map(|_| ())
}
on_drawn_major!(two_agents_and_one_is_lost);

/// The longest time without an acknowledged commit.
async fn longest_stall(ledger: &Ledger, watched: Duration) -> Duration {
    let (began, mut longest) = (Instant::now(), Duration::ZERO);
    let (mut last, mut count) = (Instant::now(), ledger.acknowledged());
    while began.elapsed() < watched {
        tokio::time::sleep(Duration::from_millis(20)).await;
        longest = longest.max(last.elapsed());
        if ledger.acknowledged() > count {
            (last, count) = (Instant::now(), ledger.acknowledged());
        }
    }
    longest
}

/// One location is away for long while commits wait for `any`: they go on, what waits for it stays some hundreds of objects,
/// memory stays bounded, an alarm names it; afterwards both locations hold the same.
async fn a_long_outage_costs_the_others_nothing(scene: &Scene, major: Major) -> Result<()> {
    let (one, two) = (Bucket::start().await, Bucket::start().await);
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = Configuration::default().server(&cluster).acknowledge("any");
    let configuration = with_bucket(with_bucket(configuration, &one, "one"), &two, "two");
    let mut site = Site::of(scene, cluster, configuration).await?;
    synchronous(&site.cluster, "*", "sync").await?;
    let puts = one.request_counts().get(&Operation::Put).copied().unwrap_or_default();
    two.faults().refuse(true);
    let mut done = 0;
    while done <= 600 {
        site.ledger.wait_for(100, PATIENCE).await?;
        done = one.request_counts().get(&Operation::Put).copied().unwrap_or_default() - puts;
    }
    let few_wait = |status: &Value| {
        let waiting = status["wal"]["locations"][1]["queued_objects"].as_u64();
        alarm(status, "location-down").is_some() && waiting.is_some_and(|n| n < 300)
    };
    let what = format!("an alarm names it, and of {done} objects few wait for it");
    site.agent.wait_until(&what, PATIENCE, few_wait).await?;
    // Some more spans, faster than the ledger would.
    for _ in 0..4 {
        site.cluster.sql("SELECT pg_switch_wal()").await?;
        site.ledger.wait_for(20, PATIENCE).await?;
    }
    let peak = site.agent.memory_peak_bytes()?;
    ensure!(peak < 400 << 20, "the agent took {} MiB", peak >> 20);
    site.ledger.stop().await?;
    two.faults().refuse(false);
    site.all_stored().await?;
    site.agent.wait_until("all is well again", PATIENCE, well).await?;
    wait_until_equal((&one, "one"), (&two, "two")).await?;
    one.faults().refuse(true);
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(a_long_outage_costs_the_others_nothing);

fn restart_lsn(text: &str) -> Result<Lsn> {
    text.parse().map_err(|_| anyhow::anyhow!("not a position: {text:?}"))
}

/// `on-spool-full = "release"`: with every location away the spool gives up its oldest WAL and the server's slot goes on; the
/// gap is on record, and a snapshot closes it as soon as the locations are back.
async fn a_full_spool_gives_up_the_oldest(scene: &Scene, major: Major) -> Result<()> {
    const SPOOL: u64 = 256 << 20;
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?
        .durability("on-spool-full", "release")
        .extra("[spool]\nmax-size = \"256MiB\"");
    let mut site = Site::of(scene, cluster, configuration).await?;
    let first = site.first_snapshot().await?;
    let away = LOCATIONS.map(|name| scene.path(&format!("{name}.away")));
    for (name, away) in LOCATIONS.iter().zip(&away) {
        folder::unmount(&site.location(name), away)?;
    }
    let slot = "SELECT restart_lsn FROM pg_replication_slots";
    let before = restart_lsn(&site.cluster.value(slot).await?)?;
    for _ in 0..24 {
        site.ledger.wait_for(2, PATIENCE).await?;
        site.cluster.sql("SELECT pg_switch_wal()").await?;
    }
    let gave_up = |status: &Value| {
        alarm(status, "spool-full").is_some_and(|why| why.contains("given up"))
            && alarm(status, "wal-gap").is_some_and(|why| why.contains("the spool was full"))
    };
    let status = site.agent.wait_until("the oldest is given up", PATIENCE, gave_up).await?;
    ensure!(status["wal"]["spool_bytes"].as_u64() <= Some(SPOOL + (17 << 20)), "{status}");
    let end = site.cluster.flushed().await?;
    let goes_on = |status: &Value| acknowledged(status) >= Some(end);
    site.agent.wait_until("the server is told to go on", PATIENCE, goes_on).await?;
    let deadline = Instant::now() + PATIENCE;
    while restart_lsn(&site.cluster.value(slot).await?)?.since(before) <= SPOOL {
        ensure!(Instant::now() < deadline, "the slot stays near {before}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for (name, away) in LOCATIONS.iter().zip(&away) {
        folder::mount_again(away, &site.location(name))?;
    }
    let closed = |status: &Value| {
        has_snapshot(status) && status["snapshots"]["last"] != first.as_str() && well(status)
    };
    site.agent.wait_until("a snapshot closes the gap", PATIENCE * 2, closed).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let inside = format!("lsn:{}", before.add(40 << 20));
    let lost = site.deployment.backstay(&["plan", "--to", &inside]).await?;
    lost.expect(3)?.says(&["WAL", "remedy"])?;
    let (restored, _) = site.restore_and_start("latest", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await?;
    // It is known after a restart, and asks for no other snapshot.
    let last = site.agent.status().await?["snapshots"]["last"].clone();
    site.agent.terminate(PATIENCE).await?;
    site.agent.restart().await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let status = site.agent.status().await?;
    ensure!(
        status["wal"]["gap_end"].is_string() && status["snapshots"]["last"] == last,
        "{status}"
    );
    ensure!(status["snapshots"]["running"].is_null(), "{status}");
    Ok(())
}
on_drawn_major!(a_full_spool_gives_up_the_oldest);

/// A spool that is full holds, unless told otherwise: WAL stays at the server, and nothing is given up. The agent warns
/// while there is time that the slot will lose it, and all is well when the location is back.
async fn a_full_spool_holds_and_the_slot_is_watched(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major)
        .setting("max_slot_wal_keep_size", "1GB")
        .setting("min_wal_size", "32MB")
        .setting("max_wal_size", "64MB")
        .start()
        .await?;
    let configuration = configuration(scene, &cluster)?.extra("[spool]\nmax-size = \"256MiB\"");
    let mut site = Site::of(scene, cluster, configuration).await?;
    let away = scene.path("away");
    folder::unmount(&site.location("far"), &away)?;
    for _ in 0..21 {
        site.ledger.wait_for(2, PATIENCE).await?;
        site.cluster.sql("SELECT pg_switch_wal()").await?;
    }
    let held = |status: &Value| {
        alarm(status, "spool-full").is_some_and(|why| why.contains("left at the server"))
            && alarm(status, "slot-at-risk").is_some_and(|why| why.contains("minutes are left"))
            && status["wal"]["slot"]["minutes_left"].is_u64()
    };
    let status = site.agent.wait_until("it holds, and warns", PATIENCE, held).await?;
    ensure!(status["wal"]["slot"]["held_bytes"].as_u64() > Some(32 << 20), "{status}");
    ensure!(alarm(&status, "wal-gap").is_none(), "{status}");
    let people = site.deployment.agent_command(&["status"]).await?.expect(10)?;
    people.says(&["slot", "minutes at the present rate", "slot-at-risk"])?;
    // Nothing is read from it any more; it need not wait for that.
    let stopped = site.cluster.stop_with(Signal::INT, STOP_PATIENCE).await;
    stopped.context("a full spool holds up the server's shutdown")?;
    site.cluster.start().await?;
    folder::mount_again(&away, &site.location("far"))?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.agent.wait_until("all is well again", PATIENCE * 2, well).await?;
    for name in LOCATIONS {
        folder::wal_without_holes(&site.location(name))?;
    }
    Ok(())
}
on_drawn_major!(a_full_spool_holds_and_the_slot_is_watched);

/// A location fails one request, and then takes long to show that it is still the right one. What it has taken meanwhile
/// counts: the commit whose WAL is there returns.
async fn what_is_stored_counts_while_its_location_is_asked(
    scene: &Scene,
    major: Major,
) -> Result<()> {
    const TAKES: Duration = Duration::from_secs(3);
    const ASKED_FOR: Duration = Duration::from_secs(12);
    let bucket = Bucket::start().await;
    // Nothing else commits.
    let cluster = Cluster::build(scene, &major).setting("autovacuum", "off").start().await?;
    let configuration =
        Configuration::default().server(&cluster).acknowledge("all").flush_interval("10m");
    let configuration = with_bucket(configuration, &bucket, "slow");
    let mut site = Site::of(scene, cluster, configuration).await?;
    // When this is stored, before the interval is over, the agent knows that commits wait.
    synchronous(&site.cluster, "*", "sync").await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.cluster.sql("CREATE TABLE waits (n int)").await?;
    let insert = "INSERT INTO waits VALUES (1)";
    let (first, second) = (site.cluster.connect().await?, site.cluster.connect().await?);
    let faults = bucket.faults();
    let on_wal = |action| Fault::on(Operation::Put, action).key("/wal/").times(1);
    let taken = faults.add(on_wal(Action::Delay(TAKES)));
    let failed = faults.add(on_wal(Action::ErrorBefore(403)));
    let asked = faults.add(Fault::on(Operation::Get, Action::Delay(ASKED_FOR)).key("/cluster"));
    let began = Instant::now();
    let later = async {
        while faults.fired(taken) == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        second.batch_execute(insert).await.context("the second commit")
    };
    let earlier = async {
        first.batch_execute(insert).await.context("the first commit")?;
        let took = began.elapsed();
        ensure!(faults.fired(failed) == 1 && faults.fired(asked) > 0, "nothing went wrong");
        ensure!(took < ASKED_FOR, "the first commit took {took:?}");
        faults.remove(asked);
        Ok(())
    };
    tokio::time::timeout(PATIENCE, async { tokio::try_join!(earlier, later) }).await??;
    Ok(())
}
on_drawn_major!(what_is_stored_counts_while_its_location_is_asked);
