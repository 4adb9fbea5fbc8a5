//! What an interrupted attempt left: kept where it is right, removed where not.

use super::is_ours;
use crate::layout::{Layout, TABLESPACES};
use crate::owner::Owner;
use backstay_common::pool;
use backstay_common::snapshot::{FileDigest, FileEntry, FileKind, PageHash, Root, page_hash};
use backstay_common::{Context, Result};
use rayon::prelude::*;
use std::collections::HashSet;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Pages that are read and hashed at once.
const PAGES: usize = 64;

/// The files that are there and equal their sealed digests, and those that must be written. What is there and
/// differs is removed.
pub async fn sort_out(
    files: Vec<FileEntry>,
    layout: &Layout,
    owner: Owner,
    root: &Root,
) -> Result<(Vec<FileEntry>, Vec<FileEntry>)> {
    let (layout, key, page_bytes) = (layout.clone(), root.hash_key, root.page_bytes as usize);
    let judged = pool::run(move || {
        let judge = |file: FileEntry| -> Result<(bool, FileEntry)> {
            let path = layout.resolve(&file.path)?;
            if file.kind == FileKind::Directory {
                return Ok((false, file));
            }
            let is_right = is_right(&path, &file, owner, &key, page_bytes)?;
            if !is_right && std::fs::symlink_metadata(&path).is_ok() {
                std::fs::remove_file(&path).context(format!("remove {}", path.display()))?;
            }
            Ok((is_right, file))
        };
        files.into_par_iter().map(judge).collect::<Result<Vec<_>>>()
    });
    let (kept, wanted): (Vec<_>, Vec<_>) = judged.await??.into_iter().partition(|(kept, _)| *kept);
    let files = |judged: Vec<(bool, FileEntry)>| judged.into_iter().map(|(_, file)| file).collect();
    Ok((files(kept), files(wanted)))
}

/// A file that was made but not yet given to its owner is not right either.
fn is_right(
    path: &Path,
    file: &FileEntry,
    owner: Owner,
    key: &[u8; 32],
    page_bytes: usize,
) -> Result<bool> {
    let looks_right = std::fs::symlink_metadata(path).is_ok_and(|found| {
        found.is_file()
            && found.len() == file.size
            && found.mode() & 0o777 == file.mode & 0o777
            && (found.uid(), found.gid()) == (owner.uid, owner.gid)
    });
    match (looks_right, file.digest) {
        (true, Some(digest)) => {
            let found = digest_of(path, key, page_bytes);
            Ok(found.context(format!("read {}", path.display()))? == digest)
        }
        _ => Ok(false),
    }
}

fn digest_of(path: &Path, key: &[u8; 32], page_bytes: usize) -> std::io::Result<[u8; 32]> {
    let mut file = std::fs::File::open(path)?;
    let mut digest = FileDigest::new();
    let mut buffer = Vec::with_capacity(PAGES * page_bytes);
    let mut size = 0;
    loop {
        buffer.clear();
        (&mut file).take((PAGES * page_bytes) as u64).read_to_end(&mut buffer)?;
        if buffer.is_empty() {
            return Ok(digest.finish(size));
        }
        size += buffer.len() as u64;
        let hashes: Vec<PageHash> =
            buffer.chunks(page_bytes).map(|page| page_hash(key, page)).collect();
        digest.push(&hashes);
    }
}

/// Removes every file that the snapshot does not have.
pub fn remove_strangers(layout: &Layout, places: &HashSet<PathBuf>) -> Result<()> {
    let outside: Vec<&PathBuf> = layout.outside().collect();
    remove_below(layout.root(), layout, places)?;
    outside.into_iter().try_for_each(|place| remove_below(place, layout, places))
}

fn remove_below(directory: &Path, layout: &Layout, places: &HashSet<PathBuf>) -> Result<()> {
    let doing = || format!("tidy {}", directory.display());
    for entry in std::fs::read_dir(directory).context(doing())? {
        let entry = entry.context(doing())?;
        let path = entry.path();
        let kind = entry.file_type().context(doing())?;
        match () {
            () if is_ours(layout, &path) => {}
            () if kind.is_dir() => remove_below(&path, layout, places)?,
            () if places.contains(&path) || is_tablespace_link(layout, &path) => {}
            () => std::fs::remove_file(&path).context(format!("remove {}", path.display()))?,
        }
    }
    Ok(())
}

fn is_tablespace_link(layout: &Layout, path: &Path) -> bool {
    debug_assert!(!path.ends_with(TABLESPACES));
    path.parent() == Some(&layout.root().join("pg_tblspc"))
}
