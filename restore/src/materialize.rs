//! A snapshot's files, written to their places.
//!
//! ```text
//! root ─► table parts ─► batches of files ─► file maps ─► chunks of frames ─► pages at their places
//! ```
//!
//! What always holds: each byte written has passed its authentication tag; memory is bounded by the batch and the requests
//! under way, not by the database; `global/pg_control` is written last, after all else is on disk, so that a
//! directory without it was not finished. What an interrupted attempt left is kept where a file's content equals its
//! sealed digest, and removed where not.

mod batch;
mod kept;
mod target;
#[cfg(test)]
pub(crate) mod tests;

use crate::directory::{OURS, make_directory, sync_directory, write_durably};
use crate::fetch::{IN_FLIGHT, Packs, part};
use crate::layout::{Layout, TABLESPACES};
use crate::owner::Owner;
use crate::progress::Progress;
use backstay_common::cbor;
use backstay_common::snapshot::{FileEntry, Manifest, TablePart};
use backstay_common::{Context, Result};
use batch::{Batch, Write};
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// PostgreSQL finds a cluster by it: written last.
const CONTROL_FILE: &str = "global/pg_control";
/// What a snapshot may hold and a restore makes itself, or must not have.
const NOT_RESTORED: [&str; 5] =
    ["backup_label", "tablespace_map", "postmaster.pid", "recovery.signal", "standby.signal"];
/// What PostgreSQL wants to be there, if only empty.
const DIRECTORIES: [&str; 12] = [
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_wal",
    "pg_wal/archive_status",
];

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Materialized {
    pub files: u64,
    /// Bytes of files that were written.
    pub written_bytes: u64,
    /// Bytes of files that an earlier attempt had left right.
    pub kept_bytes: u64,
}

/// One snapshot on its way into one directory.
#[derive(Debug)]
pub struct Materialize<'a> {
    pub packs: &'a Packs,
    pub manifest: &'a Manifest,
    pub layout: &'a Layout,
    pub owner: Owner,
    /// An earlier attempt left files in the directory.
    pub resumes: bool,
    pub progress: Arc<Progress>,
}

impl Materialize<'_> {
    /// Writes all files, and has them on disk before it returns. May be dropped; what it wrote is then taken up again.
    pub async fn run(&self) -> Result<Materialized> {
        self.prepare()?;
        let state = Arc::new(Mutex::new(State::default()));
        let work = self.writer();
        let batches = stream::iter(&self.manifest.root.table)
            .then(|part| self.packs.read_all_of(part))
            .map(|bytes| cbor::decode::<TablePart>(&bytes?))
            .map_ok(|part| batch::cut(part.files))
            .map_ok(|batches| stream::iter(batches.into_iter().map(Ok)))
            .try_flatten();
        let chunks = batches
            .and_then(|files| self.plan(files, &state))
            .map_ok(|batch| stream::iter(batch.chunks.into_iter().map(Ok)))
            .try_flatten();
        chunks
            .try_for_each_concurrent(IN_FLIGHT, |chunk| self.packs.process(chunk, work.clone()))
            .await?;
        let state = std::mem::take(&mut *state.lock().expect("no panic while held"));
        self.finish(state).await
    }

    fn prepare(&self) -> Result<()> {
        let root = self.layout.root();
        if !self.layout.tablespaces().is_empty() {
            make_directory(&root.join(TABLESPACES), self.owner)?;
        }
        for place in self.layout.tablespaces().values() {
            make_directory(place, self.owner)?;
        }
        DIRECTORIES.iter().try_for_each(|name| make_directory(&root.join(name), self.owner))?;
        self.layout.link_tablespaces()?;
        for oid in self.layout.tablespaces().keys() {
            self.owner.take(&root.join("pg_tblspc").join(oid.to_string()))?;
        }
        Ok(())
    }

    /// Makes the directories and empty files of a batch, and finds the frames of the others.
    async fn plan(&self, files: Vec<FileEntry>, state: &Arc<Mutex<State>>) -> Result<Batch> {
        let mut files = files;
        files.retain(|file| !NOT_RESTORED.contains(&file.path.as_str()));
        let files = self.set_control_file_aside(files, state);
        let (kept, wanted) = match self.resumes {
            true => kept::sort_out(files, self.layout, self.owner, &self.manifest.root).await?,
            false => (Vec::new(), files),
        };
        {
            let mut state = state.lock().expect("no panic while held");
            let bytes = |files: &[FileEntry]| files.iter().map(|file| file.size).sum::<u64>();
            state.done.files += (kept.len() + wanted.len()) as u64;
            state.done.kept_bytes += bytes(&kept);
            state.done.written_bytes += bytes(&wanted);
            self.progress.advance(bytes(&kept));
            if self.resumes {
                let all = kept.iter().chain(&wanted);
                let places = all.map(|file| self.layout.resolve(&file.path));
                state.places.extend(places.collect::<Result<Vec<PathBuf>>>()?);
            }
        }
        Batch::plan(wanted, self.layout, self.owner, self.packs, self.manifest.root.page_bytes)
            .await
    }

    fn set_control_file_aside(
        &self,
        files: Vec<FileEntry>,
        state: &Mutex<State>,
    ) -> Vec<FileEntry> {
        let (control, others) = files.into_iter().partition(|file| file.path == CONTROL_FILE);
        state.lock().expect("no panic while held").control.extend::<Vec<FileEntry>>(control);
        others
    }

    /// What each opened frame goes through.
    fn writer(&self) -> Arc<impl Fn(&Vec<Write>, &[u8]) -> Result<()> + Send + Sync + 'static> {
        let progress = self.progress.clone();
        Arc::new(move |writes: &Vec<Write>, plain: &[u8]| {
            for write in writes {
                write.target.write(part(plain, write.at, write.bytes)?, write.offset)?;
                progress.advance(write.bytes);
            }
            Ok(())
        })
    }

    async fn finish(&self, state: State) -> Result<Materialized> {
        if self.resumes {
            kept::remove_strangers(self.layout, &state.places)?;
        }
        let root = self.layout.root();
        let label = self.manifest.root.backup_label.as_bytes();
        write_durably(&root.join("backup_label"), label, self.owner)?;
        self.sync()?;
        let page_bytes = self.manifest.root.page_bytes;
        let control_path = root.join(CONTROL_FILE);
        if control_path.exists() {
            std::fs::remove_file(&control_path).context("remove the old global/pg_control")?;
        }
        let files = state.done.files + state.control.len() as u64;
        let batch =
            Batch::plan(state.control, self.layout, self.owner, self.packs, page_bytes).await?;
        let work = self.writer();
        for chunk in batch.chunks {
            self.packs.process(chunk, work.clone()).await?;
        }
        let control = File::open(&control_path).context("open the restored global/pg_control")?;
        control.sync_all().context("sync global/pg_control")?;
        sync_directory(&root.join("global"))?;
        Ok(Materialized { files, ..state.done })
    }

    /// Everything that was written is on disk, on every file system that was written to.
    fn sync(&self) -> Result<()> {
        sync_file_systems(self.layout)
    }
}

/// Syncs each file system that the layout touches.
pub fn sync_file_systems(layout: &Layout) -> Result<()> {
    let places = std::iter::once(layout.root()).chain(layout.outside().map(PathBuf::as_path));
    for place in places {
        let doing = || format!("sync the file system of {}", place.display());
        let directory = File::open(place).context(doing())?;
        rustix::fs::syncfs(&directory).map_err(std::io::Error::from).context(doing())?;
    }
    Ok(())
}

/// What has been met on the way.
#[derive(Debug, Default)]
struct State {
    done: Materialized,
    control: Vec<FileEntry>,
    /// All files of the snapshot, when an earlier attempt's must be told from them.
    places: HashSet<PathBuf>,
}

/// True for our own folder, which is no part of the cluster.
fn is_ours(layout: &Layout, path: &Path) -> bool {
    path == layout.root().join(OURS)
}
