//! Errors as a person needs them: what the server said, and what to do about it.

use super::conninfo::Host;
use crate::{Error, Kind};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::ErrorFields;
use std::io;

/// What the server said in an ErrorResponse or a NoticeResponse.
pub(super) struct Report {
    severity: String,
    code: String,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
}

impl Report {
    /// Text that is not UTF-8 (a server speaks its own encoding until the login is done) is shown as far as it is.
    pub fn read(mut fields: ErrorFields<'_>) -> Report {
        let mut report = Report {
            severity: "ERROR".into(),
            code: String::new(),
            message: "no message".into(),
            detail: None,
            hint: None,
        };
        while let Ok(Some(field)) = fields.next() {
            let text = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'S' => report.severity = text,
                b'C' => report.code = text,
                b'M' => report.message = text,
                b'D' => report.detail = Some(text),
                b'H' => report.hint = Some(text),
                _ => {}
            }
        }
        report
    }

    /// One line: "severity: message (detail)".
    pub fn text(&self) -> String {
        match &self.detail {
            Some(detail) => format!("{}: {} ({detail})", self.severity, self.message),
            None => format!("{}: {}", self.severity, self.message),
        }
    }

    pub fn into_error(self) -> Error {
        let error = Error::new(Kind::Postgres, self.text()).with_sqlstate(&self.code);
        match self.hint.as_deref().or_else(|| remedy(&self.code, &self.message)) {
            Some(remedy) => error.remedy(remedy),
            None => error,
        }
    }
}

/// For conditions that the server gives no hint for, and operators meet.
fn remedy(code: &str, message: &str) -> Option<&'static str> {
    Some(match code {
        "28P01" => "correct user= and the password (password=, PGPASSWORD or the passfile)",
        "28000" if message.contains("pg_hba.conf") => {
            "add a line for this user, database (\"replication\" for streaming) and address to pg_hba.conf, \
             and reload the server"
        }
        "28000" => "check that the role exists, may log in and fits pg_hba.conf",
        "42501" if message.contains("replication") || message.contains("walsender") => {
            "ALTER ROLE ... REPLICATION"
        }
        "3D000" => "correct dbname=",
        "53300" => "raise max_connections or max_wal_senders, or end what holds the connections",
        "57P03" => "wait until the server has started",
        _ => return None,
    })
}

/// The server could not be reached at all.
pub(super) fn unreachable(host: &Host, error: &io::Error) -> Error {
    let fault = Error::new(Kind::Postgres, error);
    match (host.socket_path(), error.kind()) {
        (Some(socket), io::ErrorKind::NotFound) => fault.remedy(format_args!(
            "there is no socket {}: start the server, or correct host= (the server's unix_socket_directories) \
             and port=",
            socket.display()
        )),
        (Some(_), io::ErrorKind::PermissionDenied) => {
            fault.remedy("run as a user who may enter the socket's directory")
        }
        (Some(_), _) => fault.remedy("start the server: its socket is there, and nobody listens"),
        (None, io::ErrorKind::ConnectionRefused) => fault.remedy(
            "start the server, or correct host= and port= (the server's listen_addresses and port)",
        ),
        (None, _) => fault.remedy("check host=, the network between, and its firewalls"),
    }
}

/// The connection broke, or the server said what no PostgreSQL says.
pub(super) fn lost(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            Error::new(Kind::Postgres, format_args!("the server broke the protocol: {error}"))
        }
        io::ErrorKind::UnexpectedEof => closed(),
        _ => Error::new(Kind::Postgres, format_args!("connection lost: {error}")),
    }
}

pub(super) fn closed() -> Error {
    Error::new(Kind::Postgres, "the server closed the connection unexpectedly")
}

/// A message that has no place here.
pub(super) fn unexpected(doing: &str) -> Error {
    Error::new(Kind::Postgres, format_args!("unexpected message from the server while {doing}"))
}
