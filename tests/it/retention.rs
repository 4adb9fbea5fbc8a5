//! What no moment of the window needs goes, in both locations, and nothing else does.

use crate::folder;
use crate::site::{
    LOCATIONS, PATIENCE, Site, configuration, has_snapshot, judge, restore, restore_and_start,
};
use anyhow::{Context, Result, ensure};
use backstay_common::name::ObjectName;
use backstay_common::snapshot::manifest::read_plain;
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, backstay_program};
use backstay_tests::scene::Scene;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A window for trials, and as much again for its margin.
const WINDOW: Duration = Duration::from_secs(20);
const SYSTEM: &str = "SELECT system_identifier FROM pg_control_system()";
const TRIAL: &str = "[retention]\nwindow = \"20s\"\ngrace = \"2s\"\n";

async fn start<'s>(scene: &'s Scene, major: &Major) -> Result<Site<'s>> {
    let cluster = Cluster::build(scene, major).start().await?;
    let configuration = configuration(scene, &cluster)?.extra(TRIAL);
    Site::of(scene, cluster, configuration).await
}

/// Until what has ended before now is older than the window.
async fn let_the_window_pass() {
    tokio::time::sleep(2 * WINDOW + Duration::from_secs(3)).await;
}

fn manifests(root: &Path) -> Result<BTreeSet<String>> {
    let named = folder::named(root, "/manifest")?;
    let id = |name: String| name.rsplit('/').nth(1).map(str::to_owned).context("a manifest's name");
    named.into_iter().map(id).collect()
}

/// Waits until each location has these snapshots, and the packs of these.
async fn wait_for_snapshots(site: &Site<'_>, wanted: &[&str]) -> Result<()> {
    let wanted: BTreeSet<String> = wanted.iter().map(|id| (*id).to_owned()).collect();
    let deadline = Instant::now() + PATIENCE;
    for location in LOCATIONS {
        let root = site.location(location);
        loop {
            let (found, packs) = (manifests(&root)?, unnamed_packs(&root)?);
            if found == wanted && packs == 0 {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "{location} has {found:?} and {packs} packs without a manifest, not {wanted:?}"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}

/// Packs that no manifest names. A manifest that names a pack which is not there is an error.
pub fn unnamed_packs(root: &Path) -> Result<usize> {
    let packs: BTreeSet<String> = folder::named(root, "/pack/")?.into_iter().collect();
    let mut named = BTreeSet::new();
    for name in folder::named(root, "/manifest")? {
        let Ok(bytes) = std::fs::read(root.join(&name)) else { continue };
        let name: ObjectName = name.parse()?;
        let (_, plain) = read_plain(&bytes.into(), &name)?;
        named.extend(plain.packs.iter().map(|pack| pack.name(plain.system).to_string()));
        // The manifest went while its packs were looked for.
        let is_there = root.join(name.to_string()).exists();
        let lacks =
            plain.packs.iter().any(|pack| !root.join(pack.name(plain.system).to_string()).exists());
        ensure!(
            !is_there || !lacks || !root.join(name.to_string()).exists(),
            "{name} lacks a pack"
        );
    }
    Ok(packs.difference(&named).count())
}

async fn prune(site: &Site<'_>, args: &[&str]) -> Result<Value> {
    let args: Vec<&str> = ["prune", "--json"].iter().chain(args).copied().collect();
    site.deployment.agent_command(&args).await?.success()?.json()
}

fn word<'v>(report: &'v Value, location: usize, snapshot: &str) -> Option<(bool, &'v str)> {
    let words = report["locations"][location]["snapshots"].as_array()?;
    let word = words.iter().find(|word| word["id"] == snapshot)?;
    Some((word["stays"].as_bool()?, word["reason"].as_str()?))
}

/// Old snapshots go with their packs; moments inside the window are restored from either location alone; a dry run tells and
/// changes nothing; a pin holds until it is given back; a shorter window waits for a word.
async fn what_the_window_does_not_need_goes(scene: &Scene, major: Major) -> Result<()> {
    let mut site = start(scene, &major).await?;
    let first = site.first_snapshot().await?;
    let pinned = site.snapshot().await?;
    let agent = site.deployment.clone();
    agent.agent_command(&["pin", &pinned, "--reason", "before the migration"]).await?.success()?;
    agent.backstay(&["list"]).await?.success()?.says(&["before the migration"])?;
    let third = site.snapshot().await?;
    let_the_window_pass().await;

    let report = prune(&site, &["--dry-run"]).await?;
    for location in 0..2 {
        let words = [&first, &pinned, &third].map(|id| word(&report, location, id));
        ensure!(matches!(words[0], Some((false, _))), "{words:?}");
        ensure!(words[1] == Some((true, "pinned")), "{words:?}");
        ensure!(matches!(words[2], Some((true, _))), "{words:?}");
        let named = report["locations"][location]["objects"].as_array().context("objects")?;
        ensure!(named.iter().any(|o| o["name"].as_str().is_some_and(|n| n.contains("/manifest"))));
        ensure!(
            manifests(&site.location(LOCATIONS[location]))?.contains(&first),
            "a dry run deleted"
        );
    }

    let session = site.cluster.connect().await?;
    site.ledger.wait_for(30, PATIENCE).await?;
    let moment = site.ledger.moment(&session).await?;
    site.ledger.wait_for(30, PATIENCE).await?;
    let fourth = site.snapshot().await?;
    site.all_stored().await?;
    wait_for_snapshots(&site, &[&pinned, &third, &fourth]).await?;
    for location in LOCATIONS {
        let root = site.location(location);
        let away = scene.path("away");
        std::fs::rename(&root, &away)?;
        let name = format!("without-{location}");
        let restored = site.restore_and_start(&name, &moment.rfc3339, &[]).await;
        std::fs::rename(&away, &root)?;
        let (mut restored, _) = restored.with_context(|| name.clone())?;
        site.judge(&restored, &Target::Time(moment.micros)).await?;
        restored.stop().await?;
    }

    agent.agent_command(&["unpin", &pinned]).await?.success()?;
    prune(&site, &[]).await?;
    let gone = |id: &str| {
        LOCATIONS.iter().all(|l| manifests(&site.location(l)).is_ok_and(|m| !m.contains(id)))
    };
    let deadline = Instant::now() + PATIENCE;
    while !gone(&pinned) {
        ensure!(Instant::now() < deadline, "the pin was given back, and {pinned} stays");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    a_shorter_window_waits(site).await
}
on_drawn_major!(what_the_window_does_not_need_goes);

async fn a_shorter_window_waits(mut site: Site<'_>) -> Result<()> {
    let shorter = configuration(site.scene, &site.cluster)?.extra(&TRIAL.replace("20s", "10s"));
    site.deployment.configure(&shorter)?;
    site.agent.terminate(PATIENCE).await?;
    // What was applied is remembered by the locations.
    std::fs::remove_dir_all(site.deployment.state_dir())?;
    site.agent.restart().await?;
    let report = prune(&site, &[]).await?;
    ensure!(report["locations"][0]["window"] == 20, "{report}");
    ensure!(report["locations"][0]["window_refused"] == 10, "{report}");
    let status = site.agent.status().await?;
    ensure!(status["alarms"].to_string().contains("window-shorter"), "{status}");
    let report = prune(&site, &["--accept-window"]).await?;
    ensure!(report["locations"][1]["window"] == 10, "{report}");
    let report = prune(&site, &[]).await?;
    ensure!(report["locations"][0]["window"] == 10, "{report}");
    let status = site.agent.status().await?;
    ensure!(!status["alarms"].to_string().contains("window-shorter"), "{status}");
    Ok(())
}

/// A restore that stands still while its snapshot leaves the window finds everything there when it goes on.
async fn a_restore_holds_what_it_reads(scene: &Scene, major: Major) -> Result<()> {
    let mut site = start(scene, &major).await?;
    site.cluster
        .sql("CREATE TABLE bulk AS SELECT n, md5(n::text) AS m, md5((n * 7)::text) AS k FROM generate_series(1, 600000) n")
        .await?;
    let read = site.snapshot().await?;
    site.all_stored().await?;
    let dir = scene.path("held");
    let mut child = Command::new(backstay_program())
        .arg("--config")
        .arg(site.deployment.config())
        .args(["restore", "--to", &format!("snapshot:{read}"), "--into"])
        .arg(&dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let pins =
        |site: &Site<'_>| folder::named(&site.location("far"), "/pins/").map(|pins| pins.len());
    let deadline = Instant::now() + PATIENCE;
    // It has claimed its folder: it knows of all its pins, and can give them back.
    while !dir.exists() {
        ensure!(Instant::now() < deadline && child.try_wait()?.is_none(), "the restore put no pin");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP)?;
    ensure!(child.try_wait()?.is_none() && pins(&site)? == 1, "the restore was done at once");

    let next = site.snapshot().await?;
    let_the_window_pass().await;
    let last = site.snapshot().await?;
    let report = prune(&site, &["--dry-run"]).await?;
    ensure!(word(&report, 0, &read) == Some((true, "pinned")), "{report}");
    wait_for_snapshots(&site, &[&read, &next, &last]).await?;

    kill_process(pid, Signal::CONT)?;
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        if let Some(ended) = child.try_wait()? {
            break ended;
        }
        ensure!(Instant::now() < deadline, "the restore does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    ensure!(ended.success(), "the restore ended with {ended}");
    let mut restored = Cluster::of(scene, &major, &dir)?;
    restored.start().await?;
    restored.wait_until_writable(PATIENCE).await?;
    ensure!(restored.value("SELECT count(*) FROM bulk WHERE m = md5(n::text)").await? == "600000");
    prune(&site, &[]).await?;
    let deadline = Instant::now() + PATIENCE;
    for name in LOCATIONS {
        while manifests(&site.location(name))?.contains(&read) {
            ensure!(Instant::now() < deadline, "{read} stays at {name}");
            tokio::time::sleep(Duration::from_millis(500)).await;
            prune(&site, &[]).await?;
        }
        ensure!(manifests(&site.location(name))?.contains(&last), "{last} went too");
    }
    // Gone, and a restore says so before it touches anything.
    let refused =
        restore(&site.deployment, &scene.path("gone"), &format!("snapshot:{read}"), &[]).await?;
    ensure!(refused.code != Some(0) && !scene.path("gone").exists());
    Ok(())
}
on_drawn_major!(a_restore_holds_what_it_reads);

/// After pg_upgrade the server is another system: refused by name until it is accepted. Then moments of both are restored, each of
/// the system that had it, and the old one goes when its last commit has left the window.
async fn both_systems_stay_in_the_window(scene: &Scene, major: Major) -> Result<()> {
    let mut site = start(scene, &major).await?;
    let old = site.first_snapshot().await?;
    let old_system = site.cluster.value(SYSTEM).await?;
    let session = site.cluster.connect().await?;
    site.ledger.wait_for(30, PATIENCE).await?;
    let moment = site.ledger.moment(&session).await?;
    site.ledger.wait_for(30, PATIENCE).await?;
    site.all_stored().await?;
    drop(session);
    site.agent.terminate(PATIENCE).await?;
    site.ledger.stop().await?;
    let ended = Instant::now();

    let next = Cluster::build(scene, &major).name("upgraded").start().await?;
    next.sql("CREATE TABLE era AS SELECT 'new'::text AS name").await?;
    let system = next.value(SYSTEM).await?;
    let [near, far] = LOCATIONS.map(|name| scene.path(name));
    let configuration = site.configuration.clone().server(&next);
    let deployment = site.deployment.clone();
    deployment.configure(&configuration)?;
    let refused: &[&str] = &[&old_system, &system, "init --accept-new-system"];
    deployment.agent_command(&["run"]).await?.expect(2)?.says(refused)?;
    deployment.agent_command(&["check"]).await?.expect(2)?.says(refused)?;
    deployment.agent_command(&["init"]).await?.expect(2)?.says(refused)?;
    ensure!(!far.join("accepted").exists(), "it was accepted before it was told to");
    let accept = ["init", "--accept-new-system"];
    deployment.agent_command(&accept).await?.success()?.says(&["takes the new system"])?;
    deployment.agent_command(&accept).await?.success()?.says(&["was initialised before"])?;
    deployment.agent_command(&["check"]).await?;

    let mut agent = Agent::start(&deployment).await?;
    let status = agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
    let new = status["snapshots"]["last"].as_str().context("the snapshot's name")?.to_owned();
    let listed = deployment.backstay(&["list", "--json"]).await?.success()?.json()?;
    ensure!(listed["system"] == system && listed["snapshots"][0]["id"] == new, "{listed}");
    ensure!(listed["earlier"][0]["system"] == old_system, "{listed}");
    ensure!(listed["earlier"][0]["snapshots"][0]["id"] == old, "{listed}");
    let planned = async |args: &[&str]| -> Result<Value> {
        let args: Vec<&str> = ["plan", "--json", "--to"].iter().chain(args).copied().collect();
        deployment.backstay(&args).await?.success()?.json()
    };
    ensure!(planned(&["latest"]).await?["system"] == system);
    ensure!(planned(&["latest", "--system", &old_system]).await?["system"] == old_system);
    ensure!(planned(&[&format!("snapshot:{old}")]).await?["system"] == old_system);
    deployment.backstay(&["list", "--system", "7"]).await?.expect(2)?.says(&["never had"])?;
    let (mut restored, _) =
        restore_and_start(scene, &deployment, &major, "before", &moment.rfc3339, &[]).await?;
    judge(&site.ledger, &restored, &Target::Time(moment.micros)).await?;
    restored.stop().await?;
    let (mut restored, _) =
        restore_and_start(scene, &deployment, &major, "after", "latest", &[]).await?;
    ensure!(restored.value("SELECT name FROM era").await? == "new");
    restored.stop().await?;

    deployment.agent_command(&["pin", &old, "--reason", "the last of 15"]).await?.success()?;
    deployment.agent_command(&["unpin", &old]).await?.success()?;
    if ended.elapsed() < WINDOW {
        let report = deployment.agent_command(&["prune", "--json"]).await?.success()?.json()?;
        let earlier = report["locations"].as_array().into_iter().flatten();
        let mut earlier = earlier.filter(|done| done["system"] == old_system);
        let stays = earlier.all(|done| done["snapshots"][0]["stays"] == true);
        ensure!(stays, "the old system goes though its commits are inside the window: {report}");
    }
    let deadline = Instant::now() + 2 * WINDOW + PATIENCE;
    let left = |root: &Path| -> Result<usize> {
        let of = |part: &str| folder::named(root, &format!("{old_system}/{part}"));
        Ok(of("snapshots/")?.len() + of("pack/")?.len() + of("wal/")?.len())
    };
    while left(&near)? + left(&far)? > 0 {
        ensure!(Instant::now() < deadline, "the old system stays: {}", left(&near)?);
        deployment.agent_command(&["prune"]).await?.success()?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    ensure!(ended.elapsed() > WINDOW, "the old system went while it was inside the window");
    for root in [&near, &far] {
        ensure!(manifests(root)?.contains(&new), "the new system's snapshot went too");
    }
    let listed = deployment.backstay(&["list", "--json"]).await?.success()?.json()?;
    ensure!(listed["earlier"].as_array().is_some_and(Vec::is_empty), "{listed}");
    agent.terminate(PATIENCE).await?;
    Ok(())
}
on_drawn_major!(both_systems_stay_in_the_window);
