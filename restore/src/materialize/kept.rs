//! What is in the directory already: kept where it equals what is sealed, told page by page where not.
//!
//! What always holds: a page is kept only if it was read from the disk and equals its sealed hash; a file that others share by a
//! hard link is never changed. Of a cluster that is restored over, only PostgreSQL's own files are judged at all.

use super::Existing;
use super::owned::{is_postgres, is_postgres_folder};
use crate::directory::OURS;
use crate::layout::{Layout, TABLESPACES};
use crate::owner::Owner;
use backstay_common::pool;
use backstay_common::snapshot::{FileDigest, FileEntry, FileKind, PageHash, Root, page_hashes};
use backstay_common::{Context, Result};
use rayon::prelude::*;
use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes that are read and hashed at once: they stay in a core's cache.
const READ_BYTES: usize = 128 << 10;
/// So many of these are read by one thread in a row.
const PARTS_MIN: usize = 64;

/// What is at the place of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Local {
    /// Nothing; it is made new.
    Absent,
    /// The file itself.
    Right,
    /// A file of other content: the hashes of its pages.
    Differs(Vec<PageHash>),
    /// Something that is not PostgreSQL's, and is left as it is.
    Foreign,
}

/// Judges each file by what is there. What is in the way of one is removed.
pub async fn judge(
    files: Vec<FileEntry>,
    existing: Existing,
    layout: &Layout,
    owner: Owner,
    root: &Root,
) -> Result<Vec<(FileEntry, Local)>> {
    if existing == Existing::Nothing {
        return Ok(files.into_iter().map(|file| (file, Local::Absent)).collect());
    }
    let (layout, key, page_bytes) = (layout.clone(), root.hash_key, root.page_bytes as usize);
    let judge = move |file: FileEntry| -> Result<(FileEntry, Local)> {
        let path = layout.resolve(&file.path)?;
        let spared = existing == Existing::Cluster && !is_postgres(&file.path);
        let local = match file.kind {
            FileKind::Directory => Local::Absent,
            FileKind::File if spared && std::fs::symlink_metadata(&path).is_ok() => Local::Foreign,
            FileKind::File => judge_file(&path, &file, owner, &key, page_bytes)?,
        };
        Ok((file, local))
    };
    pool::run_on_disk(move || files.into_par_iter().map(judge).collect()).await?
}

fn judge_file(
    path: &Path,
    file: &FileEntry,
    owner: Owner,
    key: &[u8; 32],
    page_bytes: usize,
) -> Result<Local> {
    let doing = || format!("read {}", path.display());
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Local::Absent),
        Err(error) => return Err(error).context(doing()),
    };
    if !found.is_file() || found.nlink() > 1 {
        std::fs::remove_file(path).context(format!("remove {}", path.display()))?;
        return Ok(Local::Absent);
    }
    let hashes = hashes_of(path, found.len().min(file.size), key, page_bytes).context(doing())?;
    let mut digest = FileDigest::new();
    digest.push(&hashes);
    let is_right = found.len() == file.size
        && is_attributed(&found, file, owner)
        && file.digest == Some(digest.finish(file.size));
    Ok(if is_right { Local::Right } else { Local::Differs(hashes) })
}

/// A file that was made but not yet given to its owner is not right either.
fn is_attributed(found: &Metadata, file: &FileEntry, owner: Owner) -> bool {
    found.mode() & 0o777 == file.mode & 0o777
        && (found.uid(), found.gid()) == (owner.uid, owner.gid)
}

/// The hashes of the pages in the first `size` bytes, of which the last may be short.
fn hashes_of(
    path: &Path,
    size: u64,
    key: &[u8; 32],
    page_bytes: usize,
) -> std::io::Result<Vec<PageHash>> {
    let file = File::open(path)?;
    let read_bytes = READ_BYTES.max(page_bytes);
    let count = size.div_ceil(read_bytes as u64) as usize;
    let parts = (0..count).into_par_iter().with_min_len(PARTS_MIN);
    let read = |buffer: &mut Vec<u8>, part: usize| -> std::io::Result<Vec<PageHash>> {
        let offset = part as u64 * read_bytes as u64;
        buffer.resize((size - offset).min(read_bytes as u64) as usize, 0);
        file.read_exact_at(buffer, offset)?;
        let mut hashes = Vec::new();
        page_hashes(key, buffer, page_bytes, &mut hashes);
        Ok(hashes)
    };
    let parts: Vec<Vec<PageHash>> = parts.map_init(Vec::new, read).collect::<Result<_, _>>()?;
    Ok(parts.concat())
}

/// Removes every file that is not among `places`: in an unfinished restore's directory all of them, in a cluster's only PostgreSQL's
/// own. Returns how many.
pub fn remove_strangers(
    layout: &Layout,
    places: &HashSet<PathBuf>,
    existing: Existing,
) -> Result<u64> {
    let mut tidy = Tidy { layout, places, existing, removed: 0 };
    tidy.below(layout.root(), "")?;
    for (oid, place) in layout.tablespaces() {
        tidy.below(place, &format!("pg_tblspc/{oid}"))?;
    }
    if existing == Existing::Cluster {
        tidy.dropped_tablespaces()?;
    }
    Ok(tidy.removed)
}

struct Tidy<'a> {
    layout: &'a Layout,
    places: &'a HashSet<PathBuf>,
    existing: Existing,
    removed: u64,
}

impl Tidy<'_> {
    /// `path` is the directory's in the snapshot's terms.
    fn below(&mut self, directory: &Path, path: &str) -> Result<()> {
        let doing = || format!("tidy {}", directory.display());
        for entry in std::fs::read_dir(directory).context(doing())? {
            let entry = entry.context(doing())?;
            let (place, kind) = (entry.path(), entry.file_type().context(doing())?);
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let below = if path.is_empty() { name.to_string() } else { format!("{path}/{name}") };
            match () {
                // Tablespaces are visited by themselves.
                () if below == OURS || below == TABLESPACES => {}
                () if path == "pg_tblspc" && kind.is_symlink() => {
                    self.link(&place, &name)?;
                }
                () if kind.is_dir() || below == "pg_wal" => self.folder(&place, &below)?,
                () if self.places.contains(&place) => {}
                () if self.existing == Existing::Cluster && !is_postgres(&below) => {}
                () => self.remove(&place)?,
            }
        }
        Ok(())
    }

    fn folder(&mut self, place: &Path, path: &str) -> Result<()> {
        // Beside this version's folder, a tablespace's root may have other versions' and other people's.
        let in_root = path.starts_with("pg_tblspc/") && path.split('/').count() == 3;
        if self.existing == Existing::Cluster && in_root && !self.places.contains(place) {
            return Ok(());
        }
        self.below(place, path)?;
        if self.existing == Existing::Cluster
            && is_postgres_folder(path)
            && !self.places.contains(place)
        {
            // What is not PostgreSQL's keeps its folder.
            match std::fs::remove_dir(place) {
                Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
                result => result.context(format!("remove {}", place.display()))?,
            }
        }
        Ok(())
    }

    /// The link of a tablespace that the snapshot does not have leads replay astray. What it leads to is left.
    fn link(&mut self, place: &Path, name: &str) -> Result<()> {
        let is_known = self.layout.tablespaces().keys().any(|oid| oid.to_string() == name);
        match self.existing == Existing::Cluster && !is_known {
            true => self.remove(place),
            false => Ok(()),
        }
    }

    /// Tablespaces that an earlier restore put below the directory, and that the snapshot does not have.
    fn dropped_tablespaces(&mut self) -> Result<()> {
        let Ok(entries) = std::fs::read_dir(self.layout.root().join(TABLESPACES)) else {
            return Ok(());
        };
        for place in entries.flatten().map(|entry| entry.path()) {
            if self.layout.tablespaces().values().any(|known| *known == place) {
                continue;
            }
            for version in std::fs::read_dir(&place).into_iter().flatten().flatten() {
                if version.file_name().to_string_lossy().starts_with("PG_") {
                    let path = format!("pg_tblspc/0/{}", version.file_name().to_string_lossy());
                    self.below(&version.path(), &path)?;
                    // Neither goes while something else is in it.
                    let _ = std::fs::remove_dir(version.path());
                }
            }
            let _ = std::fs::remove_dir(place);
        }
        Ok(())
    }

    fn remove(&mut self, place: &Path) -> Result<()> {
        std::fs::remove_file(place).context(format!("remove {}", place.display()))?;
        self.removed += 1;
        Ok(())
    }
}
