//! The page-hash cache made from the parent itself: its table, its maps, and the hashes in the footers of its packs.
//!
//! Small files share frames without regard to pages, so those frames are read and hashed. Each file's hashes must give its sealed
//! digest. All hashes pass through a file without a name in the state directory, not through memory. The cache that comes of it knows
//! nothing of the file system or of checksums: every file is read, and every page judged.

use super::cache::{self, CacheWriter, FileRecord, Summary};
use super::overlay;
use backstay_common::cbor;
use backstay_common::id::ObjectId;
use backstay_common::snapshot::packs::PackReader;
use backstay_common::snapshot::{
    Content, FileDigest, FileEntry, FileKind, FileMap, FrameRef, FrameUse, Manifest, PackEntry,
    PackMeta, Run, TablePart, page_hash,
};
use backstay_common::{Context, Error, Kind, Result};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Footers that are fetched at once.
const FOOTERS_AT_ONCE: usize = 8;

/// Writes the cache of `manifest` to `path`, durably; what was there is replaced at the end.
pub async fn rebuild(reader: &PackReader, manifest: &Manifest, path: &Path) -> Result<()> {
    let (made, scratch) = (path.with_extension("made"), path.with_extension("hashes"));
    let mut rebuild = Rebuild {
        reader,
        manifest,
        cache: CacheWriter::create(made),
        hashes: Hashes::new(&scratch)?,
        page_bytes: manifest.root.page_bytes,
    };
    rebuild.fetch_hashes().await?;
    let mut table = Vec::new();
    for place in &manifest.root.table {
        let part = reader.bytes(place).await?;
        let hash = *blake3::hash(&part).as_bytes();
        table.push(cache::SharedPart { hash, place: place.clone() });
        for file in cbor::decode::<TablePart>(&part)?.files {
            if file.kind == FileKind::File && file.size > 0 {
                let path = file.path.clone();
                rebuild.file(file).await.context(format_args!("hashes of {path}"))?;
            }
        }
    }
    let summary = Summary {
        snapshot: manifest.plain.snapshot,
        system: manifest.plain.system,
        key: cache::fingerprint(&manifest.root.hash_key),
        page_bytes: rebuild.page_bytes,
        judged: false,
        timeline: 0,
        all_read: 0,
        table,
    };
    match rebuild.cache.finish(&summary) {
        true => rebuild.cache.publish(path),
        false => Err(Error::new(Kind::Local, "the page-hash cache cannot be written")
            .remedy("make room in the state directory")),
    }
}

struct Rebuild<'a> {
    reader: &'a PackReader,
    manifest: &'a Manifest,
    cache: CacheWriter,
    hashes: Hashes,
    page_bytes: u32,
}

impl Rebuild<'_> {
    async fn fetch_hashes(&mut self) -> Result<()> {
        let packs: Vec<ObjectId> = self.manifest.plain.packs.iter().map(PackEntry::id).collect();
        let reader = self.reader;
        let metas = stream::iter(packs)
            .map(|id| async move { Ok::<_, Error>((id, reader.meta(id).await?)) }.boxed())
            .buffer_unordered(FOOTERS_AT_ONCE);
        let hashes = &mut self.hashes;
        metas.try_for_each(|(id, meta)| std::future::ready(hashes.add(id, &meta))).await
    }

    async fn file(&mut self, file: FileEntry) -> Result<()> {
        let (map, encoded) = match &file.content {
            Content::Within { frame, at } => {
                let pages = file.size.div_ceil(u64::from(self.page_bytes)) as u32;
                let runs = vec![Run { first_page: 0, pages, frame: 0, at: *at }];
                (FileMap { frames: vec![*frame], runs }, None)
            }
            Content::Mapped(bytes) => {
                let bytes = self.reader.bytes(bytes).await?;
                (FileMap::decode(&bytes, file.size, self.page_bytes)?, Some(bytes))
            }
            Content::Empty => return Err(Error::new(Kind::Corrupt, "it has no content")),
        };
        let mut parts = Parts::new(&self.cache, self.page_bytes);
        for run in &map.runs {
            let frame = &map.frames[run.frame as usize];
            parts.push(&self.run(run, frame, file.size).await?);
        }
        let (chunks, digest) = parts.finish(file.size);
        if Some(digest) != file.digest {
            return Err(Error::new(Kind::Corrupt, "the hashes of its pages do not fit its digest"));
        }
        let (stat, doubts) = (None, Vec::new());
        let FileEntry { path, size, content, .. } = file;
        let map_place = encoded.map(|bytes| self.cache.map(&bytes));
        let record =
            FileRecord { path, size, digest, content, chunks, map: map_place, stat, doubts };
        self.cache.record(&record, overlay::read_bytes(&map));
        Ok(())
    }

    /// The hashes of the pages of one run of a file of `size` bytes.
    async fn run(&self, run: &Run, frame: &FrameRef, size: u64) -> Result<Vec<u8>> {
        let wrong = || Error::new(Kind::Corrupt, "its map does not fit a frame");
        let (usage, place, pages) = self.hashes.of(frame).ok_or_else(wrong)?;
        if usage != FrameUse::Small {
            let first = run.at / self.page_bytes;
            let fits = run.at.is_multiple_of(self.page_bytes)
                && first.checked_add(run.pages).is_some_and(|end| end <= pages);
            return match fits {
                true => self.hashes.read(place + u64::from(first) * 8, run.pages),
                false => Err(wrong()),
            };
        }
        let plain = self.reader.frame(frame).await?;
        let start = u64::from(run.first_page) * u64::from(self.page_bytes);
        let bytes = (u64::from(run.pages) * u64::from(self.page_bytes)).min(size - start);
        let at = run.at as usize;
        let bytes = plain.get(at..at + bytes as usize).ok_or_else(wrong)?;
        let key = &self.manifest.root.hash_key;
        Ok(bytes.chunks(self.page_bytes as usize).flat_map(|page| page_hash(key, page)).collect())
    }
}

/// A file's hashes, cut into parts.
struct Parts<'a> {
    cache: &'a CacheWriter,
    part_bytes: usize,
    filling: Vec<u8>,
    chunks: Vec<u64>,
    digest: FileDigest,
}

impl<'a> Parts<'a> {
    fn new(cache: &'a CacheWriter, page_bytes: u32) -> Parts<'a> {
        let part_bytes = super::part_pages(page_bytes) as usize * 8;
        let (filling, chunks) = (Vec::with_capacity(part_bytes), Vec::new());
        Parts { cache, part_bytes, filling, chunks, digest: FileDigest::new() }
    }

    fn push(&mut self, mut hashes: &[u8]) {
        self.digest.push(hashes.as_chunks().0);
        while !hashes.is_empty() {
            let room = self.part_bytes - self.filling.len();
            let (now, later) = hashes.split_at(hashes.len().min(room));
            self.filling.extend_from_slice(now);
            if self.filling.len() == self.part_bytes {
                self.flush();
            }
            hashes = later;
        }
    }

    fn flush(&mut self) {
        self.chunks.push(self.cache.chunk(&self.filling));
        self.filling.clear();
    }

    fn finish(mut self, size: u64) -> (Vec<u64>, [u8; 32]) {
        if !self.filling.is_empty() {
            self.flush();
        }
        (self.chunks, self.digest.finish(size))
    }
}

/// All page hashes of the packs, in a file that has no name and goes when it is closed.
struct Hashes {
    file: File,
    bytes: u64,
    packs: HashMap<ObjectId, Vec<(FrameUse, u64, u32)>>,
}

impl Hashes {
    fn new(path: &Path) -> Result<Hashes> {
        let doing = || format!("make {}", path.display());
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.open(path).context(doing())?;
        std::fs::remove_file(path).context(doing())?;
        Ok(Hashes { file, bytes: 0, packs: HashMap::new() })
    }

    fn add(&mut self, pack: ObjectId, meta: &PackMeta) -> Result<()> {
        let mut frames = Vec::with_capacity(meta.frames.len());
        let mut all = Vec::new();
        for frame in &meta.frames {
            let at = self.bytes + all.len() as u64;
            frames.push((frame.usage, at, (frame.hashes.len() / 8) as u32));
            all.extend_from_slice(&frame.hashes);
        }
        self.file.write_all_at(&all, self.bytes).context("keep page hashes")?;
        self.bytes += all.len() as u64;
        self.packs.insert(pack, frames);
        Ok(())
    }

    fn of(&self, frame: &FrameRef) -> Option<(FrameUse, u64, u32)> {
        self.packs.get(&frame.pack)?.get(frame.span.number as usize).copied()
    }

    fn read(&self, at: u64, pages: u32) -> Result<Vec<u8>> {
        let mut hashes = vec![0; pages as usize * 8];
        self.file.read_exact_at(&mut hashes, at).context("read page hashes")?;
        Ok(hashes)
    }
}
