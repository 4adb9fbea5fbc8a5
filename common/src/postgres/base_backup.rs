//! BASE_BACKUP: the data directory as tar, over a replication connection ("src/backend/backup/basebackup.c").
//!
//! ```text
//! start, tablespaces ─► archive of a tablespace ─► … ─► archive of the data directory ─► manifest ─► stop
//! ```
//!
//! PostgreSQL 14 sends each archive, and then the manifest, as a copy of its own; 15 and later send one copy in which
//! every message has a tag. Both come out as the same [`BackupMessage`]s. WAL is never asked for, nor is the server
//! made to wait for its archiving: whoever calls this streams the WAL itself.

use super::fault::{Report, closed, lost, unexpected};
use super::query::Row;
use super::quote::literal;
use super::wire::{Frame, invalid};
use super::{Connection, Mode};
use crate::lsn::Lsn;
use crate::segment::TimelineId;
use crate::{Context, Error, Kind, Result};
use bytes::{Buf, Bytes};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// The longest message taken while a backup runs; PostgreSQL's own are of 32 KiB.
const BACKUP_MESSAGE_BYTES_MAX: usize = 1 << 20;
/// More tablespaces than this are not believed.
const TABLESPACES_MAX: usize = 1 << 16;
/// What the server takes as `MAX_RATE`, in units of 1024 bytes a second.
const RATE_KIB: std::ops::RangeInclusive<u64> = 32..=1_048_576;

/// What is asked of the server.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    pub label: String,
    /// An immediate checkpoint; else it is spread over minutes.
    pub fast_checkpoint: bool,
    /// Bytes a second; held to what the server can do, 32 KiB/s to 1 GiB/s. None: as fast as it goes.
    pub max_rate: Option<u64>,
}

/// One archive: the data directory, or a tablespace outside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupArchive {
    /// Its oid and where the server has it; none for the data directory, which comes last.
    pub tablespace: Option<(u32, String)>,
    /// The server's estimate.
    pub bytes: u64,
}

/// What the server sends, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupMessage {
    /// The bytes that follow are the tar of this archive: the index in [`BaseBackup::archives`].
    Archive(usize),
    /// The bytes that follow are the backup manifest.
    Manifest,
    /// Shares its memory with messages that came right before and after it.
    Data(Bytes),
    /// Everything is there, and the backup has ended.
    End { stop: Lsn, timeline: TimelineId },
}

/// A backup that is running. Dropping it ends it, and the connection.
#[derive(Debug)]
pub struct BaseBackup {
    connection: Connection,
    start: Lsn,
    timeline: TimelineId,
    archives: Vec<BackupArchive>,
    /// One copy with tags in it (15 and later), not one for each archive.
    is_tagged: bool,
    state: State,
    /// Archives that have begun.
    begun: usize,
    has_manifest: bool,
}

#[derive(Debug)]
enum State {
    /// Outside a copy: the next one begins, or the result set that ends the backup.
    Between {
        columns: Arc<[String]>,
        end: Option<(Lsn, TimelineId)>,
        error: Option<Error>,
    },
    Copying,
    Ended(Lsn, TimelineId),
    /// An error was given; nothing can follow it.
    Broken,
}

impl State {
    fn between() -> State {
        State::Between { columns: Arc::new([]), end: None, error: None }
    }
}

impl Connection {
    /// Begins a backup of `major`'s grammar, and waits for the checkpoint that it begins with.
    ///
    /// Not safe to drop before it is done, but nothing is left behind: the server ends the backup with the connection.
    pub async fn base_backup(mut self, major: u32, options: &BackupOptions) -> Result<BaseBackup> {
        if self.mode != Mode::Replication {
            return Err(self.fault("BASE_BACKUP needs a replication connection"));
        }
        self.begin()?;
        let command = command(major, options);
        let doing = format!("{}: start a base backup", self.label);
        BaseBackup::start(self, major >= 15, &command).await.context(doing)
    }
}

/// Both grammars. Checksums are verified by whoever gets the pages, and the server's verification would end the backup
/// with an error after all is sent.
fn command(major: u32, options: &BackupOptions) -> String {
    let label = literal(&options.label);
    let rate = options.max_rate.map(|rate| (rate / 1024).clamp(*RATE_KIB.start(), *RATE_KIB.end()));
    if major < 15 {
        let fast = if options.fast_checkpoint { " FAST" } else { "" };
        let rate = rate.map_or(String::new(), |kib| format!(" MAX_RATE {kib}"));
        return format!(
            "BASE_BACKUP LABEL {label} PROGRESS{fast} NOWAIT{rate} TABLESPACE_MAP NOVERIFY_CHECKSUMS \
             MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
        );
    }
    let checkpoint = if options.fast_checkpoint { "fast" } else { "spread" };
    let rate = rate.map_or(String::new(), |kib| format!(", MAX_RATE {kib}"));
    format!(
        "BASE_BACKUP (LABEL {label}, PROGRESS, CHECKPOINT '{checkpoint}', WAIT false{rate}, TABLESPACE_MAP, \
         VERIFY_CHECKSUMS false, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C')"
    )
}

impl BaseBackup {
    async fn start(
        mut connection: Connection,
        is_tagged: bool,
        command: &str,
    ) -> Result<BaseBackup> {
        connection.wire.put(|buf| frontend::query(command, buf))?;
        connection.wire.flush().await.map_err(lost)?;
        let start = result_set(&mut connection, 1).await?.pop_front();
        let start = start.ok_or_else(|| connection.fault("named no start of the backup"))?;
        let (timeline, start) = (start.parse("tli")?, start.parse("recptr")?);
        let archives = result_set(&mut connection, TABLESPACES_MAX).await?;
        let archives = archives.iter().map(archive).collect::<Result<Vec<_>>>()?;
        let is_last = |n: usize| n + 1 == archives.len();
        if !archives.iter().enumerate().all(|(n, a)| a.tablespace.is_none() == is_last(n))
            || archives.is_empty()
        {
            return Err(connection.fault("listed tablespaces without the data directory last"));
        }
        connection.wire.set_message_max(BACKUP_MESSAGE_BYTES_MAX);
        let (state, begun, has_manifest) = (State::between(), 0, false);
        let backup = BaseBackup {
            connection,
            start,
            timeline,
            archives,
            is_tagged,
            state,
            begun,
            has_manifest,
        };
        Ok(backup)
    }

    /// Where replay will begin.
    pub fn start_lsn(&self) -> Lsn {
        self.start
    }

    /// The timeline that the start is on.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// What is sent, in order.
    pub fn archives(&self) -> &[BackupArchive] {
        &self.archives
    }

    /// The next message; after the end, the end again. Safe to drop: nothing is lost, the next call goes on.
    pub async fn next(&mut self) -> Result<BackupMessage> {
        let done = self.advance().await;
        if done.is_err() {
            self.state = State::Broken;
        }
        done.map_err(|error| error.context(format_args!("{}: base backup", self.connection.label)))
    }

    async fn advance(&mut self) -> Result<BackupMessage> {
        loop {
            match &self.state {
                State::Ended(stop, timeline) => {
                    return Ok(BackupMessage::End { stop: *stop, timeline: *timeline });
                }
                State::Broken => return Err(Error::new(Kind::Bug, "the backup has failed before")),
                State::Between { .. } | State::Copying => {}
            }
            let frame = self.connection.message().await?;
            let message = match frame {
                Some(Frame::Message(message)) => message,
                Some(_) => return Err(unexpected("taking a base backup")),
                None => return Err(self.earlier_error().unwrap_or_else(closed)),
            };
            if let Some(message) = self.take(message)? {
                return Ok(message);
            }
        }
    }

    fn earlier_error(&mut self) -> Option<Error> {
        match &mut self.state {
            State::Between { error, .. } => error.take(),
            _ => None,
        }
    }

    /// Takes one message; none if it says nothing by itself.
    fn take(&mut self, message: Message) -> Result<Option<BackupMessage>> {
        match (&mut self.state, message) {
            (State::Copying, Message::CopyData(body)) => self.data(body.into_bytes()),
            (State::Copying, Message::CopyDone) => {
                self.state = State::between();
                Ok(None)
            }
            (State::Between { .. }, Message::CopyOutResponse(_)) => {
                self.state = State::Copying;
                match self.is_tagged {
                    true if self.begun > 0 => Err(unexpected("taking a base backup")),
                    true => Ok(None),
                    false => self.begin_next().map(Some),
                }
            }
            (State::Between { columns, .. }, Message::RowDescription(body)) => {
                let names = body.fields().map(|field| Ok(field.name().to_string()));
                *columns = names.collect::<Vec<_>>().map_err(lost)?.into();
                Ok(None)
            }
            (State::Between { columns, end, .. }, Message::DataRow(body)) => {
                let row = Row::read(columns, &body).map_err(lost)?;
                *end = Some((row.parse("recptr")?, row.parse("tli")?));
                Ok(None)
            }
            (State::Between { .. }, Message::CommandComplete(_)) => Ok(None),
            (State::Between { error, .. }, Message::ErrorResponse(body)) => {
                // The connection goes on to ReadyForQuery, or ends; either way this is why.
                *error = Some(Report::read(body.fields()).into_error());
                Ok(None)
            }
            (State::Copying, Message::ErrorResponse(body)) => {
                Err(Report::read(body.fields()).into_error())
            }
            (State::Between { end, error, .. }, Message::ReadyForQuery(_)) => {
                if let Some(error) = error.take() {
                    return Err(error);
                }
                let is_whole = self.begun == self.archives.len() && self.has_manifest;
                let (Some((stop, timeline)), true) = (*end, is_whole) else {
                    return Err(Error::new(
                        Kind::Postgres,
                        "the server ended the backup before all of it was sent",
                    ));
                };
                self.connection.is_idle = true;
                self.state = State::Ended(stop, timeline);
                Ok(Some(BackupMessage::End { stop, timeline }))
            }
            _ => Err(unexpected("taking a base backup")),
        }
    }

    fn data(&mut self, mut body: Bytes) -> Result<Option<BackupMessage>> {
        if !self.is_tagged {
            return Ok(Some(BackupMessage::Data(body)));
        }
        let short = || lost(invalid("a message of the backup is too short"));
        match body.try_get_u8().map_err(|_| short())? {
            b'd' if self.begun > 0 => Ok(Some(BackupMessage::Data(body))),
            // Which archive it is follows from the order; the name and the place say the same.
            b'n' if self.begun < self.archives.len() => self.begin_next().map(Some),
            b'm' if self.begun == self.archives.len() => self.begin_next().map(Some),
            // Bytes done; we count our own.
            b'p' => Ok(None),
            tag => Err(lost(invalid(format!("a backup message '{}'", tag.escape_ascii())))),
        }
    }

    fn begin_next(&mut self) -> Result<BackupMessage> {
        if self.begun < self.archives.len() {
            self.begun += 1;
            return Ok(BackupMessage::Archive(self.begun - 1));
        }
        match std::mem::replace(&mut self.has_manifest, true) {
            true => Err(unexpected("taking a base backup")),
            false => Ok(BackupMessage::Manifest),
        }
    }
}

/// Reads one result set, which is followed by more.
async fn result_set(connection: &mut Connection, rows_max: usize) -> Result<VecDeque<Row>> {
    let mut columns: Arc<[String]> = Arc::new([]);
    let mut rows = VecDeque::new();
    loop {
        match connection.message().await? {
            Some(Frame::Message(Message::RowDescription(body))) => {
                let names = body.fields().map(|field| Ok(field.name().to_string()));
                columns = names.collect::<Vec<_>>().map_err(lost)?.into();
            }
            Some(Frame::Message(Message::DataRow(body))) => {
                if rows.len() == rows_max {
                    return Err(too_many(rows_max));
                }
                rows.push_back(Row::read(&columns, &body).map_err(lost)?);
            }
            Some(Frame::Message(Message::CommandComplete(_))) => return Ok(rows),
            Some(Frame::Message(Message::ErrorResponse(body))) => {
                return Err(Report::read(body.fields()).into_error());
            }
            Some(_) => return Err(unexpected("starting a base backup")),
            None => return Err(closed()),
        }
    }
}

fn too_many(rows: usize) -> Error {
    lost(io::Error::new(io::ErrorKind::InvalidData, format!("more than {rows} rows")))
}

fn archive(row: &Row) -> Result<BackupArchive> {
    let tablespace = match (row.by_name("spcoid"), row.by_name("spclocation")) {
        (None, None) => None,
        (Some(_), Some(location)) => Some((row.parse("spcoid")?, location.to_string())),
        _ => return Err(Error::new(Kind::Postgres, "a tablespace without an oid or a place")),
    };
    let kib: u64 = row.by_name("size").and_then(|size| size.parse().ok()).unwrap_or(0);
    Ok(BackupArchive { tablespace, bytes: kib.saturating_mul(1024) })
}

#[cfg(test)]
mod tests;
