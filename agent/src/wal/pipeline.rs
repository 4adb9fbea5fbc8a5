//! The pipeline of one line: checks what comes from the server, decodes it, spools it, and cuts it.
//!
//! It runs on a thread of its own, for it decodes and writes. What always holds: the spool's bytes are those that the
//! server sent, in order and without a hole; whatever was cut has passed the decoder; bytes that come again
//! are compared with those that are there. Nothing here outlives the process: a new pipeline decodes what the spool and
//! the folder `sealed` hold, and goes on from there.

mod room;

use super::WalPath;
use super::cut::{
    BEHIND_BYTES, COMMIT_PAUSE, Cut, GROUP_PIECES, Group, Rules, TAIL_BYTES_MAX, Uncut,
};
use super::line::Line;
use backstay_common::lsn::{Lsn, LsnRange, covered_until};
use backstay_common::pgtime::PgTime;
use backstay_common::wal::{DecodeError, Decoder, EventKind, Summary, WalVersion};
use backstay_common::{Error, Kind, Result};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Bytes read from the spool at once.
const BLOCK_BYTES: u64 = 1 << 20;

/// What receive hands on, in the order in which it came.
#[derive(Debug)]
pub enum Message {
    Wal {
        start: Lsn,
        bytes: Bytes,
        server_end: Lsn,
        clock: PgTime,
    },
    /// The server's WAL reached `end` at `clock`; if it is `urgent`, what is there shall be shipped now.
    Clock {
        end: Lsn,
        clock: PgTime,
        urgent: bool,
    },
}

/// Why a pipeline takes no more from this connection.
#[derive(Debug)]
pub enum Fault {
    /// The server left out bytes.
    Hole { expected: Lsn, found: Lsn },
    /// The server sent other bytes than those that are spooled.
    Diverged { at: Lsn },
    /// The bytes are not WAL that continues what came before.
    Broken(DecodeError),
    /// The connection ended while the spool was full.
    Held,
    /// The process must stop.
    Fatal(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Fatal(error)
    }
}

pub struct Pipeline {
    path: Arc<WalPath>,
    pub line: Arc<Line>,
    rules: Rules,
    decoder: Decoder,
    /// Of the records since the last piece.
    piece: Summary,
    /// Of the records of this span.
    span: Summary,
    span_first_record: Option<Lsn>,
    /// The pieces that are not in a longer object yet.
    group: Group,
    /// Borders of spans whose pieces are sealed and that are not sealed whole.
    lacking: BTreeSet<Lsn>,
    /// How far the server's WAL reached, by its last message.
    server_end: Lsn,
    /// All before it has been cut.
    cut_from: Lsn,
    /// Nothing after it is cut: after a crash the beginning of a record at the spool's end may be anything, until the
    /// server has sent it again.
    proven: Lsn,
    /// Cuts of full spans that end in what is not proven, and what `cut_from` was before each.
    withheld: Vec<(Lsn, Cut)>,
    uncut: Uncut,
    clock: Option<PgTime>,
    /// The last shutdown checkpoint.
    shutdown: Option<Lsn>,
    /// When the spool became full, if it is.
    full_since: Option<Instant>,
}

impl Pipeline {
    /// Takes up a line where the spool ends: truncates what is no WAL, and cuts the spans that are full.
    /// Blocks.
    pub fn open(path: Arc<WalPath>, line: Arc<Line>) -> Result<Pipeline> {
        let begin = line.spool.begin();
        let mut sealed = path.board.read(|state| state.shelf.ranges(line.number));
        let cut_from = covered_until(begin, &mut sealed);
        let lacking = lacking_whole(begin, cut_from, &sealed);
        // A record that began in the span before is read whole.
        let first = lacking.first().map_or(cut_from, |border| Lsn::new(border.get() - 1));
        let from = span_before(first.min(line.spool.end())).max(begin);
        let mut pipeline = Pipeline {
            decoder: decoder(&path, &line, from)?,
            proven: begin,
            withheld: Vec::new(),
            rules: Rules::new(&path.context.settings.durability),
            piece: Summary::default(),
            span: Summary::default(),
            span_first_record: None,
            group: Group::from(cut_from),
            lacking,
            server_end: Lsn::INVALID,
            cut_from,
            uncut: Uncut::default(),
            clock: None,
            shutdown: None,
            full_since: None,
            path,
            line,
        };
        pipeline.truncate_tail(from)?;
        pipeline.decode_again(from)?;
        Ok(pipeline)
    }

    /// What fails to decode at the end of the spool was not whole when the process before this one was killed.
    fn truncate_tail(&self, from: Lsn) -> Result<()> {
        let mut decoder = decoder(&self.path, &self.line, from)?;
        let end = self.line.spool.end();
        for block in blocks(from, end) {
            if let Err(fault) = decoder.feed(&self.line.spool.read(block)?, &mut |_| {}) {
                tracing::warn!(%fault, spool = %end, valid = %decoder.record_end(), "spool truncated");
                return self.line.spool.truncate(decoder.record_end());
            }
        }
        Ok(())
    }

    fn decode_again(&mut self, from: Lsn) -> Result<()> {
        for block in blocks(from, self.line.spool.end()) {
            let bytes = self.line.spool.read(block)?;
            self.advance(&bytes)?;
            self.note_border();
        }
        self.prove(self.decoder.record_end());
        Ok(())
    }

    /// All before `to` is what the server has.
    fn prove(&mut self, to: Lsn) {
        self.proven = self.proven.max(to);
        while self.withheld.first().is_some_and(|(_, cut)| cut.range.end <= self.proven) {
            let (_, cut) = self.withheld.remove(0);
            self.hand_over(cut);
        }
        if self.proven > self.cut_from {
            self.uncut.arrive(Instant::now());
        }
    }

    /// What follows the last whole record in the spool is not what the server has: it goes, and comes again.
    fn tear(&mut self) -> Result<()> {
        let valid = self.decoder.record_end();
        tracing::warn!(spool = %self.line.spool.end(), %valid, "the spool ended in a torn record");
        self.line.spool.truncate(valid)?;
        self.path.board.update(|state| state.frontier.retract(valid));
        self.cut_from = self.withheld.first().map_or(self.cut_from, |(before, _)| *before);
        self.withheld.clear();
        self.proven = self.proven.min(valid);
        self.decode_from_spool()
    }

    /// Forgets what the decoder has seen beyond the spool.
    fn decode_from_spool(&mut self) -> Result<()> {
        let spool = &self.line.spool;
        let from = span_before(self.cut_from.min(spool.end())).max(spool.begin());
        self.decoder = decoder(&self.path, &self.line, from)?;
        (self.piece, self.span, self.span_first_record) = Default::default();
        self.group = Group::from(self.cut_from);
        self.decode_again(from)
    }

    /// Where the stream must go on, at the latest.
    pub fn position(&self) -> Lsn {
        self.decoder.position().min(self.line.spool.end())
    }

    /// The agent stops: what is left is cut, and synced. A restart goes on where the spool ends. Blocks.
    pub fn finish(mut self) -> Result<()> {
        self.cut_rest()?;
        self.close()
    }

    /// Another line follows. Blocks.
    pub fn end(mut self) -> Result<()> {
        self.trim()?;
        self.close()
    }

    /// Cuts what is left, and lets go of what is no whole record at the end: as part of a line that has ended it would wait for
    /// ever. Returns where the spool ends then. Blocks.
    pub fn trim(&mut self) -> Result<Lsn> {
        let end = self.cut_rest()?;
        self.line.spool.truncate(end)?;
        if self.decoder.position() > end {
            self.decode_from_spool()?;
        }
        let number = self.line.number;
        self.path.board.update(|state| {
            if state.current == number {
                state.frontier.retract(end);
            }
        });
        Ok(end)
    }

    fn close(self) -> Result<()> {
        self.line.spool.sync()?;
        self.line.end();
        self.path.board.ring();
        Ok(())
    }

    /// Returns up to where everything is cut.
    fn cut_rest(&mut self) -> Result<Lsn> {
        if self.decoder.position() > self.line.spool.end() {
            // There was no room for what was decoded last.
            self.decode_from_spool()?;
        }
        let Some((before, cut)) = self.withheld.first() else {
            self.cut_piece()?;
            return Ok(self.cut_from);
        };
        // The beginning of a record that never came whole is no loss.
        let (range, cut) = (LsnRange::new(*before, self.proven.max(*before)), cut.clone());
        self.withheld.clear();
        self.cut_from = range.end;
        if !range.is_empty() {
            self.hand_over(Cut { range, ..cut });
        }
        Ok(self.cut_from)
    }

    /// Takes messages until the sender is gone or a fault, and then cuts what is left.
    pub async fn run(
        mut self,
        mut messages: mpsc::Receiver<Message>,
        over: CancellationToken,
    ) -> (Pipeline, Result<(), Fault>) {
        let mut result = self.take_all(&mut messages, &over).await;
        if !matches!(result, Err(Fault::Fatal(_)))
            && let Err(error) = self.cut_piece()
        {
            result = Err(Fault::Fatal(error));
        }
        (self, result)
    }

    async fn take_all(
        &mut self,
        messages: &mut mpsc::Receiver<Message>,
        over: &CancellationToken,
    ) -> Result<(), Fault> {
        let mut bell = self.path.board.listen();
        loop {
            let due = self.due();
            let is_sealed = self.line.pieces_are_sealed();
            let message = tokio::select! {
                biased;
                message = messages.recv() => message,
                () = sleep_until(due), if due.is_some() && is_sealed => {
                    self.cut_piece()?;
                    continue;
                }
                _ = bell.changed(), if !is_sealed => continue,
            };
            let Some(message) = message else { return Ok(()) };
            self.take(message, over).await?;
            self.cut_if_late(messages.is_empty())?;
        }
    }

    async fn take(&mut self, message: Message, over: &CancellationToken) -> Result<(), Fault> {
        match message {
            Message::Wal { start, bytes, server_end, clock } => {
                self.server_end = server_end;
                self.take_wal(start, &bytes, over).await?;
                self.take_clock(server_end, clock);
            }
            Message::Clock { end, clock, urgent } => {
                self.take_clock(end, clock);
                if urgent {
                    self.uncut.urge();
                }
            }
        }
        Ok(())
    }

    fn take_clock(&mut self, end: Lsn, clock: PgTime) {
        if end <= self.position() {
            self.clock = Some(clock);
        }
    }

    /// When a piece is due. Far behind the server, or where no commit waits, there are no pieces for each commit.
    fn due(&self) -> Option<Instant> {
        let is_behind = self.server_end.get() > self.position().get() + BEHIND_BYTES;
        let rules = self.rules_now();
        self.uncut.due(&if is_behind { rules.without_commits() } else { rules })
    }

    fn rules_now(&self) -> Rules {
        match self.path.context.is_asynchronous.load(Ordering::Relaxed) {
            true => self.rules.without_commits(),
            false => self.rules,
        }
    }

    /// Commits that came together are cut together, but none waits for those that keep coming.
    fn cut_if_late(&mut self, is_idle: bool) -> Result<()> {
        let now = Instant::now();
        let patience = if is_idle { Duration::ZERO } else { COMMIT_PAUSE };
        match self.due() {
            Some(due) if due + patience <= now && self.line.pieces_are_sealed() => self.cut_piece(),
            _ => Ok(()),
        }
    }

    async fn take_wal(
        &mut self,
        start: Lsn,
        bytes: &[u8],
        over: &CancellationToken,
    ) -> Result<(), Fault> {
        let end = start.add(bytes.len() as u64);
        match self.compare(start, bytes)? {
            Some(at) if at >= self.decoder.record_end() => self.tear()?,
            Some(at) => return Err(Fault::Diverged { at }),
            None => self.prove(end.min(self.position())),
        }
        let expected = self.position();
        if start > expected {
            return Err(Fault::Hole { expected, found: start });
        }
        let slice =
            |from: Lsn, to: Lsn| &bytes[from.since(start) as usize..to.since(start) as usize];
        let mut at = expected;
        while at < end {
            let to = end.min(at.next_span());
            self.wait_for_room(over).await?;
            let decoded = self.advance(slice(self.decoder.position().clamp(at, to), to));
            let good = match decoded {
                Ok(()) => to,
                Err(_) => self.decoder.record_end().clamp(at, to),
            };
            let spooled = self.line.spool.end();
            self.append(slice(spooled.clamp(at, good), good), over).await?;
            self.prove(good);
            self.publish(good);
            if let Err(fault) = decoded {
                return Err(self.broken(fault)?);
            }
            self.note_border();
            at = to;
        }
        Ok(())
    }

    /// What is spooled already must come again as it was. Returns where it first differs.
    fn compare(&self, start: Lsn, bytes: &[u8]) -> Result<Option<Lsn>> {
        let spool = &self.line.spool;
        let end = start.add(bytes.len() as u64).min(spool.end());
        let from = start.max(spool.begin());
        if from >= end {
            return Ok(None);
        }
        let there = match spool.read(LsnRange::new(from, end)) {
            Ok(there) => there,
            // Forgotten since: every location has it.
            Err(_) if from < spool.begin() => return Ok(None),
            Err(error) => return Err(error),
        };
        let came = &bytes[from.since(start) as usize..end.since(start) as usize];
        let differs = there.iter().zip(came).position(|(a, b)| a != b);
        Ok(differs.map(|offset| from.add(offset as u64)))
    }

    /// Decodes the bytes at the decoder's position, which lie within one span.
    fn advance(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        let at = self.decoder.position();
        let split = match at < self.cut_from && self.cut_from < at.add(bytes.len() as u64) {
            true => self.cut_from.since(at) as usize,
            false => bytes.len(),
        };
        self.feed(&bytes[..split])?;
        if self.decoder.position() == self.cut_from {
            self.finish_piece();
            self.group = Group::from(self.cut_from);
        }
        self.feed(&bytes[split..])
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        let Pipeline { decoder, piece, span, group, uncut, shutdown, .. } = self;
        decoder.feed(bytes, &mut |event| {
            piece.note(&event);
            span.note(&event);
            group.summary.note(&event);
            match event.kind {
                EventKind::Checkpoint { shutdown: true, .. } => *shutdown = Some(event.start),
                _ if event.target_time().is_some() => uncut.commit(),
                EventKind::Prepare { .. } => uncut.commit(),
                _ => {}
            }
        })
    }

    /// A span that has become full is cut, even where its beginning was cut into pieces.
    fn note_border(&mut self) {
        let end = self.decoder.position();
        if end != end.span_start() || end > self.line.spool.end() {
            return;
        }
        self.cut_tail(end);
        let summary = self.finish_span();
        self.group = Group::from(end);
        if end > self.cut_from || self.lacking.remove(&end) {
            let span = Lsn::new(end.get() - 1).span_start();
            let start = span.max(self.line.spool.begin());
            let range = LsnRange::new(start, end);
            self.push(Cut { range, summary, clock: self.clock, is_patient: true });
            self.lacking.remove(&end);
        }
    }

    /// What is left of a span goes ahead of it, if commits wait and the rest is short.
    fn cut_tail(&mut self, end: Lsn) {
        let span = Lsn::new(end.get() - 1).span_start();
        let is_tail = span < self.cut_from && self.cut_from < end && end <= self.proven;
        if self.rules_now().commits_wait && is_tail && end.since(self.cut_from) <= TAIL_BYTES_MAX {
            let summary = self.finish_piece();
            let range = LsnRange::new(self.cut_from, end);
            self.push(Cut { range, summary, clock: self.clock, is_patient: false });
            self.lacking.insert(end);
        }
    }

    /// Cuts what is in no object yet.
    fn cut_piece(&mut self) -> Result<()> {
        let end = self.position().min(self.proven);
        if end <= self.cut_from || self.line.spool.end() < self.decoder.position() {
            self.uncut.cut(Instant::now());
            return Ok(());
        }
        let summary = self.finish_piece();
        let range = LsnRange::new(self.cut_from, end);
        self.push(Cut { range, summary, clock: self.clock, is_patient: false });
        self.group.pieces += 1;
        if self.group.pieces >= GROUP_PIECES {
            let group = std::mem::replace(&mut self.group, Group::from(end));
            self.hand_over(group.cut(end, &self.decoder, self.clock));
        }
        Ok(())
    }

    fn push(&mut self, cut: Cut) {
        let next = self.cut_from.max(cut.range.end);
        let before = std::mem::replace(&mut self.cut_from, next);
        self.uncut.cut(Instant::now());
        match cut.range.end <= self.proven {
            true => self.hand_over(cut),
            false => self.withheld.push((before, cut)),
        }
    }

    fn hand_over(&self, cut: Cut) {
        tracing::trace!(range = %cut.range, "cut");
        self.line.push_cut(cut);
        self.path.board.ring();
    }

    fn finish_piece(&mut self) -> Summary {
        let piece = self.piece.finish(&mut self.decoder);
        self.span_first_record = self.span_first_record.or(piece.first_record);
        self.group.first_record = self.group.first_record.or(piece.first_record);
        piece
    }

    fn finish_span(&mut self) -> Summary {
        self.finish_piece();
        let mut span = std::mem::take(&mut self.span);
        span.first_record = self.span_first_record.take();
        if span.first_record.is_some() {
            span.last_record = self.decoder.last_record();
            span.last_record_end = Some(self.decoder.record_end());
        }
        span
    }

    /// All before `to` is spooled.
    fn publish(&mut self, to: Lsn) {
        let at_rest = self.decoder.record_end() == self.decoder.position();
        let leaving =
            at_rest && self.shutdown.is_some() && self.shutdown == self.decoder.last_record();
        if leaving {
            self.uncut.urge();
        }
        let number = self.line.number;
        self.path.board.receive(|state| {
            if state.current == number {
                state.frontier.receive(to);
            }
            state.server.leaving = leaving.then(Instant::now);
        });
    }

    /// The decoder has gone back to the last good record; so does the spool, but not into what is cut.
    fn broken(&mut self, fault: DecodeError) -> Result<Fault> {
        let to = self.decoder.record_end().max(self.cut_from.min(self.line.spool.end()));
        self.line.spool.truncate(to)?;
        let end = self.line.spool.end();
        self.path.board.update(|state| state.frontier.retract(end));
        Ok(Fault::Broken(fault))
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// The borders up to `end` of spans that no single one of the `sealed` ranges holds, though all of them together do.
fn lacking_whole(begin: Lsn, end: Lsn, sealed: &[LsnRange]) -> BTreeSet<Lsn> {
    let mut border = begin.next_span();
    let borders = std::iter::from_fn(|| {
        let this = border;
        border = border.next_span();
        (this <= end).then_some(this)
    });
    let is_whole = |border: &Lsn| {
        let start = Lsn::new(border.get() - 1).span_start().max(begin);
        sealed.iter().any(|range| range.start <= start && range.end == *border)
    };
    borders.filter(|border| !is_whole(border)).collect()
}

/// The start of the span before that of `lsn`.
fn span_before(lsn: Lsn) -> Lsn {
    Lsn::new(lsn.span_start().get().saturating_sub(1)).span_start()
}

fn decoder(path: &WalPath, line: &Line, from: Lsn) -> Result<Decoder> {
    let context = &path.context;
    let version = WalVersion::from_major(context.major()).map_err(|unknown| {
        Error::new(Kind::Postgres, unknown).remedy("use a version of Backstay that knows it")
    })?;
    Ok(Decoder::new(version, context.segment_size, context.system, line.timeline(), from))
}

/// `from` to `end`, in blocks that no span border crosses.
fn blocks(from: Lsn, end: Lsn) -> impl Iterator<Item = LsnRange> {
    let mut at = from;
    std::iter::from_fn(move || {
        let block = LsnRange::new(at, at.add(BLOCK_BYTES).min(at.next_span()).min(end));
        at = block.end;
        (block.start < end).then_some(block)
    })
}

impl std::fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pipeline").field("line", &self.line.number).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
