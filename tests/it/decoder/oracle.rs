//! WAL records as `pg_waldump` and `pg_walinspect` tell of them.

use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_common::segment::TimelineId;
use backstay_common::wal::{Event, EventKind};
use backstay_tests::major::Major;
use backstay_tests::postgres::{Cluster, Session};
use backstay_tests::wal::Words;

/// What no backup asks for: such records are no events. Any other of these two managers must be one.
const IRRELEVANT: [(&str, &str); 6] = [
    ("XLOG", "NOOP"),
    ("XLOG", "NEXTOID"),
    ("XLOG", "FPI"),
    ("XLOG", "FPI_FOR_HINT"),
    ("Transaction", "ASSIGNMENT"),
    ("Transaction", "INVALIDATION"),
];

/// One record.
#[derive(Debug)]
pub struct Told {
    pub start: Lsn,
    prev: Lsn,
    xid: u32,
    manager: String,
    kind: String,
    description: String,
}

impl Told {
    pub fn matters(&self) -> bool {
        ["XLOG", "Transaction"].contains(&self.manager.as_str())
            && !IRRELEVANT.contains(&(&self.manager, &self.kind))
    }

    pub fn agrees_with(&self, event: &Event) -> bool {
        let words = Words::of(event);
        let inner = match event.kind {
            EventKind::Prepare { xid, .. } => xid,
            _ => event.xid,
        };
        (self.start, self.prev, self.xid, self.xid) == (event.start, event.prev, event.xid, inner)
            && (self.manager.as_str(), self.kind.as_str()) == (words.manager, words.kind)
            && words.time.is_none_or(|time| self.time() == Some(time))
            && words.details.iter().all(|detail| self.says(detail))
    }

    /// Whether the description has this part.
    fn says(&self, detail: &str) -> bool {
        ["; ", ": ", " "].iter().any(|by| self.description.split(by).any(|part| part == detail))
            || self.description == detail
    }

    /// The first time in the description, which both print in UTC; microseconds since 2000.
    fn time(&self) -> Option<i64> {
        const SECOND: &str = "2026-11-22 14:03:00";
        let text = &self.description;
        let (at, _) = text.char_indices().find(|&(at, _)| {
            let window = text.get(at..at + SECOND.len());
            window.is_some_and(|text| text.parse::<jiff::civil::DateTime>().is_ok())
        })?;
        let end = text[at + SECOND.len()..].find(|c: char| c != '.' && !c.is_ascii_digit())?;
        let utc = text[at..at + SECOND.len() + end].parse::<jiff::civil::DateTime>().ok()?;
        let since_1970 = utc.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_microsecond();
        Some(since_1970 - 946_684_800_000_000)
    }
}

/// An SQL expression for microseconds since 2000.
pub fn micros(timestamp: &str) -> String {
    format!("((extract(epoch FROM {timestamp}) - 946684800) * 1000000)::bigint")
}

pub async fn walinspect(session: &Session, start: Lsn, until: Lsn) -> Result<Vec<Told>> {
    session
        .batch_execute(
            "SET client_min_messages = warning; SET timezone = 'UTC';
             CREATE EXTENSION IF NOT EXISTS pg_walinspect",
        )
        .await?;
    let query = format!(
        "SELECT start_lsn, prev_lsn, xid, resource_manager, record_type, description
         FROM pg_get_wal_records_info('{start}', '{until}')"
    );
    session.rows(&query).await?.into_iter().map(from_row).collect()
}

fn from_row(row: Vec<String>) -> Result<Told> {
    let [start, prev, xid, manager, kind, description] =
        <[String; 6]>::try_from(row).ok().context("six columns")?;
    Ok(Told {
        start: lsn(&start)?,
        prev: lsn(&prev)?,
        xid: xid.parse()?,
        manager,
        kind,
        description,
    })
}

/// Whether this major came with `pg_waldump`: only Debian's packages have it.
pub fn has_waldump(major: &Major) -> bool {
    major.program("pg_waldump").is_file()
}

pub fn waldump(
    cluster: &Cluster,
    timeline: TimelineId,
    start: Lsn,
    until: Lsn,
) -> Result<Vec<Told>> {
    let output = cluster
        .command("pg_waldump")
        .env("TZ", "UTC")
        .arg("--path")
        .arg(cluster.data().join("pg_wal"))
        .args([
            "--timeline",
            &timeline.to_string(),
            "--start",
            &start.to_string(),
            "--end",
            &until.to_string(),
        ])
        .output()?;
    ensure!(output.status.success(), "pg_waldump: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    // A start inside a record is announced.
    let lines = text.lines().filter(|line| line.starts_with("rmgr: "));
    lines.map(|line| from_line(line).with_context(|| format!("pg_waldump: {line}"))).collect()
}

/// `rmgr: Transaction len (rec/tot): 34/ 34, tx: 730, lsn: 0/01A2B3C8, prev 0/01A2B390, desc: COMMIT 2026-...`
fn from_line(line: &str) -> Result<Told> {
    let after = |word: &str| line.split_once(word).map(|(_, rest)| rest.trim_start());
    let field = |word| {
        let rest = after(word)?;
        rest.split([',', ' ']).next()
    };
    let (kind, description) = after("desc: ")
        .map(|desc| desc.split_once(' ').unwrap_or((desc, "")))
        .context("no description")?;
    Ok(Told {
        start: lsn(field("lsn: ").context("no LSN")?)?,
        prev: lsn(field("prev ").context("no chain")?)?,
        xid: field("tx: ").context("no transaction")?.parse()?,
        manager: field("rmgr: ").context("no manager")?.to_owned(),
        kind: kind.to_owned(),
        description: description.trim().to_owned(),
    })
}

fn lsn(text: &str) -> Result<Lsn> {
    text.parse().map_err(|error| anyhow::anyhow!("{text:?}: {error}"))
}
