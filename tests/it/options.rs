//! The shapes that a cluster can have, and what `restore` can be asked for.

use crate::site::{PATIENCE, Site, configuration, has_snapshot, judge, restore};
use anyhow::{Context, Result, ensure};
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::scene::Scene;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A table in a tablespace and an unlogged one.
const TABLES: &str = "
    CREATE TABLE placed (n int PRIMARY KEY, m text) TABLESPACE outside;
    INSERT INTO placed SELECT n, md5(n::text) FROM generate_series(1, 5000) n;
    CREATE UNLOGGED TABLE fleeting (n int PRIMARY KEY);
    INSERT INTO fleeting SELECT generate_series(1, 5000);";

/// What [`TABLES`] made is there as it must be after a restore. The tablespace lies below `place`.
async fn tables_are_there(restored: &Cluster, place: &Path) -> Result<()> {
    let session = restored.connect().await?;
    ensure!(session.value("SELECT count(*) FROM placed WHERE m = md5(n::text)").await? == "5000");
    ensure!(
        session.value("SELECT count(*) FROM fleeting").await? == "0",
        "unlogged rows came back"
    );
    session.batch_execute("INSERT INTO fleeting VALUES (1)").await?;
    let location = session
        .value("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'outside'")
        .await?;
    ensure!(Path::new(&location).starts_with(place), "the tablespace is at {location}");
    Ok(())
}

/// All that a folder holds, with sizes and times: to see that nobody has touched it.
fn fingerprint(dir: &Path) -> Result<Vec<(PathBuf, u64, std::time::SystemTime)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            found.extend(fingerprint(&entry.path())?);
        }
        found.push((entry.path(), metadata.len(), metadata.modified()?));
    }
    found.sort();
    Ok(found)
}

/// 1 MB segments, no page checksums, a tablespace that comes along into the target directory.
async fn small_segments_without_checksums(scene: &Scene, major: Major) -> Result<()> {
    let place = scene.folder("ts")?;
    let cluster = Cluster::build(scene, &major).checksums(false).segment_mib(1).start().await?;
    cluster.sql(&format!("CREATE TABLESPACE outside LOCATION '{}'", place.display())).await?;
    cluster.sql(TABLES).await?;
    let configuration = configuration(scene, &cluster)?;
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.ledger.wait_for(200, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.cluster.stop().await?;
    let before = fingerprint(&place)?;
    let (restored, _) = site.restore_then_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await?;
    tables_are_there(&restored, restored.data()).await?;
    for (setting, value) in [("wal_segment_size", "1MB"), ("data_checksums", "off")] {
        ensure!(restored.value(&format!("SHOW {setting}")).await? == value, "{setting}");
    }
    ensure!(before == fingerprint(&place)?, "the original's tablespace was touched");
    Ok(())
}
on_drawn_major!(small_segments_without_checksums);

/// 64 MB segments, page checksums, a tablespace that is mapped, configuration files where Debian has them.
async fn large_segments_and_files_elsewhere(scene: &Scene, major: Major) -> Result<()> {
    let place = scene.folder("ts")?;
    let etc = scene.folder("etc")?;
    let made = Cluster::build(scene, &major).segment_mib(64).make()?;
    let data = made.data().to_owned();
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        std::fs::rename(data.join(name), etc.join(name))?;
    }
    let conf = etc.join("postgresql.conf");
    let there = |name: &str| etc.join(name).display().to_string();
    let more = format!(
        "data_directory = '{}'\nhba_file = '{}'\nident_file = '{}'\nwork_mem = '7MB'\n",
        data.display(),
        there("pg_hba.conf"),
        there("pg_ident.conf")
    );
    std::fs::write(&conf, std::fs::read_to_string(&conf)? + &more)?;
    let mut cluster = Cluster::of(scene, &major, &etc)?;
    cluster.start().await?;
    cluster.sql(&format!("CREATE TABLESPACE outside LOCATION '{}'", place.display())).await?;
    cluster.sql(TABLES).await?;
    let configuration = configuration(scene, &cluster)?.data_dir(Some(&data));
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.ledger.wait_for(200, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.cluster.stop().await?;
    // The host is gone, and its /etc with it.
    for dir in [&data, &etc, &place] {
        std::fs::rename(dir, dir.with_extension("lost"))?;
    }
    let mapped = scene.path("mapped");
    let mapping = format!("{}={}", place.display(), mapped.display());
    let (restored, _) =
        site.restore_and_start("copy", "latest", &["--tablespace", &mapping]).await?;
    site.judge(&restored, &Target::All).await?;
    tables_are_there(&restored, &mapped).await?;
    for (setting, value) in
        [("wal_segment_size", "64MB"), ("data_checksums", "on"), ("work_mem", "7MB")]
    {
        ensure!(restored.value(&format!("SHOW {setting}")).await? == value, "{setting}");
    }
    ensure!(!etc.exists() && !data.exists(), "the original's folders are there again");
    Ok(())
}
on_drawn_major!(large_segments_and_files_elsewhere);

/// Restored over the original's place, backed up on with the same configuration, restored again: to the end of the
/// second history, and to a time in the first.
async fn a_second_generation(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let session = site.cluster.connect().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    let first = site.ledger.moment(&session).await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    let accident = site.ledger.moment(&session).await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    site.ledger.stop().await?;
    drop(session);
    site.all_stored().await?;
    site.agent.terminate(PATIENCE).await?;
    let (data, port) = (site.cluster.data().to_owned(), site.cluster.port().to_string());
    site.cluster.destroy()?;

    let bin = major.bin().display().to_string();
    let start = ["--start", "--port", &port, "--pg-bin", &bin];
    restore(&site.deployment, &data, &accident.rfc3339, &start).await?.success()?;
    site.cluster = Cluster::attach(scene, &major, &data)?;
    site.judge(&site.cluster, &Target::Time(accident.micros)).await?;

    // What was lost is lost: the second history goes its own way.
    let session = site.cluster.connect().await?;
    let mut second = site.ledger.forked(&session, scene.random().fork("second")).await?;
    second.start(&site.cluster);
    site.agent.restart().await?;
    site.snapshot().await?;
    second.wait_for(100, PATIENCE).await?;
    let later = second.moment(&session).await?;
    second.wait_for(100, PATIENCE).await?;
    second.stop().await?;
    site.all_stored().await?;
    site.locations_equal().await?;

    let to = |name: &'static str, to: String| restore_and_start_named(&site, name, to);
    let latest = to("second", "latest".to_owned()).await?;
    judge(&second, &latest, &Target::All).await?;
    drop(latest);
    let middle = to("middle", later.rfc3339.clone()).await?;
    judge(&second, &middle, &Target::Time(later.micros)).await?;
    drop(middle);
    let early = to("first", first.rfc3339.clone()).await?;
    judge(&site.ledger, &early, &Target::Time(first.micros)).await?;
    Ok(())
}
on_drawn_major!(a_second_generation);

async fn restore_and_start_named(site: &Site<'_>, name: &str, to: String) -> Result<Cluster> {
    let started = site.restore_and_start(name, &to, &[]).await;
    Ok(started.with_context(|| format!("{name}: --to {to}"))?.0)
}

/// What only the damaged server still has is replayed too, and without it is missing.
async fn wal_of_the_damaged_server(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    let stored = site.ledger.acknowledged();
    site.all_stored().await?;
    site.agent.kill()?;
    site.ledger.wait_for(300, PATIENCE).await?;
    site.cluster.kill()?;
    site.ledger.stop().await?;
    let old_wal = site.cluster.data().join("pg_wal").display().to_string();
    let (restored, _) = site.restore_and_start("with", "latest", &["--wal-from", &old_wal]).await?;
    site.judge(&restored, &Target::All).await?;
    let (without, _) = site.restore_and_start("less", "latest", &[]).await?;
    let session = without.connect().await?;
    let kept: usize = session.value("SELECT count(*) FROM ledger.entries").await?.parse()?;
    ensure!(
        (stored..site.ledger.acknowledged()).contains(&kept),
        "{kept} of {} came from the locations, which had at least {stored}",
        site.ledger.acknowledged()
    );
    Ok(())
}
on_drawn_major!(wal_of_the_damaged_server);

/// A running server's directory is never touched; one that isn't empty only with `--force`, which moves it aside.
async fn force_moves_aside_and_never_a_running_server(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let data = site.cluster.data().to_owned();
    for more in [&[][..], &["--force"][..]] {
        let refused = restore(&site.deployment, &data, "latest", more).await?.expect(2)?;
        refused.says(&["server", "runs in it", "remedy"])?;
    }
    ensure!(site.cluster.is_running() && site.cluster.value("SELECT 1").await? == "1");

    site.agent.terminate(PATIENCE).await?;
    site.cluster.stop().await?;
    std::fs::write(data.join("precious"), "mine")?;
    let before = fingerprint(&data)?.len();
    let refused = restore(&site.deployment, &data, "latest", &[]).await?.expect(2)?;
    refused.says(&["not empty", "--force"])?;
    ensure!(fingerprint(&data)?.len() == before, "a refused restore has touched the directory");

    let bin = major.bin().display().to_string();
    let port = site.cluster.port().to_string();
    let more = ["--force", "--start", "--port", &port, "--pg-bin", &bin];
    let finished = restore(&site.deployment, &data, "latest", &more).await?.success()?;
    let aside = std::fs::read_dir(scene.dir())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path != &data && path.join("precious").exists())
        .context("the old directory is gone")?;
    ensure!(std::fs::read_to_string(aside.join("precious"))? == "mine");
    ensure!(aside.join("global/pg_control").exists());
    finished.says(&[&aside.display().to_string()])?;
    let restored = Cluster::attach(scene, &major, &data)?;
    ensure!(!data.join("precious").exists());
    site.judge(&restored, &Target::All).await.map(|_| ())
}
on_drawn_major!(force_moves_aside_and_never_a_running_server);

/// A server that does not start leaves a cluster that is complete, and no pin; that it will not, because another server has the port of
/// the restored configuration, is said before replay.
async fn servers_that_cannot_be_opened(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    // Only in the file: the server that runs keeps its address.
    let conf = site.cluster.data().join("postgresql.conf");
    let elsewhere = "\nlisten_addresses = '192.0.2.1'\n";
    std::fs::write(&conf, std::fs::read_to_string(&conf)? + elsewhere)?;
    site.snapshot().await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let (dir, bin) = (scene.path("copy"), major.bin().display().to_string());
    let is_unfinished = |dir: &Path| dir.join("backstay-restore/incomplete").exists();
    let mut restored = Cluster::of(scene, &major, &dir)?;
    let port = restored.port().to_string();
    let start = ["--start", "--pg-bin", &bin, "--port", &port];
    let failed = restore(&site.deployment, &dir, "latest", &start).await?.expect(6)?;
    failed.says(&["does not start", "192.0.2.1"])?;
    ensure!(!is_unfinished(&dir), "it is not complete");
    let listed = site.deployment.backstay(&["list", "--json"]).await?.success()?.json()?;
    ensure!(!listed.to_string().contains("restore to latest"), "a pin is left: {listed}");
    // The harness gives the address on the command line.
    restored.start().await?;
    site.judge(&restored, &Target::All).await?;

    let other = scene.path("other");
    let refused = restore(&site.deployment, &other, "latest", &start[..3]).await?.expect(2)?;
    let taken = format!("port {} is taken", site.cluster.port());
    refused.says(&["the restore goes on", &taken, "complete, but not started"])?;
    ensure!(!is_unfinished(&other), "it is not complete");
    Ok(())
}
on_drawn_major!(servers_that_cannot_be_opened);

/// Settings of an earlier recovery, of archiving and of replication neither hold the restored server up nor let it reach
/// what belongs to the original.
async fn stale_settings_are_cleared(scene: &Scene, major: Major) -> Result<()> {
    let archive = scene.folder("archive")?;
    let cluster = Cluster::build(scene, &major)
        .setting("archive_mode", "on")
        .setting("archive_command", &format!("cp %p {}/%f", archive.display()))
        .setting("max_connections", "60")
        .setting("recovery_target_name", "nonsense")
        .start()
        .await?;
    // Only in the file: a reload would let every commit wait.
    for setting in [
        "synchronous_standby_names = 'nobody'",
        "recovery_target_timeline = '7'",
        "recovery_target_action = 'shutdown'",
        "restore_command = 'false'",
        "primary_conninfo = 'host=nowhere'",
        "recovery_end_command = 'false'",
    ] {
        cluster.sql(&format!("ALTER SYSTEM SET {setting}")).await?;
    }
    std::fs::write(cluster.data().join("standby.signal"), "")?;
    // Another target in an included file, and a file of the host's.
    let (conf, shared) = (cluster.data().join("postgresql.conf"), scene.path("shared.conf"));
    let include = format!("include_dir 'conf.d'\ninclude '{}'\n", shared.display());
    std::fs::write(&conf, std::fs::read_to_string(&conf)? + &include)?;
    let more = scene.folder("main/conf.d")?.join("old.conf");
    std::fs::write(&more, "recovery_target_xid = '9'\n")?;
    scene.give(&more)?;
    let configuration = configuration(scene, &cluster)?;
    let mut site = Site::of(scene, cluster, configuration).await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    site.agent.terminate(PATIENCE).await?;
    site.cluster.stop().await?;
    let archived = fingerprint(&archive)?;
    let (restored, finished) = site.restore_and_start("copy", "latest", &[]).await?;
    finished.says(&["archive", "synchronous_standby_names", "conf.d/old.conf", "shared.conf"])?;
    site.judge(&restored, &Target::All).await?;
    restored
        .sql("SELECT pg_switch_wal(); CREATE TABLE after (n int); SELECT pg_switch_wal()")
        .await?;
    for (setting, value) in [
        ("synchronous_standby_names", ""),
        ("primary_conninfo", ""),
        ("recovery_target_name", ""),
        ("recovery_target_xid", ""),
        ("max_connections", "60"),
    ] {
        let is = restored.value(&format!("SHOW {setting}")).await?;
        ensure!(is == value, "{setting} is {is:?} and not {value:?}");
    }
    let archiving = restored.value("SHOW archive_mode").await?;
    let command = restored.value("SHOW archive_command").await?;
    ensure!(
        archiving == "off" || !command.contains("archive/"),
        "it archives: {archiving} {command}"
    );
    ensure!(archived == fingerprint(&archive)?, "the original's archive was written to");
    // And it starts again, on its own.
    let mut restored = restored;
    restored.restart().await?;
    ensure!(restored.value("SELECT pg_is_in_recovery()").await? == "f");
    Ok(())
}
on_drawn_major!(stale_settings_are_cleared);

/// One may restore with a location and a key alone, on a host that has no configuration. Root gives the files away as
/// asked, and a server of another major is refused before anything is done.
async fn from_a_location_and_a_key(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    site.ledger.wait_for(50, PATIENCE).await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    let status = site.agent.wait_until("it is idle", PATIENCE, has_snapshot).await?;
    ensure!(status["alarms"].as_array().is_some_and(Vec::is_empty), "{status}");
    let url = format!("file://{}", site.location("far").display());
    let (dir, key) = (scene.path("bare"), site.deployment.key().display().to_string());
    let into = dir.display().to_string();
    let from = ["--from", &url, "--key-file", &key];
    let run = async |more: &[&str]| {
        let args: Vec<&str> = from.iter().chain(more).copied().collect();
        backstay_tests::programs::run(&backstay_tests::programs::backstay_program(), &args, &[])
            .await
    };
    run(&["list"]).await?.success()?;
    let other = backstay_tests::major::Majors::available().iter().find(|other| **other != major);
    if let Some(other) = other {
        let bin = other.bin().display().to_string();
        let args = ["restore", "--to", "latest", "--into", &into, "--start", "--pg-bin", &bin];
        let refused = run(&args).await?;
        ensure!(refused.code.is_some_and(|code| code != 0), "{refused:?}");
        refused.says(&[&major.to_string(), &other.to_string()])?;
        ensure!(!dir.exists(), "it refuses after it has begun");
    }
    run(&["restore", "--to", "latest", "--into", &into]).await?.success()?;
    let mode = std::fs::metadata(&dir)?.permissions().mode() & 0o777;
    ensure!(mode == 0o700, "mode {mode:o}");
    let mut restored = Cluster::of(scene, &major, &dir)?;
    restored.start().await?;
    restored.wait_until_writable(PATIENCE).await?;
    judge(&site.ledger, &restored, &Target::All).await?;
    Ok(())
}
on_drawn_major!(from_a_location_and_a_key);

/// "10m ago", a zone by name, and times without a zone, which are refused.
async fn times_as_people_write_them(scene: &Scene, major: Major) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let session = site.cluster.connect().await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    let moment = site.ledger.moment(&session).await?;
    site.ledger.wait_for(100, PATIENCE).await?;
    site.all_stored().await?;
    let utc: jiff::Timestamp = moment.rfc3339.parse()?;
    let planned = site.plan(&moment.rfc3339).await?;
    let berlin = utc.to_zoned(jiff::tz::TimeZone::get("Europe/Berlin")?);
    let local = berlin.strftime("%Y-%m-%d %H:%M:%S%.6f").to_string();
    let offset = berlin.strftime("%Y-%m-%dT%H:%M:%S%.6f%:z").to_string();
    let space = utc.strftime("%Y-%m-%d %H:%M:%S%.6fZ").to_string();
    for args in
        [vec![offset], vec![space], vec![local.clone(), "--tz".into(), "Europe/Berlin".into()]]
    {
        let words: Vec<&str> =
            ["plan", "--json", "--to"].into_iter().chain(args.iter().map(String::as_str)).collect();
        let plan = site.deployment.backstay(&words).await?.success()?.json()?;
        ensure!(plan["stop"] == planned["stop"], "{words:?}: {plan} is not {planned}");
    }
    let refused = site.deployment.backstay(&["plan", "--to", &local]).await?.expect(2)?;
    refused.says(&["zone", "--tz"])?;
    for nonsense in
        ["yesterdayish", "lsn:0/XYZ", "xid:-1", "snapshot:nonsense", "2026-13-01 00:00Z"]
    {
        let refused = site.deployment.backstay(&["plan", "--to", nonsense]).await?;
        let code = refused.code;
        ensure!(matches!(code, Some(2 | 3)), "{nonsense}: {refused:?}");
    }
    // Before the first snapshot: out of reach, and the nearest moment is told.
    site.deployment.backstay(&["plan", "--to", "10m ago"]).await?.expect(3)?.says(&["snapshot"])?;
    tokio::time::sleep(std::time::Duration::from_secs(14)).await;
    site.deployment.backstay(&["plan", "--to", "12s ago"]).await?.success()?;
    Ok(())
}
on_drawn_major!(times_as_people_write_them);
