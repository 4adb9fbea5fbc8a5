//! Prints what the WAL decoder sees in a directory of segment files, a line per event, for comparison with `pg_waldump`.
//!
//! `LSN PREV MANAGER KIND XID [TIME] [what else]`, with `pg_waldump`'s words. How the WAL ends goes to standard error, with
//! the number of records of all kinds. The exit code is 1 where it ends in anything but zeros or a recycled segment.

use backstay_common::lsn::Lsn;
use backstay_common::wal::{DecodeError, Event, PageField};
use backstay_tests::wal::{Segments, Words};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Print the events of the WAL in a directory.
#[derive(clap::Parser)]
struct Args {
    /// A directory with segment files, such as pg_wal.
    dir: PathBuf,
    /// Begin at this page or record instead of the first segment.
    #[arg(long)]
    start: Option<Lsn>,
    /// Bytes given to the decoder at a time.
    #[arg(long, default_value_t = 128 << 10)]
    read: usize,
}

fn main() -> anyhow::Result<ExitCode> {
    let args: Args = clap::Parser::parse();
    let segments = Segments::find(&args.dir)?;
    let start = args.start.unwrap_or(segments.start());
    let decoded = segments.decode(start, Lsn::new(u64::MAX), args.read)?;
    let mut out = BufWriter::new(io::stdout().lock());
    for event in &decoded.events {
        writeln!(out, "{}", line(event))?;
    }
    out.flush()?;
    let reason = decoded.fault.as_ref().map_or("no more segments".into(), ToString::to_string);
    eprintln!("{} records up to {}: {reason}", decoded.records, decoded.end);
    let quiet = decoded.fault.as_ref().is_none_or(ends_quietly);
    Ok(if quiet { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn ends_quietly(fault: &DecodeError) -> bool {
    fault.is_end_of_wal() || matches!(fault, DecodeError::BadPage { field: PageField::Address, .. })
}

fn line(event: &Event) -> String {
    let Words { manager, kind, time, details } = Words::of(event);
    let (start, prev) = (lsn(event.start), lsn(event.prev));
    let mut line = format!("{start} {prev} {manager} {kind} {}", event.xid);
    if let Some(time) = time {
        line += &format!(" {}", utc(time));
    }
    if !details.is_empty() {
        line += &format!(" {}", details.join("; "));
    }
    line
}

/// As `pg_waldump` pads it.
fn lsn(lsn: Lsn) -> String {
    format!("{:X}/{:08X}", lsn.get() >> 32, lsn.get() as u32)
}

/// As `pg_waldump` writes a time with `TZ=UTC`.
fn utc(time: i64) -> String {
    const SECONDS_1970_TO_2000: i64 = 946_684_800;
    match jiff::Timestamp::from_microsecond(time + SECONDS_1970_TO_2000 * 1_000_000) {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%S%.6f UTC").to_string(),
        Err(_) => format!("({time} us)"),
    }
}
