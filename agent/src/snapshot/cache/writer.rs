//! Writes the page-hash cache of the snapshot that is being taken, from several threads.
//!
//! The snapshot does not depend on it: when the disk refuses, that is told once, and there is no cache.

use super::MAGIC;
use super::record::{FileRecord, MapPlace, Summary};
use super::wear::{Line, frame_key, path_hash};
use backstay_common::snapshot::Content;
use backstay_common::{Context, Result, cbor};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// A cache that is being written.
#[derive(Debug)]
pub struct CacheWriter {
    path: PathBuf,
    /// None when it could not be written.
    inner: Mutex<Option<Inner>>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    buffer: Vec<u8>,
    hasher: blake3::Hasher,
    at: u64,
    index: Vec<Line>,
}

impl CacheWriter {
    /// Begins the file `path` anew.
    pub fn create(path: PathBuf) -> CacheWriter {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
        let inner = file.map(|file| {
            let (buffer, hasher) = (Vec::with_capacity(2 * BUFFER_BYTES), blake3::Hasher::new());
            let mut inner = Inner { file, buffer, hasher, at: 0, index: Vec::new() };
            inner.buffer.extend_from_slice(MAGIC);
            inner.at = MAGIC.len() as u64;
            inner
        });
        let writer = CacheWriter { path, inner: Mutex::new(None) };
        writer.keep(inner);
        writer
    }

    /// Writes page hashes; where they are.
    pub fn chunk(&self, hashes: &[u8]) -> u64 {
        self.with(|inner| inner.append(&[hashes])).unwrap_or(0)
    }

    /// Writes an encoded map; where it is.
    pub fn map(&self, map: &[u8]) -> MapPlace {
        let at = self.with(|inner| inner.append(&[map])).unwrap_or(0);
        MapPlace { at, bytes: map.len() as u64 }
    }

    /// Writes what is known of a file. `mapped_read_bytes`: of the frames of its map, if it has one.
    pub fn record(&self, record: &FileRecord, mapped_read_bytes: u64) {
        let read_bytes = match &record.content {
            Content::Within { frame, .. } => u64::from(frame.span.plain_bytes),
            Content::Mapped(_) => mapped_read_bytes,
            Content::Empty => 0,
        };
        let bytes = cbor::encode(record);
        self.with(|inner| {
            let at = inner.append(&[&(bytes.len() as u32).to_le_bytes(), &bytes])?;
            let (path, frame) = (path_hash(&record.path), frame_key(&record.content));
            inner.index.push(Line { path, at, size: record.size, read_bytes, frame });
            Ok(())
        });
    }

    /// Ends the file, and has it on disk. False if there is none.
    pub fn finish(&self, summary: &Summary) -> bool {
        self.with(|inner| inner.finish(summary)).is_some()
    }

    /// Gives a finished file its name, durably.
    pub fn publish(&self, path: &Path) -> Result<()> {
        let doing = || format!("rename {}", self.path.display());
        fs::rename(&self.path, path).context(doing())?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        File::open(folder).and_then(|folder| folder.sync_all()).context(doing())
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> io::Result<T>) -> Option<T> {
        let mut inner = self.inner.lock().expect("no panic while held");
        let done = work(inner.as_mut()?);
        done.map_err(|error| {
            *inner = None;
            self.tell(&error);
        })
        .ok()
    }

    fn keep(&self, made: io::Result<Inner>) {
        match made {
            Ok(made) => *self.inner.lock().expect("no panic while held") = Some(made),
            Err(error) => self.tell(&error),
        }
    }

    fn tell(&self, error: &io::Error) {
        let path = self.path.display();
        tracing::warn!(
            "cannot write the page-hash cache {path}: {error}; the next snapshot fetches the hashes instead"
        );
    }
}

impl Inner {
    fn append(&mut self, parts: &[&[u8]]) -> io::Result<u64> {
        let at = self.at;
        for part in parts {
            self.buffer.extend_from_slice(part);
            self.at += part.len() as u64;
        }
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(at)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hasher.update(&self.buffer);
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    fn finish(&mut self, summary: &Summary) -> io::Result<()> {
        let (index_at, lines) = (self.at, std::mem::take(&mut self.index));
        for line in &lines {
            self.append(&[&line.encode()])?;
        }
        let footer = cbor::encode(summary);
        self.append(&[&footer])?;
        for length in [index_at, lines.len() as u64, footer.len() as u64] {
            self.append(&[&length.to_le_bytes()])?;
        }
        self.flush()?;
        self.file.write_all(self.hasher.finalize().as_bytes())?;
        self.file.sync_all()
    }
}
