//! Two histories of one cluster, two agents of one server, and WAL that nobody has: kept apart, told, and closed.

use crate::folder;
use crate::site::{
    LOCATIONS, PATIENCE, Site, all_stored, configuration, has_snapshot, judge, restore_and_start,
};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::ledger::{Ledger, Target};
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::Agent;
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::time::Duration;

/// Waits until the agent streams on another branch than `before`, with a snapshot newer than `last`; that branch.
async fn on_a_branch_of_its_own(agent: &mut Agent, before: &Value, last: &Value) -> Result<String> {
    let own = |status: &Value| {
        let branch = &status["wal"]["branch"];
        branch.is_string()
            && branch != before
            && has_snapshot(status)
            && status["snapshots"]["last"] != *last
    };
    let status = agent.wait_until("it is on a branch of its own", PATIENCE, own).await?;
    Ok(status["wal"]["branch"].as_str().context("a branch")?.to_owned())
}

/// Two standbys are promoted apart: both become timeline 2. Neither's WAL gets among the other's, and each history can be
/// restored by the name of its branch.
async fn two_servers_promoted_apart(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let servers =
        [site.cluster.standby(scene, "s1").await?, site.cluster.standby(scene, "s2").await?];
    site.ledger.wait_for(60, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    for server in &servers {
        server.catch_up(&site.cluster, PATIENCE).await?;
    }
    let last = site.agent.status().await?["snapshots"]["last"].clone();
    site.agent.kill()?;
    site.cluster.kill()?;
    let mut told = Vec::new();
    let mut taken = last;
    for (server, name) in servers.iter().zip(["a1", "a2"]) {
        server.promote().await?;
        let deployment = site.deploy(name, server).await?;
        let mut agent = Agent::start(&deployment).await?;
        let branch = on_a_branch_of_its_own(&mut agent, &Value::Null, &taken).await?;
        taken = agent.status().await?["snapshots"]["last"].clone();
        let session = server.connect().await?;
        let ledger = site.ledger.forked(&session, scene.random().fork(name)).await?;
        told.push((deployment, agent, branch, ledger));
    }
    ensure!(told[0].2 != told[1].2, "both write to branch {}", told[0].2);
    ensure!(told.iter().all(|(.., branch, _)| branch.starts_with("00000002-")), "{}", told[0].2);
    for (server, (.., ledger)) in servers.iter().zip(&mut told) {
        ledger.start(server);
    }
    for (server, (_, agent, _, ledger)) in servers.iter().zip(&mut told) {
        ledger.wait_for(80, PATIENCE).await?;
        ledger.stop().await?;
        all_stored(agent, server).await?;
    }
    for name in LOCATIONS {
        folder::wal_without_holes(&site.location(name))?;
    }
    let args = ["plan", "--to", "latest", "--timeline", "2"];
    told[0].0.backstay(&args).await?.expect(3)?.says(&["two histories", &told[0].2, &told[1].2])?;
    for (number, (deployment, _, branch, ledger)) in told.iter().enumerate() {
        let more = ["--timeline", branch.as_str()];
        let name = format!("r{number}");
        let (restored, _) =
            restore_and_start(scene, deployment, &major, &name, "latest", &more).await?;
        judge(ledger, &restored, &Target::All).await.context(name)?;
    }
    Ok(())
}
on_drawn_major!(two_servers_promoted_apart);

/// The server is put back to an older copy of itself and goes on: the same timeline, the same positions, other bytes. The agent,
/// with its spool and without, leaves the old history as it is and gives the new one a branch of its own.
async fn a_server_that_was_put_back(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.cluster.stop().await?;
    let keep = scene.path("keep");
    folder::copy(site.cluster.data(), &keep)?;
    site.cluster.start().await?;
    let session = site.cluster.connect().await?;
    let old = site.ledger.forked(&session, scene.random().fork("old")).await?;
    drop(session);
    site.ledger.start(&site.cluster);
    site.ledger.wait_for(150, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let mut others: Vec<(String, Ledger)> = Vec::new();
    let status = site.agent.status().await?;
    let first = status["wal"]["branch"].as_str().context("a branch")?.to_owned();
    for round in 0..2 {
        let status = site.agent.status().await?;
        let (branch, last) = (status["wal"]["branch"].clone(), status["snapshots"]["last"].clone());
        site.cluster.stop().await?;
        if round == 1 {
            site.agent.kill()?;
            std::fs::remove_dir_all(site.deployment.state_dir())?;
        }
        folder::copy(&keep, site.cluster.data())?;
        site.cluster.start().await?;
        let session = site.cluster.connect().await?;
        let mut ledger = old.forked(&session, scene.random().fork(&format!("o{round}"))).await?;
        ledger.start(&site.cluster);
        ledger.wait_for(30, PATIENCE).await?;
        if round == 1 {
            site.agent.restart().await?;
        }
        let own = on_a_branch_of_its_own(&mut site.agent, &branch, &last).await?;
        ensure!(own != first && own.starts_with("00000001-"), "{own}");
        ledger.wait_for(50, PATIENCE).await?;
        ledger.stop().await?;
        site.all_stored().await?;
        others.push((own, ledger));
    }
    let list = site.deployment.backstay(&["list"]).await?.success()?;
    list.says(&["diverged", &first])?;
    let own = others.iter().map(|(branch, ledger)| (branch, ledger));
    for (number, (branch, ledger)) in own.chain([(&first, &site.ledger)]).enumerate() {
        let more = ["--timeline", branch.as_str()];
        let (restored, _) = site.restore_and_start(&format!("r{number}"), "latest", &more).await?;
        judge(ledger, &restored, &Target::All).await.with_context(|| branch.clone())?;
    }
    Ok(())
}
on_drawn_major!(a_server_that_was_put_back);

/// Two agents of one server: one takes the snapshots, the other says who does, and takes over when that one is gone.
async fn one_of_two_agents_takes_the_snapshots(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let other = site.deploy("other", &site.cluster).await?;
    let mut agent = Agent::start(&other).await?;
    let streams = |status: &Value| status["wal"]["connected"] == true;
    agent.wait_until("it streams", PATIENCE, streams).await?;
    let leases = folder::named(&site.location("near"), "/lease/")?;
    ensure!(leases.len() == 1, "{leases:?}");
    let refused = other.agent_command(&["snapshot"]).await?;
    refused.expect(8)?.says(&["lease 1", "remedy"])?;
    // Whoever holds it goes on.
    site.snapshot().await?;
    ensure!(folder::named(&site.location("near"), "/lease/")? == leases, "a lease is renewed");
    site.agent.kill()?;
    let gone = "SELECT count(*) FROM pg_replication_slots WHERE active";
    let deadline = std::time::Instant::now() + PATIENCE;
    while site.cluster.value(gone).await? != "1" {
        ensure!(std::time::Instant::now() < deadline, "the killed agent's walsender stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    other.agent_command(&["snapshot"]).await?.success()?;
    for name in LOCATIONS {
        ensure!(folder::named(&site.location(name), "/lease/")?.len() == 2, "at {name}");
    }
    // The first comes back: it is fenced, as long as the other lives.
    site.agent.restart().await?;
    site.agent.wait_until("it streams", PATIENCE, streams).await?;
    site.deployment.agent_command(&["snapshot"]).await?.expect(8)?.says(&["other", "lease 2"])?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(one_of_two_agents_takes_the_snapshots);

/// A record in the server's own WAL is damaged before the agent has received it. What comes after is not taken for its
/// continuation: the gap is told to every location, and a snapshot closes it.
async fn a_broken_chain(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?;
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let last = site.agent.status().await?["snapshots"]["last"].clone();
    site.agent.kill()?;
    let at: Lsn = site
        .cluster
        .value("SELECT pg_current_wal_insert_lsn()")
        .await?
        .parse()
        .ok()
        .context("an LSN")?;
    site.cluster
        .sql("CREATE TABLE filler AS SELECT md5(n::text) FROM generate_series(1, 2000) n")
        .await?;
    let file = site.cluster.value(&format!("SELECT pg_walfile_name('{}')", at.add(1))).await?;
    let path = site.cluster.data().join("pg_wal").join(file);
    damage(&path, (at.get() % (16 << 20)) + 20_000)?;
    site.cluster.sql("SELECT pg_switch_wal()").await?;
    site.ledger.start(&site.cluster);
    site.agent.restart().await?;
    let another = |status: &Value| has_snapshot(status) && status["snapshots"]["last"] != last;
    site.agent.wait_until("a snapshot closes the gap", PATIENCE * 2, another).await?;
    ensure!(site.agent.log().contains("wal-broken"), "no alarm");
    for name in LOCATIONS {
        let deadline = std::time::Instant::now() + PATIENCE;
        while folder::named(&site.location(name), "/gap/")?.len() != 1 {
            ensure!(std::time::Instant::now() < deadline, "{name} does not know of one gap");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    site.deployment
        .backstay(&["list"])
        .await?
        .success()?
        .says(&["cannot be recovered", "broken"])?;
    let branch = site.agent.status().await?["wal"]["branch"].clone();
    site.told("gap", branch.as_str().context("the branch")?).await?;
    let inside = format!("lsn:{}", at.add(30_000));
    site.deployment.backstay(&["plan", "--to", &inside]).await?.expect(3)?.says(&["broken"])?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(a_broken_chain);

fn damage(path: &std::path::Path, offset: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let mut bytes = [0; 64];
    file.read_exact_at(&mut bytes, offset)?;
    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
    file.write_all_at(&bytes, offset)?;
    Ok(())
}
