//! What is in the data directory and its tablespaces, in the order in which a snapshot lists it.
//!
//! A folder comes before what is in it, siblings in the order of their names' bytes; `global/pg_control` is not in it: it is read
//! after all else. What vanishes meanwhile is left out, for replay knows why it vanished. Memory is
//! bounded by the largest single folder.

pub mod rules;

use super::cache::FileStat;
use backstay_common::snapshot::Tablespace;
use backstay_common::{Context, Error, Kind, Result};
use rules::RelationFile;
use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Read last, by itself.
pub const CONTROL_PATH: &str = "global/pg_control";
/// Deeper than PostgreSQL ever nests: only a symbolic link that leads back up gets there.
const DEPTH_MAX: usize = 24;
/// The folders in which a link to another disk is followed: PostgreSQL's own data, moved by hand.
const FOLLOWED: [&str; 7] =
    ["base", "global", "pg_commit_ts", "pg_logical", "pg_multixact", "pg_twophase", "pg_xact"];

/// What to walk, and what to stay out of.
#[derive(Clone, Debug)]
pub struct Tree {
    pub data_dir: PathBuf,
    pub major: u32,
    pub catalog_version: u32,
    /// Folders that are not the database's, wherever they lie: the agent's state, locations.
    pub foreign: Vec<PathBuf>,
}

/// One file or folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// As in [`backstay_common::snapshot::FileEntry`].
    pub path: String,
    pub source: PathBuf,
    /// Unix permission bits.
    pub mode: u32,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Folder,
    File {
        /// Bytes when it was found. What is appended later comes from the WAL.
        size: u64,
        /// For a file of a relation: which segment of its fork.
        segment: Option<u32>,
        stat: FileStat,
    },
}

/// Finds everything, and gives it to `visit` in order. Blocks.
pub fn walk(tree: &Tree, visit: &mut dyn FnMut(Found) -> Result<()>) -> Result<()> {
    let spaces = tablespaces(&tree.data_dir)?;
    let resolved = |path: &Path| fs::canonicalize(path).ok();
    let foreign = tree.foreign.iter().filter_map(|path| resolved(path)).collect();
    let spaces = spaces.iter().filter_map(|space| resolved(Path::new(&space.location))).collect();
    Walk { tree, foreign, spaces, visit }.folder("", &tree.data_dir, 0)
}

/// The tablespaces outside the data directory, by oid.
pub fn tablespaces(data_dir: &Path) -> Result<Vec<Tablespace>> {
    let folder = data_dir.join("pg_tblspc");
    let mut spaces = Vec::new();
    for name in names_in(&folder)?.unwrap_or_default() {
        let Ok(oid) = name.parse() else { continue };
        let path = folder.join(&name);
        match fs::read_link(&path) {
            Ok(target) => {
                spaces.push(Tablespace { oid, location: text(target.as_os_str(), &folder)? });
            }
            // An in-place tablespace is a folder, and part of the data directory.
            Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::NotFound) => {}
            Err(e) => return Err(unreadable(&path, e)),
        }
    }
    Ok(spaces)
}

struct Walk<'a> {
    tree: &'a Tree,
    foreign: HashSet<PathBuf>,
    /// Where tablespaces are: one inside the data directory is not taken twice.
    spaces: HashSet<PathBuf>,
    visit: &'a mut dyn FnMut(Found) -> Result<()>,
}

impl Walk<'_> {
    /// What is in the folder `path`; the folder itself was visited.
    fn folder(&mut self, path: &str, source: &Path, depth: usize) -> Result<()> {
        let Some(names) = names_in(source)? else {
            return match path {
                "" => Err(unreadable(source, ErrorKind::NotFound.into())),
                _ => Ok(()),
            };
        };
        let relations = rules::holds_relations(path);
        let unlogged = match relations {
            true => rules::unlogged(names.iter().map(String::as_str)),
            false => HashSet::new(),
        };
        for name in &names {
            if rules::is_left_out(name) || relations && is_volatile(name, &unlogged) {
                continue;
            }
            let below = match path {
                "" => name.clone(),
                _ => format!("{path}/{name}"),
            };
            self.entry(below, name, source.join(name), depth, relations)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        path: String,
        name: &str,
        source: PathBuf,
        depth: usize,
        in_relations: bool,
    ) -> Result<()> {
        if depth == DEPTH_MAX {
            let reason = format!("{} is nested too deeply", source.display());
            return Err(Error::new(Kind::Local, reason)
                .remedy("a symbolic link in the data directory seems to lead back up; remove it"));
        }
        let Some(found) = looked_at(fs::metadata(&source), &source)? else { return Ok(()) };
        if found.is_file() && path != CONTROL_PATH {
            let segment = RelationFile::parse(name).filter(|_| in_relations).map(|f| f.segment);
            let (size, stat) = (found.len(), stat(&found));
            let what = What::File { size, segment, stat };
            return (self.visit)(Found { path, mode: mode(&found), source, what });
        }
        match found.is_dir() {
            true => self.subfolder(path, source, &found, depth),
            // Sockets, pipes and devices are nobody's data.
            false => Ok(()),
        }
    }

    fn subfolder(
        &mut self,
        path: String,
        source: PathBuf,
        found: &Metadata,
        depth: usize,
    ) -> Result<()> {
        let real = match fs::canonicalize(&source) {
            Ok(real) => real,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(unreadable(&source, e)),
        };
        if self.foreign.contains(&real) || path == "backstay-restore" {
            return Ok(());
        }
        let folder = |path: &str, source: &Path| Found {
            path: path.to_string(),
            source: source.to_path_buf(),
            mode: mode(found),
            what: What::Folder,
        };
        let top = path.split('/').next().unwrap_or_default();
        if top == "pg_tblspc" && path != top {
            return self.tablespace(path, source, found, depth);
        }
        (self.visit)(folder(&path, &source))?;
        if path == "pg_wal" {
            for name in rules::folders_of_wal(self.tree.major) {
                (self.visit)(folder(&format!("{path}/{name}"), &source.join(name)))?;
            }
        }
        let is_elsewhere = is_link(&source) && !FOLLOWED.contains(&top);
        if rules::is_emptied(&path) || self.spaces.contains(&real) || is_elsewhere {
            return Ok(());
        }
        self.folder(&path, &source, depth + 1)
    }

    /// `pg_tblspc/<oid>`, of which only this version's folder is the cluster's; and what is below it.
    fn tablespace(
        &mut self,
        path: String,
        source: PathBuf,
        found: &Metadata,
        depth: usize,
    ) -> Result<()> {
        let parts: Vec<&str> = path.split('/').collect();
        let version = format!("PG_{}_{}", self.tree.major, self.tree.catalog_version);
        let is_ours = match parts[..] {
            [_, oid] => rules::is_number(oid),
            [_, _, folder] => folder == version,
            _ => true,
        };
        if !is_ours {
            return Ok(());
        }
        let folder = Found {
            path: path.clone(),
            source: source.clone(),
            mode: mode(found),
            what: What::Folder,
        };
        (self.visit)(folder)?;
        if parts.len() > 2 {
            return self.folder(&path, &source, depth + 1);
        }
        let below = source.join(&version);
        self.entry(format!("{path}/{version}"), &version, below, depth + 1, false)
    }
}

/// True for a relation's file that recovery would throw away.
fn is_volatile(name: &str, unlogged: &HashSet<String>) -> bool {
    let of_unlogged =
        |file: RelationFile<'_>| file.fork != rules::Fork::Init && unlogged.contains(file.relation);
    rules::is_temporary(name) || RelationFile::parse(name).is_some_and(of_unlogged)
}

/// The names in a folder, in order; none if it has vanished.
fn names_in(folder: &Path) -> Result<Option<Vec<String>>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(unreadable(folder, e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.context(format!("read {}", folder.display()))?;
        names.push(text(&entry.file_name(), folder)?);
    }
    names.sort_unstable();
    Ok(Some(names))
}

fn text(name: &std::ffi::OsStr, folder: &Path) -> Result<String> {
    name.to_str().map(str::to_string).ok_or_else(|| {
        let reason = format!("the name {name:?} in {} is not UTF-8", folder.display());
        Error::new(Kind::Local, reason).remedy("rename it, or move it out of the data directory")
    })
}

/// None for what has vanished, and for a link that leads nowhere.
fn looked_at(found: io::Result<Metadata>, path: &Path) -> Result<Option<Metadata>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(unreadable(path, e)),
    }
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())
}

/// The reading begins now, or later.
fn stat(found: &Metadata) -> FileStat {
    let changed = found.ctime().saturating_mul(1_000_000_000).saturating_add(found.ctime_nsec());
    let read_began = jiff::Timestamp::now().as_nanosecond() as i64;
    let (device, inode, size) = (found.dev(), found.ino(), found.len());
    FileStat { device, inode, changed, size, read_began }
}

fn mode(found: &Metadata) -> u32 {
    found.permissions().mode() & 0o7777
}

/// A fault of the data directory, with what to do about it.
pub fn unreadable(path: &Path, reason: io::Error) -> Error {
    let error = Error::new(Kind::Local, format!("read {}: {reason}", path.display()));
    match reason.kind() {
        ErrorKind::PermissionDenied => error.remedy(
            "run the agent as the user that runs PostgreSQL, or as one of its group where initdb \
             was run with --allow-group-access",
        ),
        ErrorKind::NotFound => error.remedy("correct data-dir in [postgres]"),
        _ => error,
    }
}

#[cfg(test)]
mod tests;
