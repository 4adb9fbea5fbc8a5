//! The harness itself: that a sound server passes, and that a wrong one doesn't.

use anyhow::{Result, ensure};
use backstay_tests::certificate::Authority;
use backstay_tests::checks::check_all;
use backstay_tests::ledger::{Ledger, Load, Target};
use backstay_tests::major::Major;
use backstay_tests::postgres::{Cluster, Session};
use backstay_tests::scene::{Scene, play};
use backstay_tests::{on_drawn_major, on_each_major};
use std::time::{Duration, Instant};

/// Fails unless the check fails, and for the reason that contains these words.
async fn check_fails(
    ledger: &Ledger,
    session: &Session,
    target: &Target,
    words: &str,
) -> Result<()> {
    let Err(error) = ledger.check(session, target).await else {
        anyhow::bail!("the check passes, although: {words}");
    };
    ensure!(format!("{error:#}").contains(words), "not because {words:?}: {error:#}");
    Ok(())
}

/// A killed server, started again, has all that was acknowledged; a cold copy of it has it too.
async fn acknowledged_transactions_survive_a_kill(scene: &Scene, major: Major) -> Result<()> {
    let mut cluster = Cluster::build(scene, &major).start().await?;
    let mut ledger = Ledger::create(&cluster, Load::default(), scene.random()).await?;
    ledger.start(&cluster);
    ledger.wait_for(150, Duration::from_secs(120)).await?;
    let before_the_kill = Instant::now();
    cluster.kill()?;
    cluster.start().await?;
    ledger.wait_for(50, Duration::from_secs(120)).await?;
    ledger.stop().await?;
    ensure!(ledger.acknowledged() > 100, "only {} transactions", ledger.acknowledged());

    let session = cluster.connect().await?;
    let report = ledger.check(&session, &Target::All).await?;
    ensure!(report.left_out == 0 && report.present >= ledger.acknowledged());
    ledger.check(&session, &Target::Latest { acknowledged_until: before_the_kill }).await?;
    let checked = check_all(&cluster).await?;
    ensure!(checked.databases == 2 && checked.indexes > 100, "{checked:?}");

    cluster.stop().await?;
    let mut copy = cluster.copy_to(scene, "copy")?;
    copy.start().await?;
    ledger.check(&copy.connect().await?, &Target::All).await?;
    check_all(&copy).await?;
    Ok(())
}
on_each_major!(acknowledged_transactions_survive_a_kill);

/// Each kind of damage to the rows is found.
async fn a_wrong_row_fails_the_check(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let mut ledger = Ledger::create(&cluster, Load::default(), scene.random()).await?;
    ledger.start(&cluster);
    ledger.wait_for(400, Duration::from_secs(120)).await?;
    ledger.stop().await?;
    let session = cluster.connect().await?;
    ledger.check(&session, &Target::All).await?;

    let last = "(SELECT max(seq) FROM ledger.entries WHERE client = 1)";
    let damages = [
        (format!("DELETE FROM ledger.entries WHERE client = 1 AND seq = {last}"), "must be here"),
        ("DELETE FROM ledger.entries WHERE client = 2 AND seq = 7".into(), "client 2: 8 follows 6"),
        (
            format!(
                "INSERT INTO ledger.entries VALUES (1, {last} + 1, 3, 900000000, 1, 2, 5, NULL, false)"
            ),
            "was never committed",
        ),
        ("UPDATE ledger.entries SET amount = 0 WHERE client = 3 AND seq = 1".into(), "and was"),
        ("UPDATE ledger.accounts SET balance = balance + 1 WHERE id = 5".into(), "account 5 holds"),
        ("DELETE FROM ledger.blobs WHERE client = 1".into(), "large value (1, "),
        ("CREATE TABLE ledger.made_1_0 (n int)".into(), "table \"made_1_0\" should not be here"),
        ("SELECT setval('ledger.tickets', 3)".into(), "sequence at 3"),
    ];
    for (damage, words) in damages {
        let save = "DROP SCHEMA IF EXISTS saved CASCADE; CREATE SCHEMA saved;
             CREATE TABLE saved.entries AS TABLE ledger.entries;
             CREATE TABLE saved.accounts AS TABLE ledger.accounts;
             CREATE TABLE saved.blobs AS TABLE ledger.blobs;
             CREATE TABLE saved.ticket AS SELECT last_value FROM ledger.tickets;";
        let undo = "TRUNCATE ledger.entries, ledger.accounts, ledger.blobs;
             INSERT INTO ledger.entries TABLE saved.entries;
             INSERT INTO ledger.accounts TABLE saved.accounts;
             INSERT INTO ledger.blobs TABLE saved.blobs;
             DROP TABLE IF EXISTS ledger.made_1_0;
             SELECT setval('ledger.tickets', last_value) FROM saved.ticket;";
        session.batch_execute(save).await?;
        session.batch_execute(&damage).await?;
        check_fails(&ledger, &session, &Target::All, words).await?;
        session.batch_execute(undo).await?;
        ledger.check(&session, &Target::All).await?;
    }
    Ok(())
}
on_drawn_major!(a_wrong_row_fails_the_check);

/// PostgreSQL's own recovery, stopped at each kind of target, is what the ledger expects of that target,
/// and not what it expects of another.
async fn every_kind_of_target_is_judged(scene: &Scene, major: Major) -> Result<()> {
    let archive = scene.folder("archive")?;
    let mut cluster = Cluster::build(scene, &major)
        .setting("archive_mode", "on")
        .setting("archive_command", &format!("cp %p {}/%f", archive.display()))
        .start()
        .await?;
    let mut ledger = Ledger::create(&cluster, Load::default(), scene.random()).await?;
    ledger.run_for(&cluster, Duration::from_millis(500)).await?;
    cluster.stop().await?;
    let base = cluster.copy_to(scene, "base")?;
    cluster.start().await?;
    let session = cluster.connect().await?;
    ledger.start(&cluster);
    ledger.wait_for(200, Duration::from_secs(120)).await?;
    let moment = ledger.moment(&session).await?;
    ledger.wait_for(200, Duration::from_secs(120)).await?;
    let xid = ledger.last_acknowledged().map(|t| t.entry.xid).unwrap_or_default();
    ledger.wait_for(200, Duration::from_secs(120)).await?;
    ledger.restore_point(&session, "here").await?;
    ledger.wait_for(200, Duration::from_secs(120)).await?;
    ledger.stop().await?;
    drop(session);
    cluster.stop().await?;

    // `recovery_target_lsn` counts the record that starts there; the ledger counts it as open.
    let targets = [
        ("lsn", moment.lsn.to_string(), Target::Lsn(moment.lsn)),
        ("time", as_setting(&moment.rfc3339), Target::Time(moment.micros)),
        ("xid", xid.to_string(), Target::Xid(xid)),
        ("name", "here".to_owned(), Target::Name("here".to_owned())),
    ];
    let mut stops = Vec::new();
    for (kind, value, target) in &targets {
        let mut restored = recovered(scene, &base, &archive, kind, value)?;
        restored.start().await?;
        restored.wait_until_writable(Duration::from_secs(120)).await?;
        let session = restored.connect().await?;
        let report = ledger.check(&session, target).await?;
        ensure!(report.left_out >= 150, "{kind}: {report:?}");
        check_fails(&ledger, &session, &Target::All, "must be here").await?;
        for other in targets.iter().filter(|(_, _, other)| differs(target, other)) {
            ensure!(ledger.check(&session, &other.2).await.is_err(), "{kind} passes as {other:?}");
        }
        stops.push(report.present);
        if *kind == "time" {
            check_all(&restored).await?;
            // History goes on from here, and is judged by what it became.
            ledger_goes_on(scene, &ledger, &restored, session).await?;
        }
    }
    ensure!(
        stops[0].abs_diff(stops[1]) < 20 && stops[1] < stops[2] && stops[2] < stops[3],
        "{stops:?}"
    );
    Ok(())
}
on_drawn_major!(every_kind_of_target_is_judged);

/// Where settings are read, PostgreSQL knows no "Z" yet.
fn as_setting(rfc3339: &str) -> String {
    rfc3339.replace('T', " ").replace('Z', "+00")
}

/// Position and time were taken at one moment.
fn differs(a: &Target, b: &Target) -> bool {
    let early = |t: &Target| matches!(t, Target::Lsn(_) | Target::Time(_));
    !(early(a) && early(b)) && std::mem::discriminant(a) != std::mem::discriminant(b)
}

fn recovered(
    scene: &Scene,
    base: &Cluster,
    archive: &std::path::Path,
    kind: &str,
    value: &str,
) -> Result<Cluster> {
    let to = scene.path(&format!("to-{kind}"));
    let done = std::process::Command::new("cp").arg("-a").arg(base.data()).arg(&to).status()?;
    ensure!(done.success());
    std::fs::write(to.join("recovery.signal"), "")?;
    scene.give(&to.join("recovery.signal"))?;
    let conf = to.join("postgresql.auto.conf");
    let lines = format!(
        "archive_mode = off\nrestore_command = 'cp {}/%f %p'\n\
         recovery_target_{kind} = '{value}'\nrecovery_target_action = 'promote'\n",
        archive.display()
    );
    std::fs::write(&conf, std::fs::read_to_string(&conf)? + &lines)?;
    Cluster::of(scene, base.major(), &to)
}

async fn ledger_goes_on(
    scene: &Scene,
    ledger: &Ledger,
    restored: &Cluster,
    session: Session,
) -> Result<()> {
    let mut fork = ledger.forked(&session, scene.random().fork("fork")).await?;
    let kept = fork.check(&session, &Target::All).await?;
    fork.run_for(restored, Duration::from_millis(500)).await?;
    let report = fork.check(&session, &Target::All).await?;
    ensure!(report.present > kept.present, "nothing was written after the restore");
    check_fails(ledger, &session, &Target::All, "and was").await
}

/// Checksums, segment size, TLS and passwords are as asked for.
async fn a_cluster_is_as_described(scene: &Scene, major: Major) -> Result<()> {
    let authority = Authority::new()?;
    let mut cluster = Cluster::build(scene, &major)
        .name("odd")
        .checksums(false)
        .segment_mib(1)
        .durable()
        .setting("work_mem", "5MB")
        .tls(&authority.issue(&["localhost", "127.0.0.1"])?)
        .scram("secret1")
        .start()
        .await?;
    for (name, value) in [
        ("data_checksums", "off"),
        ("wal_segment_size", "1MB"),
        ("fsync", "on"),
        ("work_mem", "5MB"),
        ("ssl", "on"),
        ("listen_addresses", "127.0.0.1"),
    ] {
        let is = cluster.value(&format!("SHOW {name}")).await?;
        ensure!(is == value, "{name} is {is} and not {value}");
    }
    let rules = cluster
        .value("SELECT string_agg(type || ' ' || auth_method, ',') FROM pg_hba_file_rules")
        .await?;
    ensure!(rules == "local trust,hostssl scram-sha-256", "{rules}");
    let secret =
        cluster.value("SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'").await?;
    ensure!(secret.starts_with("SCRAM-SHA-256$"), "{secret}");

    let found = Cluster::attach(scene, &major, cluster.data())?;
    ensure!(found.value("SHOW data_directory").await? == cluster.data().display().to_string());
    drop(found);
    ensure!(!cluster.is_running(), "a dropped cluster leaves its server running");
    cluster.destroy()?;
    ensure!(!cluster.data().exists());

    let summed = Cluster::build(scene, &major).name("summed").segment_mib(64).start().await?;
    ensure!(summed.value("SHOW data_checksums").await? == "on");
    ensure!(summed.value("SHOW wal_segment_size").await? == "64MB");
    Ok(())
}
on_each_major!(a_cluster_is_as_described);

/// A flipped byte in a table, and an index that lacks an entry, are found.
async fn unsound_files_fail_the_checks(scene: &Scene, major: Major) -> Result<()> {
    let mut cluster = Cluster::build(scene, &major).checksums(false).start().await?;
    cluster
        .sql(
            "CREATE TABLE t (n int PRIMARY KEY, m text);
             INSERT INTO t SELECT n, md5(n::text) FROM generate_series(1, 1000) n;
             CREATE INDEX t_m ON t (m);",
        )
        .await?;
    check_all(&cluster).await?;
    let table = cluster.value("SELECT pg_relation_filepath('t')").await?;
    cluster.stop().await?;
    let path = cluster.data().join(table);
    let mut bytes = std::fs::read(&path)?;
    // The text of the newest tuple of page 0, right after the page's free space: its index entry no longer fits.
    let upper = usize::from(u16::from_le_bytes([bytes[14], bytes[15]]));
    bytes[upper + 24 + 4 + 8] ^= 1;
    std::fs::write(&path, bytes)?;
    cluster.start().await?;
    let error =
        check_all(&cluster).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(error.contains("index t_m"), "not found: {error:?}");
    Ok(())
}
on_drawn_major!(unsound_files_fail_the_checks);

/// A scene that ends leaves nothing behind, one that fails says so.
#[test]
fn a_scene_cleans_up_and_a_failed_one_fails() {
    let mut dir = std::path::PathBuf::new();
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        play("fails_on_purpose", async |scene: &Scene| {
            dir = scene.folder("inside")?;
            anyhow::bail!("on purpose")
        });
    }));
    assert!(failed.is_err());
    assert!(dir.is_absolute() && !dir.exists());
}
