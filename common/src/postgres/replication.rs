//! The commands of the replication protocol ("src/backend/replication/walsender.c").

use super::quote::identifier;
use super::stream::Stream;
use super::{Connection, Row};
use crate::id::SystemId;
use crate::lsn::Lsn;
use crate::segment::TimelineId;
use crate::{Context, Error, Kind, Result};

/// SQLSTATE of a slot that is already there, from [`Connection::create_physical_slot`].
pub const DUPLICATE_OBJECT: &str = "42710";
/// SQLSTATE of WAL that the server has removed, from [`Connection::start_replication`].
pub const UNDEFINED_FILE: &str = "58P01";
/// The server starts or shuts down.
pub const CANNOT_CONNECT_NOW: &str = "57P03";
/// SQLSTATE of a slot that another connection streams from.
pub const OBJECT_IN_USE: &str = "55006";

/// What a server says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub system: SystemId,
    pub timeline: TimelineId,
    /// How far its WAL is durable; on a standby, received or replayed.
    pub flush: Lsn,
}

impl Connection {
    /// Which cluster this is, on which timeline, and how far.
    pub async fn identify_system(&mut self) -> Result<Identity> {
        let row = self.command("IDENTIFY_SYSTEM").await?;
        Ok(Identity {
            system: row.parse("systemid")?,
            timeline: row.parse("timeline")?,
            flush: row.parse("xlogpos")?,
        })
    }

    /// The bytes of a timeline's history file. Timeline 1 has none, and asking for it is the server's error.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<Vec<u8>> {
        let row = self.command(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let name = row.text("filename")?;
        if name != timeline.history_file() {
            return Err(
                self.fault(format_args!("sent {name:?} as the history of timeline {timeline}"))
            );
        }
        let content = row.bytes(1).map(<[u8]>::to_vec);
        content.ok_or_else(|| self.fault(format_args!("sent no content of {name}")))
    }

    /// Makes a physical slot that holds WAL from now on. If it exists, the error's SQLSTATE is
    /// [`DUPLICATE_OBJECT`].
    pub async fn create_physical_slot(&mut self, name: &str) -> Result<()> {
        let name = slot_name(name)?;
        let command = format!("CREATE_REPLICATION_SLOT {name} PHYSICAL RESERVE_WAL");
        self.command(&command).await.map(drop)
    }

    /// Drops a slot that nobody streams from.
    pub async fn drop_slot(&mut self, name: &str) -> Result<()> {
        let command = format!("DROP_REPLICATION_SLOT {}", slot_name(name)?);
        self.query(&command).await.map(drop)
    }

    /// The value of a setting.
    pub async fn show(&mut self, name: &str) -> Result<String> {
        let row = self.command(&format!("SHOW {}", identifier(name))).await?;
        let value = row.get(0).map(str::to_string);
        value.ok_or_else(|| self.fault(format_args!("sent no value of {name}")))
    }

    /// Streams the WAL of `timeline` from `start` on; any position still on the server's disk will do.
    ///
    /// Some refusals come with the first message instead: a start beyond the server's flush position, WAL already
    /// removed ([`UNDEFINED_FILE`]). A failed start ends the connection.
    pub async fn start_replication(
        mut self,
        slot: Option<&str>,
        timeline: TimelineId,
        start: Lsn,
    ) -> Result<Stream> {
        let slot = match slot {
            Some(name) => format!("SLOT {} ", slot_name(name)?),
            None => String::new(),
        };
        if self.server_version_num()? < 150_000 {
            // A standby of 14 streams only over a connection that has asked this.
            self.identify_system().await?;
        }
        self.begin()?;
        let command = format!("START_REPLICATION {slot}PHYSICAL {start} TIMELINE {timeline}");
        let doing = format!("{}: stream timeline {timeline} from {start}", self.label);
        Stream::start(self, timeline, &command).await.context(doing)
    }

    async fn command(&mut self, command: &str) -> Result<Row> {
        self.query_one(command).await
    }
}

fn slot_name(name: &str) -> Result<String> {
    let valid = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    match valid {
        true => Ok(identifier(name)),
        false => Err(Error::new(Kind::Config, format_args!("{name:?} is not a slot name"))
            .remedy("use 1 to 63 of a-z, 0-9 and _")),
    }
}
