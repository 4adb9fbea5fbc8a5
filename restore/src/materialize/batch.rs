//! Some files of the table, and the frames that they need: all, or those of which a page differs from what is there.

use super::gather::{PART_BYTES, Part, Room};
use super::kept::Local;
use super::target::Target;
use crate::fetch::{CHUNK_PLAIN_BYTES, Chunk, FrameHashes, Packs, group};
use crate::layout::Layout;
use crate::owner::Owner;
use backstay_common::snapshot::{
    BytesRef, Content, FileEntry, FileKind, FileMap, FrameRef, PageHash, Run,
};
use backstay_common::{Context, Error, Kind, Result};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A batch is cut when its files have this many bytes, so that their maps stay small.
const BATCH_BYTES: u64 = 16 << 30;
const BATCH_FILES: usize = 10_000;
/// A request is for frames of no more plain bytes than this where parts are put together: so long do parts wait for each other.
const GATHERED_CHUNK_BYTES: u64 = 16 << 20;

/// `bytes` bytes from `at` on in a frame go to `offset` in a file.
#[derive(Debug)]
pub struct Write {
    pub target: Arc<Target>,
    pub offset: u64,
    pub at: u32,
    pub bytes: u64,
    /// The part of the file that waits for these bytes, and its place in the order of parts.
    pub part: Option<(u64, Arc<Part>)>,
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
        files: Vec<(FileEntry, Local)>,
        layout: &Layout,
        owner: Owner,
        packs: &Packs,
        room: &Arc<Room>,
        page_bytes: u32,
    ) -> Result<Batch> {
        let mut made = Made { directories: HashSet::new(), root: layout.root(), owner };
        let mut wanted = Vec::new();
        let mut mapped: Vec<(&BytesRef, Mapped)> = Vec::new();
        for (file, local) in &files {
            let path = layout.resolve(&file.path)?;
            if file.kind == FileKind::Directory {
                made.directory(&path, Some(file.mode & 0o777))?;
                continue;
            }
            made.directory(path.parent().unwrap_or(layout.root()), None)?;
            let (target, hashes) = match local {
                Local::Right | Local::Foreign => continue,
                Local::Absent => (Target::new(path, file.mode, file.size, owner), [].as_slice()),
                Local::Differs(hashes) => {
                    (Target::existing(path, file.mode, file.size, owner), hashes.as_slice())
                }
            };
            let (target, size) = (Arc::new(target), file.size);
            match &file.content {
                Content::Empty if size == 0 => target.make()?,
                Content::Empty => return Err(without_content(file)),
                Content::Within { frame, at } => {
                    wanted.push((
                        *frame,
                        Write { target, offset: 0, at: *at, bytes: size, part: None },
                    ));
                }
                Content::Mapped(map) => mapped.push((map, Mapped { target, size, hashes })),
            }
        }
        let maps: Vec<&BytesRef> = mapped.iter().map(|(map, _)| *map).collect();
        let maps = packs.read_all(&maps).await?;
        let mapped: Vec<(Mapped<'_>, FileMap)> = (mapped.into_iter().zip(maps))
            .map(|((_, file), bytes)| {
                let map = file.decode(&bytes, page_bytes)?;
                Ok((file, map))
            })
            .collect::<Result<_>>()?;
        let known = mapped.iter().filter(|(file, _)| !file.hashes.is_empty());
        let sealed = packs.hashes(known.flat_map(|(_, map)| map.frames.iter().copied())).await?;
        let mut parts = 0;
        for (file, map) in &mapped {
            // Its size and attributes may be all that is wrong.
            file.target.make()?;
            let runs = map.runs.iter();
            let writes = runs.flat_map(|run| file.writes(map, run, &sealed, page_bytes)).collect();
            wanted.extend(gathered(writes, file.size, room, &mut parts));
        }
        let plain_max = if parts > 0 { GATHERED_CHUNK_BYTES } else { CHUNK_PLAIN_BYTES };
        let mut chunks = group(wanted, plain_max);
        chunks.sort_by_key(first_part);
        Ok(Batch { chunks })
    }

    /// Bytes that will be written.
    pub fn bytes(&self) -> u64 {
        let frames = self.chunks.iter().flat_map(|chunk| &chunk.frames);
        frames.flat_map(|(_, writes)| writes).map(|write| write.bytes).sum()
    }
}

/// A file of many frames.
#[derive(Debug)]
struct Mapped<'a> {
    target: Arc<Target>,
    size: u64,
    /// Of the pages that are there.
    hashes: &'a [PageHash],
}

impl Mapped<'_> {
    fn decode(&self, bytes: &[u8], page_bytes: u32) -> Result<FileMap> {
        FileMap::decode(bytes, self.size, page_bytes)
            .context(format!("map of {}", self.target.path.display()))
    }

    /// What must be written of one run: the pages that are not there as they are sealed, neighbours together. The map was
    /// checked when it was decoded: its runs hold each page once.
    fn writes(
        &self,
        map: &FileMap,
        run: &Run,
        sealed: &FrameHashes,
        page_bytes: u32,
    ) -> Vec<(FrameRef, Write)> {
        let frame = map.frames[run.frame as usize];
        let sealed = sealed.get(&(frame.pack, frame.span.number)).map_or(&[][..], Vec::as_slice);
        let first = run.at.is_multiple_of(page_bytes).then_some((run.at / page_bytes) as usize);
        let is_kept = |page: u32| {
            let there = self.hashes.get((run.first_page + page) as usize);
            there.is_some() && there == first.and_then(|first| sealed.get(first + page as usize))
        };
        let mut writes: Vec<(u32, u32)> = Vec::new();
        for page in (0..run.pages).filter(|page| !is_kept(*page)) {
            match writes.last_mut() {
                Some((from, pages)) if *from + *pages == page => *pages += 1,
                _ => writes.push((page, 1)),
            }
        }
        let write = |(page, pages): (u32, u32)| {
            let offset = u64::from(run.first_page + page) * u64::from(page_bytes);
            let bytes = (u64::from(pages) * u64::from(page_bytes)).min(self.size - offset);
            let at = run.at + page * page_bytes;
            (frame, Write { target: self.target.clone(), offset, at, bytes, part: None })
        };
        writes.into_iter().map(write).collect()
    }
}

/// Has those writes of a file of `size` bytes gathered that make up whole parts of it together. `writes` are in their order in the
/// file; `parts` counts the parts.
fn gathered(
    writes: Vec<(FrameRef, Write)>,
    size: u64,
    room: &Arc<Room>,
    parts: &mut u64,
) -> Vec<(FrameRef, Write)> {
    let mut cut = Vec::with_capacity(writes.len());
    for (frame, write) in writes {
        cut_at_parts(frame, write, &mut cut);
    }
    for writes in cut.chunk_by_mut(|(_, a), (_, b)| part_of(a) == part_of(b)) {
        let first = &writes[0].1;
        let offset = part_of(first) * PART_BYTES;
        let (bytes, target) = ((size - offset).min(PART_BYTES), first.target.clone());
        if writes.len() == 1 || writes.iter().map(|(_, write)| write.bytes).sum::<u64>() != bytes {
            continue;
        }
        *parts += 1;
        let part = Arc::new(Part::new(target, offset, bytes, room.clone()));
        writes.iter_mut().for_each(|(_, write)| write.part = Some((*parts, part.clone())));
    }
    cut
}

fn part_of(write: &Write) -> u64 {
    write.offset / PART_BYTES
}

fn cut_at_parts(frame: FrameRef, mut rest: Write, cut: &mut Vec<(FrameRef, Write)>) {
    loop {
        let bytes = rest.bytes.min((part_of(&rest) + 1) * PART_BYTES - rest.offset);
        let Write { ref target, offset, at, .. } = rest;
        cut.push((frame, Write { target: target.clone(), offset, at, bytes, part: None }));
        if bytes == rest.bytes {
            return;
        }
        (rest.offset, rest.at, rest.bytes) =
            (offset + bytes, at + bytes as u32, rest.bytes - bytes);
    }
}

/// The first part that a chunk has something of; 0 if there is none.
fn first_part(chunk: &Chunk<Vec<Write>>) -> u64 {
    let writes = chunk.frames.iter().flat_map(|(_, writes)| writes);
    writes.filter_map(|write| Some(write.part.as_ref()?.0)).min().unwrap_or(0)
}

fn without_content(file: &FileEntry) -> Error {
    let text = format!("the snapshot has no content for {:?} of {} bytes", file.path, file.size);
    Error::new(Kind::Corrupt, text)
}

/// Directories that are known to be there.
struct Made<'a> {
    directories: HashSet<PathBuf>,
    root: &'a Path,
    owner: Owner,
}

impl Made<'_> {
    /// Makes a directory and those above it. Only a directory's own entry says its mode; until then it is 0700.
    fn directory(&mut self, path: &Path, mode: Option<u32>) -> Result<()> {
        use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
        let doing = || format!("make directory {}", path.display());
        if !self.directories.contains(path) {
            match std::fs::symlink_metadata(path) {
                Ok(found) if found.is_dir() => {}
                // `initdb --waldir` makes it a link, and so is it restored over.
                Ok(_) if path == self.root.join("pg_wal") && path.is_dir() => {}
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

    /// Writes of one file, one behind the other from page 0 on, each from a frame of its own: how many pages, or none where pages are
    /// kept.
    fn writes(pages: &[(u64, bool)]) -> Vec<(FrameRef, Write)> {
        use backstay_common::id::ObjectId;
        use backstay_common::seal::{Codec, FrameSpan};
        let target =
            Arc::new(Target::new("/nowhere/file".into(), 0o600, 1 << 30, Owner::of_process()));
        let (mut offset, mut writes) = (0, Vec::new());
        for ((pages, is_written), number) in pages.iter().zip(0..) {
            let span = FrameSpan {
                number,
                offset: 0,
                sealed_bytes: 16,
                plain_bytes: 1 << 20,
                codec: Codec::Zstd,
            };
            let frame = FrameRef { pack: ObjectId::from_bytes([1; 8]), span };
            let (target, bytes) = (target.clone(), pages * 8192);
            if *is_written {
                writes.push((frame, Write { target, offset, at: 0, bytes, part: None }));
            }
            offset += bytes;
        }
        writes
    }

    #[test]
    fn parts_are_gathered_where_several_frames_make_up_all_of_them() {
        // A part of one frame, one of three of which the last reaches into the third part; of which some is kept; a short one of two.
        let pages = [
            (128, true),
            (100, true),
            (8, true),
            (40, true),
            (60, false),
            (48, true),
            (3, true),
            (4, true),
        ];
        let (room, mut parts) = (Arc::default(), 0);
        let writes = gathered(writes(&pages), (3 * 128 + 7) * 8192, &room, &mut parts);
        let shown = writes.iter().map(|(frame, write)| {
            let part = write.part.as_ref().map_or(0, |(part, _)| *part);
            (frame.span.number, write.offset / 8192, write.at / 8192, write.bytes / 8192, part)
        });
        let expected = [
            (0, 0, 0, 128, 0),
            (1, 128, 0, 100, 1),
            (2, 228, 0, 8, 1),
            (3, 236, 0, 20, 1),
            (3, 256, 20, 20, 0),
            (5, 336, 0, 48, 0),
            (6, 384, 0, 3, 2),
            (7, 387, 0, 4, 2),
        ];
        assert_eq!(shown.collect::<Vec<_>>(), expected);
        assert_eq!(parts, 2);
        let alone = |(frame, write): (FrameRef, Write)| Chunk {
            pack: frame.pack,
            frames: vec![(frame.span, vec![write])],
        };
        let first: Vec<u64> = writes.into_iter().map(|write| first_part(&alone(write))).collect();
        assert_eq!(first, [0, 1, 1, 1, 0, 0, 2, 2]);
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
