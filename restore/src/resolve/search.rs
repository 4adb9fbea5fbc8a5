//! The target on one line: which snapshot, and at which record to stop.
//!
//! Snapshots are tried from the newest back. Footers say which objects can hold the record; only those are decoded, from
//! the first record that they end. A footer that does not continue the one before it is not believed.

mod find;

use super::line::{self, Line};
use super::reach::Reach;
use super::refuse::{self, Tried};
use super::survey::Survey;
use super::{Answer, Restriction};
use crate::plan::StopPoint;
use crate::target::Target;
use backstay_common::Result;
use backstay_common::id::SnapshotId;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::pgtime::PgTime;
use backstay_common::snapshot::ManifestPlain;
use backstay_common::wal::{Event, EventKind, PAGE_BYTES, Summary};
use find::{Found, Last, first, last, last_before};
use jiff::Timestamp;

/// A record may reach the WAL a little later than its time says: a clock proves only what is older than this, in
/// microseconds.
const CLOCK_MARGIN_US: i64 = 1_000_000;
/// Footers that the search for a clock step reads at most.
const CLOCK_STEP_FOOTERS_MAX: usize = 4096;
/// A page's header, at most. A position may be given behind it though nothing follows.
const PAGE_HEADER_BYTES_MAX: u64 = 40;

/// A snapshot with what it reaches on a line.
struct Start<'a> {
    id: SnapshotId,
    plain: &'a ManifestPlain,
    reach: Reach,
}

impl Start<'_> {
    /// True if the WAL reaches the moment from which on the snapshot is consistent.
    fn is_usable(&self) -> bool {
        self.reach.end >= self.plain.stop
    }

    fn answer(self, stop: StopPoint, position: Lsn, end: Lsn, branch_of: Lsn) -> Answer {
        Answer {
            snapshot: self.id,
            stop,
            branch: self.reach.branch_at(branch_of),
            position,
            end,
            last_transaction: None,
            first_lost: None,
            reach: self.reach,
            notes: Vec::new(),
        }
    }

    /// The answer that stops after the record at `start`, and with it `last` transaction.
    async fn after(
        self,
        survey: &Survey,
        start: Lsn,
        end: Lsn,
        last: Option<i64>,
    ) -> Result<Answer> {
        let rest = LsnRange::new(end, Lsn::MAX);
        let ends = |summary: &Summary| summary.least_time.is_some();
        let lost = first(survey, &self.reach, rest, &ends, &|e| e.target_time().is_some()).await?;
        let mut answer = self.answer(StopPoint::AfterRecord(start), end, end, start);
        answer.last_transaction = last.map(PgTime);
        answer.first_lost = lost.and_then(|found| found.event.target_time()).map(PgTime);
        Ok(answer)
    }
}

fn starts<'a>(survey: &'a Survey, line: &'a Line, only: &Restriction) -> Vec<Start<'a>> {
    let snapshots = survey.on_line(line, only.snapshot);
    let start = |(id, plain)| survey.reach(line, plain).map(|reach| Start { id, plain, reach });
    snapshots.into_iter().filter_map(start).collect()
}

/// Resolves a target other than `snapshot:` on one line.
pub async fn on_line(
    survey: &Survey,
    line: &Line,
    target: &Target,
    only: &Restriction,
) -> Result<Answer> {
    let starts = starts(survey, line, only);
    let mut tried = Tried::new(target, line);
    match target {
        Target::Latest => latest(survey, starts, &mut tried).await,
        Target::Lsn(lsn) => lsn_target(survey, starts, *lsn, &mut tried).await,
        Target::Time(time) => time_target(survey, starts, *time, &mut tried).await,
        Target::Xid(xid) => {
            let holds = |summary: &Summary| holds_xid(summary, *xid);
            record_target(survey, starts, &holds, &|e| e.target_xid() == Some(*xid), &mut tried)
                .await
        }
        Target::Name(name) => {
            let holds = |summary: &Summary| {
                summary.more_restore_points
                    || summary.restore_points.iter().any(|p| p.name == *name)
            };
            let is = |event: &Event| matches!(&event.kind, EventKind::RestorePoint { name: found, .. } if found == name);
            record_target(survey, starts, &holds, &is, &mut tried).await
        }
        Target::Snapshot(_) => snapshot(survey, only).await,
    }
}

/// Ids wrap around: `least` precedes `greatest` as PostgreSQL compares them.
fn holds_xid(summary: &Summary, xid: u32) -> bool {
    let precedes = |a: u32, b: u32| (a.wrapping_sub(b) as i32) < 0;
    match (summary.least_xid, summary.greatest_xid) {
        (Some(least), Some(greatest)) => !precedes(xid, least) && !precedes(greatest, xid),
        _ => false,
    }
}

/// The end of one snapshot.
pub async fn snapshot(survey: &Survey, only: &Restriction) -> Result<Answer> {
    let chosen = only.snapshot.and_then(|id| Some((id, survey.snapshots.get(&id)?)));
    let Some((id, plain)) = chosen else { return Err(refuse::no_snapshot(survey)) };
    let line = line::line_of(plain.branch, &survey.pasts);
    let target = Target::Snapshot(id.to_string());
    let mut tried = Tried::new(&target, &line);
    let start = survey.reach(&line, plain).map(|reach| Start { id, plain, reach });
    match start.filter(Start::is_usable) {
        Some(start) => {
            let (stop, end) = (StopPoint::Consistent, start.plain.stop);
            Ok(start.answer(stop, end, end, Lsn::new(end.get() - 1)))
        }
        None => {
            tried.incomplete(id, plain, survey.reach(&line, plain).as_ref());
            Err(tried.unreachable(survey))
        }
    }
}

async fn latest(survey: &Survey, starts: Vec<Start<'_>>, tried: &mut Tried<'_>) -> Result<Answer> {
    for start in starts {
        if !start.is_usable() {
            tried.incomplete(start.id, start.plain, Some(&start.reach));
            continue;
        }
        let last = last_before(survey, &start.reach, start.reach.end).await?;
        let Some(Last { start: record, end, time }) =
            last.filter(|last| last.end >= start.plain.stop)
        else {
            tried.incomplete(start.id, start.plain, Some(&start.reach));
            continue;
        };
        let gap = start.reach.gap;
        let mut answer = start.answer(StopPoint::AfterRecord(record), end, end, record);
        answer.last_transaction = time.map(PgTime);
        answer.notes.extend(gap.map(|gap| refuse::more_beyond(&gap)));
        return Ok(answer);
    }
    Err(tried.unreachable(survey))
}

async fn lsn_target(
    survey: &Survey,
    starts: Vec<Start<'_>>,
    lsn: Lsn,
    tried: &mut Tried<'_>,
) -> Result<Answer> {
    for start in starts {
        tried.seen(start.id, start.plain);
        if start.plain.stop > lsn {
            continue;
        }
        if !start.is_usable() {
            tried.incomplete(start.id, start.plain, Some(&start.reach));
            continue;
        }
        let end = start.reach.end;
        let behind_header =
            end == end.align_down(PAGE_BYTES) && lsn.since(end) <= PAGE_HEADER_BYTES_MAX;
        if lsn > end && !behind_header {
            tried.covered(survey, &start.reach).await?;
            return Err(tried.too_late(survey));
        }
        let last = last_before(survey, &start.reach, lsn.min(end)).await?;
        if let Some(last) = last.filter(|last| last.end >= start.plain.stop) {
            return start.after(survey, last.start, last.end, last.time).await;
        }
    }
    Err(tried.too_early(survey))
}

async fn record_target(
    survey: &Survey,
    starts: Vec<Start<'_>>,
    holds: &find::Holds<'_>,
    is: &find::Is<'_>,
    tried: &mut Tried<'_>,
) -> Result<Answer> {
    let (mut searched_from, mut early) = (Lsn::MAX, None::<Found>);
    for start in starts {
        tried.seen(start.id, start.plain);
        if !start.is_usable() {
            tried.incomplete(start.id, start.plain, Some(&start.reach));
            continue;
        }
        if early.is_none() {
            let range = LsnRange::new(start.plain.start, searched_from);
            early = last(survey, &start.reach, range, holds, is).await?;
            searched_from = start.plain.start;
            tried.covered(survey, &start.reach).await?;
        }
        let Some(found) = &early else { continue };
        if found.event.end < start.plain.stop {
            continue;
        }
        let (record, end) = (found.event.start, found.event.end);
        let time = found.event.target_time().or(found.last_time);
        let same = LsnRange::new(start.plain.start, record);
        let before = last(survey, &start.reach, same, holds, is).await?;
        let mut answer = start.after(survey, record, end, time).await?;
        if let Some(before) = before {
            let place = before.event.start;
            answer
                .notes
                .push(format!("there is another before it, at {place}: the newest is taken"));
        }
        return Ok(answer);
    }
    Err(match early {
        Some(_) => tried.too_early(survey),
        None => tried.not_found(survey),
    })
}

async fn time_target(
    survey: &Survey,
    mut starts: Vec<Start<'_>>,
    time: Timestamp,
    tried: &mut Tried<'_>,
) -> Result<Answer> {
    let time = PgTime::from(time);
    let mut is_late = false;
    for number in 0..starts.len() {
        let start = &starts[number];
        tried.seen(start.id, start.plain);
        if !start.is_usable() {
            tried.incomplete(start.id, start.plain, Some(&start.reach));
            continue;
        }
        if !began_before(start.plain, time) {
            continue;
        }
        match first_later(survey, &start.reach, time, Lsn::MAX).await? {
            Some(found) if found.event.start < start.plain.stop => continue,
            Some(found) => {
                refuse_clock_step(survey, &starts, number, time, &found, tried).await?;
                let start = starts.swap_remove(number);
                return Ok(before(start, &found));
            }
            None if is_covered(survey, &start.reach, time).await? => {
                let last = last_before(survey, &start.reach, start.reach.end).await?;
                let Some(last) = last.filter(|last| last.end >= start.plain.stop) else { continue };
                let start = starts.swap_remove(number);
                return start.after(survey, last.start, last.end, last.time).await;
            }
            None => {
                is_late = true;
                tried.covered(survey, &start.reach).await?;
            }
        }
    }
    Err(match is_late {
        true => tried.too_late(survey),
        false => tried.too_early(survey),
    })
}

/// A snapshot that began later holds what was committed between the time and its start, though no record after it says so.
fn began_before(plain: &ManifestPlain, time: PgTime) -> bool {
    // Its beginning is told in whole seconds, rounded down.
    plain.began < time.timestamp().as_second()
}

fn before(start: Start<'_>, found: &Found) -> Answer {
    let record = found.event.start;
    let mut answer = start.answer(StopPoint::BeforeRecord(record), record, found.event.end, record);
    answer.last_transaction = found.last_time.map(PgTime);
    answer.first_lost = found.event.target_time().map(PgTime);
    answer
}

/// The first end of a transaction that is later than `time`, among records that begin before `until`.
async fn first_later(
    survey: &Survey,
    reach: &Reach,
    time: PgTime,
    until: Lsn,
) -> Result<Option<Found>> {
    let later = |at: Option<i64>| at.is_some_and(|at| at > time.micros());
    let range = LsnRange::new(Lsn::INVALID, until);
    first(survey, reach, range, &|s| later(s.greatest_time), &|e| later(e.target_time())).await
}

/// True if all that happened up to `time` is in `reach`, which holds nothing later.
async fn is_covered(survey: &Survey, reach: &Reach, time: PgTime) -> Result<bool> {
    let clock = survey.clock(reach).await?;
    if clock.is_some_and(|clock| time.micros_since(clock) <= -CLOCK_MARGIN_US) {
        return Ok(true);
    }
    let footers = survey.footers(&reach.stretches).await?;
    Ok(footers.iter().any(|meta| meta.summary.greatest_time >= Some(time.micros())))
}

/// A clock that was set back makes "the first later than" another record when it is counted from an older snapshot.
async fn refuse_clock_step(
    survey: &Survey,
    starts: &[Start<'_>],
    chosen: usize,
    time: PgTime,
    found: &Found,
    tried: &Tried<'_>,
) -> Result<()> {
    let mut until = starts[chosen].plain.start;
    for older in starts[chosen + 1..].iter().filter(|start| start.is_usable()) {
        if older.reach.stretches.len() > CLOCK_STEP_FOOTERS_MAX {
            return Ok(());
        }
        let other = first_later(survey, &older.reach, time, until).await?;
        match other {
            Some(other) if other.event.start >= older.plain.stop => {
                let ours = (starts[chosen].id, found.event.start);
                return Err(tried.clock_step(ours, (older.id, other.event.start)));
            }
            _ => until = older.plain.start,
        }
    }
    Ok(())
}
