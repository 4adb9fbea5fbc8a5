//! Where the WAL goes on when the spool does not say: at the first start, without a spool, on another timeline.
//!
//! At the end of what is stored, on the newest timeline of the server's history of which anything is: so the rest of a
//! timeline that nobody had received when its primary died is read from the one that took over. What the origin does not
//! tell, bytes do: the last stored object of a branch must be what the server has in its place, else the branch is not joined.

use super::{Session, ancestors, history_of, is_gone, is_standby};
use crate::wal::branch::{self, Joinable, Stock};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::origin::Beginnings;
use backstay_common::postgres::{Connection, Identity, Mode, Stream, StreamMessage};
use backstay_common::segment::TimelineId;
use backstay_common::wal::{Decoder, WalVersion};
use backstay_common::{Context, Error, Kind, Result};
use std::time::Duration;

/// How long the first record of a timeline is waited for.
const FIRST_RECORD_PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of WAL in which it must come.
const FIRST_RECORD_WITHIN: u64 = 4 << 20;
/// How long the server may take to send WAL that is compared.
const COMPARE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a refusal of WAL that is gone is waited for.
const HELD_PATIENCE: Duration = Duration::from_secs(5);

/// What the bytes say of a branch whose origin agrees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evidence {
    /// The last that is stored is what the server has.
    Same,
    /// The server has something else there, or not as much.
    Other,
    /// Nothing is stored, or the server no longer has it.
    None,
}

/// Where a timeline of the server's history ends; `None` for its own.
async fn end_of(connection: &mut Connection, timeline: TimelineId) -> Result<Option<Lsn>> {
    let own = connection.identify_system().await?.timeline;
    let history = history_of(connection, own).await?;
    let all = ancestors(history.as_deref())?;
    Ok(all.iter().find(|ancestor| ancestor.timeline == timeline).map(|ancestor| ancestor.switch))
}

/// A timeline of the server's history.
struct Step {
    timeline: TimelineId,
    /// Where the next one begins; `None` on the server's own.
    until: Option<Lsn>,
}

impl Session {
    /// Nothing is spooled that the server could continue.
    pub(super) async fn begin_anew(
        &mut self,
        connection: &mut Connection,
        identity: &Identity,
    ) -> Result<()> {
        let history = history_of(connection, identity.timeline).await?;
        let mut steps: Vec<Step> = ancestors(history.as_deref())?
            .iter()
            .map(|ancestor| Step { timeline: ancestor.timeline, until: Some(ancestor.switch) })
            .collect();
        steps.push(Step { timeline: identity.timeline, until: None });
        let stock = Stock::list(&self.path).await;
        let (mut next, mut refuted) = (None, Vec::new());
        for step in steps.iter().rev() {
            let Ok(beginnings) = self.beginnings(connection, step.timeline).await else { break };
            let (found, other) = self.joinable(connection, &stock, &beginnings, step.until).await?;
            if other {
                refuted.push(step.timeline);
            }
            if let Some(found) = found {
                match (step.until, next) {
                    (Some(until), Some(next)) if found.furthest >= until => {
                        return self.switch(connection, next, until).await;
                    }
                    _ => return self.join(beginnings, found, step.until, Lsn::INVALID).await,
                }
            }
            next = Some(step.timeline);
        }
        let held = self.held_from(identity.flush).await?.min(identity.flush);
        let on = steps.iter().find(|step| step.until.is_none_or(|until| held < until));
        let timeline = on.map_or(identity.timeline, |step| step.timeline);
        let beginnings = self.beginnings(connection, timeline).await?;
        let begin = self.path.context.segment_size.start_of(held);
        let branch = match refuted.contains(&timeline) {
            false => None,
            // At its beginning the spool may look like the branch that the end has shown not to be ours.
            true => {
                let (branch, origin) = branch::open_another(&self.path, &beginnings).await?;
                let sealed = self.path.sealed.clone();
                super::super::blocking(move || sealed.keep_origin(branch, &origin)).await?;
                tracing::warn!(%branch, "a branch of its own");
                Some(branch)
            }
        };
        self.begin_line(beginnings, branch, begin, Lsn::INVALID).await
    }

    /// The line that is spooled ends; that of timeline `next` begins with the segment that holds `at`, or where another
    /// agent has got to already.
    pub(super) async fn switch(
        &mut self,
        connection: &mut Connection,
        next: TimelineId,
        at: Lsn,
    ) -> Result<()> {
        tracing::info!(timeline = %next, %at, "timeline switch");
        let beginnings = self.beginnings(connection, next).await?;
        let stock = Stock::list(&self.path).await;
        if beginnings.is_first_record_unknown() {
            // The server came later to this timeline; whoever stored its beginning may have gone as far as it has it.
            let until = end_of(connection, next).await?;
            let (found, _) = self.joinable(connection, &stock, &beginnings, until).await?;
            if let Some(found) = found.filter(|found| found.furthest > at) {
                let found = self.as_far_as_held(next, found).await?;
                return self.join(beginnings, found, until, at).await;
            }
        } else {
            let joinable = stock.joinable(&self.path, &beginnings).await;
            if let Some(found) = joinable.into_iter().find(|found| found.least > at) {
                return self.join(beginnings, found, None, at).await;
            }
        }
        let begin = self.path.context.segment_size.start_of(at);
        self.begin_line(beginnings, None, begin, at).await
    }

    /// If the server no longer has what the location lacks that has the least, that one is filled from another.
    async fn as_far_as_held(&self, timeline: TimelineId, mut found: Joinable) -> Result<Joinable> {
        let first = LsnRange::new(found.least, found.least.add(1));
        // A server that does not have it yet says nothing for a while, one that no longer has it refuses.
        let read = tokio::time::timeout(HELD_PATIENCE, self.read(timeline, first)).await;
        if matches!(read, Ok(Err(error)) if is_gone(&error)) {
            found.least = found.furthest;
        }
        Ok(found)
    }

    /// Goes on where the branch ends at the required location that has the least of it; if none has any, where the server
    /// holds WAL for us.
    async fn join(
        &mut self,
        beginnings: Beginnings,
        found: Joinable,
        until: Option<Lsn>,
        floor: Lsn,
    ) -> Result<()> {
        let least = match found.least.is_valid() {
            true => found.least,
            false => self.held_from(found.frontier()).await?.min(found.frontier()),
        };
        let from = least.min(until.unwrap_or(Lsn::MAX));
        let begin = self.path.context.segment_size.start_of(from);
        tracing::info!(branch = %found.branch, %from, "going on where it is stored");
        let (sealed, branch, origin) = (self.path.sealed.clone(), found.branch, found.origin);
        super::super::blocking(move || sealed.keep_origin(branch, &origin)).await?;
        self.begin_line(beginnings, Some(branch), begin, floor).await
    }

    /// The branch that holds this server's WAL of a timeline, if any does; and whether one that agrees does not.
    async fn joinable(
        &self,
        connection: &mut Connection,
        stock: &Stock,
        beginnings: &Beginnings,
        until: Option<Lsn>,
    ) -> Result<(Option<Joinable>, bool)> {
        let (mut unproved, mut refuted) = (Vec::new(), false);
        for candidate in stock.joinable(&self.path, beginnings).await {
            // Asked after the listing: whoever stored it may be streaming from this very server.
            let flush = connection.identify_system().await?.flush;
            // A standby that has less than is stored may only be late.
            let until = until.or(is_standby(connection).then_some(flush));
            match self.evidence(&candidate, beginnings.timeline, until, flush).await {
                Ok(Evidence::Same) => return Ok((Some(candidate), refuted)),
                Ok(Evidence::None) => unproved.push(candidate),
                Ok(Evidence::Other) => {
                    refuted = true;
                    tracing::warn!(branch = %candidate.branch, "it holds other WAL than the server");
                }
                Err(error) => return Err(error.context("compare the server with what is stored")),
            }
        }
        if beginnings.is_first_record_unknown() {
            return Ok((None, refuted));
        }
        unproved.retain(|candidate| candidate.least.is_valid());
        Ok((unproved.into_iter().max_by_key(Joinable::frontier), refuted))
    }

    async fn evidence(
        &self,
        candidate: &Joinable,
        timeline: TimelineId,
        until: Option<Lsn>,
        flush: Lsn,
    ) -> Result<Evidence> {
        let newest = candidate.newest_before(until.unwrap_or(Lsn::MAX));
        let Some((range, name)) = newest else { return Ok(Evidence::None) };
        let limit = until.unwrap_or(flush);
        if until.is_none() && range.end > limit {
            // A server never sends what it has not flushed: this one has never had that WAL.
            return Ok(Evidence::Other);
        }
        let both = LsnRange::new(range.start, range.end.min(limit));
        let read = tokio::time::timeout(COMPARE_PATIENCE, self.read(timeline, both)).await;
        let slow = |_| Error::new(Kind::Postgres, format!("the server does not send {both}"));
        let theirs = match read.map_err(slow)? {
            Err(error) if is_gone(&error) => return Ok(Evidence::None),
            read => read?,
        };
        let stored = candidate.wal(&self.path, name).await?;
        Ok(match stored.starts_with(&theirs) {
            true => Evidence::Same,
            false => Evidence::Other,
        })
    }

    /// The server's WAL of `range`, over a connection of its own.
    async fn read(&self, timeline: TimelineId, range: LsnRange) -> Result<Vec<u8>> {
        let from = self.path.context.segment_size.start_of(range.start);
        let connection = self.connect(Mode::Replication).await?;
        let mut stream: Stream = connection.start_replication(None, timeline, from).await?;
        let mut wal = Vec::with_capacity(range.len() as usize);
        while (wal.len() as u64) < range.len() {
            match stream.next().await? {
                StreamMessage::Wal { start, bytes, .. } => {
                    let skip = range.start.since(start).min(bytes.len() as u64) as usize;
                    let room = (range.len() as usize - wal.len()).min(bytes.len() - skip);
                    wal.extend_from_slice(&bytes[skip..skip + room]);
                }
                StreamMessage::Keepalive { .. } => {}
                StreamMessage::End(_) => {
                    let reason = format!("the server ended its WAL before {}", range.end);
                    return Err(Error::new(Kind::Postgres, reason));
                }
            }
        }
        Ok(wal)
    }

    pub(super) async fn beginnings(
        &self,
        connection: &mut Connection,
        timeline: TimelineId,
    ) -> Result<Beginnings> {
        if timeline == TimelineId::FIRST {
            return Ok(Beginnings::of_first_timeline());
        }
        let history = history_of(connection, timeline).await?;
        let mut beginnings = Beginnings { timeline, history, first_record: None };
        let switch = beginnings.switch()?;
        let read = tokio::time::timeout(FIRST_RECORD_PATIENCE, self.first_record(timeline, switch));
        let waited =
            |_| Error::new(Kind::Postgres, format!("timeline {timeline} has no record yet"));
        beginnings.first_record = match read.await.map_err(waited)? {
            Err(error) if is_gone(&error) => None,
            read => Some(read?),
        };
        Ok(beginnings)
    }

    /// The first record of a timeline that begins at `switch`, read over a connection of its own.
    async fn first_record(&self, timeline: TimelineId, switch: Lsn) -> Result<Vec<u8>> {
        let context = &self.path.context;
        let version = WalVersion::from_major(context.major())
            .map_err(|unknown| Error::new(Kind::Postgres, unknown))?;
        let mut decoder =
            Decoder::new(version, context.segment_size, context.system, timeline, switch);
        let from = context.segment_size.start_of(switch);
        let connection = self.connect(Mode::Replication).await?;
        let mut stream: Stream = connection.start_replication(None, timeline, from).await?;
        let mut wal = Vec::new();
        loop {
            let StreamMessage::Wal { start, bytes, .. } = stream.next().await? else { continue };
            let skip = switch.since(start).min(bytes.len() as u64) as usize;
            wal.extend_from_slice(&bytes[skip..]);
            // Eight bytes at a time: no two records end within them.
            while decoder.record_count() == 0 {
                let at = decoder.position().since(switch) as usize;
                let Some(next) = wal.get(at..at + 8) else { break };
                let fed = decoder.feed(next, &mut |_| {}).map_err(Error::from);
                fed.context("read a timeline's first record")?;
            }
            if let Some(first) = decoder.take_first_record() {
                let until = decoder.record_end().since(switch).min(wal.len() as u64) as usize;
                return Ok(wal[first.since(switch) as usize..until].to_vec());
            }
            if wal.len() as u64 > FIRST_RECORD_WITHIN {
                let reason = format!("timeline {timeline} begins with no record at {switch}");
                return Err(Error::new(Kind::Postgres, reason));
            }
        }
    }
}
