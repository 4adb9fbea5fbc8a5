//! Some files of the table, and the frames that they need.

use super::target::Target;
use crate::fetch::{Chunk, Packs, group};
use crate::layout::Layout;
use crate::owner::Owner;
use backstay_common::snapshot::{BytesRef, Content, FileEntry, FileKind, FileMap, FrameRef};
use backstay_common::{Context, Error, Kind, Result};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A batch is cut when its files have this many bytes, so that their maps stay small.
const BATCH_BYTES: u64 = 16 << 30;
const BATCH_FILES: usize = 10_000;

/// `bytes` bytes from `at` on in a frame go to `offset` in a file.
#[derive(Debug)]
pub struct Write {
    pub target: Arc<Target>,
    pub offset: u64,
    pub at: u32,
    pub bytes: u64,
}

/// The frames of some files, in the order in which they are read.
#[derive(Debug)]
pub struct Batch {
    pub chunks: Vec<Chunk<Vec<Write>>>,
}

/// Cuts the files of a table part into batches of bounded size.
pub fn cut(files: Vec<FileEntry>) -> Vec<Vec<FileEntry>> {
    let mut batches = vec![Vec::new()];
    let mut bytes = 0;
    for file in files {
        let batch = batches.last_mut().expect("never empty");
        if batch.len() >= BATCH_FILES || (bytes + file.size > BATCH_BYTES && !batch.is_empty()) {
            bytes = 0;
            batches.push(Vec::new());
        }
        bytes += file.size;
        batches.last_mut().expect("never empty").push(file);
    }
    batches
}

impl Batch {
    /// Makes directories and empty files, reads the maps of the others.
    pub async fn plan(
        files: Vec<FileEntry>,
        layout: &Layout,
        owner: Owner,
        packs: &Packs,
        page_bytes: u32,
    ) -> Result<Batch> {
        let mut made = Made { directories: HashSet::new(), owner };
        let mut wanted = Vec::new();
        let mut mapped: Vec<(&BytesRef, Arc<Target>, u64)> = Vec::new();
        for file in &files {
            let path = layout.resolve(&file.path)?;
            if file.kind == FileKind::Directory {
                made.directory(&path, Some(file.mode & 0o777))?;
                continue;
            }
            let target = Arc::new(Target::new(path, file.mode, file.size, owner));
            made.directory(target.path.parent().unwrap_or(layout.root()), None)?;
            match &file.content {
                Content::Empty if file.size == 0 => target.make()?,
                Content::Empty => return Err(without_content(file)),
                Content::Within { frame, at } => {
                    wanted.push((*frame, Write { target, offset: 0, at: *at, bytes: file.size }));
                }
                Content::Mapped(map) => mapped.push((map, target, file.size)),
            }
        }
        let maps: Vec<&BytesRef> = mapped.iter().map(|(map, ..)| *map).collect();
        let maps = packs.read_all(&maps).await?;
        for ((_, target, size), bytes) in mapped.into_iter().zip(maps) {
            let map = FileMap::decode(&bytes, size, page_bytes)
                .context(format!("map of {}", target.path.display()))?;
            wanted.extend(writes_of(&map, &target, size, page_bytes));
        }
        Ok(Batch { chunks: group(wanted) })
    }
}

/// The map was checked when it was decoded: its runs hold each page once.
fn writes_of(
    map: &FileMap,
    target: &Arc<Target>,
    size: u64,
    page_bytes: u32,
) -> Vec<(FrameRef, Write)> {
    let page_bytes = u64::from(page_bytes);
    let write = |run: &backstay_common::snapshot::Run| {
        let offset = u64::from(run.first_page) * page_bytes;
        let bytes = (u64::from(run.pages) * page_bytes).min(size - offset);
        (
            map.frames[run.frame as usize],
            Write { target: target.clone(), offset, at: run.at, bytes },
        )
    };
    map.runs.iter().map(write).collect()
}

fn without_content(file: &FileEntry) -> Error {
    let text = format!("the snapshot has no content for {:?} of {} bytes", file.path, file.size);
    Error::new(Kind::Corrupt, text)
}

/// Directories that are known to be there.
struct Made {
    directories: HashSet<PathBuf>,
    owner: Owner,
}

impl Made {
    /// Makes a directory and those above it. Only a directory's own entry says its mode; until then it is 0700.
    fn directory(&mut self, path: &Path, mode: Option<u32>) -> Result<()> {
        use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
        let doing = || format!("make directory {}", path.display());
        if !self.directories.contains(path) {
            match std::fs::symlink_metadata(path) {
                Ok(found) if found.is_dir() => {}
                Ok(_) => {
                    return Err(Error::new(Kind::Local, "something else is there").context(doing()));
                }
                Err(_) => {
                    if let Some(parent) = path.parent() {
                        self.directory(parent, None)?;
                    }
                    std::fs::DirBuilder::new().mode(0o700).create(path).context(doing())?;
                    self.owner.take(path)?;
                }
            }
            self.directories.insert(path.to_path_buf());
        }
        match mode {
            Some(mode) => std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
                .context(doing()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64) -> FileEntry {
        let path = "base/1/1".to_string();
        let kind = FileKind::File;
        FileEntry { path, kind, mode: 0o600, size, digest: None, content: Content::Empty }
    }

    #[test]
    fn batches_are_bounded_and_lose_nothing() {
        let sizes =
            |batches: Vec<Vec<FileEntry>>| -> Vec<usize> { batches.iter().map(Vec::len).collect() };
        assert_eq!(sizes(cut((0..20).map(|_| file(1 << 30)).collect())), [16, 4]);
        assert_eq!(sizes(cut(vec![file(BATCH_BYTES * 2), file(1)])), [1, 1]);
        let many = cut((0..BATCH_FILES + 1).map(|_| file(1)).collect());
        assert_eq!(sizes(many), [BATCH_FILES, 1]);
    }
}
