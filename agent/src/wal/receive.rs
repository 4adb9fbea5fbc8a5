//! One stream of WAL: the task that owns the socket.
//!
//! Whatever the pipeline, the disk or the locations are doing, keepalives are answered at once and the server hears of
//! us every [`REPORT_EVERY`]. Between here and the pipeline is a queue of at most [`QUEUE_MESSAGES`] messages of
//! [`MESSAGE_BYTES_MAX`]; when it is full no more is read from the socket, and the server holds the WAL.

use super::WalPath;
use super::pipeline::{Fault, Message, Pipeline};
use backstay_common::config::Acknowledge;
use backstay_common::lsn::Lsn;
use backstay_common::pgtime::PgTime;
use backstay_common::postgres::{EndOfStream, Stream, StreamMessage};
use backstay_common::{Error, Kind, Result};
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
                    (Ok(permit), Some(message)) => permit.send(message),
                    _ => return Ok(Err(End::Pipeline(Fault::Held))),
                },
                () = sender.closed() => return Ok(Err(End::Pipeline(Fault::Held))),
                message = self.stream.next(), if pending.is_none() => {
                    self.heard = Instant::now();
                    match self.note(message?).await? {
                        Ok(message) => pending = Some(message),
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
                self.note_server(server_end, clock, false);
                Message::Wal { start, bytes, server_end, clock }
            }
            StreamMessage::Keepalive { end, clock_us, reply_requested } => {
                let clock = PgTime(clock_us);
                self.note_server(end, clock, true);
                if reply_requested {
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

    /// When the server, which shuts down, shall wait for the locations no longer.
    fn leave_at(&self) -> Option<Instant> {
        if self.path.context.settings.durability.acknowledge == Acknowledge::Spool {
            return None;
        }
        self.path.board.read(|state| {
            let waits = state.frontier.acknowledged() < state.frontier.received();
            state.server.leaving.filter(|_| waits).map(|since| since + LEAVE_PATIENCE)
        })
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
