//! A snapshot that is interrupted is taken up by the next one, and what that does not need goes.

use crate::folder;
use crate::retention::unnamed_packs;
use crate::site::{LOCATIONS, PATIENCE, Site, configuration, has_snapshot, load};
use anyhow::{Context, Result, ensure};
use backstay_common::name::ObjectName;
use backstay_common::snapshot::ManifestPlain;
use backstay_common::snapshot::manifest::read_plain;
use backstay_tests::ledger::{Ledger, Target};
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Deployment};
use backstay_tests::scene::Scene;
use std::path::Path;
use std::time::{Duration, Instant};

const TRIAL: &str = "[retention]\nwindow = \"1h\"\ngrace = \"2s\"\n";
const ROUNDS: i64 = 2;

/// The bytes of the packs that both locations have.
fn packs_of_both(near: &Path, far: &Path) -> Result<u64> {
    let there = folder::named(far, "/pack/")?;
    let both = folder::named(near, "/pack/")?.into_iter().filter(|name| there.contains(name));
    Ok(both.map(|name| std::fs::metadata(near.join(name)).map_or(0, |file| file.len())).sum())
}

fn manifest(root: &Path) -> Result<ManifestPlain> {
    let names = folder::named(root, "/manifest")?;
    let name = names.first().context("no manifest")?;
    let bytes = std::fs::read(root.join(name))?;
    let name: ObjectName = name.parse()?;
    Ok(read_plain(&bytes.into(), &name)?.1)
}

/// Killed in the middle of its first snapshot, several times, while pages change in between: the snapshot that is taken at last
/// stores clearly less than all of it, restores right, and of the others nothing stays.
async fn killed_in_the_middle_of_the_first_snapshot(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    cluster
        .sql("CREATE TABLE bulk AS SELECT n, 0 AS round, md5(n::text) || md5((n * 7)::text) || md5((n * 11)::text) AS m FROM generate_series(1, 1500000) n")
        .await?;
    // What a first reader would write goes to the disk before.
    for statement in ["VACUUM (FREEZE, ANALYZE) bulk", "CHECKPOINT"] {
        cluster.sql(statement).await?;
    }
    let quick = configuration(scene, &cluster)?.extra(TRIAL);
    let slow = quick.clone().snapshot("max-rate", "32MiB");
    let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
    let deployment = Deployment::new(scene, "backup", &slow).await?;
    ledger.start(&cluster);
    deployment.agent_command(&["init"]).await?.success()?;
    let mut random = scene.random().fork("moments");
    let [near, far] = LOCATIONS.map(|name| scene.path(name));

    for round in 1..=ROUNDS {
        let before = packs_of_both(&near, &far)?;
        let mut agent = Agent::start(&deployment).await?;
        let deadline = Instant::now() + PATIENCE;
        while packs_of_both(&near, &far)? == before {
            ensure!(Instant::now() < deadline, "round {round}: no pack is stored");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::sleep(Duration::from_millis(random.range(0..700))).await;
        agent.kill()?;
        for root in [&near, &far] {
            ensure!(folder::named(root, "/manifest")?.is_empty(), "round {round} was not in time");
        }
        let update = format!(
            "UPDATE bulk SET round = {round}, m = md5(m) || m WHERE n % 9973 = {round}; CHECKPOINT"
        );
        for statement in update.split("; ") {
            cluster.sql(statement).await?;
        }
    }

    let left = packs_of_both(&near, &far)?;
    deployment.configure(&quick)?;
    let agent = Agent::start(&deployment).await?;
    let mut site = Site { scene, cluster, ledger, configuration: quick, deployment, agent };
    site.agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
    site.ledger.wait_for(30, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let plain = manifest(&near)?;
    let used: u64 = plain.packs.iter().map(|pack| pack.live_bytes).sum();
    // Of what was left, some has changed since.
    ensure!(
        left > 0 && plain.stored_bytes + left * 8 / 10 < used,
        "{} of {used} bytes are stored, and {left} bytes were left",
        plain.stored_bytes
    );
    ensure!(plain.abandoned.as_ref().is_some_and(|ids| ids.len() == ROUNDS as usize), "{plain:?}");

    let deadline = Instant::now() + PATIENCE;
    for root in [&near, &far] {
        let begins = || folder::named(root, "/begin").map(|begins| begins.len());
        while unnamed_packs(root)? > 0 || begins()? > 1 {
            ensure!(
                Instant::now() < deadline,
                "{} has {} packs that no manifest names, and {} begins",
                root.display(),
                unnamed_packs(root)?,
                begins()?
            );
            tokio::time::sleep(Duration::from_millis(300)).await;
            site.deployment.agent_command(&["prune"]).await?.success()?;
        }
    }
    ensure!(!site.deployment.state_dir().join(format!("{}.packs", plain.system)).exists());

    site.agent.terminate(PATIENCE).await?;
    for (name, other) in [("near", "far"), ("far", "near")] {
        site.deployment.configure(&site.configuration.clone().without(other))?;
        let name = format!("from-{name}");
        let (mut restored, _) = site.restore_and_start(&name, "latest", &[]).await?;
        site.judge(&restored, &Target::All).await.with_context(|| name.clone())?;
        let digest = "SELECT count(*), sum(hashtext(n || m || round)::bigint) FROM bulk";
        let rows = [&site.cluster, &restored];
        let [there, here] = [rows[0].connect().await?, rows[1].connect().await?];
        ensure!(there.rows(digest).await? == here.rows(digest).await?, "{name}: bulk is another");
        restored.stop().await?;
    }
    Ok(())
}
on_drawn_major!(killed_in_the_middle_of_the_first_snapshot);
