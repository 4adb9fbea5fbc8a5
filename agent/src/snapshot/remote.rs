//! A snapshot without file access: what a server says of itself, and its base backup, received.
//!
//! ```text
//! BASE_BACKUP ─► pump ─ bounded ─► sort (a thread) ─► sink
//!                  └─── bounded ─► compare with the server's manifest (a thread)
//! ```
//!
//! The connection that sends is the backup session: when it ends early, the backup is void, and nothing is to be undone.

use super::arrive::{Arrivals, Kept, Origin, Sink};
use super::blocking;
use super::label::BackupLabel;
use super::server_manifest::{self, ChannelReader, Expected, Said};
use super::walk::CONTROL_PATH;
use crate::connect;
use crate::context::AgentContext;
use backstay_common::control::ControlFile;
use backstay_common::id::SnapshotId;
use backstay_common::lsn::Lsn;
use backstay_common::postgres::{BackupMessage, BackupOptions, BaseBackup, Connection, Mode, Row};
use backstay_common::segment::TimelineId;
use backstay_common::snapshot::Tablespace;
use backstay_common::{Context, Error, Kind, Result};
use bytes::Bytes;
use std::path::{Path, PathBuf};
use std::sync::Once;
use tokio::sync::mpsc;

/// Messages of the server that wait to be sorted, of 32 KiB each.
const PIECES_MAX: usize = 64;

/// A server that is backed up over the network.
#[derive(Debug)]
pub struct Remote {
    replication: Connection,
    pub shape: Shape,
    /// That the server is on.
    pub timeline: TimelineId,
    foreign: Vec<PathBuf>,
    major: u32,
}

/// What the server says of its data directory.
#[derive(Clone, Debug)]
pub struct Shape {
    pub page_bytes: u32,
    /// Pages in one segment of a relation.
    pub segment_pages: u32,
    pub checksums: bool,
    /// The name of the role that initdb made.
    pub superuser: String,
    /// Permission bits of its folders.
    folder_mode: u32,
    /// None for a role that may not ask.
    data_dir: Option<PathBuf>,
}

/// A base backup that has been received whole.
#[derive(Debug)]
pub struct Received {
    pub label: BackupLabel,
    pub control: ControlFile,
    pub control_bytes: Vec<u8>,
    pub control_mode: u32,
    pub tablespaces: Vec<Tablespace>,
}

impl Remote {
    /// Connects, and makes sure that the server can be backed up. `foreign` are folders of the agent's own.
    pub async fn open(context: &AgentContext, foreign: Vec<PathBuf>) -> Result<Remote> {
        let conninfo = connect::conninfo(&context.settings)?;
        let mut sql = Connection::connect(&conninfo, Mode::Sql).await?;
        let shape = examine(&mut sql, context).await.context("prepare the backup")?;
        sql.close().await;
        let mut replication = Connection::connect(&conninfo, Mode::Replication).await?;
        let identity = replication.identify_system().await?;
        if identity.system != context.system {
            let reason = "SQL and replication reach two different servers";
            return Err(Error::new(Kind::Postgres, reason)
                .remedy("let `conninfo` name one host, or set target_session_attrs"));
        }
        let timeline = identity.timeline;
        Ok(Remote { replication, shape, timeline, foreign, major: context.major() })
    }

    /// Starts the backup, and waits for the checkpoint that it begins with.
    pub async fn start(
        self,
        id: SnapshotId,
        fast_checkpoint: bool,
        max_rate: Option<u64>,
    ) -> Result<Backup> {
        let label = format!("backstay {id}");
        let options = BackupOptions { label, fast_checkpoint, max_rate };
        let backup = self.replication.base_backup(self.major, &options).await?;
        let inside = |path: &PathBuf| {
            let data_dir = self.shape.data_dir.as_deref()?;
            path.strip_prefix(data_dir).ok().and_then(Path::to_str).map(str::to_string)
        };
        let foreign = self.foreign.iter().filter_map(inside).filter(|path| !path.is_empty());
        let origin = Origin {
            archives: backup.archives().to_vec(),
            major: self.major,
            folder_mode: self.shape.folder_mode,
            foreign: foreign.collect(),
        };
        Ok(Backup { backup, origin })
    }
}

async fn examine(sql: &mut Connection, context: &AgentContext) -> Result<Shape> {
    let row = sql
        .query_one(
            "select (select system_identifier from pg_control_system()) as system, \
             current_setting('wal_level') as wal_level, \
             (select rolname from pg_roles where oid = 10) as superuser, \
             current_setting('block_size') as block_size, \
             (select setting from pg_settings where name = 'segment_size') as segment_size, \
             current_setting('data_checksums') as checksums, \
             current_setting('data_directory_mode') as mode, \
             (select setting from pg_settings where name = 'data_directory') as data_dir, \
             (select setting from pg_settings where name = 'config_file') as config_file",
        )
        .await?;
    tell_of_config(&row);
    if row.parse::<i64>("system")? as u64 != context.system.get() {
        let reason = format!(
            "the server is of system {}, and the agent was started for {}",
            row.text("system")?,
            context.system
        );
        return Err(Error::new(Kind::Config, reason)
            .remedy("correct conninfo in [postgres], and restart the agent"));
    }
    if row.text("wal_level")? == "minimal" {
        return Err(Error::new(Kind::Postgres, "the server runs with wal_level = minimal")
            .remedy("alter system set wal_level = replica; then restart the server"));
    }
    shape(&row)
}

/// Says once what cannot be had without file access.
fn tell_of_config(row: &Row) {
    static TOLD: Once = Once::new();
    let (Some(config), Some(data_dir)) = (row.by_name("config_file"), row.by_name("data_dir"))
    else {
        return;
    };
    if !Path::new(config).starts_with(data_dir) {
        TOLD.call_once(|| {
            tracing::warn!(
                "the server's configuration at {config} lies outside its data directory: it cannot be read \
                 without file access, and is in no snapshot"
            );
        });
    }
}

fn shape(row: &Row) -> Result<Shape> {
    let mode = row.text("mode")?;
    let page_bytes: u32 = row.parse("block_size")?;
    // PostgreSQL's own choices; what follows divides by it.
    if !page_bytes.is_power_of_two() || !(1024..=32_768).contains(&page_bytes) {
        let reason = format!("the server names an impossible block size: {page_bytes}");
        return Err(Error::new(Kind::Postgres, reason));
    }
    Ok(Shape {
        page_bytes,
        segment_pages: row.parse("segment_size")?,
        checksums: row.text("checksums")? == "on",
        superuser: row.text("superuser")?.to_string(),
        folder_mode: u32::from_str_radix(mode, 8).map_err(|_| {
            Error::new(Kind::Postgres, format!("the server names an impossible mode: {mode:?}"))
        })?,
        data_dir: row.by_name("data_dir").map(PathBuf::from),
    })
}

impl Shape {
    /// The copied `pg_control` says the same: pages were cut and judged by it.
    pub fn check(&self, control: &ControlFile) -> Result<()> {
        let said = (self.page_bytes, self.segment_pages, self.checksums);
        let is = (control.block_bytes, control.relation_segment_blocks, control.has_checksums());
        match said == is {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Postgres,
                format!("the server says that its pages are {said:?}, and its pg_control {is:?}"),
            )),
        }
    }
}

/// A base backup that is running.
#[derive(Debug)]
pub struct Backup {
    backup: BaseBackup,
    origin: Origin,
}

/// What the pump gives to the thread that sorts.
#[derive(Debug)]
enum Piece {
    Archive(usize),
    Data(Bytes),
}

impl Backup {
    /// Where replay will begin.
    pub fn start_lsn(&self) -> Lsn {
        self.backup.start_lsn()
    }

    /// The server's estimate of what it will send.
    pub fn bytes(&self) -> u64 {
        self.origin.archives.iter().map(|archive| archive.bytes).sum()
    }

    /// Receives everything, gives the files to `sink`, and compares all with the server's manifest.
    ///
    /// Safe to drop: the backup ends with its connection. A difference to the manifest is of [`Kind::Corrupt`].
    pub async fn receive(
        mut self,
        context: &AgentContext,
        sink: impl Sink + Send + 'static,
    ) -> Result<Received> {
        let (pieces, to_sort) = mpsc::channel(PIECES_MAX);
        let (parts, manifest) = mpsc::channel(PIECES_MAX);
        let arrivals = Arrivals::new(self.origin.clone());
        let sorting = async {
            let mut kept = blocking(move || sort(to_sort, arrivals, sink)).await?;
            let streamed = std::mem::take(&mut kept.streamed);
            let reader = ChannelReader::new(manifest);
            let said = blocking(move || server_manifest::compare(reader, streamed)).await?;
            Ok((kept, said))
        };
        let pumping = pump(&mut self.backup, pieces, parts);
        let ((stop, timeline), (kept, said)) = tokio::try_join!(pumping, sorting)?;
        self.finish(context, kept, &said, stop, timeline)
    }

    fn finish(
        &self,
        context: &AgentContext,
        kept: Kept,
        said: &Said,
        stop: Lsn,
        timeline: TimelineId,
    ) -> Result<Received> {
        let start = self.backup.start_lsn();
        said.check(&Expected { system: context.system, start, stop })?;
        if timeline != self.backup.timeline() {
            let (from, to) = (self.backup.timeline(), timeline);
            let reason = format!("the server went from timeline {from} to {to} during the backup");
            return Err(Error::new(Kind::Postgres, reason).remedy("take another snapshot"));
        }
        let label = String::from_utf8(kept.label)
            .map_err(|_| Error::new(Kind::Postgres, "the server's backup_label is not UTF-8"))?;
        let label = BackupLabel::parse(&label, stop)?;
        if (label.start, label.timeline) != (start, timeline) {
            let reason =
                format!("the server's backup_label begins at {}, not {start}", label.start);
            return Err(Error::new(Kind::Postgres, reason));
        }
        let control = ControlFile::parse(&kept.control)
            .map_err(Error::from)
            .context(format!("{CONTROL_PATH} of the base backup"))?;
        let spaces = self.origin.archives.iter().filter_map(|archive| archive.tablespace.clone());
        // An in-place tablespace is a folder of the data directory, under a relative path.
        let spaces = spaces.filter(|(_, location)| location.starts_with('/'));
        let tablespaces = spaces.map(|(oid, location)| Tablespace { oid, location }).collect();
        if control.system != context.system {
            let reason =
                format!("{CONTROL_PATH} of the base backup is of system {}", control.system);
            return Err(Error::new(Kind::Postgres, reason));
        }
        let (control_bytes, control_mode) = (kept.control, kept.control_mode);
        Ok(Received { label, control, control_bytes, control_mode, tablespaces })
    }
}

/// Gives on what the server sends, to its end: where the backup stopped, and on which timeline.
async fn pump(
    backup: &mut BaseBackup,
    pieces: mpsc::Sender<Piece>,
    parts: mpsc::Sender<Bytes>,
) -> Result<(Lsn, TimelineId)> {
    let (mut pieces, mut parts) = (Some(pieces), Some(parts));
    loop {
        let sent = match backup.next().await? {
            BackupMessage::Archive(number) => give(&pieces, Piece::Archive(number)).await,
            BackupMessage::Manifest => {
                pieces = None;
                true
            }
            BackupMessage::Data(bytes) if pieces.is_some() => {
                give(&pieces, Piece::Data(bytes)).await
            }
            BackupMessage::Data(bytes) => give(&parts, bytes).await,
            BackupMessage::End { stop, timeline } => {
                parts.take();
                return Ok((stop, timeline));
            }
        };
        if !sent {
            // Whoever took it has failed, and says why.
            std::future::pending::<()>().await;
        }
    }
}

async fn give<T>(to: &Option<mpsc::Sender<T>>, what: T) -> bool {
    match to {
        Some(to) => to.send(what).await.is_ok(),
        None => false,
    }
}

/// Sorts until there is no more. Blocks.
fn sort(
    mut pieces: mpsc::Receiver<Piece>,
    mut arrivals: Arrivals,
    mut sink: impl Sink,
) -> Result<Kept> {
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Piece::Archive(number) => arrivals.archive(number, &mut sink)?,
            Piece::Data(bytes) => arrivals.data(bytes, &mut sink)?,
        }
    }
    let kept = arrivals.finish()?;
    sink.finish()?;
    Ok(kept)
}
