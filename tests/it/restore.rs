//! Every kind of target, on every major, while the database is written to all the time.

use crate::folder;
use crate::site::{PATIENCE, Site, recovery_left_nothing, restore};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Finished, backstay_program, run};
use backstay_tests::scene::Scene;
use backstay_tests::{on_drawn_major, on_each_major};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::Path;

/// One target as it is typed, as the ledger judges it, and how it is started.
struct Case {
    name: &'static str,
    to: String,
    target: Target,
    with_start: bool,
}

/// Back to a time, a position, a transaction, a name and a snapshot, while the original goes on; then the accident, and
/// everything comes back from the one location that is left.
async fn every_kind_of_target(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    for case in moments(&mut site).await? {
        reach(&site, &case).await.with_context(|| format!("--to {}", case.to))?;
    }
    latest_after_the_accident(site).await.context("--to latest")
}
on_each_major!(every_kind_of_target);

/// `backstay restore | head` restores, whether somebody reads what it prints or not.
async fn nobody_reads_what_it_prints(scene: &Scene, major: Major) -> Result<()> {
    let site = Site::start(scene, &major).await?;
    let (program, into) = (backstay_program(), scene.path("copy"));
    let piped = "set -o pipefail; \"$@\" | true";
    let words = ["-c", piped, "bash"].map(OsStr::new).into_iter();
    let words = words.chain([program.as_os_str(), OsStr::new("--config")]);
    let words = words.chain([site.deployment.config().as_os_str()]);
    let words = words.chain(["restore", "--to", "latest", "--into"].map(OsStr::new));
    let words: Vec<&OsStr> = words.chain([into.as_os_str()]).collect();
    run(Path::new("bash"), &words, &[]).await?.success()?;
    ensure!(into.join("PG_VERSION").exists() && into.join("global/pg_control").exists());
    Ok(())
}
on_drawn_major!(nobody_reads_what_it_prints);

/// Lets the load run, and notes moments on the way.
async fn moments(site: &mut Site<'_>) -> Result<Vec<Case>> {
    let session = site.cluster.connect().await?;
    site.ledger.wait_for(60, PATIENCE).await?;
    let moment = site.ledger.moment(&session).await?;
    site.ledger.wait_for(60, PATIENCE).await?;
    let xid = site.ledger.last_acknowledged().context("a transaction")?.entry.xid;
    site.ledger.wait_for(60, PATIENCE).await?;
    site.ledger.restore_point(&session, "before the update").await?;
    site.ledger.wait_for(60, PATIENCE).await?;
    let before = site.ledger.moment(&session).await?;
    let snapshot = site.snapshot().await?;
    site.ledger.wait_for(60, PATIENCE).await?;
    site.all_stored().await?;
    let case = |name, to, target, with_start| Case { name, to, target, with_start };
    let point = "before the update".to_owned();
    Ok(vec![
        case("time", moment.rfc3339, Target::Time(moment.micros), true),
        case("lsn", format!("lsn:{}", moment.lsn), Target::Lsn(moment.lsn), false),
        case("xid", format!("xid:{xid}"), Target::Xid(xid), true),
        case("name", format!("name:{point}"), Target::Name(point), false),
        case("snap", format!("snapshot:{snapshot}"), Target::Snapshot { stop: before.lsn }, true),
    ])
}

async fn reach(site: &Site<'_>, case: &Case) -> Result<()> {
    let plan = site.plan(&case.to).await.context("plan")?;
    let (restored, finished) = match case.with_start {
        true => site.restore_and_start(case.name, &case.to, &[]).await?,
        false => site.restore_then_start(case.name, &case.to, &[]).await?,
    };
    let newest = site.judge(&restored, &case.target).await?;
    agrees(&plan, &restored, &finished, newest).await
}

/// The plan, made on its own, says what the restore then did.
async fn agrees(plan: &Value, restored: &Cluster, finished: &Finished, newest: Lsn) -> Result<()> {
    let text = |field: &str| plan[field].as_str().with_context(|| format!("{field} of {plan}"));
    finished.clone().says(&[text("snapshot")?])?;
    let (timeline, switch) =
        switch_of(restored.data()).context("the history of the new timeline")?;
    let leg = plan["legs"].as_array().and_then(|legs| legs.last()).context("legs")?;
    let branch = leg["branch"].as_str().context("a leg's branch")?;
    ensure!(u32::from_str_radix(&branch[..8], 16)? < timeline, "{branch} is not before {timeline}");
    let position = |value: &Value| -> Result<Lsn> {
        let text = value.as_str().with_context(|| format!("a position: {value}"))?;
        text.parse().map_err(|_| anyhow::anyhow!("not a position: {text}"))
    };
    let end = position(&plan["end"])?;
    ensure!(switch <= end, "ended at {switch}, beyond the planned end {end}");
    let stop = &plan["stop"];
    if let Some(stop) = stop.get("before-record") {
        // Between the last record replayed and the stop lies, at most, a page's header.
        let stop = position(stop)?;
        ensure!(switch <= stop, "replayed to {switch}, beyond the planned stop {stop}");
        ensure!(stop.get() - switch.get() <= 40, "replayed to {switch}, short of {stop}");
    } else if let Some(stop) = stop.get("after-record") {
        let stop = position(stop)?;
        ensure!(switch > stop, "replayed to {switch}, short of the planned stop {stop}");
    } else {
        ensure!(stop == "consistent", "an unknown stop: {stop}");
    }
    ensure!(newest < end, "holds a commit from {newest}, beyond the planned end {end}");
    if let Some(time) = plan["last_transaction"].as_str() {
        let replayed = restored
            .value("SELECT (extract(epoch FROM pg_last_xact_replay_timestamp()) * 1000000)::bigint")
            .await?;
        let planned: jiff::Timestamp = time.parse()?;
        ensure!(
            planned.as_microsecond().to_string() == replayed,
            "{time} planned, {replayed} reached"
        );
    }
    Ok(())
}

/// The newest timeline of a server and where it left its parent, from its history file.
fn switch_of(data: &Path) -> Result<(u32, Lsn)> {
    let mut newest = None;
    for entry in std::fs::read_dir(data.join("pg_wal"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(number) = name.strip_suffix(".history") {
            newest = newest.max(Some((u32::from_str_radix(number, 16)?, name)));
        }
    }
    let (timeline, name) = newest.context("no history file")?;
    let text = std::fs::read_to_string(data.join("pg_wal").join(name))?;
    let line = text.lines().rfind(|line| line.starts_with(|c: char| c.is_ascii_digit()));
    let switch = line.and_then(|line| line.split_whitespace().nth(1)).context("no switch")?;
    Ok((timeline, switch.parse().map_err(|_| anyhow::anyhow!("not a position: {switch}"))?))
}

/// Server, agent and one location are gone. What is restored is started with `pg_ctl start` and nothing else, when the
/// other location, the key, the configuration and the program are gone too.
async fn latest_after_the_accident(mut site: Site<'_>) -> Result<()> {
    let scene = site.scene;
    site.ledger.wait_for(60, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.agent.kill()?;
    let (major, port) = (site.major().clone(), site.cluster.port());
    site.cluster.destroy()?;
    std::fs::remove_dir_all(site.location("near"))?;
    std::fs::remove_dir_all(site.deployment.state_dir())?;

    let plan = site.plan("latest").await?;
    let program = own_copy(scene)?;
    let dir = scene.path("latest");
    let config = site.deployment.config().display().to_string();
    let into = dir.display().to_string();
    let args = ["--config", &config, "restore", "--to", "latest", "--into", &into];
    let finished = backstay_tests::programs::run(&program, &args, &[]).await?.success()?;
    // The location that is gone is named, not passed over.
    let finished = finished.says(&["near"])?;
    for gone in [program.as_path(), site.deployment.config(), site.deployment.key()] {
        std::fs::remove_file(gone)?;
    }
    std::fs::rename(site.location("far"), scene.path("away"))?;

    let mut command = site.cluster.command("pg_ctl");
    command.arg("start").arg("-w").arg("-D").arg(&dir).arg("-l").arg(scene.path("alone.log"));
    scene.show_on_failure(&scene.path("alone.log"));
    let status =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).status()?;
    ensure!(status.success(), "pg_ctl start: {status}");
    let restored = Cluster::attach(scene, &major, &dir)?;
    ensure!(restored.port() == port, "it listens on {} and not on {port}", restored.port());
    restored.wait_until_writable(PATIENCE).await?;
    recovery_left_nothing(&dir)?;
    let newest = site.judge(&restored, &Target::All).await?;
    agrees(&plan, &restored, &finished, newest).await
}

/// The program under test in a place of its own, from where it can be taken away.
fn own_copy(scene: &Scene) -> Result<std::path::PathBuf> {
    let copy = scene.path("backstay-copy");
    // Not by this process: a program cannot be run while anybody, a child of another scene too, has it open to write.
    folder::copy(&backstay_program(), &copy).context("copy the program")?;
    Ok(copy)
}

/// What was restored without `--start` gets a standby as any server does: no setting of its own recovery comes along.
async fn a_standby_of_what_was_restored(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let dir = scene.path("copy");
    restore(&site.deployment, &dir, "latest", &[]).await?.success()?;
    let mut restored = Cluster::of(scene, &major, &dir)?;
    restored.start().await?;
    restored.wait_until_writable(PATIENCE).await?;
    // As `pg_basebackup -R` makes it: with the settings of its primary, and more of its own.
    let mut standby = restored.standby(scene, "standby").await?;
    standby.stop().await?;
    let auto = |dir: &Path| dir.join("postgresql.auto.conf");
    let both = [auto(&dir), auto(standby.data())].map(std::fs::read_to_string);
    std::fs::write(auto(standby.data()), both.into_iter().collect::<std::io::Result<String>>()?)?;
    standby.start().await?;
    standby.catch_up(&restored, PATIENCE).await?;
    recovery_left_nothing(&dir)
}
backstay_tests::on_drawn_major!(a_standby_of_what_was_restored);

/// A restore that was killed is taken up again, and ends as if nothing had happened.
async fn an_interrupted_restore_is_taken_up(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.cluster
        .sql("CREATE TABLE bulk AS SELECT n, md5(n::text) AS m, md5((n * 7)::text) AS k FROM generate_series(1, 400000) n")
        .await?;
    site.snapshot().await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let dir = scene.path("again");
    let mut killed = 0;
    for wait in [150, 300, 450] {
        let (config, into) = (site.deployment.config(), dir.display().to_string());
        let mut child = std::process::Command::new(backstay_program())
            .arg("--config")
            .arg(config)
            .args(["restore", "--to", "latest", "--into", &into])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        tokio::time::sleep(std::time::Duration::from_millis(wait)).await;
        let ended = child.try_wait()?;
        child.kill()?;
        child.wait()?;
        match ended {
            None => killed += 1,
            Some(_) => break,
        }
    }
    ensure!(killed > 0, "every restore was done before it was killed");
    let unfinished = dir.join("backstay-restore/incomplete").exists();
    let finished = restore(&site.deployment, &dir, "latest", &[]).await?;
    if unfinished {
        finished.success()?;
    }
    let mut restored = Cluster::of(scene, &major, &dir)?;
    restored.start().await?;
    restored.wait_until_writable(PATIENCE).await?;
    ensure!(restored.value("SELECT count(*) FROM bulk WHERE m = md5(n::text)").await? == "400000");
    site.judge(&restored, &Target::All).await.map(|_| ())
}
backstay_tests::on_drawn_major!(an_interrupted_restore_is_taken_up);
