//! A base backup as it arrives, sorted: what goes into the snapshot, what is kept aside, what is left out.
//!
//! ```text
//! archive, bytes ─► tar ─► paths in the data directory ─► rules ─► whoever stores it
//!                            │ every file's size and CRC: for the server's manifest
//!                            └ backup_label, pg_control: kept
//! ```
//!
//! The server leaves out most of what a snapshot leaves out. What it sends all the same is judged by the rules of the
//! walk, and counts for its manifest. Nothing here does I/O.

use super::server_manifest::Streamed;
use super::tar::{Entry, EntryKind, Tar, TarEvent};
use super::walk::{CONTROL_PATH, rules};
use backstay_common::postgres::BackupArchive;
use backstay_common::snapshot::table::check_relative;
use backstay_common::{Error, Kind, Result};
use bytes::Bytes;

/// The longest file that is kept aside.
const KEPT_BYTES_MAX: u64 = 64 << 10;
const LABEL_PATH: &str = "backup_label";

/// Where sorted files go, in order. Folders come before what is in them.
pub trait Sink: Sized {
    fn folder(&mut self, path: &str, mode: u32) -> Result<()>;
    /// A file of `size` bytes begins; `segment` is which segment of its fork it is, for a relation.
    fn file(&mut self, path: &str, mode: u32, size: u64, segment: Option<u32>) -> Result<()>;
    /// More bytes of the file that has begun.
    fn bytes(&mut self, bytes: &Bytes) -> Result<()>;
    /// All of its bytes were given.
    fn file_end(&mut self) -> Result<()>;
    /// There are no more files.
    fn finish(self) -> Result<()>;
}

/// What is known of the server beforehand.
#[derive(Clone, Debug)]
pub struct Origin {
    pub archives: Vec<BackupArchive>,
    pub major: u32,
    /// Permission bits of the data directory's folders.
    pub folder_mode: u32,
    /// Folders that are not the database's, as paths in the data directory: the agent's own, should it run there.
    pub foreign: Vec<String>,
}

/// What was kept aside.
#[derive(Debug, Default)]
pub struct Kept {
    /// The text of `backup_label`.
    pub label: Vec<u8>,
    /// `pg_control`, and its permission bits.
    pub control: Vec<u8>,
    pub control_mode: u32,
    pub streamed: Streamed,
}

/// Sorts one backup.
#[derive(Debug)]
pub struct Arrivals {
    origin: Origin,
    tar: Tar,
    /// Where the archive's files belong, with a slash at its end unless it is the data directory.
    prefix: String,
    open: Option<OpenFile>,
    kept: Kept,
}

#[derive(Debug)]
struct OpenFile {
    path: String,
    size: u64,
    crc: u32,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Store { segment: Option<u32> },
    Label,
    Control,
    LeaveOut,
}

impl Arrivals {
    pub fn new(origin: Origin) -> Arrivals {
        let (tar, prefix, kept) = (Tar::new(), String::new(), Kept::default());
        Arrivals { origin, tar, prefix, open: None, kept }
    }

    /// The archive of this number begins.
    pub fn archive(&mut self, number: usize, sink: &mut impl Sink) -> Result<()> {
        self.end_archive()?;
        self.tar = Tar::new();
        let archive = self.origin.archives.get(number);
        let archive =
            archive.ok_or_else(|| Error::new(Kind::Bug, "an archive that is not listed"))?;
        self.prefix = match &archive.tablespace {
            Some((oid, _)) => format!("pg_tblspc/{oid}/"),
            None => String::new(),
        };
        let mode = self.origin.folder_mode;
        if number == 0 && archive.tablespace.is_some() {
            sink.folder("pg_tblspc", mode)?;
        }
        match self.prefix.strip_suffix('/') {
            Some(folder) => sink.folder(folder, mode),
            None => Ok(()),
        }
    }

    /// More bytes of the archive.
    pub fn data(&mut self, mut bytes: Bytes, sink: &mut impl Sink) -> Result<()> {
        while let Some(event) = self.tar.next(&mut bytes).map_err(|bad| self.bad(bad))? {
            match event {
                TarEvent::Entry(entry) => self.entry(entry, sink)?,
                TarEvent::Data(part) => self.part(&part, sink)?,
                TarEvent::FileEnd => self.file_end(sink)?,
            }
        }
        Ok(())
    }

    /// All archives have come.
    pub fn finish(mut self) -> Result<Kept> {
        self.end_archive()?;
        let missing = |what: &str| {
            Error::new(Kind::Postgres, format!("the server's base backup has no {what} in it"))
        };
        match (self.kept.label.is_empty(), self.kept.control.is_empty()) {
            (true, _) => Err(missing(LABEL_PATH)),
            (_, true) => Err(missing(CONTROL_PATH)),
            _ => Ok(self.kept),
        }
    }

    fn end_archive(&mut self) -> Result<()> {
        self.tar.end().map_err(|bad| self.bad(bad))
    }

    fn bad(&self, reason: impl std::fmt::Display) -> Error {
        let archive = match self.prefix.as_str() {
            "" => "the data directory".to_string(),
            prefix => prefix.trim_end_matches('/').to_string(),
        };
        Error::new(Kind::Corrupt, format!("the server's archive of {archive}: {reason}"))
    }

    fn entry(&mut self, entry: Entry, sink: &mut impl Sink) -> Result<()> {
        // Some names are as the server walked to them.
        let name = entry.name.strip_prefix("./").unwrap_or(&entry.name);
        let path = format!("{}{name}", self.prefix);
        check_relative(&path).map_err(|error| self.bad(error.message()))?;
        match entry.kind {
            EntryKind::Folder => self.folder(&path, entry.mode, sink),
            // With a tablespace map in the backup there are none; the list of archives says the same.
            EntryKind::Link { .. } => Ok(()),
            EntryKind::File { size } => {
                let fate = self.fate(&path);
                if matches!(fate, Fate::Label | Fate::Control) && size > KEPT_BYTES_MAX {
                    return Err(self.bad(format!("{path} has {size} bytes")));
                }
                match fate {
                    Fate::Store { segment } => sink.file(&path, entry.mode, size, segment)?,
                    Fate::Control => self.kept.control_mode = entry.mode,
                    Fate::Label | Fate::LeaveOut => {}
                }
                self.open = Some(OpenFile { path, size, crc: 0, fate });
                Ok(())
            }
        }
    }

    fn folder(&mut self, path: &str, mode: u32, sink: &mut impl Sink) -> Result<()> {
        // It came before the tablespaces in it; those of `pg_wal` are made below.
        let is_known = path == "pg_tblspc" && self.origin.archives.len() > 1;
        if is_known || self.is_left_out(path) {
            return Ok(());
        }
        sink.folder(path, mode)?;
        if path == "pg_wal" {
            for name in rules::folders_of_wal(self.origin.major) {
                sink.folder(&format!("{path}/{name}"), mode)?;
            }
        }
        Ok(())
    }

    fn fate(&self, path: &str) -> Fate {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        match path {
            LABEL_PATH => Fate::Label,
            CONTROL_PATH => Fate::Control,
            _ if self.is_left_out(path) => Fate::LeaveOut,
            _ if !rules::holds_relations(folder) => Fate::Store { segment: None },
            _ if rules::is_temporary(name) => Fate::LeaveOut,
            _ => Fate::Store { segment: rules::RelationFile::parse(name).map(|file| file.segment) },
        }
    }

    fn is_left_out(&self, path: &str) -> bool {
        let (top, below) = path.split_once('/').unwrap_or((path, ""));
        let is_in = |folder: &String| {
            path.strip_prefix(folder.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        !below.is_empty() && rules::is_emptied(top)
            || top == "backstay-restore"
            || path.split('/').any(rules::is_left_out)
            || self.origin.foreign.iter().any(is_in)
    }

    fn part(&mut self, part: &Bytes, sink: &mut impl Sink) -> Result<()> {
        let Some(open) = &mut self.open else { return Err(no_file()) };
        open.crc = crc32c::crc32c_append(open.crc, part);
        match open.fate {
            Fate::Store { .. } => sink.bytes(part)?,
            Fate::Label => self.kept.label.extend_from_slice(part),
            Fate::Control => self.kept.control.extend_from_slice(part),
            Fate::LeaveOut => {}
        }
        Ok(())
    }

    fn file_end(&mut self, sink: &mut impl Sink) -> Result<()> {
        let open = self.open.take().ok_or_else(no_file)?;
        if matches!(open.fate, Fate::Store { .. }) {
            sink.file_end()?;
        }
        match self.kept.streamed.note(&open.path, open.size, open.crc) {
            true => Ok(()),
            false => Err(self.bad(format!("{} is in it twice", open.path))),
        }
    }
}

fn no_file() -> Error {
    Error::new(Kind::Bug, "bytes of a file that has not begun")
}

#[cfg(test)]
mod tests;
