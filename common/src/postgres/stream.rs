//! WAL as it comes: the COPY BOTH that START_REPLICATION begins.

use super::Connection;
use super::fault::{Report, closed, lost, unexpected};
use super::query::Row;
use super::wire::{Frame, invalid};
use crate::lsn::Lsn;
use crate::pgtime::PgTime;
use crate::segment::TimelineId;
use crate::{Error, Kind, Result};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{Message, RowDescriptionBody};
use postgres_protocol::message::frontend;
use std::io;
use std::sync::Arc;

/// Reports that the server does not take are not piled up beyond this.
const UNWRITTEN_BYTES_MAX: usize = 64 << 10;

/// A stream of WAL that owns its connection.
///
/// One task can read and report: [`Stream::next`] and [`Stream::send_status`] are both safe to drop at any time,
/// so that both can stand in the arms of a `select!`.
#[derive(Debug)]
pub struct Stream {
    connection: Connection,
    timeline: TimelineId,
    state: State,
}

#[derive(Debug)]
enum State {
    Copying,
    /// The server has ended the copy, and tells what follows; the connection goes on.
    Ending {
        columns: Arc<[String]>,
        switch: Option<EndOfStream>,
        error: Option<Error>,
    },
    Ended(EndOfStream),
    /// An error was given; nothing can follow it.
    Broken,
}

/// What the server sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamMessage {
    Wal {
        /// Where the first of `bytes` stands.
        start: Lsn,
        /// How far the server's WAL reached when it sent this.
        server_end: Lsn,
        /// The server's clock, in microseconds since 2000-01-01 UTC (see [`PgTime`]).
        clock_us: i64,
        /// Shares its memory with messages that came right before and after it.
        bytes: Bytes,
    },
    Keepalive {
        /// How far the server's WAL reached when it sent this.
        end: Lsn,
        /// As in `Wal`.
        clock_us: i64,
        /// The server wants a report at once, or it will take us for dead.
        reply_requested: bool,
    },
    End(EndOfStream),
}

/// Why no more WAL comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndOfStream {
    /// The timeline ended at `start`, where `next` begins. What was received beyond `start` was never replayed by
    /// anybody. The connection can be used again: [`Stream::into_connection`].
    TimelineSwitch { next: TimelineId, start: Lsn },
    /// The server shuts down, and has seen all its WAL reported as flushed.
    ServerShutdown,
    /// The server closed the connection without a word: it crashed, or something between did.
    Closed,
}

impl Stream {
    /// Sends the command and waits until the server streams, or says at once that the timeline ends here.
    pub(super) async fn start(
        mut connection: Connection,
        timeline: TimelineId,
        command: &str,
    ) -> Result<Stream> {
        connection.wire.put(|buf| frontend::query(command, buf))?;
        connection.wire.flush().await.map_err(lost)?;
        let mut stream = Stream { connection, timeline, state: State::Broken };
        match stream.connection.message().await? {
            Some(Frame::CopyBoth) => stream.state = State::Copying,
            Some(Frame::Message(Message::RowDescription(body))) => {
                stream.state =
                    State::Ending { columns: column_names(&body)?, switch: None, error: None };
                let end = stream.until_ended().await?;
                stream.state = State::Ended(end);
            }
            Some(Frame::Message(Message::ErrorResponse(body))) => {
                return Err(Report::read(body.fields()).into_error());
            }
            Some(_) => return Err(unexpected("starting to stream")),
            None => return Err(closed()),
        }
        Ok(stream)
    }

    /// The timeline that is streamed.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// What the server said of itself: see [`Connection::parameter`].
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The next message. After the end, the end again.
    ///
    /// Safe to drop: nothing is lost, the next call goes on. It waits as long as the server is silent; a live server
    /// says something at least every half `wal_sender_timeout`, if that is set.
    pub async fn next(&mut self) -> Result<StreamMessage> {
        match self.advance().await {
            Ok(StreamMessage::End(end)) => {
                self.state = State::Ended(end);
                Ok(StreamMessage::End(end))
            }
            Ok(message) => Ok(message),
            Err(error) => {
                self.state = State::Broken;
                Err(error.context(format_args!("{}: receive WAL", self.connection.label)))
            }
        }
    }

    async fn advance(&mut self) -> Result<StreamMessage> {
        match &self.state {
            State::Ended(end) => return Ok(StreamMessage::End(*end)),
            State::Broken => return Err(Error::new(Kind::Bug, "the stream has failed before")),
            State::Ending { .. } => return self.until_ended().await.map(StreamMessage::End),
            State::Copying => {}
        }
        // A report whose sending was dropped half way.
        if self.connection.wire.unwritten() > 0 {
            self.connection.wire.flush().await.map_err(lost)?;
        }
        match self.connection.message().await? {
            Some(Frame::Message(Message::CopyData(body))) => {
                decode(body.into_bytes()).map_err(lost)
            }
            Some(Frame::Message(Message::CopyDone)) => {
                self.state = State::Ending { columns: Arc::new([]), switch: None, error: None };
                self.connection.wire.put(|buf| {
                    frontend::copy_done(buf);
                    Ok(())
                })?;
                self.until_ended().await.map(StreamMessage::End)
            }
            // A server that shuts down ends the command without ending the copy.
            Some(Frame::Message(Message::CommandComplete(_))) => {
                Ok(StreamMessage::End(EndOfStream::ServerShutdown))
            }
            Some(Frame::Message(Message::ErrorResponse(body))) => {
                Err(Report::read(body.fields()).into_error())
            }
            Some(_) => Err(unexpected("streaming")),
            None => Ok(StreamMessage::End(EndOfStream::Closed)),
        }
    }

    /// Reads what follows the end of the copy. Safe to drop: what was learnt is in the state.
    async fn until_ended(&mut self) -> Result<EndOfStream> {
        self.connection.wire.flush().await.map_err(lost)?;
        loop {
            let frame = self.connection.message().await?;
            let State::Ending { columns, switch, error } = &mut self.state else {
                return Err(Error::new(Kind::Bug, "the stream is not at its end"));
            };
            match frame {
                Some(Frame::Message(Message::RowDescription(body))) => {
                    *columns = column_names(&body)?;
                }
                Some(Frame::Message(Message::DataRow(body))) => {
                    let row = Row::read(columns, &body).map_err(lost)?;
                    *switch = Some(read_switch(&row, self.timeline)?);
                }
                Some(Frame::Message(Message::ErrorResponse(body))) => {
                    error.get_or_insert_with(|| Report::read(body.fields()).into_error());
                }
                Some(Frame::Message(Message::ReadyForQuery(_))) => {
                    self.connection.is_idle = true;
                    return match (error.take(), *switch) {
                        (Some(error), _) => Err(error),
                        (None, Some(switch)) => Ok(switch),
                        (None, None) => Err(Error::new(
                            Kind::Postgres,
                            "the server ended the stream and named no next timeline",
                        )),
                    };
                }
                // Data that was on its way, and the ends of the two commands.
                Some(Frame::Message(
                    Message::CopyData(_) | Message::CopyDone | Message::CommandComplete(_),
                )) => {}
                Some(_) => return Err(unexpected("ending the stream")),
                None => return Err(error.take().unwrap_or_else(closed)),
            }
        }
    }

    /// Reports how far WAL is written, durable and applied: each is the position after the last such byte.
    ///
    /// Safe to drop: what is not yet written then goes out with the next call of this or of [`Stream::next`].
    /// After the end of the stream there is nobody to tell, and nothing is done.
    pub async fn send_status(
        &mut self,
        written: Lsn,
        flushed: Lsn,
        applied: Lsn,
        reply_requested: bool,
    ) -> Result<()> {
        if !matches!(self.state, State::Copying) {
            return Ok(());
        }
        let wire = &mut self.connection.wire;
        if wire.unwritten() < UNWRITTEN_BYTES_MAX {
            let status = encode_status([written, flushed, applied], PgTime::now(), reply_requested);
            wire.put(|buf| {
                frontend::CopyData::new(&status[..])?.write(buf);
                Ok(())
            })?;
        }
        wire.flush()
            .await
            .map_err(|error| lost(error).context(format_args!("{}: report", self.connection.label)))
    }

    /// The connection, for further commands; none unless the stream ended with a timeline switch.
    pub fn into_connection(self) -> Option<Connection> {
        self.connection.is_idle.then_some(self.connection)
    }
}

fn column_names(body: &RowDescriptionBody) -> Result<Arc<[String]>> {
    let names = body.fields().map(|field| Ok(field.name().to_string())).collect::<Vec<_>>();
    Ok(names.map_err(lost)?.into())
}

fn read_switch(row: &Row, timeline: TimelineId) -> Result<EndOfStream> {
    let next: TimelineId = row.parse("next_tli")?;
    if next <= timeline {
        return Err(Error::new(
            Kind::Postgres,
            format_args!("the server names timeline {next} as the one after {timeline}"),
        ));
    }
    Ok(EndOfStream::TimelineSwitch { next, start: row.parse("next_tli_startpos")? })
}

fn decode(mut body: Bytes) -> io::Result<StreamMessage> {
    let short = |_| invalid("a replication message is too short");
    let tag = body.try_get_u8().map_err(short)?;
    match tag {
        b'w' => Ok(StreamMessage::Wal {
            start: Lsn::new(body.try_get_u64().map_err(short)?),
            server_end: Lsn::new(body.try_get_u64().map_err(short)?),
            clock_us: body.try_get_i64().map_err(short)?,
            bytes: body,
        }),
        b'k' => Ok(StreamMessage::Keepalive {
            end: Lsn::new(body.try_get_u64().map_err(short)?),
            clock_us: body.try_get_i64().map_err(short)?,
            reply_requested: body.try_get_u8().map_err(short)? != 0,
        }),
        _ => Err(invalid(format!("a replication message '{}'", tag.escape_ascii()))),
    }
}

fn encode_status(positions: [Lsn; 3], now: PgTime, reply_requested: bool) -> BytesMut {
    let mut status = BytesMut::with_capacity(34);
    status.put_u8(b'r');
    positions.iter().for_each(|lsn| status.put_u64(lsn.get()));
    status.put_i64(now.micros());
    status.put_u8(reply_requested.into());
    status
}
