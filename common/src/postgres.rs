//! Talking to PostgreSQL 14 to 18: one connection type, for SQL and for replication.
//!
//! ```text
//! conninfo  where, who, how safe ─► connect (tls, certificate, auth) ─► Connection
//!                                                                        │ query        SQL, rows of text
//!                                                                        │ replication  IDENTIFY_SYSTEM, slots, ..
//!                                                                        ├ stream       WAL and reports
//!                                                                        └ base_backup  the data directory as tar
//! ```
//!
//! [`conninfo`](Conninfo) reads libpq's connection strings; `connect` finds a host that suits; `wire` frames and bounds
//! messages; `fault` turns what goes wrong into errors with a remedy; `quote` puts values into SQL. `postgres-protocol`
//! encodes and decodes; nothing here trusts a length that a server names. Every error is of `Kind::Postgres` (with the
//! server's SQLSTATE, if it spoke), or of `Kind::Config` where the connection string or a file that it names is off.

mod auth;
mod base_backup;
mod certificate;
mod connect;
mod conninfo;
mod fault;
mod query;
mod quote;
mod replication;
mod stream;
#[cfg(test)]
mod tests;
mod tls;
mod wire;

pub use base_backup::{BackupArchive, BackupMessage, BackupOptions, BaseBackup};
pub use conninfo::{Conninfo, Environment, SslMode, TargetSession};
pub use query::{RESULT_BYTES_MAX, ResultSet, Row};
pub use quote::{identifier, literal};
pub use replication::{
    CANNOT_CONNECT_NOW, DUPLICATE_OBJECT, Identity, OBJECT_IN_USE, UNDEFINED_FILE,
};
pub use stream::{EndOfStream, Stream, StreamMessage};
pub use wire::MESSAGE_BYTES_MAX;

use crate::{Error, Kind, Result};
use fault::{Report, lost};
use postgres_protocol::message::backend::Message;
use std::collections::HashMap;
use std::fmt;
use wire::{Frame, Wire};

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// SQL in the database of the connection string.
    Sql,
    /// Commands and streams of physical replication; the role needs REPLICATION, and no SQL is understood but SHOW.
    Replication,
}

/// An open session. Dropping it ends it: the server rolls back, ends a backup, and keeps a slot's WAL.
pub struct Connection {
    wire: Wire,
    parameters: HashMap<String, String>,
    mode: Mode,
    /// "PostgreSQL at HOST": the start of every error.
    label: String,
    is_encrypted: bool,
    /// The server waits for a command. False from the sending of one until its end was read.
    is_idle: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({}, {:?})", self.label, self.mode)
    }
}

impl Connection {
    /// Opens a session with the first host that accepts it and is of the kind asked for.
    ///
    /// Each address has `connect_timeout` (10 s unless set). Safe to drop: what was opened is closed.
    pub async fn connect(info: &Conninfo, mode: Mode) -> Result<Connection> {
        connect::connect(info, mode).await
    }

    fn new(
        wire: Wire,
        parameters: HashMap<String, String>,
        mode: Mode,
        host: String,
        is_encrypted: bool,
    ) -> Connection {
        let label = format!("PostgreSQL at {host}");
        Connection { wire, parameters, mode, label, is_encrypted, is_idle: true }
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// True if the connection is inside TLS.
    pub fn is_encrypted(&self) -> bool {
        self.is_encrypted
    }

    /// A setting that the server reports unasked, such as `in_hot_standby`, at its latest value.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// The server's version as `server_version_num` has it: 150018 for 15.18.
    pub fn server_version_num(&self) -> Result<u32> {
        let text = self.parameter("server_version").unwrap_or_default();
        version_num(text).ok_or_else(|| {
            self.fault(format_args!("reports the version {text:?}, which is not one"))
        })
    }

    /// Ends the session in an orderly way. A server that is gone already is no error.
    pub async fn close(mut self) {
        if let Err(error) = self.wire.close().await {
            tracing::debug!(server = self.label, %error, "closing");
        }
    }

    /// A command is about to be sent: none may be under way.
    fn begin(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.is_idle, false) {
            true => Ok(()),
            false => Err(self
                .fault("the connection was left in the middle of a command, or has failed")
                .remedy("connect again")),
        }
    }

    fn fault(&self, reason: impl fmt::Display) -> Error {
        Error::new(Kind::Postgres, format_args!("{}: {reason}", self.label))
    }

    /// The next message that an exchange is about; none at the end of the connection. Safe to drop.
    async fn message(&mut self) -> Result<Option<Frame>> {
        loop {
            match self.wire.frame().await.map_err(lost)? {
                Some(Frame::Message(Message::NoticeResponse(body))) => {
                    tracing::debug!(
                        server = self.label,
                        notice = Report::read(body.fields()).text()
                    );
                }
                Some(Frame::Message(Message::ParameterStatus(body))) => {
                    let (name, value) = (body.name().map_err(lost)?, body.value().map_err(lost)?);
                    // Only those it told of at first: a bound on what a server can make us keep.
                    if let Some(known) = self.parameters.get_mut(name) {
                        *known = value.to_string();
                    }
                }
                Some(Frame::Message(Message::NotificationResponse(_))) => {}
                frame => return Ok(frame),
            }
        }
    }
}

/// "15.18 (Debian 15.18-0+deb12u1)" is 150018; "18beta1" is 180000.
fn version_num(text: &str) -> Option<u32> {
    let number = text.split_whitespace().next()?;
    let (major, rest) = match number.find(|c: char| !c.is_ascii_digit()) {
        Some(end) => number.split_at(end),
        None => (number, ""),
    };
    let major: u32 = major.parse().ok().filter(|major| (10..1000).contains(major))?;
    let minor = match rest.strip_prefix('.') {
        Some(minor) => minor.parse().ok().filter(|minor| *minor < 10_000)?,
        None => 0,
    };
    Some(major * 10_000 + minor)
}
