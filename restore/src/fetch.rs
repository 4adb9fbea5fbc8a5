//! Frames out of packs, from whichever location has them whole.
//!
//! Frames that lie near each other are read with one request. A location that fails, or whose bytes do not pass
//! their authentication tag, is passed over for the next one, object by object; only when none is left, after some rounds, does a
//! read fail, and then it names the object and what each location said.

mod hashes;

pub use hashes::{FrameHashes, FrameKey};

use crate::rounds::Rounds;
use backstay_common::id::{ObjectId, SnapshotId, SystemId};
use backstay_common::keys::{Epoch, Keyring};
use backstay_common::location::Location;
use backstay_common::name::ObjectName;
use backstay_common::pool;
use backstay_common::seal::{FrameSpan, Opener, Unpacker};
use backstay_common::snapshot::filemap::BytesPiece;
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::snapshot::{BytesRef, FrameRef, Manifest, ManifestPlain};
use backstay_common::{Error, Kind, Result};
use bytes::Bytes;
use futures::{TryStreamExt, stream};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Requests that are under way at once.
pub const IN_FLIGHT: usize = 8;
/// A request asks for at most this many bytes, unless one frame is larger.
const CHUNK_BYTES: u64 = 8 << 20;
/// And for frames of no more bytes than this when they are opened, so that the last requests are shared out evenly.
pub const CHUNK_PLAIN_BYTES: u64 = 64 << 20;
/// Bytes between two wanted frames that are read along rather than asked for with another request.
const GAP_BYTES: u64 = 256 << 10;

/// Frames of one pack that are read with one request, each with what it is for.
#[derive(Debug)]
pub struct Chunk<J> {
    pub pack: ObjectId,
    pub frames: Vec<(FrameSpan, J)>,
}

impl<J> Chunk<J> {
    /// The bytes of the pack that hold the frames.
    pub fn range(&self) -> Range<u64> {
        let end = |span: &FrameSpan| span.offset + u64::from(span.sealed_bytes);
        let start = self.frames.first().map_or(0, |(span, _)| span.offset);
        start..self.frames.iter().map(|(span, _)| end(span)).max().unwrap_or(start)
    }
}

/// Gathers what is wanted of each frame, and frames that lie near each other into one request, for at most `plain_max` bytes
/// when they are opened.
pub fn group<W>(
    wanted: impl IntoIterator<Item = (FrameRef, W)>,
    plain_max: u64,
) -> Vec<Chunk<Vec<W>>> {
    let mut frames: BTreeMap<(ObjectId, u64, u32), (FrameSpan, Vec<W>)> = BTreeMap::new();
    for (frame, want) in wanted {
        let key = (frame.pack, frame.span.offset, frame.span.number);
        frames.entry(key).or_insert_with(|| (frame.span, Vec::new())).1.push(want);
    }
    let mut chunks: Vec<Chunk<Vec<W>>> = Vec::new();
    let mut room = Room::default();
    for ((pack, ..), (span, wants)) in frames {
        match chunks.last_mut() {
            Some(chunk) if chunk.pack == pack && room.takes(&span, plain_max) => {
                chunk.frames.push((span, wants));
            }
            _ => {
                room = Room { start: span.offset, ..Room::default() };
                chunks.push(Chunk { pack, frames: vec![(span, wants)] });
            }
        }
        room.end = room.end.max(span.offset + u64::from(span.sealed_bytes));
        room.plain_bytes += u64::from(span.plain_bytes);
    }
    chunks
}

/// What a request holds so far.
#[derive(Debug, Default)]
struct Room {
    start: u64,
    end: u64,
    plain_bytes: u64,
}

impl Room {
    fn takes(&self, span: &FrameSpan, plain_max: u64) -> bool {
        span.offset <= self.end + GAP_BYTES
            && span.offset + u64::from(span.sealed_bytes) - self.start <= CHUNK_BYTES
            && self.plain_bytes + u64::from(span.plain_bytes) <= plain_max
    }
}

/// A location, and how it has done so far.
#[derive(Debug)]
struct Source {
    location: Location,
    failures: AtomicU64,
    bytes: AtomicU64,
}

/// The packs of one snapshot, ready to be read.
#[derive(Debug)]
pub struct Packs {
    sources: Vec<Source>,
    packs: HashMap<ObjectId, Pack>,
}

/// One pack, and what opening it takes.
#[derive(Debug)]
struct Pack {
    name: ObjectName,
    opener: Arc<Opener>,
    /// Bytes of the object.
    size: u64,
    /// Bytes before its first frame.
    header_bytes: u64,
}

/// How many bytes each location gave.
pub type LocationBytes = Vec<(String, u64)>;

impl Packs {
    /// Opens the snapshot's epochs and checks that they fit its packs. `locations` are best first.
    pub async fn open(
        locations: &[Location],
        keyring: &Keyring,
        plain: &ManifestPlain,
    ) -> Result<Packs> {
        let mut epochs = Vec::with_capacity(plain.epochs.len());
        for &id in &plain.epochs {
            epochs.push(keyring.epoch_anywhere(plain.system, id, locations).await?);
        }
        Packs::with_epochs(locations, &epochs, plain)
    }

    fn with_epochs(
        locations: &[Location],
        epochs: &[Arc<Epoch>],
        plain: &ManifestPlain,
    ) -> Result<Packs> {
        let mut packs = HashMap::with_capacity(plain.packs.len());
        for entry in &plain.packs {
            let bad = || {
                Error::new(
                    Kind::Corrupt,
                    format!("snapshot {}: a pack of no epoch", plain.snapshot),
                )
            };
            let header = entry.header(plain).ok_or_else(bad)?;
            let epoch = epochs.get(entry.epoch as usize).ok_or_else(bad)?;
            let pack = Pack {
                name: header.name().clone(),
                opener: Arc::new(Opener::new(&header, epoch)?),
                size: entry.size,
                header_bytes: header.len() as u64,
            };
            packs.insert(entry.id(), pack);
        }
        let source = |location: &Location| Source {
            location: location.clone(),
            failures: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        Ok(Packs { sources: locations.iter().map(source).collect(), packs })
    }

    /// Reads, checks and opens the frames of `chunk`, and gives each to `work`, which runs on a pool and may wait for a disk. A fault of
    /// `work` ends it. Not to be dropped before its end, unless `work` may still run for a moment.
    pub async fn process<J, F>(&self, chunk: Chunk<J>, work: Arc<F>) -> Result<()>
    where
        J: Send + Sync + 'static,
        F: Fn(&J, &[u8]) -> Result<()> + Send + Sync + 'static,
    {
        let Pack { name, opener, .. } = self.pack(chunk.pack)?;
        let chunk = Arc::new(chunk);
        let mut done = 0;
        let mut rounds = Rounds::default();
        loop {
            let mut refusals = Vec::new();
            for source in self.by_health() {
                let bytes = match source.location.get_range(name, chunk.range()).await {
                    Ok(bytes) => bytes,
                    Err(refusal) => {
                        source.refuse(name, refusal, &mut refusals);
                        continue;
                    }
                };
                source.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                let (chunk, opener, work) = (chunk.clone(), opener.clone(), work.clone());
                match pool::run_on_disk(move || open_frames(&chunk, done, &bytes, &opener, &*work))
                    .await?
                {
                    Opened::All => return Ok(()),
                    Opened::Damaged { at, error } => {
                        done = at;
                        source.refuse(name, error, &mut refusals);
                    }
                    Opened::WorkFailed(error) => return Err(error),
                }
            }
            if !rounds.again(refusals.iter().map(|(_, refusal)| refusal)).await {
                return Err(nowhere(name, refusals));
            }
        }
    }

    fn pack(&self, id: ObjectId) -> Result<&Pack> {
        self.packs.get(&id).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("pack {id} is not in the manifest's list"))
        })
    }

    /// The plain bytes of each of `wanted`.
    pub async fn read_all(&self, wanted: &[&BytesRef]) -> Result<Vec<Vec<u8>>> {
        let mut places = Vec::new();
        let mut lengths = Vec::with_capacity(wanted.len());
        for (number, bytes) in wanted.iter().enumerate() {
            let mut length = 0;
            for piece in &bytes.pieces {
                places.push((piece.frame, Place { number, offset: length, piece: *piece }));
                length += piece.bytes as usize;
            }
            lengths.push(length);
        }
        let read: Vec<Vec<u8>> = lengths.into_iter().map(|length| vec![0; length]).collect();
        let read = Arc::new(Mutex::new(read));
        let fill = {
            let read = read.clone();
            Arc::new(move |places: &Vec<Place>, plain: &[u8]| fill(&read, places, plain))
        };
        stream::iter(group(places, CHUNK_PLAIN_BYTES).into_iter().map(Ok))
            .try_for_each_concurrent(IN_FLIGHT, |chunk| self.process(chunk, fill.clone()))
            .await?;
        let mut read = read.lock().expect("no panic while held");
        Ok(std::mem::take(&mut *read))
    }

    /// The plain bytes of one place.
    pub async fn read_all_of(&self, wanted: &BytesRef) -> Result<Vec<u8>> {
        Ok(self.read_all(&[wanted]).await?.swap_remove(0))
    }

    /// Locations that have failed less often come first.
    fn by_health(&self) -> Vec<&Source> {
        let mut sources: Vec<&Source> = self.sources.iter().collect();
        sources.sort_by_key(|source| source.failures.load(Ordering::Relaxed));
        sources
    }

    /// Where the bytes came from.
    pub fn read_from(&self) -> LocationBytes {
        let of = |source: &Source| {
            (source.location.name().to_string(), source.bytes.load(Ordering::Relaxed))
        };
        self.sources.iter().map(of).collect()
    }
}

impl Source {
    fn refuse(&self, name: &ObjectName, refusal: Error, refusals: &mut Vec<(String, Error)>) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(location = %self.location.name(), object = %name, error = refusal.message(), "reading elsewhere");
        refusals.push((self.location.name().to_string(), refusal));
    }
}

/// The manifest of a snapshot, from the first location that has it whole.
pub async fn read_manifest(
    locations: &[Location],
    keyring: &Keyring,
    system: SystemId,
    snapshot: SnapshotId,
) -> Result<Manifest> {
    let name = ObjectName::Manifest { system, snapshot };
    let mut refusals = Vec::new();
    for location in locations {
        match manifest_at(location, keyring, system, &name).await {
            Ok(manifest) => return Ok(manifest),
            Err(refusal) if refusal.kind() == Kind::Key => return Err(refusal),
            Err(refusal) => refusals.push((location.name().to_string(), refusal)),
        }
    }
    Err(nowhere(&name, refusals))
}

async fn manifest_at(
    location: &Location,
    keyring: &Keyring,
    system: SystemId,
    name: &ObjectName,
) -> Result<Manifest> {
    let bytes = location.get(name).await?;
    let (header, _) = read_plain(&bytes, name)?;
    let epoch = keyring.epoch(system, header.epoch(), location).await?;
    Manifest::open(bytes, name, &epoch)
}

/// A part of what [`Packs::read_all`] reads.
#[derive(Debug)]
struct Place {
    number: usize,
    offset: usize,
    piece: BytesPiece,
}

fn fill(read: &Mutex<Vec<Vec<u8>>>, places: &[Place], plain: &[u8]) -> Result<()> {
    let mut read = read.lock().expect("no panic while held");
    for place in places {
        let from = part(plain, place.piece.at, u64::from(place.piece.bytes))?;
        read[place.number][place.offset..place.offset + from.len()].copy_from_slice(from);
    }
    Ok(())
}

/// `bytes` bytes of a frame from `at` on.
pub fn part(plain: &[u8], at: u32, bytes: u64) -> Result<&[u8]> {
    let at = at as usize;
    let end = usize::try_from(bytes).ok().and_then(|bytes| at.checked_add(bytes));
    end.and_then(|end| plain.get(at..end)).ok_or_else(|| {
        Error::new(Kind::Corrupt, "the snapshot's map points behind the end of a frame")
    })
}

enum Opened {
    All,
    /// The frame with this number in the chunk failed its check; those before it are done.
    Damaged {
        at: usize,
        error: Error,
    },
    WorkFailed(Error),
}

fn open_frames<J, F: Fn(&J, &[u8]) -> Result<()>>(
    chunk: &Chunk<J>,
    from: usize,
    bytes: &Bytes,
    opener: &Opener,
    work: &F,
) -> Opened {
    thread_local! {
        static UNPACKER: RefCell<Unpacker> = RefCell::default();
    }
    let start = chunk.range().start;
    for (at, (span, job)) in chunk.frames.iter().enumerate().skip(from) {
        let offset = (span.offset - start) as usize;
        let sealed = &bytes[offset..offset + span.sealed_bytes as usize];
        let opened = UNPACKER.with_borrow_mut(|unpacker| {
            let plain = opener
                .frame_in(span, sealed, unpacker)
                .map_err(|error| Opened::Damaged { at, error })?;
            work(job, plain).map_err(Opened::WorkFailed)
        });
        if let Err(stopped) = opened {
            return stopped;
        }
    }
    Opened::All
}

fn nowhere(name: &ObjectName, refusals: Vec<(String, Error)>) -> Error {
    let any = |kind| refusals.iter().any(|(_, refusal)| refusal.kind() == kind);
    let all_missing =
        !refusals.is_empty() && refusals.iter().all(|(_, r)| r.kind() == Kind::Missing);
    let kind = match () {
        () if any(Kind::Corrupt) => Kind::Corrupt,
        () if all_missing => Kind::Missing,
        () => Kind::Storage,
    };
    let said: Vec<String> =
        refusals.iter().map(|(place, refusal)| format!("{place}: {}", refusal.message())).collect();
    let remedy = match kind {
        Kind::Storage => "bring back a location that holds it, and give the same command again",
        _ => {
            "restore from another snapshot (`backstay list`), or bring back a location that holds it whole"
        }
    };
    Error::new(
        kind,
        format!("object {name} can be read whole from no location ({})", said.join("; ")),
    )
    .remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::seal::Codec;

    fn frame(pack: u8, number: u32, offset: u64, sealed_bytes: u32) -> FrameRef {
        let span =
            FrameSpan { number, offset, sealed_bytes, plain_bytes: 1 << 20, codec: Codec::Zstd };
        FrameRef { pack: ObjectId::from_bytes([pack; 8]), span }
    }

    #[test]
    fn near_frames_share_a_request_and_wants_of_a_frame_are_gathered() {
        let wanted = [
            (frame(2, 0, 200, 1000), "other pack"),
            (frame(1, 1, 1200, 1000), "b"),
            (frame(1, 0, 200, 1000), "a"),
            (frame(1, 1, 1200, 1000), "b again"),
            (frame(1, 9, 2200 + GAP_BYTES + 1, 1000), "too far"),
        ];
        let chunks = group(wanted, CHUNK_PLAIN_BYTES);
        let shown = chunks.iter().map(|chunk| {
            let wants: Vec<String> = chunk.frames.iter().map(|(_, w)| w.join(",")).collect();
            (chunk.pack.as_bytes()[0], chunk.range(), wants.join(" "))
        });
        let far = 2200 + GAP_BYTES + 1;
        let expected = [
            (1, 200..2200, "a b,b again".to_string()),
            (1, far..far + 1000, "too far".to_string()),
            (2, 200..1200, "other pack".to_string()),
        ];
        assert_eq!(shown.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn requests_are_bounded() {
        let wanted = (0..64).map(|n| (frame(1, n, u64::from(n) << 20, 1 << 20), ()));
        let chunks = group(wanted, CHUNK_PLAIN_BYTES);
        assert_eq!(chunks.len(), 8);
        assert!(chunks.iter().all(|c| c.range().end - c.range().start <= CHUNK_BYTES));
    }

    #[test]
    fn requests_for_what_compresses_well_are_bounded_too() {
        let chunks = group(
            (0..200).map(|n| (frame(1, n, u64::from(n) * 1000, 1000), ())),
            CHUNK_PLAIN_BYTES,
        );
        let frames: Vec<usize> = chunks.iter().map(|chunk| chunk.frames.len()).collect();
        assert_eq!(frames, [64, 64, 64, 8], "64 MiB each");
    }

    #[test]
    fn a_part_beyond_its_frame_is_refused() {
        assert_eq!(part(b"abc", 1, 2).unwrap(), b"bc");
        for (at, bytes) in [(2, 2), (4, 0), (u32::MAX, u64::MAX)] {
            assert_eq!(part(b"abc", at, bytes).unwrap_err().kind(), Kind::Corrupt);
        }
    }
}
