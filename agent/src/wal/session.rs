//! The connection to PostgreSQL: where to begin, and what to do when a stream ends.
//!
//! It connects for ever, with pauses, until the agent stops. What decides whether the line goes on is [`decide`], which is
//! pure; where another begins is found out in `session/begin`. While the server is a standby and another agent holds the lease, the
//! agent stands by (`session/standby`). A gap (WAL that the server no longer has, or that cannot be decoded, or a history that was left) is kept
//! in the spool, fsynced, before the stream goes on behind it; nothing else ever skips WAL.

mod begin;
mod standby;

use super::WalPath;
use super::branch::{self, Stock};
use super::line::Line;
use super::pipeline::{Fault, Pipeline};
use super::receive::{End, receive};
use crate::connect;
use backstay_common::gap::Cause;
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::origin::Beginnings;
use backstay_common::postgres::{
    Connection, DUPLICATE_OBJECT, EndOfStream, Identity, Mode, UNDEFINED_FILE, literal,
};
use backstay_common::segment::{Ancestor, TimelineId, parse_history};
use backstay_common::{Error, Kind, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(15));
/// A stream that lasted so long was a good one.
const GOOD: Duration = Duration::from_secs(10);
/// So often the same broken record is asked for before it is given up.
const BROKEN_MAX: u32 = 3;

/// Receives until the agent stops. An error is one that the process must stop for.
pub async fn run(path: Arc<WalPath>, pipeline: Option<Pipeline>) -> Result<()> {
    let mut session = Session { path: path.clone(), pipeline, broken: None };
    let stop = path.context.stop.clone();
    let mut failures = 0;
    while !stop.is_cancelled() {
        let began = Instant::now();
        let result = tokio::select! {
            result = session.once() => result,
            () = stop_before_streaming(&path) => Ok(()),
        };
        path.board.update(|state| state.server.connected = false);
        let error = match result {
            Ok(()) => None,
            Err(error) if is_fatal(&error) => return Err(error),
            Err(error) => Some(error),
        };
        failures = if began.elapsed() > GOOD || error.is_none() { 1 } else { failures + 1 };
        if let Some(error) = error {
            session.complain(&error, failures);
        }
        tokio::select! {
            () = tokio::time::sleep(super::backoff(failures, BACKOFF)) => {}
            () = stop.cancelled() => {}
        }
    }
    session.finish().await
}

/// While streaming, the stream itself sees to the stop; before, nothing is lost by dropping what was begun.
async fn stop_before_streaming(path: &WalPath) {
    path.context.stop.cancelled().await;
    while path.board.read(|state| state.server.connected) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn is_fatal(error: &Error) -> bool {
    matches!(error.kind(), Kind::Local | Kind::Bug | Kind::Corrupt)
}

struct Session {
    path: Arc<WalPath>,
    /// Of the current line; none before the first.
    pipeline: Option<Pipeline>,
    /// Where the server's records broke off last, and how many times in a row.
    broken: Option<(Lsn, u32)>,
}

/// What the server's timeline means for the line that is spooled.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    /// More of the same line.
    Continue,
    /// The line has ended at `at`, where `next` begins.
    Switch { next: TimelineId, at: Lsn },
    /// The server has another history: the line stays as it is.
    Anew,
}

/// `position` is how far the line is spooled; `history` is that of the server's `timeline`.
fn decide(
    line: &Beginnings,
    position: Lsn,
    timeline: TimelineId,
    history: Option<&[u8]>,
) -> Result<Decision> {
    if timeline == line.timeline {
        let same = history == line.history.as_deref();
        return Ok(if same { Decision::Continue } else { Decision::Anew });
    }
    let ancestors = ancestors(history)?;
    let Some(n) = ancestors.iter().position(|a| a.timeline == line.timeline) else {
        return Ok(Decision::Anew);
    };
    if self::ancestors(line.history.as_deref())? != ancestors[..n] {
        return Ok(Decision::Anew);
    }
    let at = ancestors[n].switch;
    let next = ancestors.get(n + 1).map_or(timeline, |next| next.timeline);
    Ok(if position < at { Decision::Continue } else { Decision::Switch { next, at } })
}

fn ancestors(history: Option<&[u8]>) -> Result<Vec<Ancestor>> {
    let text = String::from_utf8_lossy(history.unwrap_or_default());
    parse_history(&text).map_err(|reason| Error::new(Kind::Postgres, reason))
}

impl Session {
    /// One connection, from its beginning to its end.
    async fn once(&mut self) -> Result<()> {
        let mut connection = self.connect(Mode::Replication).await?;
        let identity = self.identify(&mut connection).await?;
        self.ensure_slot(&mut connection).await?;
        let is_standby = is_standby(&connection);
        if is_standby {
            match self.path.leasing.is_free().await {
                Ok(true) => {}
                Ok(false) => return self.stand_by(connection, true).await,
                // What is spooled was received from this standby, as the only agent.
                Err(_) if self.pipeline.is_some() => {}
                Err(_) => return self.stand_by(connection, false).await,
            }
        }
        let history = history_of(&mut connection, identity.timeline).await?;
        let decision = match &self.pipeline {
            Some(p) => {
                decide(&p.line.beginnings, p.position(), identity.timeline, history.as_deref())?
            }
            None => Decision::Anew,
        };
        match decision {
            Decision::Continue => self.go_on(&identity, is_standby).await?,
            Decision::Switch { next, at } => self.switch(&mut connection, next, at).await?,
            Decision::Anew => self.begin_anew(&mut connection, &identity).await?,
        }
        self.stream(connection).await
    }

    /// The server has the line's timeline and history, and must have its WAL as well.
    async fn go_on(&mut self, identity: &Identity, is_standby: bool) -> Result<()> {
        let Some(pipeline) = &self.pipeline else { return Ok(()) };
        let (line, position) = (&pipeline.line, pipeline.position());
        // A standby that was restarted asks its primary again for what it had.
        let is_behind = position > identity.flush && !is_standby;
        if line.timeline() == identity.timeline && is_behind {
            return self.diverge(identity.flush, identity.flush).await;
        }
        if self.broken.is_some_and(|(at, times)| at == position && times >= BROKEN_MAX) {
            let from = self.path.context.segment_size.start_of(identity.flush);
            if from > position {
                let reason = format!(
                    "the server's records break off at {position}, each time that they are asked for"
                );
                return self.skip(position, from, Cause::Broken, reason).await;
            }
        }
        Ok(())
    }

    /// What the server has from `at` on is not what it had: it was reset to an older state, or is another one. It gets a
    /// branch of its own, which begins with the segment that holds `at`.
    async fn diverge(&mut self, at: Lsn, flush: Lsn) -> Result<()> {
        let Some(pipeline) = &self.pipeline else { return Ok(()) };
        let beginnings = pipeline.line.beginnings.clone();
        let left = pipeline.line.branch();
        let (branch, origin) = branch::open_another(&self.path, &beginnings).await?;
        let left = left.map_or("a branch without a name".to_string(), |left| left.to_string());
        let reason = format!(
            "from {at} on the server's WAL is not what it was on branch {left}: it goes on as branch {branch}"
        );
        tracing::warn!(%branch, "{reason}");
        let (path, gap) = (self.path.clone(), LsnRange::new(at, flush.max(at.add(1))));
        super::blocking(move || {
            path.sealed.keep_origin(branch, &origin)?;
            path.record_gap(gap, Cause::Diverged, Some(branch), reason)
        })
        .await?;
        let begin = self.path.context.segment_size.start_of(at);
        self.begin_line(beginnings, Some(branch), begin, Lsn::INVALID).await
    }

    /// The line ends, and another of its branch begins at `from`, behind what cannot be had.
    async fn skip(&mut self, position: Lsn, from: Lsn, cause: Cause, reason: String) -> Result<()> {
        let Some(pipeline) = &self.pipeline else { return Ok(()) };
        let (beginnings, branch) = (pipeline.line.beginnings.clone(), pipeline.line.branch());
        let position = self.trim().await?.min(position);
        self.record_gap(LsnRange::new(position, from), cause, branch, reason).await?;
        self.broken = None;
        self.begin_line(beginnings, branch, from, Lsn::INVALID).await
    }

    /// Streams the current line, and those that follow it, for as long as the connection lasts.
    async fn stream(&mut self, mut connection: Connection) -> Result<()> {
        loop {
            let no_line = || Error::new(Kind::Bug, "there is no line to stream");
            let line = self.pipeline.as_ref().ok_or_else(no_line)?;
            let (timeline, from) = (line.line.timeline(), self.start_of(line));
            let slot = &self.path.context.settings.postgres.slot;
            let stream = match connection.start_replication(Some(slot), timeline, from).await {
                Ok(stream) => stream,
                Err(error) => return self.refused(error).await,
            };
            tracing::info!(%timeline, %from, "streaming");
            self.path.context.alarms.clear("postgres-down", "");
            self.path.board.update(|state| {
                state.server.connected = true;
                state.server.leaving = None;
                state.server.last_error = None;
            });
            let pipeline = self.pipeline.take().ok_or_else(no_line)?;
            let (pipeline, end) = receive(&self.path, stream, pipeline).await?;
            self.pipeline = Some(pipeline);
            match self.ended(end).await? {
                Some(again) => connection = again,
                None => return Ok(()),
            }
        }
    }

    /// The segment start of what is spooled.
    fn start_of(&self, pipeline: &Pipeline) -> Lsn {
        self.path.context.segment_size.start_of(pipeline.position())
    }

    /// A connection to go on with, if there is one.
    async fn ended(&mut self, end: End) -> Result<Option<Connection>> {
        if !matches!(end, End::Pipeline(_)) {
            self.path.context.alarms.clear("wal-broken", "");
            self.broken = None;
        }
        match end {
            End::Server(EndOfStream::TimelineSwitch { next, start }, stream) => {
                let Some(mut connection) = stream.into_connection() else { return Ok(None) };
                self.switch(&mut connection, next, start).await?;
                Ok(Some(connection))
            }
            End::Server(EndOfStream::Closed, _) => {
                Err(Error::new(Kind::Postgres, "the server closed the connection"))
            }
            End::Server(EndOfStream::ServerShutdown, _) | End::Left => {
                Err(Error::new(Kind::Postgres, "the server has been shut down"))
            }
            End::Stopped => Ok(None),
            End::Failed(error) => self.refused(error).await.map(|()| None),
            End::Pipeline(Fault::Diverged { at }) => {
                let flush = self.path.board.read(|state| state.server.end);
                self.diverge(at, flush).await.map(|()| None)
            }
            End::Pipeline(fault) => Err(self.broken(fault)),
        }
    }

    fn broken(&mut self, fault: Fault) -> Error {
        let alarms = &self.path.context.alarms;
        match fault {
            Fault::Hole { expected, found } => {
                let reason = format!("the server went on at {found} where {expected} was next");
                Error::new(Kind::Postgres, reason)
            }
            Fault::Diverged { at } => {
                Error::new(Kind::Bug, format!("the divergence at {at} was not followed"))
            }
            Fault::Broken(fault) => {
                let reason =
                    format!("the server's WAL does not continue what came before: {fault}");
                alarms.raise("wal-broken", "", &reason);
                let position = self.pipeline.as_ref().map_or(Lsn::INVALID, Pipeline::position);
                let before = self.broken.filter(|(at, _)| *at == position);
                self.broken = Some((position, before.map_or(1, |(_, times)| times + 1)));
                Error::new(Kind::Postgres, reason)
            }
            Fault::Held => {
                Error::new(Kind::Postgres, "the connection ended while the spool was full")
            }
            Fault::Fatal(error) => error,
        }
    }

    /// A stream could not begin. If its WAL is gone, the next one begins behind the gap.
    async fn refused(&mut self, error: Error) -> Result<()> {
        let Some(pipeline) = self.pipeline.as_ref().filter(|_| is_gone(&error)) else {
            return Err(error);
        };
        let (position, branch) = (pipeline.position(), pipeline.line.branch());
        let mut connection = self.connect(Mode::Replication).await?;
        let identity = self.identify(&mut connection).await?;
        let history = history_of(&mut connection, identity.timeline).await?;
        let line = &pipeline.line.beginnings;
        let reason = format!("the server no longer has the WAL after {position}");
        if line.timeline != identity.timeline {
            // The rest of an older timeline is gone; the next one may still be there.
            let decided = decide(line, Lsn::MAX, identity.timeline, history.as_deref())?;
            if let Decision::Switch { next, at } = decided {
                let position = self.trim().await?.min(position);
                let gap = LsnRange::new(position, at.max(position));
                self.record_gap(gap, Cause::Removed, branch, reason).await?;
                return self.switch(&mut connection, next, at).await;
            }
        }
        let from = self.path.context.segment_size.start_of(self.held_from(identity.flush).await?);
        if from <= position {
            return Err(error.context(format!("WAL from {position} on, which the slot holds")));
        }
        self.skip(position, from, Cause::Removed, reason).await
    }

    /// The current line goes on no more. Returns where what is whole of it ends.
    async fn trim(&mut self) -> Result<Lsn> {
        let Some(mut pipeline) = self.pipeline.take() else { return Ok(Lsn::MAX) };
        let trimmed = super::blocking(move || Ok((pipeline.trim()?, pipeline)));
        let (end, pipeline) = trimmed.await?;
        self.pipeline = Some(pipeline);
        Ok(end)
    }

    /// Keeps those parts of a gap that no location has either.
    async fn record_gap(
        &self,
        gap: LsnRange,
        cause: Cause,
        branch: Option<Branch>,
        reason: String,
    ) -> Result<()> {
        let missing = match branch {
            _ if gap.is_empty() => return Ok(()),
            Some(branch) => Stock::list(&self.path).await.missing(branch, gap),
            None => vec![gap],
        };
        for part in missing {
            let (path, reason) = (self.path.clone(), reason.clone());
            super::blocking(move || path.record_gap(part, cause, branch, reason)).await?;
        }
        Ok(())
    }

    /// The first WAL that the server holds for us.
    async fn held_from(&self, flush: Lsn) -> Result<Lsn> {
        let slot = literal(&self.path.context.settings.postgres.slot);
        let asked = format!(
            "SELECT restart_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = {slot}"
        );
        let held = self.first_value(&asked).await?.and_then(|text| text.parse().ok());
        Ok(held.unwrap_or(flush))
    }

    /// Ends the current line and begins another, whose branch may be known.
    async fn begin_line(
        &mut self,
        beginnings: Beginnings,
        branch: Option<Branch>,
        begin: Lsn,
        floor: Lsn,
    ) -> Result<()> {
        let old = self.pipeline.take();
        let path = self.path.clone();
        let (line, pipeline) = super::blocking(move || {
            old.map_or(Ok(()), Pipeline::end)?;
            let number = path.board.read(|s| s.lines.keys().max().map_or(1, |n| n + 1));
            let line = Arc::new(Line::create(&path.root, number, beginnings, begin)?);
            branch.map_or(Ok(()), |branch| line.settle(branch))?;
            path.take_up(&line, floor);
            Ok((line.clone(), Pipeline::open(path, line)?))
        })
        .await?;
        self.pipeline = Some(pipeline);
        self.path.start_sealing(&line);
        Ok(())
    }

    async fn connect(&self, mode: Mode) -> Result<Connection> {
        let info = connect::conninfo(&self.path.context.settings)?;
        Connection::connect(&info, mode).await
    }

    async fn identify(&self, connection: &mut Connection) -> Result<Identity> {
        let identity = connection.identify_system().await?;
        let expected = self.path.context.system;
        if identity.system != expected {
            let reason =
                format!("the server is system {}, not {expected} as before", identity.system);
            self.path.context.alarms.raise("wal-foreign", "", &reason);
            // Taken for another one at the start, it is asked again at the next.
            let kind = if self.path.context.is_recalled { Kind::Local } else { Kind::Postgres };
            return Err(Error::new(kind, reason)
                .remedy("correct conninfo, or restart the agent if the server was replaced"));
        }
        self.path.context.alarms.clear("wal-foreign", "");
        Ok(identity)
    }

    /// Makes the slot if it is not there, and anew if what it holds has been removed all the same: its room was
    /// limited, or it was made while a checkpoint was under way that did not know of it.
    async fn ensure_slot(&self, connection: &mut Connection) -> Result<()> {
        let slot = &self.path.context.settings.postgres.slot;
        match connection.create_physical_slot(slot).await {
            Err(error) if error.sqlstate() == Some(DUPLICATE_OBJECT) => {}
            created => {
                tracing::info!(slot, "replication slot created");
                return created;
            }
        }
        let asked = format!(
            "SELECT 1 FROM pg_catalog.pg_replication_slots \
             WHERE slot_name = {} AND wal_status = 'lost' AND NOT active",
            literal(slot)
        );
        if self.first_value(&asked).await?.is_none() {
            return Ok(());
        }
        tracing::warn!(slot, "the WAL that the slot held is gone: it is made anew");
        connection.drop_slot(slot).await?;
        connection.create_physical_slot(slot).await
    }

    /// The first value of the first row of a query over a connection of its own.
    async fn first_value(&self, sql: &str) -> Result<Option<String>> {
        let mut connection = self.connect(Mode::Sql).await?;
        let rows = connection.query(sql).await?;
        connection.close().await;
        Ok(rows.first().and_then(|row| row.get(0)).map(str::to_string))
    }

    fn complain(&self, error: &Error, failures: u32) {
        tracing::warn!(%error, failures, "connection to PostgreSQL");
        if failures > 1 {
            self.path.context.alarms.raise("postgres-down", "", error);
        }
        let message = error.message().to_string();
        self.path.board.update(|state| state.server.last_error = Some(message));
    }

    /// The agent stops: what is left is cut and synced. The line goes on at the next start.
    async fn finish(self) -> Result<()> {
        match self.pipeline {
            Some(pipeline) => super::blocking(move || pipeline.finish()).await,
            None => Ok(()),
        }
    }
}

fn is_standby(connection: &Connection) -> bool {
    connection.parameter("in_hot_standby") == Some("on")
}

fn is_gone(error: &Error) -> bool {
    error.sqlstate() == Some(UNDEFINED_FILE)
}

async fn history_of(connection: &mut Connection, timeline: TimelineId) -> Result<Option<Vec<u8>>> {
    match timeline {
        TimelineId::FIRST => Ok(None),
        _ => connection.timeline_history(timeline).await.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: &[u8] = b"1\t0/3000148\tno recovery target specified\n";
    const THIRD: &[u8] = b"1\t0/3000148\tno recovery target specified\n2\t0/5000000\tagain\n";

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn line(number: u32, history: Option<&[u8]>) -> Beginnings {
        let history = history.map(<[u8]>::to_vec);
        Beginnings { timeline: timeline(number), history, first_record: None }
    }

    #[test]
    fn the_same_timeline_goes_on_if_its_history_is_the_same() {
        let at = Lsn::new(0x400_0000);
        let first = line(1, None);
        assert_eq!(decide(&first, at, timeline(1), None).unwrap(), Decision::Continue);
        let second = line(2, Some(SECOND));
        assert_eq!(decide(&second, at, timeline(2), Some(SECOND)).unwrap(), Decision::Continue);
        let other = b"1\t0/3000200\tno recovery target specified\n";
        assert_eq!(decide(&second, at, timeline(2), Some(other)).unwrap(), Decision::Anew);
        assert_eq!(decide(&second, at, timeline(1), None).unwrap(), Decision::Anew);
    }

    #[test]
    fn the_rest_of_the_old_timeline_comes_before_the_next() {
        let first = line(1, None);
        let before = Lsn::new(0x300_0100);
        assert_eq!(decide(&first, before, timeline(3), Some(THIRD)).unwrap(), Decision::Continue);
        let at = Lsn::new(0x300_0148);
        let switch = Decision::Switch { next: timeline(2), at };
        assert_eq!(decide(&first, at, timeline(3), Some(THIRD)).unwrap(), switch);
        let beyond = Lsn::new(0x900_0000);
        assert_eq!(decide(&first, beyond, timeline(3), Some(THIRD)).unwrap(), switch);
        let switch = Decision::Switch { next: timeline(3), at: Lsn::new(0x500_0000) };
        let second = line(2, Some(SECOND));
        assert_eq!(decide(&second, beyond, timeline(3), Some(THIRD)).unwrap(), switch);
    }

    #[test]
    fn a_line_that_is_no_ancestor_is_left_as_it_is() {
        let other = line(2, Some(b"1\t0/2000000\tsomewhere else\n"));
        let at = Lsn::new(0x900_0000);
        assert_eq!(decide(&other, at, timeline(3), Some(THIRD)).unwrap(), Decision::Anew);
        let skipped = b"1\t0/3000148\tx\n3\t0/5000000\ty\n";
        let second = line(2, Some(SECOND));
        assert_eq!(decide(&second, at, timeline(4), Some(skipped)).unwrap(), Decision::Anew);
    }
}
