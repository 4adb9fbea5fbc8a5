//! The WAL decoder against PostgreSQL's own readers, on WAL that real servers wrote.
//!
//! Each event must be told by the other side with the same position, chain, transaction, kind, time and details, and each
//! record that it tells of must be an event, unless it is of a kind that no backup asks for. All records must be counted.

mod oracle;
mod workload;

use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_common::wal::{Event, EventKind};
use backstay_tests::major::Major;
use backstay_tests::on_each_major;
use backstay_tests::postgres::{Cluster, Session};
use backstay_tests::random::Random;
use backstay_tests::scene::{Scene, full};
use backstay_tests::wal::{Decoded, Segments, Words};
use oracle::Told;
use std::collections::BTreeMap;
use workload::Workload;

/// Everything that a server may write, crashed, promoted and read back.
async fn every_event_is_what_postgresql_says(scene: &Scene, major: Major) -> Result<()> {
    const SIZES_MIB: [u32; 3] = [1, 16, 64];
    let drawn = [*scene.random().pick(&SIZES_MIB)];
    for &mib in if full() { &SIZES_MIB[..] } else { &drawn } {
        let label = format!("PostgreSQL {major}, segments of {mib} MB");
        with_segments(scene, &major, mib, &label).await.context(label.clone())?;
    }
    Ok(())
}
on_each_major!(every_event_is_what_postgresql_says);

async fn with_segments(scene: &Scene, major: &Major, mib: u32, label: &str) -> Result<()> {
    let mut primary = workload::build(scene, major, mib).start().await?;
    let mut workload = Workload::begin(&primary, scene.random().fork(label)).await?;
    workload.play(&mut primary).await?;
    let torn = workload.crash_inside_a_record(&mut primary).await?;
    workload.after_the_crash(&primary).await?;
    primary.stop().await?;

    let mut promoted = workload::promoted(scene, &mut primary, &format!("p{mib}")).await?;
    workload.last(&promoted).await?;
    let session = promoted.connect().await?;
    let until = promoted.flushed().await?;
    let segments = Segments::find(&promoted.data().join("pg_wal"))?;
    let start = segments.size().start_of(workload.start);
    let decoded = decode(&segments, start, until, &mut workload.random)?;
    println!("{label}: {}", counts(&decoded, torn));
    ensure_varied(&decoded, torn)?;
    against_sql(&session, &decoded, &workload).await.context("compared with SQL")?;

    if major.number() >= 15 {
        let told = oracle::walinspect(&session, start, until).await?;
        compare(&decoded, &told).context("compared with pg_walinspect")?;
        println!("{label}: pg_walinspect agrees on {} records", told.len());
        workload.ensure_images(&session, start, until, label).await?;
    }
    drop(session);
    promoted.stop().await?;
    if oracle::has_waldump(major) {
        against_waldump(&primary, start, &mut workload.random, label).context("timeline 1")?;
        let fork = end_of_recovery(&decoded).context("no promotion was decoded")?;
        let fork = segments.size().start_of(fork.start);
        against_waldump(&promoted, fork, &mut workload.random, label).context("timeline 2")?;
    } else {
        println!("{label}: pg_waldump left out, it is not part of this build");
    }
    primary.destroy()?;
    promoted.destroy()
}

/// Decodes with cuts of a drawn size, and again as if by several that follow each other.
fn decode(segments: &Segments, start: Lsn, until: Lsn, random: &mut Random) -> Result<Decoded> {
    let read = random.range(1_000..300_000) as usize;
    let decoded = segments.decode(start, until, read)?;
    ensure!(decoded.fault.is_none(), "{:?}", decoded.fault);
    let stretch = until.since(start) / random.range(5..60) + 1;
    let resumed = segments.decode_resuming(start, until, read, stretch)?;
    ensure!(
        resumed == decoded,
        "resumed every {stretch} bytes it ends at {}, not {}: {:?}",
        resumed.end,
        decoded.end,
        resumed.fault
    );
    Ok(decoded)
}

/// Everything of the newest timeline from `start` to the end that the shutdown left.
fn against_waldump(cluster: &Cluster, start: Lsn, random: &mut Random, label: &str) -> Result<()> {
    let dir = cluster.data().join("pg_wal");
    let segments = Segments::find(&dir)?;
    let end = segments.decode(start, Lsn::new(u64::MAX), 1 << 20)?.end;
    let decoded = decode(&segments, start, end, random)?;
    let told = oracle::waldump(cluster, segments.timeline(), start, end)?;
    compare(&decoded, &told)?;
    println!(
        "{label}: pg_waldump agrees on {} records of timeline {}",
        told.len(),
        segments.timeline()
    );
    Ok(())
}

fn compare(decoded: &Decoded, told: &[Told]) -> Result<()> {
    let mut relevant = told.iter().filter(|record| record.matters());
    for event in &decoded.events {
        let record = relevant.next().with_context(|| format!("never told: {event:?}"))?;
        ensure!(
            record.agrees_with(event),
            "{event:?}\n  {:?}\nis told as\n  {record:?}",
            Words::of(event)
        );
    }
    if let Some(record) = relevant.next() {
        anyhow::bail!("never decoded: {record:?}");
    }
    let last = told.last().map(|record| record.start);
    ensure!(
        (decoded.records, decoded.last_record) == (told.len() as u64, last),
        "{} records up to {:?}, not {} up to {last:?}",
        decoded.records,
        decoded.last_record,
        told.len()
    );
    Ok(())
}

/// What the server knows of its own transactions: their times and ends, how many committed, which one last, and where each
/// restore point ended.
async fn against_sql(session: &Session, decoded: &Decoded, workload: &Workload) -> Result<()> {
    let commits: BTreeMap<u32, i64> = decoded
        .events
        .iter()
        .filter(|event| event.start >= workload.start)
        .filter_map(|event| match event.kind {
            EventKind::Commit { time } if event.xid != 0 => Some((event.xid, time)),
            EventKind::CommitPrepared { time, xid } => Some((xid, time)),
            _ => None,
        })
        .collect();
    let known: BTreeMap<u32, i64> = session
        .rows(&format!(
            "SELECT x, {} FROM generate_series({}, {}) x
             WHERE pg_xact_status(x::text::xid8) = 'committed'",
            oracle::micros("pg_xact_commit_timestamp(x::text::xid)"),
            workload.first_xid,
            workload.last_xid
        ))
        .await?
        .iter()
        .map(|row| Ok((row[0].parse()?, row[1].parse()?)))
        .collect::<Result<_>>()?;
    for (xid, time) in &commits {
        let is = known.get(xid).with_context(|| format!("{xid} did not commit"))?;
        // Of a replicated transaction SQL tells the time of its origin, and recovery targets look at its time here.
        ensure!(
            is == time || *xid == workload.replicated_xid,
            "{xid} committed at {time}, not {is}"
        );
    }
    let origin = oracle::micros(&format!("timestamptz '{}'", workload::REPLICATED_TIME));
    let origin: i64 = session.value(&format!("SELECT {origin}")).await?.parse()?;
    ensure!(known.get(&workload.replicated_xid) == Some(&origin), "nothing was replicated");
    ensure!(commits.get(&workload.replicated_xid).is_some_and(|time| *time > origin));
    let subtransactions = known.len() - commits.len();
    ensure!(
        subtransactions == workload.committed_subtransactions,
        "{} committed with {} subtransactions; decoded: {}",
        known.len(),
        workload.committed_subtransactions,
        commits.len()
    );
    for (name, end) in &workload.restore_points {
        let found = decoded.events.iter().find(
            |event| matches!(&event.kind, EventKind::RestorePoint { name: of, .. } if of == name),
        );
        let found = found.with_context(|| format!("restore point {name:?} is not decoded"))?;
        ensure!(found.end == *end, "{found:?} ends at {end}");
    }
    let aborted = decoded.events.iter().filter_map(|event| match event.kind {
        EventKind::Abort { .. } if event.start >= workload.start => event.target_xid(),
        EventKind::AbortPrepared { xid, .. } => Some(xid),
        _ => None,
    });
    for xid in aborted {
        let status = session.value(&format!("SELECT pg_xact_status('{xid}'::xid8)")).await?;
        ensure!(status == "aborted", "{xid} is {status}");
    }
    let last = session
        .rows(&format!("SELECT xid, {} FROM pg_last_committed_xact()", oracle::micros("timestamp")))
        .await?;
    let (xid, time) = commits.last_key_value().context("no commits")?;
    ensure!(last[0] == [xid.to_string(), time.to_string()], "{xid} at {time} is not {last:?}");
    ensure!(commits.len() > 25, "only {} commits", commits.len());
    println!(
        "  SQL agrees on {} commits and {} restore points",
        commits.len(),
        workload.restore_points.len()
    );
    Ok(())
}

fn end_of_recovery(decoded: &Decoded) -> Option<&Event> {
    decoded.events.iter().find(|event| matches!(event.kind, EventKind::EndOfRecovery { .. }))
}

/// Fails if the workload did not bring about what it is for.
fn ensure_varied(decoded: &Decoded, torn: bool) -> Result<()> {
    let mut kinds = vec![
        "COMMIT",
        "ABORT",
        "PREPARE",
        "COMMIT_PREPARED",
        "ABORT_PREPARED",
        "RESTORE_POINT",
        "PARAMETER_CHANGE",
        "CHECKPOINT_SHUTDOWN",
        "CHECKPOINT_ONLINE",
        "END_OF_RECOVERY",
        "SWITCH",
        "BACKUP_END",
        "FPW_CHANGE",
    ];
    if torn {
        kinds.push("OVERWRITE_CONTRECORD");
    }
    let found = by_kind(decoded);
    let missing: Vec<_> = kinds.iter().filter(|kind| !found.contains_key(*kind)).collect();
    ensure!(missing.is_empty(), "the workload wrote no {missing:?}");
    Ok(())
}

fn by_kind(decoded: &Decoded) -> BTreeMap<&'static str, usize> {
    let mut found = BTreeMap::new();
    for event in &decoded.events {
        *found.entry(Words::of(event).kind).or_default() += 1;
    }
    found
}

fn counts(decoded: &Decoded, torn: bool) -> String {
    let kinds: Vec<String> =
        by_kind(decoded).iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    let torn = if torn { "" } else { "; no kill left an overwritten record" };
    format!(
        "{} records, {} events up to {}{torn}: {}",
        decoded.records,
        decoded.events.len(),
        decoded.end,
        kinds.join(", ")
    )
}
