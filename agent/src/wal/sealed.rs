//! The folder `sealed`: objects that wait for a location, byte for byte as they will be stored.
//!
//! An object that closes a span is fsynced before any location gets it, so that all get the same; a piece is not: if it
//! is lost, another is cut. Names are `<branch>.<start>-<end>.<id>`, and `<branch>.origin`. A crash while one is
//! written leaves a `.tmp`, which the next start removes; a damaged file is removed then too, and its range is cut anew.

use super::line::Line;
use super::shelf::Item;
use crate::durable::sync_folder;
use backstay_common::id::{Branch, SystemId};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_common::seal::Header;
use backstay_common::{Context, Error, Kind, Result};
use bytes::Bytes;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The folder. All methods block.
#[derive(Clone, Debug)]
pub struct Sealed {
    folder: PathBuf,
    system: SystemId,
}

impl Sealed {
    pub fn create(root: &Path, system: SystemId) -> Result<Sealed> {
        let folder = root.join("sealed");
        std::fs::create_dir_all(&folder)
            .and_then(|()| sync_folder(root))
            .context(format!("create {}", folder.display()))?;
        Ok(Sealed { folder, system })
    }

    /// What is here for `lines`, for the shelf.
    pub fn load(&self, lines: &[Arc<Line>]) -> Result<Vec<Item>> {
        let doing = || format!("read {}", self.folder.display());
        let mut items = Vec::new();
        for entry in std::fs::read_dir(&self.folder).context(doing())? {
            let path = entry.context(doing())?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".tmp") {
                std::fs::remove_file(&path).context(doing())?;
            } else if let Some(object) = self.parse(&name) {
                items.extend(self.item(&path, object, lines)?);
            }
        }
        Ok(items)
    }

    fn item(&self, path: &Path, name: ObjectName, lines: &[Arc<Line>]) -> Result<Option<Item>> {
        let ObjectName::Wal { branch, range, id, .. } = name else { return Ok(None) };
        let bytes: Bytes = std::fs::read(path).context(format!("read {}", path.display()))?.into();
        let header = match Header::check(&bytes, &name) {
            Ok(header) => header,
            Err(error) => {
                tracing::warn!(%error, "removed from the spool, and cut anew");
                std::fs::remove_file(path).context(format!("remove {}", path.display()))?;
                return Ok(None);
            }
        };
        let of_branch = lines.iter().filter(|line| line.branch() == Some(branch));
        let Some(line) =
            of_branch.rev().find(|line| line.spool.begin() <= range.start).or_else(|| {
                // Its WAL has been forgotten already, because every location has it.
                lines.iter().find(|line| line.branch() == Some(branch))
            })
        else {
            let reason = format!("{} belongs to no WAL in the spool", path.display());
            return Err(Error::new(Kind::Corrupt, reason)
                .remedy("put the spool back as it was, or move the file away"));
        };
        Ok(Some(Item {
            line: line.number,
            system: self.system,
            branch,
            range,
            id,
            size: bytes.len() as u64,
            epoch: header.epoch(),
            since: Instant::now(),
        }))
    }

    fn parse(&self, name: &str) -> Option<ObjectName> {
        let (branch, rest) = name.split_once('.')?;
        let (range, id) = rest.split_once('.')?;
        let (start, end) = range.split_once('-')?;
        let range = LsnRange::new(Lsn::from_name(start)?, Lsn::from_name(end)?);
        let (branch, id) = (branch.parse().ok()?, id.parse().ok()?);
        Some(ObjectName::Wal { system: self.system, branch, range, id })
    }

    fn path(&self, item: &Item) -> PathBuf {
        let Item { branch, range, id, .. } = item;
        self.folder.join(format!("{branch}.{}-{}.{id}", range.start.name(), range.end.name()))
    }

    /// Keeps an object until it is removed.
    pub fn keep(&self, item: &Item, bytes: &[u8]) -> std::io::Result<()> {
        self.write(&self.path(item), bytes, item.closes_span())
    }

    pub fn read(&self, item: &Item) -> Result<Bytes> {
        let path = self.path(item);
        Ok(std::fs::read(&path).context(format!("read {}", path.display()))?.into())
    }

    /// Removes objects, durably.
    pub fn remove(&self, items: &[Arc<Item>]) -> Result<()> {
        for item in items {
            match std::fs::remove_file(self.path(item)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context(format!("remove {}", self.path(item).display()));
                }
                _ => {}
            }
        }
        sync_folder(&self.folder).context(format!("fsync {}", self.folder.display()))
    }

    /// Keeps a branch's origin, for locations that get it later.
    pub fn keep_origin(&self, branch: Branch, bytes: &[u8]) -> Result<()> {
        let path = self.origin_path(branch);
        self.write(&path, bytes, true).context(format!("write {}", path.display()))
    }

    pub fn origin(&self, branch: Branch) -> Result<Bytes> {
        let path = self.origin_path(branch);
        Ok(std::fs::read(&path).context(format!("read {}", path.display()))?.into())
    }

    fn origin_path(&self, branch: Branch) -> PathBuf {
        self.folder.join(format!("{branch}.origin"))
    }

    fn write(&self, path: &Path, bytes: &[u8], durable: bool) -> std::io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let temporary = self.folder.join(format!("{name}.tmp"));
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        std::fs::rename(&temporary, path)?;
        if durable {
            sync_folder(&self.folder)?;
        }
        Ok(())
    }
}
