//! What went wrong, in the terms of whoever must act on it.
//!
//! Every fault that leaves a module has a [`Kind`], which says what the caller does about it and which
//! exit code the programs end with; a message that names the thing and the reason; and, where a
//! person can do something, the remedy. Modules without I/O have small enums of their own and turn into
//! this type at their border.

use std::fmt;

/// What the caller does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A fault of ours: stop and report.
    Bug,
    /// The operator's words or files are off: correct them.
    Config,
    /// The moment asked for cannot be reached.
    Target,
    /// Bytes are not what they must be: never use them.
    Corrupt,
    /// An object that is needed is not there.
    Missing,
    /// A location cannot be reached or refuses: try again, later or elsewhere.
    Storage,
    /// PostgreSQL cannot be reached or refuses.
    Postgres,
    /// A key is not there, or is not the right one.
    Key,
    /// Another agent has taken over.
    Fenced,
    /// No agent answers on the control socket.
    NoAgent,
    /// The local disk or operating system refuses.
    Local,
    /// The work was asked to stop.
    Cancelled,
}

impl Kind {
    /// The exit code of both programs, as the README lists them.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Bug | Kind::Local | Kind::Cancelled => 1,
            Kind::Config => 2,
            Kind::Target => 3,
            Kind::Corrupt | Kind::Missing => 4,
            Kind::Storage => 5,
            Kind::Postgres => 6,
            Kind::Key => 7,
            Kind::Fenced => 8,
            Kind::NoAgent => 9,
        }
    }
}

/// An error with its kind, and what a person needs to know of it.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    remedy: Option<String>,
    sqlstate: Option<String>,
}

/// The result of nearly everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `message` names the thing and the reason: "location virginia: bucket acme-us does not exist".
    pub fn new(kind: Kind, message: impl fmt::Display) -> Error {
        Error(Box::new(Inner { kind, message: message.to_string(), remedy: None, sqlstate: None }))
    }

    /// Adds what the reader can do about it, as an instruction.
    pub fn remedy(mut self, remedy: impl fmt::Display) -> Error {
        self.0.remedy = Some(remedy.to_string());
        self
    }

    /// Puts what was being done before the message: "seal segment: ...".
    pub fn context(mut self, doing: impl fmt::Display) -> Error {
        self.0.message = format!("{doing}: {}", self.0.message);
        self
    }

    /// Keeps the SQLSTATE that a server answered with.
    pub fn with_sqlstate(mut self, code: impl Into<String>) -> Error {
        self.0.sqlstate = Some(code.into());
        self
    }

    /// What the caller does about it.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The thing and the reason, without the remedy.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What the reader can do about it.
    pub fn remedy_text(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// The five characters that PostgreSQL names the condition with, if a server said so.
    pub fn sqlstate(&self) -> Option<&str> {
        self.0.sqlstate.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        match &self.0.remedy {
            Some(remedy) => write!(f, "\n  remedy: {remedy}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Says what was being done when a result failed.
pub trait Context<T> {
    /// Puts `doing` before the message: a present-tense phrase, such as "seal segment".
    fn context(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T> Context<T> for Result<T, Error> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| error.context(doing))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error::new(Kind::Local, error).context(doing))
    }
}
