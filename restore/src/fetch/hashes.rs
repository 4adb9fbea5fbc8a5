//! The page hashes of frames, out of the footers of their packs: what tells a page that need not be fetched.

use super::{IN_FLIGHT, Pack, Packs, Source, nowhere};
use backstay_common::id::ObjectId;
use backstay_common::seal::{TAIL_BYTES, footer_place};
use backstay_common::snapshot::{FrameRef, PackMeta, PageHash};
use backstay_common::{Error, Kind, Result, cbor};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// The end of a pack that is asked for first: it mostly holds the footer.
const TAIL_GUESS: u64 = 256 << 10;

/// One frame: its pack, and its number there.
pub type FrameKey = (ObjectId, u32);

/// The hashes of the pages in each frame, in their order.
pub type FrameHashes = HashMap<FrameKey, Vec<PageHash>>;

impl Packs {
    /// The hashes of these frames. Of a pack whose footer can be read nowhere there are none: its frames are then
    /// fetched, and say themselves what is wrong.
    pub async fn hashes(&self, frames: impl IntoIterator<Item = FrameRef>) -> Result<FrameHashes> {
        let mut wanted: BTreeMap<ObjectId, BTreeSet<u32>> = BTreeMap::new();
        for frame in frames {
            wanted.entry(frame.pack).or_default().insert(frame.span.number);
        }
        let parts = stream::iter(wanted)
            .map(|(id, numbers)| async move { self.hashes_of(id, &numbers).await })
            .buffer_unordered(IN_FLIGHT);
        let parts: Vec<Vec<(FrameKey, Vec<PageHash>)>> = parts.try_collect().await?;
        Ok(parts.into_iter().flatten().collect())
    }

    async fn hashes_of(
        &self,
        id: ObjectId,
        numbers: &BTreeSet<u32>,
    ) -> Result<Vec<(FrameKey, Vec<PageHash>)>> {
        let pack = self.pack(id)?;
        let mut refusals = Vec::new();
        for source in self.by_health() {
            match meta_at(pack, source).await {
                Ok(meta) => return Ok(picked(id, numbers, &meta)),
                Err(refusal) => source.refuse(&pack.name, refusal, &mut refusals),
            }
        }
        let error = nowhere(&pack.name, refusals);
        tracing::warn!(error = error.message(), "without its footer all of its frames are fetched");
        Ok(Vec::new())
    }
}

fn picked(
    id: ObjectId,
    numbers: &BTreeSet<u32>,
    meta: &PackMeta,
) -> Vec<(FrameKey, Vec<PageHash>)> {
    let of = |number: &u32| {
        let frame = meta.frames.get(*number as usize)?;
        Some(((id, *number), frame.hashes.as_chunks().0.to_vec()))
    };
    numbers.iter().filter_map(of).collect()
}

async fn meta_at(pack: &Pack, source: &Source) -> Result<PackMeta> {
    let wrong =
        || Error::new(Kind::Corrupt, format!("object {} has no room for its footer", pack.name));
    let guess = pack.size.saturating_sub(TAIL_GUESS)..pack.size;
    let end = read(pack, source, guess.clone()).await?;
    let tail = end.last_chunk::<TAIL_BYTES>().ok_or_else(wrong)?;
    let place = footer_place(tail, pack.size).ok_or_else(wrong)?;
    let sealed = match place.start.checked_sub(guess.start) {
        Some(at) => end.slice(at as usize..end.len() - TAIL_BYTES),
        None if place.start >= pack.header_bytes => read(pack, source, place.clone()).await?,
        None => return Err(wrong()),
    };
    let meta = pack.opener.footer_meta(&sealed, pack.header_bytes, place.start)?;
    cbor::decode(&meta)
}

async fn read(pack: &Pack, source: &Source, range: Range<u64>) -> Result<Bytes> {
    let bytes = source.location.get_range(&pack.name, range).await?;
    source.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    Ok(bytes)
}
