//! Reads single frames and footers of a snapshot's packs, from whichever location has them whole.
//!
//! For programs that want little of a snapshot: its table, its maps, the hashes of its pages. The frames read last are kept, since
//! maps and small files share them.

use super::{BytesRef, FrameRef, ManifestPlain, PackMeta};
use crate::cbor;
use crate::id::ObjectId;
use crate::keys::{Epoch, Keyring};
use crate::location::Location;
use crate::name::ObjectName;
use crate::pool;
use crate::seal::{FrameSpan, Header, Object, Opener, Unpacker};
use crate::{Error, Kind, Result};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

/// Frames that are kept, of at most 1 MiB each.
const KEPT_FRAMES: usize = 16;
/// A footer that is longer costs the whole object.
const TAIL_BYTES: u64 = 128 << 10;

/// The packs of one snapshot.
#[derive(Debug)]
pub struct PackReader {
    locations: Vec<Location>,
    packs: HashMap<ObjectId, Pack>,
    kept: Mutex<VecDeque<(FrameRef, Arc<Vec<u8>>)>>,
}

#[derive(Debug)]
struct Pack {
    name: ObjectName,
    size: u64,
    epoch: Arc<Epoch>,
    opener: Arc<Opener>,
}

impl PackReader {
    /// Opens the snapshot's epochs and checks that they fit its packs. `locations` are best first.
    pub async fn open(
        locations: Vec<Location>,
        keyring: &Keyring,
        plain: &ManifestPlain,
    ) -> Result<PackReader> {
        let mut epochs = Vec::with_capacity(plain.epochs.len());
        for &id in &plain.epochs {
            epochs.push(keyring.epoch_anywhere(plain.system, id, &locations).await?);
        }
        let bad = || {
            let reason = format!("snapshot {} names a pack of no epoch", plain.snapshot);
            Error::new(Kind::Corrupt, reason)
        };
        let mut packs = HashMap::with_capacity(plain.packs.len());
        for entry in &plain.packs {
            let header: Header = entry.header(plain).ok_or_else(bad)?;
            let epoch = epochs.get(entry.epoch as usize).ok_or_else(bad)?.clone();
            let opener = Arc::new(Opener::new(&header, &epoch)?);
            let name = header.name().clone();
            packs.insert(entry.id(), Pack { name, size: entry.size, epoch, opener });
        }
        Ok(PackReader { locations, packs, kept: Mutex::default() })
    }

    /// The plain bytes of one frame. Safe to drop.
    pub async fn frame(&self, frame: &FrameRef) -> Result<Arc<Vec<u8>>> {
        if let Some(plain) = self.kept(frame) {
            return Ok(plain);
        }
        let pack = self.pack(frame.pack)?;
        let span = frame.span;
        let read = |location| frame_at(pack, location, span).boxed();
        let plain = self.first_good(pack, read).await?;
        let plain = Arc::new(plain);
        let mut kept = self.kept.lock().expect("no panic while held");
        kept.push_front((*frame, plain.clone()));
        kept.truncate(KEPT_FRAMES);
        Ok(plain)
    }

    /// Bytes that lie in frames. Safe to drop.
    pub async fn bytes(&self, wanted: &BytesRef) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for piece in &wanted.pieces {
            let frame = self.frame(&piece.frame).await?;
            let end = piece.at as usize + piece.bytes as usize;
            let part = frame.get(piece.at as usize..end).ok_or_else(|| {
                Error::new(Kind::Corrupt, "the snapshot points behind the end of a frame")
            })?;
            bytes.extend_from_slice(part);
        }
        Ok(bytes)
    }

    /// What the footer of a pack says of its frames. Safe to drop.
    pub async fn meta(&self, id: ObjectId) -> Result<PackMeta> {
        let pack = self.pack(id)?;
        let meta = self.first_good(pack, |location| meta_at(pack, location).boxed()).await?;
        cbor::decode(&meta)
    }

    fn pack(&self, id: ObjectId) -> Result<&Pack> {
        self.packs.get(&id).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("pack {id} is not in the manifest's list"))
        })
    }

    fn kept(&self, frame: &FrameRef) -> Option<Arc<Vec<u8>>> {
        let kept = self.kept.lock().expect("no panic while held");
        kept.iter().find(|(known, _)| known == frame).map(|(_, plain)| plain.clone())
    }

    async fn first_good<'a, T>(
        &'a self,
        pack: &Pack,
        read: impl Fn(&'a Location) -> BoxFuture<'a, Result<T>>,
    ) -> Result<T> {
        let mut last = Error::new(Kind::Storage, "no location can be read");
        for location in &self.locations {
            match read(location).await {
                Ok(value) => return Ok(value),
                Err(error) => {
                    tracing::debug!(location = %location.name(), object = %pack.name, %error, "reading elsewhere");
                    last = error;
                }
            }
        }
        Err(last)
    }
}

async fn frame_at(pack: &Pack, location: &Location, span: FrameSpan) -> Result<Vec<u8>> {
    let range = span.offset..span.offset + u64::from(span.sealed_bytes);
    let sealed = location.get_range(&pack.name, range).await?;
    let opener = pack.opener.clone();
    pool::run(move || opener.frame(&span, &sealed, &mut Unpacker::new())).await?
}

async fn meta_at(pack: &Pack, location: &Location) -> Result<Vec<u8>> {
    let start = pack.size.saturating_sub(TAIL_BYTES);
    let tail = location.get_range(&pack.name, start..pack.size).await?;
    if let Some(meta) = pack.opener.meta_of_tail(&tail)? {
        return Ok(meta);
    }
    let bytes = location.get(&pack.name).await?;
    let (name, epoch) = (pack.name.clone(), pack.epoch.clone());
    pool::run(move || Ok(Object::open(bytes, &name, &epoch)?.meta().to_vec())).await?
}
