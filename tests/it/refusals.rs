//! Bad input: each gets the thing, the reason and the remedy, and the exit code that is promised.

use crate::site::{LOCATIONS, PATIENCE, Site, configuration, has_snapshot, load, restore, stored};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_common::postgres::{Connection, Conninfo, Mode};
use backstay_common::segment::TimelineId;
use backstay_tests::bucket::{Action, Bucket, Fault, Operation};
use backstay_tests::ledger::{Ledger, Target};
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Agent, Configuration, Deployment};
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// All faults of a file at once, with their lines; from both programs.
async fn faults_of_the_configuration(scene: &Scene, _: Major) -> Result<()> {
    let near = scene.path("near");
    let configuration = Configuration::default()
        .conninfo("host=/tmp colour=blue")
        .folder("near", &near)?
        .location("near", "ftp://elsewhere/x")
        .acknowledge("most")
        .flush_interval("soon")
        .snapshot("schedule", "whenever")
        .window("1 fortnight")
        .extra("[postgre]\nconninfo = \"\"\n");
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    let text = std::fs::read_to_string(deployment.config())?;
    let line_of = |words: &str| {
        let found = text.lines().position(|line| line.contains(words));
        found.map(|n| format!("line {}: ", n + 1)).with_context(|| format!("{words} in {text}"))
    };
    let mut words = Vec::new();
    for fault in ["colour=blue", "ftp://", "most", "soon", "whenever", "fortnight", "[postgre]"] {
        words.push(line_of(fault)?);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).chain(["unknown key"]).collect();
    let state = deployment.state_dir();
    for verb in ["init", "check", "run", "status", "snapshot"] {
        deployment.agent_command(&[verb]).await?.expect(2)?.says(&words)?;
    }
    for verb in [&["list"][..], &["plan", "--to", "latest"]] {
        deployment.backstay(verb).await?.expect(2)?.says(&words)?;
    }
    ensure!(!state.exists(), "a faulty configuration was acted on");

    for (schedule, why) in [("99 2 * * *", "99"), ("0 2 30 2 *", "never due")] {
        let never = Configuration::default().conninfo("host=/tmp").folder("near", &near)?;
        deployment.configure(&never.snapshot("schedule", schedule))?;
        for verb in ["init", "check", "run"] {
            deployment.agent_command(&[verb]).await?.expect(2)?.says(&["schedule", why])?;
        }
    }

    std::fs::write(deployment.config(), "cluster = \"orders\"\nkeys = ]")?;
    deployment.agent_command(&["check"]).await?.expect(2)?.says(&["line 2"])?;
    std::fs::remove_file(deployment.config())?;
    deployment.agent_command(&["check"]).await?.expect(2)?.says(&["backstay.toml", "--config"])?;
    deployment.backstay(&["list"]).await?.expect(2)?.says(&["backstay.toml", "--config"])?;
    deployment.agent_command(&["dance"]).await?.expect(2)?;
    deployment.backstay(&["restore", "--to"]).await?.expect(2)?;
    Ok(())
}
on_drawn_major!(faults_of_the_configuration);

/// A server that is not there, that cannot be backed up, that is full, that does not let us.
async fn servers_that_cannot_be_backed_up(scene: &Scene, major: Major) -> Result<()> {
    let mut cluster = Cluster::build(scene, &major)
        .setting("wal_level", "minimal")
        .setting("max_wal_senders", "0")
        .start()
        .await?;
    let configuration = configuration(scene, &cluster)?;
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    for verb in ["init", "check", "run"] {
        let refused = deployment.agent_command(&[verb]).await?.expect(6)?;
        refused.says(&["wal_level = minimal", "remedy", "wal_level = replica", "restart"])?;
    }
    for setting in ["wal_level = 'replica'", "max_wal_senders = 1", "max_replication_slots = 1"] {
        cluster.sql(&format!("ALTER SYSTEM SET {setting}")).await?;
    }
    cluster.stop().await?;
    for verb in ["init", "check"] {
        let refused = deployment.agent_command(&[verb]).await?.expect(6)?;
        refused.says(&[&cluster.socket_dir().display().to_string(), "remedy"])?;
    }
    cluster.start().await?;
    deployment.agent_command(&["init"]).await?.success()?;
    no_walsender(&cluster).await?;
    deployment.agent_command(&["check"]).await?.success()?;
    no_walsender(&cluster).await?;

    // Somebody else has the one walsender; then only the one slot.
    let conninfo = Conninfo::parse(&cluster.conninfo())?;
    let other = Connection::connect(&conninfo, Mode::Replication).await?;
    let refused = deployment.agent_command(&["check"]).await?.expect(6)?;
    refused.says(&["max_wal_senders", "remedy"])?;
    drop(other);
    no_walsender(&cluster).await?;
    cluster.sql("SELECT pg_create_physical_replication_slot('theirs')").await?;
    let refused = deployment.agent_command(&["check"]).await?.expect(6)?;
    refused.says(&["slot", "remedy", "max_replication_slots"])?;
    cluster.sql("SELECT pg_drop_replication_slot('theirs')").await?;

    // A role that lacks one right after the other; what is told is what helps.
    cluster.sql("CREATE ROLE backstay LOGIN").await?;
    let plain = cluster.conninfo().replace("user=postgres", "user=backstay");
    let plain = configuration.clone().conninfo(&plain);
    deployment.configure(&plain)?;
    let mut granted = 0;
    loop {
        no_walsender(&cluster).await?;
        let finished = deployment.agent_command(&["check"]).await?;
        if finished.code == Some(0) {
            break;
        }
        let finished = finished.expect(6)?.says(&["remedy: "])?;
        let remedies =
            finished.stdout.lines().filter_map(|line| line.trim().strip_prefix("remedy: "));
        let remedy = remedies
            .filter(|remedy| remedy.starts_with("alter role") || remedy.starts_with("grant"))
            .map(str::to_owned)
            .next()
            .with_context(|| format!("no remedy to run: {}", finished.stdout))?;
        cluster.sql(&remedy).await.with_context(|| remedy.clone())?;
        granted += 1;
        ensure!(granted < 6, "the remedies don't help: {}", finished.stdout);
    }
    ensure!(granted >= 3, "only {granted} rights were asked for");

    // The slot is in somebody else's hands: the agent says so and goes on trying, and takes it when it is free.
    cluster.sql("ALTER SYSTEM SET max_wal_senders = 5").await?;
    cluster.restart().await?;
    deployment.configure(&configuration)?;
    let mut agent = Agent::start(&deployment).await?;
    agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
    agent.kill()?;
    let slot = cluster.value("SELECT slot_name FROM pg_replication_slots").await?;
    no_walsender(&cluster).await?;
    let mut thief = Connection::connect(&conninfo, Mode::Replication).await?;
    let at = thief.identify_system().await?.flush;
    let segment = Lsn::new(at.get() / (16 << 20) * (16 << 20));
    let stream = thief.start_replication(Some(&slot), TimelineId::FIRST, segment).await?;
    agent.restart().await?;
    let told = |status: &Value| status["alarms"].to_string().contains(&slot);
    agent.wait_until("an alarm names the slot", PATIENCE, told).await?;
    drop(stream);
    let well = |status: &Value| {
        status["wal"]["connected"] == true && status["alarms"].as_array().is_some_and(Vec::is_empty)
    };
    agent.wait_until("it streams again", PATIENCE, well).await?;
    Ok(())
}
on_drawn_major!(servers_that_cannot_be_backed_up);

/// A backend ends somewhat after its client.
async fn no_walsender(cluster: &Cluster) -> Result<()> {
    let count = "SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender') \
         + (SELECT count(*) FROM pg_replication_slots WHERE active)";
    let deadline = std::time::Instant::now() + PATIENCE;
    while cluster.value(count).await? != "0" {
        ensure!(std::time::Instant::now() < deadline, "a walsender stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A location that refuses writes, that was never initialised, that is not mounted; the last while the agent runs.
async fn locations_that_are_not_there(scene: &Scene, major: Major) -> Result<()> {
    let bucket = Bucket::start().await;
    let cluster = Cluster::build(scene, &major).start().await?;
    let both = configuration(scene, &cluster)?;
    let settings = bucket.settings("cloud");
    let secret =
        settings.secret_access_key.as_ref().map(|s| s.expose().to_owned()).unwrap_or_default();
    let lines = format!(
        "endpoint = \"{}\"\nallow-http = true\nregion = \"us-east-1\"\naccess-key-id = \"{}\"\nsecret-access-key = \"{secret}\"",
        bucket.endpoint(),
        settings.access_key_id.clone().unwrap_or_default(),
    );
    let with_cloud = both.clone().location_with("cloud", &settings.url, &lines);
    let deployment = Deployment::new(scene, "backup", &with_cloud).await?;
    let refusal = bucket.faults().add(Fault::on(Operation::Put, Action::ErrorBefore(403)));
    let refused = deployment.agent_command(&["init"]).await?.expect(5)?;
    refused.says(&["cloud", "remedy"])?;
    bucket.faults().remove(refusal);
    deployment.agent_command(&["init"]).await?.success()?;
    bucket.faults().add(Fault::on(Operation::Put, Action::ErrorBefore(403)));
    deployment.agent_command(&["check"]).await?.expect(5)?.says(&["cloud", "remedy"])?;

    // Never initialised: a folder that is there and empty, and a prefix with nothing below it.
    let empty = both.clone().folder("attic", &scene.path("attic"))?;
    deployment.configure(&empty)?;
    deployment.agent_command(&["check"]).await?.expect(5)?.says(&["attic", "init"])?;
    ensure!(std::fs::read_dir(scene.path("attic"))?.next().is_none(), "it was filled anew");

    // Not mounted: the folder is gone; then it is there, empty, as a mount point is.
    deployment.configure(&both)?;
    let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
    ledger.start(&cluster);
    let agent = Agent::start(&deployment).await?;
    let mut site = Site { scene, cluster, ledger, configuration: both, deployment, agent };
    site.first_snapshot().await?;
    let (mounted, away) = (site.location("far"), scene.path("unmounted"));
    std::fs::rename(&mounted, &away)?;
    site.deployment
        .agent_command(&["check"])
        .await?
        .expect(5)?
        .says(&["far", "remedy", "mount"])?;
    // What a write under way has left.
    let _ = std::fs::remove_dir_all(&mounted);
    std::fs::create_dir(&mounted)?;
    site.deployment.agent_command(&["check"]).await?.expect(5)?.says(&["far", "remedy"])?;
    let told = |status: &Value| {
        let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
        alarms.iter().any(|alarm| alarm["subject"] == "far")
    };
    site.agent.wait_until("an alarm names the location", PATIENCE, told).await?;
    site.agent.terminate(PATIENCE).await?;
    site.agent.restart().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let found: Vec<PathBuf> =
        std::fs::read_dir(&mounted)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    ensure!(found.is_empty(), "the mount point was filled: {found:?}");
    std::fs::remove_dir(&mounted)?;
    std::fs::rename(&away, &mounted)?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let well = |status: &Value| status["alarms"].as_array().is_some_and(Vec::is_empty);
    site.agent.wait_until("all is well again", PATIENCE, well).await?;
    site.locations_equal().await
}
on_drawn_major!(locations_that_are_not_there);

/// Before the first snapshot's end, later than what is covered, of an unknown name, transaction or snapshot.
async fn targets_out_of_reach(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
    ledger.run_for(&cluster, Duration::from_millis(500)).await?;
    let session = cluster.connect().await?;
    let early = ledger.moment(&session).await?;
    let configuration = configuration(scene, &cluster)?;
    let deployment = Deployment::new(scene, "backup", &configuration).await?;
    deployment.agent_command(&["init"]).await?.success()?;

    // Not even a snapshot.
    let dir = scene.path("never");
    restore(&deployment, &dir, "latest", &[]).await?.expect(3)?.says(&["snapshot"])?;
    ledger.start(&cluster);
    let agent = Agent::start(&deployment).await?;
    let mut site = Site { scene, cluster, ledger, configuration, deployment, agent };
    site.first_snapshot().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    site.all_stored().await?;
    site.agent.kill()?;
    let dark = site.ledger.moment(&session).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    let late = site.ledger.moment(&session).await?;
    site.ledger.stop().await?;

    let cases: [(String, &[&str]); 8] = [
        (early.rfc3339.clone(), &["snapshot"]),
        (format!("lsn:{}", early.lsn), &["snapshot"]),
        (late.rfc3339.clone(), &["latest"]),
        ("2031-01-01T00:00:00Z".to_owned(), &["latest"]),
        (format!("lsn:{}", late.lsn), &["latest"]),
        ("xid:4000000000".to_owned(), &["4000000000"]),
        ("name:never-made".to_owned(), &["never-made"]),
        ("snapshot:20200101T000000Z-00000000".to_owned(), &["20200101T000000Z-00000000"]),
    ];
    for (to, words) in cases {
        for refused in [
            restore(&site.deployment, &dir, &to, &[]).await?,
            site.deployment.backstay(&["plan", "--to", &to]).await?,
        ] {
            refused.expect(3)?.says(words).with_context(|| to.clone())?.says(&["remedy"])?;
        }
        ensure!(!dir.exists(), "--to {to}: refused, and something was made");
    }
    // An agent that is dead looks like an idle server: the time is refused all the same.
    site.deployment.backstay(&["plan", "--to", &dark.rfc3339]).await?.expect(3)?;
    // Both locations gone: 5, not 3.
    for name in LOCATIONS {
        std::fs::rename(site.location(name), scene.path(&format!("{name}.gone")))?;
    }
    restore(&site.deployment, &dir, "latest", &[])
        .await?
        .expect(5)?
        .says(&["near", "far", "remedy"])?;
    Ok(())
}
on_drawn_major!(targets_out_of_reach);

/// A small file system of its own, unmounted at the end.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None` where nobody may mount.
    fn mount(at: &Path, mib: u32) -> Result<Option<Tmpfs>> {
        std::fs::create_dir_all(at)?;
        let done = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "backstay-test"])
            .arg(at)
            .output();
        Ok(done.is_ok_and(|output| output.status.success()).then(|| Tmpfs(at.to_owned())))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

/// The disk under the spool is full: the agent says so and acknowledges nothing that it hasn't got; with room again, it
/// goes on without a gap.
async fn a_full_disk_under_the_spool(scene: &Scene, major: Major) -> Result<()> {
    let backup = scene.path("backup");
    let Some(_disk) = Tmpfs::mount(&backup, 96)? else {
        eprintln!("a_full_disk_under_the_spool: left out, nothing can be mounted here");
        return Ok(());
    };
    let mut site = Site::start(scene, &major).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.all_stored().await?;
    let ballast = backup.join("ballast");
    fill(&ballast)?;
    site.cluster
        .sql("CREATE TABLE filler AS SELECT repeat(md5(n::text), 30) AS m FROM generate_series(1, 40000) n")
        .await?;
    // Either way is sound: it ends with an error, or it stands still with an alarm.
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut told = String::new();
    while !told.contains("No space left") && !told.contains("full") {
        ensure!(std::time::Instant::now() < deadline, "it tells nothing: {told}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        told = site.agent.log();
        if site.agent.is_running() {
            told += &site.agent.status().await?["alarms"].to_string();
        }
    }
    if !site.agent.is_running() {
        let status = site.agent.wait(PATIENCE).await?;
        ensure!(status.code() == Some(1), "it ended with {status}");
        ensure!(told.contains("remedy"), "no remedy: {told}");
    }
    std::fs::remove_file(&ballast)?;
    if !site.agent.is_running() {
        site.agent.restart().await?;
    }
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let status = site.agent.status().await?;
    ensure!(stored(&status)?.len() == 2, "{status}");
    for name in LOCATIONS {
        crate::folder::wal_without_holes(&site.location(name))?;
    }
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await?;
    // Before the disk is unmounted.
    site.agent.terminate(PATIENCE).await?;
    Ok(())
}
on_drawn_major!(a_full_disk_under_the_spool);

/// Takes all the room that is left, to the last few hundred bytes.
fn fill(path: &Path) -> Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(path)?;
    let mut block = vec![1u8; 1 << 20];
    while block.len() > 256 {
        if file.write_all(&block).is_err() {
            block.truncate(block.len() / 2);
        }
    }
    Ok(())
}
