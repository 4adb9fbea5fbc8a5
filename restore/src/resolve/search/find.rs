//! Finding one record in the WAL that a snapshot reaches, by the footers first.

use super::super::reach::{Reach, Stretch};
use super::super::survey::{Decoded, FOOTERS_AT_ONCE, Survey};
use backstay_common::Result;
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::span::SpanMeta;
use backstay_common::wal::{Event, PAGE_BYTES, Summary};
use std::sync::Arc;

/// Whether a run of WAL with this footer may hold the record.
pub type Holds<'a> = dyn Fn(&Summary) -> bool + Send + Sync + 'a;
/// Whether this is the record.
pub type Is<'a> = dyn Fn(&Event) -> bool + Send + Sync + 'a;

/// A record that was looked for.
#[derive(Clone, Debug)]
pub struct Found {
    pub event: Event,
    /// The time of the last transaction that ended before it, if one was seen.
    pub last_time: Option<i64>,
}

/// The last complete record before a position.
#[derive(Clone, Copy, Debug)]
pub struct Last {
    pub start: Lsn,
    pub end: Lsn,
    /// The time of the last transaction that ended by then, if one was seen.
    pub time: Option<i64>,
}

/// Where to begin to decode one stretch, so that every record that ends in it is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct From {
    lsn: Lsn,
    /// The footer continues the one before it: it tells of every record.
    is_believed: bool,
}

/// Follows footers from stretch to stretch.
#[derive(Debug, Default)]
struct Chain {
    branch: Option<Branch>,
    /// The last record that a footer told of: its start and end.
    last: Option<(Lsn, Lsn)>,
}

impl Chain {
    /// `None` if no record that counts ends in the stretch.
    fn next(&mut self, stretch: &Stretch, summary: &Summary) -> Option<From> {
        if self.branch.replace(stretch.branch) != Some(stretch.branch) {
            self.last = None;
        }
        let before = self.last;
        self.last = summary.last_record.zip(summary.last_record_end).or(before);
        if !stretch.is_needed() {
            return None;
        }
        if stretch.range.contains(stretch.counts.start) {
            return Some(From { lsn: stretch.counts.start, is_believed: true });
        }
        let first = summary.first_record?;
        match before {
            // Begun at the last record rather than behind it: it may be a switch, and only then are zeros good.
            Some((start, end)) if first > behind_header(end) => {
                Some(From { lsn: start, is_believed: false })
            }
            _ => Some(From { lsn: first, is_believed: true }),
        }
    }
}

/// Where a record begins at the latest that follows one ending at `end`.
fn behind_header(end: Lsn) -> Lsn {
    const LONG_HEADER_BYTES: u64 = 40;
    match end == end.align_down(PAGE_BYTES) {
        true => end.add(LONG_HEADER_BYTES),
        false => end,
    }
}

/// The first record that begins in `range`, counts, and `is` the one.
pub async fn first(
    survey: &Survey,
    reach: &Reach,
    range: LsnRange,
    holds: &Holds<'_>,
    is: &Is<'_>,
) -> Result<Option<Found>> {
    let mut chain = Chain::default();
    let mut last_time = None;
    for stretches in reach.stretches.chunks(FOOTERS_AT_ONCE) {
        if stretches[0].range.start >= range.end {
            break;
        }
        for (stretch, meta) in stretches.iter().zip(survey.footers(stretches).await?) {
            let Some(from) = chain.next(stretch, &meta.summary) else { continue };
            if stretch.range.start >= range.end {
                break;
            }
            let passed = stretch.range.end <= range.start;
            if passed || (from.is_believed && !holds(&meta.summary)) {
                last_time = meta.summary.greatest_time.or(last_time);
                continue;
            }
            let decoded = decode(survey, stretch, from.lsn, stretch.range.end, &meta).await?;
            for event in counted(&decoded, stretch) {
                if range.contains(event.start) && is(event) {
                    return Ok(Some(Found { event: event.clone(), last_time }));
                }
                last_time = event.target_time().or(last_time);
            }
        }
    }
    Ok(None)
}

/// The last record that begins in `range`, counts, and `is` the one.
pub async fn last(
    survey: &Survey,
    reach: &Reach,
    range: LsnRange,
    holds: &Holds<'_>,
    is: &Is<'_>,
) -> Result<Option<Found>> {
    let metas = survey.footers(&reach.stretches).await?;
    let from = begins(&reach.stretches, &metas);
    for (number, stretch) in reach.stretches.iter().enumerate().rev() {
        let Some(from) = from[number] else { continue };
        let is_outside = stretch.range.start >= range.end || stretch.range.end <= range.start;
        if is_outside || (from.is_believed && !holds(&metas[number].summary)) {
            continue;
        }
        let decoded = decode(survey, stretch, from.lsn, stretch.range.end, &metas[number]).await?;
        let events: Vec<&Event> = counted(&decoded, stretch).collect();
        let Some(at) = events.iter().rposition(|e| range.contains(e.start) && is(e)) else {
            continue;
        };
        let before = events[..at].iter().rev().find_map(|e| e.target_time());
        let last_time = before.or_else(|| greatest(&metas[..number]));
        return Ok(Some(Found { event: events[at].clone(), last_time }));
    }
    Ok(None)
}

/// The last record that counts and ends at or before `lsn`. It is decoded, so it is known to be whole.
pub async fn last_before(survey: &Survey, reach: &Reach, lsn: Lsn) -> Result<Option<Last>> {
    let metas = survey.footers(&reach.stretches).await?;
    let from = begins(&reach.stretches, &metas);
    for (number, stretch) in reach.stretches.iter().enumerate().rev() {
        let limit = lsn.min(stretch.range.end).min(stretch.counts.end);
        let Some(from) = from[number].filter(|from| from.lsn < limit) else { continue };
        let decoded = decode(survey, stretch, from.lsn, limit, &metas[number]).await?;
        let Some(start) = decoded.last_record else { continue };
        let time = counted(&decoded, stretch).filter_map(Event::target_time).last();
        let time = time.or_else(|| greatest(&metas[..number]));
        return Ok(Some(Last { start, end: decoded.record_end, time }));
    }
    Ok(None)
}

fn begins(stretches: &[Stretch], metas: &[Arc<SpanMeta>]) -> Vec<Option<From>> {
    let mut chain = Chain::default();
    stretches.iter().zip(metas).map(|(stretch, meta)| chain.next(stretch, &meta.summary)).collect()
}

/// The time of the last transactions that the footers tell of.
fn greatest(metas: &[Arc<SpanMeta>]) -> Option<i64> {
    metas.iter().rev().find_map(|meta| meta.summary.greatest_time)
}

async fn decode(
    survey: &Survey,
    stretch: &Stretch,
    from: Lsn,
    to: Lsn,
    meta: &SpanMeta,
) -> Result<Decoded> {
    survey.decode(stretch.branch, LsnRange::new(from, to), meta).await
}

fn counted<'a>(decoded: &'a Decoded, stretch: &Stretch) -> impl Iterator<Item = &'a Event> {
    let counts = stretch.counts;
    decoded.events.iter().filter(move |event| counts.contains(event.start))
}
