//! A snapshot's files, written to their places.
//!
//! ```text
//! root ─► table parts ─► batches of files ─► file maps ─► chunks of frames ─► parts of files ─► their places
//! ```
//!
//! What always holds: each byte written has passed its authentication tag; memory is bounded by the batch, the requests
//! under way, and 256 MiB of parts that wait for their pages (`gather`), not by the database; `global/pg_control` is written last, after all else is on disk, so that a
//! directory without it was not finished. Where files are already, left by an interrupted attempt or by the cluster that is
//! restored over, `pg_control` goes first of all; then each page that equals its sealed hash is kept, the others are
//! written, and files that the snapshot does not have are removed. A crash at any point leaves what the next attempt
//! judges in the same way.

mod batch;
mod gather;
mod kept;
mod owned;
mod target;
#[cfg(test)]
pub(crate) mod tests;

use crate::directory::{make_directory, sync_directory, write_durably};
use crate::fetch::{IN_FLIGHT, Packs, part};
use crate::layout::{Layout, TABLESPACES};
use crate::owner::Owner;
use crate::progress::Progress;
use backstay_common::cbor;
use backstay_common::snapshot::{FileEntry, Manifest, TablePart};
use backstay_common::{Context, Result};
use batch::{Batch, Write};
use futures::{StreamExt, TryStreamExt, stream};
use gather::Room;
use kept::Local;
use std::collections::HashSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use target::Pen;

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

/// What is in the directory already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    Nothing,
    /// What an interrupted restore left: all of it is ours to change and remove.
    Unfinished,
    /// A cluster: only PostgreSQL's own files may be changed and removed.
    Cluster,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Materialized {
    pub files: u64,
    /// Bytes of files that were written.
    pub written_bytes: u64,
    /// Bytes that were there already and equal what is sealed.
    pub kept_bytes: u64,
    /// Files that the snapshot does not have.
    pub removed_files: u64,
}

/// One snapshot on its way into one directory.
#[derive(Debug)]
pub struct Materialize<'a> {
    pub packs: &'a Packs,
    pub manifest: &'a Manifest,
    pub layout: &'a Layout,
    pub owner: Owner,
    pub existing: Existing,
    pub progress: Arc<Progress>,
}

impl Materialize<'_> {
    /// Writes all files, and has them on disk before it returns. May be dropped; what it wrote is then taken up again.
    pub async fn run(&self) -> Result<Materialized> {
        self.prepare()?;
        let state = Arc::new(Mutex::new(State::default()));
        let (work, room) = (self.writer(), Arc::default());
        let batches = stream::iter(&self.manifest.root.table)
            .then(|part| self.packs.read_all_of(part))
            .map(|bytes| cbor::decode::<TablePart>(&bytes?))
            .map_ok(|part| batch::cut(part.files))
            .map_ok(|batches| stream::iter(batches.into_iter().map(Ok)))
            .try_flatten();
        let chunks = batches
            .and_then(|files| self.plan(files, &state, &room))
            .map_ok(|batch| stream::iter(batch.chunks.into_iter().map(Ok)))
            .try_flatten();
        chunks
            .try_for_each_concurrent(IN_FLIGHT, |chunk| self.packs.process(chunk, work.clone()))
            .await?;
        room.check_empty()?;
        let state = std::mem::take(&mut *state.lock().expect("no panic while held"));
        self.finish(state).await
    }

    fn prepare(&self) -> Result<()> {
        let root = self.layout.root();
        self.remove_control_file()?;
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

    /// From here on PostgreSQL does not start in the directory, whatever becomes of this attempt.
    fn remove_control_file(&self) -> Result<()> {
        let path = self.layout.root().join(CONTROL_FILE);
        match std::fs::remove_file(&path) {
            Ok(()) => sync_directory(&self.layout.root().join("global")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).context("remove the old global/pg_control"),
        }
    }

    /// Makes the directories and empty files of a batch, and finds the frames of the others.
    async fn plan(
        &self,
        files: Vec<FileEntry>,
        state: &Arc<Mutex<State>>,
        room: &Arc<Room>,
    ) -> Result<Batch> {
        let mut files = files;
        files.retain(|file| !NOT_RESTORED.contains(&file.path.as_str()));
        let files = self.set_control_file_aside(files, state);
        if self.existing != Existing::Nothing {
            let places = files.iter().map(|file| self.layout.resolve(&file.path));
            let places = places.collect::<Result<Vec<PathBuf>>>()?;
            state.lock().expect("no panic while held").note_places(places);
        }
        let root = &self.manifest.root;
        let files = kept::judge(files, self.existing, self.layout, self.owner, root).await?;
        let count = files.len() as u64;
        let is_ours = |(_, local): &&(FileEntry, Local)| *local != Local::Foreign;
        let bytes: u64 = files.iter().filter(is_ours).map(|(file, _)| file.size).sum();
        let batch =
            Batch::plan(files, self.layout, self.owner, self.packs, room, root.page_bytes).await?;
        let kept_bytes = bytes.saturating_sub(batch.bytes());
        self.progress.advance(kept_bytes);
        let done = &mut state.lock().expect("no panic while held").done;
        done.files += count;
        done.kept_bytes += kept_bytes;
        done.written_bytes += batch.bytes();
        Ok(batch)
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
            let mut pen: Option<Pen<'_>> = None;
            for write in writes {
                let bytes = part(plain, write.at, write.bytes)?;
                progress.advance(write.bytes);
                if let Some((_, part)) = &write.part
                    && part.take(bytes, write.offset)?
                {
                    continue;
                }
                let target = &*write.target;
                let mut held = match pen.take() {
                    Some(pen) if std::ptr::eq(pen.target, target) => pen,
                    _ => target.pen(),
                };
                held.write(bytes, write.offset)?;
                pen = Some(held);
            }
            Ok(())
        })
    }

    async fn finish(&self, state: State) -> Result<Materialized> {
        let mut done = state.done;
        if self.existing != Existing::Nothing {
            done.removed_files = kept::remove_strangers(self.layout, &state.places, self.existing)?;
        }
        let root = self.layout.root();
        let label = self.manifest.root.backup_label.as_bytes();
        write_durably(&root.join("backup_label"), label, self.owner)?;
        self.sync()?;
        let page_bytes = self.manifest.root.page_bytes;
        let control_path = root.join(CONTROL_FILE);
        done.files += state.control.len() as u64;
        let control = state.control.into_iter().map(|file| (file, Local::Absent)).collect();
        let room = Arc::default();
        let batch =
            Batch::plan(control, self.layout, self.owner, self.packs, &room, page_bytes).await?;
        let work = self.writer();
        for chunk in batch.chunks {
            self.packs.process(chunk, work.clone()).await?;
        }
        room.check_empty()?;
        let control = File::open(&control_path).context("open the restored global/pg_control")?;
        control.sync_all().context("sync global/pg_control")?;
        sync_directory(&root.join("global"))?;
        Ok(done)
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
    /// All files of the snapshot and the folders above them, where others must be told from them.
    places: HashSet<PathBuf>,
}

impl State {
    fn note_places(&mut self, places: Vec<PathBuf>) {
        for place in places {
            for above in place.ancestors().skip(1) {
                if !self.places.insert(above.to_path_buf()) {
                    break;
                }
            }
            self.places.insert(place);
        }
    }
}
