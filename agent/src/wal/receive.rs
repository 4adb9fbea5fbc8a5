//! One stream of WAL: the task that owns the socket.
//!
//! Whatever the pipeline, the disk or the locations are doing, keepalives are answered at once and the server hears of
//! us every [`REPORT_EVERY`]. Between here and the pipeline is a queue of at most [`QUEUE_MESSAGES`] messages of
//! [`MESSAGE_BYTES_MAX`]; when it is full no more is read from the socket, and the server holds the WAL.
//!
//! A server that shuts down waits for us. It is left when the locations, or the spool, do not take the rest soon: it keeps the
//! WAL, and we ask for it again. That it shuts down is seen by its shutdown checkpoint; by its asking for a reply again and again
//! at one position, as a standby does; or, while nothing is read, by its taking no connections any more.

use super::WalPath;
use super::pipeline::{Fault, Message, Pipeline};
use crate::connect;
use backstay_common::config::Acknowledge;
use backstay_common::lsn::Lsn;
use backstay_common::pgtime::PgTime;
use backstay_common::postgres::{
    CANNOT_CONNECT_NOW, Connection, EndOfStream, Mode, Stream, StreamMessage,
};
use backstay_common::{Error, Kind, Result};
use futures::future::OptionFuture;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const QUEUE_MESSAGES: usize = 64;
/// A walsender sends 128 KiB at most.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// A server that says nothing for so long, though asked, is gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long a server that shuts down is kept waiting for the locations.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);
/// A server that waits for us asks again as soon as we have answered; so often in a row, and within [`LEAVE_PATIENCE`], no other
/// does.
const ASKED_MIN: u32 = 20;
/// How often a server from which nothing is read is asked whether it is there still.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Why a stream is over.
#[derive(Debug)]
pub enum End {
    Server(EndOfStream, Stream),
    /// The server shuts down, and the locations do not have it all in time: it was not acknowledged.
    Left,
    Stopped,
    Failed(Error),
    Pipeline(Fault),
}

/// Receives until the stream ends. The pipeline comes back unless it is broken for good.
pub async fn receive(
    path: &Arc<WalPath>,
    stream: Stream,
    pipeline: Pipeline,
) -> Result<(Pipeline, End)> {
    let (sender, messages) = mpsc::channel(QUEUE_MESSAGES);
    let over = CancellationToken::new();
    let runtime = tokio::runtime::Handle::current();
    let work = pipeline.run(messages, over.clone());
    let worker = tokio::task::spawn_blocking(move || runtime.block_on(work));
    let receiver = Receiver {
        path: path.clone(),
        stream,
        sender,
        heard: Instant::now(),
        reported: Lsn::INVALID,
        asked: None,
    };
    let end = receiver.run().await;
    over.cancel();
    let panicked = |_| Error::new(Kind::Bug, "the WAL pipeline panicked");
    let (pipeline, result) = worker.await.map_err(panicked)?;
    match result {
        Ok(()) => Ok((pipeline, end)),
        Err(Fault::Fatal(error)) => Err(error),
        Err(Fault::Held) if !matches!(end, End::Pipeline(_)) => Ok((pipeline, end)),
        Err(fault) => Ok((pipeline, End::Pipeline(fault))),
    }
}

struct Receiver {
    path: Arc<WalPath>,
    stream: Stream,
    sender: mpsc::Sender<Message>,
    /// When the server last said something.
    heard: Instant,
    /// What it was last told.
    reported: Lsn,
    /// Where it has asked for replies without a pause, since when, and how often.
    asked: Option<(Lsn, Instant, u32)>,
}

impl Receiver {
    async fn run(mut self) -> End {
        match self.pump().await {
            Ok(Ok(end)) => End::Server(end, self.stream),
            Ok(Err(end)) => end,
            Err(error) => End::Failed(error),
        }
    }

    async fn pump(&mut self) -> Result<Result<EndOfStream, End>> {
        let mut bell = self.path.board.listen();
        let mut tick = tokio::time::interval(REPORT_EVERY);
        let mut pending: Option<Message> = None;
        let (stop, sender) = (self.path.context.stop.clone(), self.sender.clone());
        // While a message waits for room.
        let mut shutdown = OptionFuture::default();
        loop {
            let leave_at = self.leave_at();
            tokio::select! {
                () = stop.cancelled() => return Ok(Err(End::Stopped)),
                _ = tick.tick() => {
                    self.report(true).await?;
                    if self.heard.elapsed() > SILENCE_MAX && pending.is_none() {
                        return Err(Error::new(Kind::Postgres, "the server has fallen silent"));
                    }
                }
                _ = bell.changed() => {
                    if self.acknowledged() != self.reported {
                        self.report(false).await?;
                    }
                }
                () = sleep_until(leave_at), if leave_at.is_some() => return Ok(Err(End::Left)),
                permit = sender.reserve(), if pending.is_some() => match (permit, pending.take()) {
                    (Ok(permit), Some(message)) => {
                        permit.send(message);
                        shutdown = OptionFuture::default();
                    }
                    _ => return Ok(Err(End::Pipeline(Fault::Held))),
                },
                Some(()) = &mut shutdown => return Ok(Err(End::Left)),
                () = sender.closed() => return Ok(Err(End::Pipeline(Fault::Held))),
                message = self.stream.next(), if pending.is_none() => {
                    self.heard = Instant::now();
                    match self.note(message?).await? {
                        Ok(message) => {
                            pending = Some(message);
                            shutdown = Some(Box::pin(is_shut_down(self.path.clone()))).into();
                        }
                        Err(end) => return Ok(Ok(end)),
                    }
                }
            }
        }
    }

    async fn note(&mut self, message: StreamMessage) -> Result<Result<Message, EndOfStream>> {
        Ok(Ok(match message {
            StreamMessage::Wal { bytes, .. } if bytes.len() > MESSAGE_BYTES_MAX => {
                let reason = format!("the server sent {} bytes of WAL at once", bytes.len());
                return Err(Error::new(Kind::Postgres, reason));
            }
            StreamMessage::Wal { start, server_end, clock_us, bytes } => {
                let clock = PgTime(clock_us);
                self.asked = None;
                self.note_server(server_end, clock, false);
                Message::Wal { start, bytes, server_end, clock }
            }
            StreamMessage::Keepalive { end, clock_us, reply_requested } => {
                let clock = PgTime(clock_us);
                self.note_server(end, clock, true);
                if reply_requested {
                    self.note_asked(end);
                    self.report(false).await?;
                }
                Message::Clock { end, clock, urgent: reply_requested }
            }
            StreamMessage::End(end) => return Ok(Err(end)),
        }))
    }

    fn note_server(&self, end: Lsn, clock: PgTime, is_quiet: bool) {
        self.path.board.update_quietly(|state| {
            state.server.end = end;
            state.server.clock = Some(clock);
            if is_quiet {
                state.server.quiet = Some((end, clock));
            }
        });
    }

    fn acknowledged(&self) -> Lsn {
        self.path.board.read(|state| state.frontier.acknowledged())
    }

    /// Tells the server what is true now.
    async fn report(&mut self, reply_requested: bool) -> Result<()> {
        let (written, flushed) =
            self.path.board.read(|s| (s.frontier.received(), s.frontier.acknowledged()));
        self.reported = flushed;
        tracing::trace!(%flushed, "acknowledged");
        self.stream.send_status(written.max(flushed), flushed, flushed, reply_requested).await
    }

    fn note_asked(&mut self, at: Lsn) {
        let now = Instant::now();
        let goes_on = |(end, since, times): &(Lsn, Instant, u32)| {
            *end == at && (*times >= ASKED_MIN || since.elapsed() < LEAVE_PATIENCE)
        };
        let (_, since, times) = self.asked.filter(goes_on).unwrap_or((at, now, 0));
        self.asked = Some((at, since, times + 1));
    }

    /// When the server, which shuts down, shall wait for the locations no longer.
    fn leave_at(&self) -> Option<Instant> {
        if self.path.context.settings.durability.acknowledge == Acknowledge::Spool {
            return None;
        }
        let asks = self.asked.filter(|(_, _, times)| *times >= ASKED_MIN);
        self.path.board.read(|state| {
            let waits = state.frontier.acknowledged() < state.frontier.received();
            let since = state.server.leaving.or(asks.map(|(_, since, _)| since));
            since.filter(|_| waits).map(|since| since + LEAVE_PATIENCE)
        })
    }
}

/// Returns when the server takes no connections any more because it shuts down. Safe to drop.
async fn is_shut_down(path: Arc<WalPath>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Ok(conninfo) = connect::conninfo(&path.context.settings) else { continue };
        let asked = Connection::connect(&conninfo, Mode::Sql);
        match tokio::time::timeout(LOOK_EVERY, asked).await {
            Ok(Ok(connection)) => connection.close().await,
            Ok(Err(error)) if error.sqlstate() == Some(CANNOT_CONNECT_NOW) => return,
            Ok(Err(_)) | Err(_) => {}
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
