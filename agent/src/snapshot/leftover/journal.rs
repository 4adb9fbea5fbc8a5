//! Writes the journal, and reads it when the next snapshot begins.

use super::record::{self, Record};
use super::{Begun, Leftover, Listed, PackNote, REMEMBERED_FOR, USED_FOR};
use backstay_common::id::SystemId;
use backstay_common::{Context, Result};
use jiff::Timestamp;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Where the journal of `system` is.
pub fn path_of(state_dir: &Path, system: SystemId) -> PathBuf {
    state_dir.join(format!("{system}.packs"))
}

/// The journal of a snapshot that is being taken.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    /// None when it could not be written.
    file: Mutex<Option<File>>,
}

impl Journal {
    /// True if an interrupted snapshot left a journal.
    pub fn is_left(state_dir: &Path, system: SystemId) -> bool {
        path_of(state_dir, system).exists()
    }

    /// Takes up what is left, and begins a journal for `begun`, which keeps what can still be used. `listed` are the packs
    /// that the locations have. Blocks.
    pub fn take_up(
        state_dir: &Path,
        begun: &Begun,
        listed: &Listed,
        now: Timestamp,
    ) -> (Journal, Leftover) {
        let path = path_of(state_dir, begun.system);
        let (file, leftover) = match begin(&path, begun, listed, now) {
            Ok((file, leftover)) => (Some(file), leftover),
            Err(error) => {
                tell(&path, &error);
                (None, Leftover::default())
            }
        };
        (Journal { path, file: Mutex::new(file) }, leftover)
    }

    /// None is kept.
    #[cfg(test)]
    pub fn none() -> Journal {
        Journal { path: PathBuf::from("/nowhere"), file: Mutex::new(None) }
    }

    /// Notes a pack, with the hashes of its pages. It may not be stored yet: that is for the locations to say.
    pub fn note(&self, pack: PackNote, hashes: &[u8]) {
        let mut file = self.file.lock().expect("no panic while held");
        let Some(open) = file.as_mut() else { return };
        let record = Record { begun: None, pack: Some(pack) };
        if let Err(error) = open.write_all(&record.encode(hashes)) {
            *file = None;
            tell(&self.path, &error);
        }
    }

    /// The snapshot is committed: its manifest says all.
    pub fn remove(&self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {error}", self.path.display());
            }
            _ => {}
        }
    }
}

fn tell(path: &Path, error: &dyn std::fmt::Display) {
    tracing::warn!(
        "cannot keep {}: {error}; if this snapshot is interrupted, the next one stores all again",
        path.display()
    );
}

/// Writes the journal anew with what is kept of the old one. A crash leaves the old one.
fn begin(path: &Path, begun: &Begun, listed: &Listed, now: Timestamp) -> Result<(File, Leftover)> {
    let new = path.with_extension("packs.new");
    let doing = || format!("write {}", new.display());
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&new).context(doing())?;
    let leftover = match File::open(path) {
        Ok(old) => keep(old, &mut file, begun, listed, now).context(doing())?,
        Err(error) if error.kind() == ErrorKind::NotFound => Leftover::default(),
        Err(error) => return Err(error).context(format!("read {}", path.display())),
    };
    let record = Record { begun: Some(begun.clone()), pack: None };
    file.write_all(&record.encode(&[])).context(doing())?;
    file.sync_all().context(doing())?;
    fs::rename(&new, path).context(doing())?;
    Ok((file, leftover))
}

/// Copies what can still be used, and makes it known.
fn keep(
    old: File,
    new: &mut File,
    begun: &Begun,
    listed: &Listed,
    now: Timestamp,
) -> io::Result<Leftover> {
    let mut leftover = Leftover { page_bytes: begun.page_bytes, ..Leftover::default() };
    let (mut old, mut at, mut is_used) = (BufReader::new(old), 0, false);
    while let Ok(read) = record::read(&mut old) {
        let keeps = match &read.record {
            Record { begun: Some(then), .. } => {
                let age = now.duration_since(then.snapshot.began());
                let is_within = |limit| age.is_negative() || age.unsigned_abs() <= limit;
                is_used = then.key == begun.key
                    && then.page_bytes == begun.page_bytes
                    && is_within(USED_FOR);
                let is_ours = then.system == begun.system && is_within(REMEMBERED_FOR);
                if is_ours {
                    leftover.abandoned.push(then.snapshot);
                }
                is_ours
            }
            Record { pack: Some(pack), .. } => {
                is_used && listed.contains(&(pack.entry.id(), pack.entry.size))
            }
            _ => false,
        };
        if !keeps {
            continue;
        }
        new.write_all(&read.bytes)?;
        let hashes_at = at + read.hashes_at as u64;
        at += read.bytes.len() as u64;
        if let Some(pack) = read.record.pack {
            leftover.add(pack, hashes_at);
        }
    }
    leftover.runs.sort_unstable_by_key(|run| (run.path, run.first_page));
    if !leftover.runs.is_empty() {
        leftover.file = Some(new.try_clone()?);
    }
    Ok(leftover)
}
