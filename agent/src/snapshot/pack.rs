//! Packs: frames collected into objects, sealed, and handed to the locations.
//!
//! A frame has a place at once and an address later: when its pack is sealed, the pack's id and the frame's offset are known. At
//! any time one pack is being filled and one sealed; how many sealed ones are in memory is [`Fleet`]'s to bound.

use super::leftover::{FrameNote, Journal, PackNote, RunNote};
use super::progress::Meter;
use super::ship::{Fleet, Parcel};
use crate::epochs::Epochs;
use backstay_common::cbor;
use backstay_common::id::{EpochId, ObjectId, SystemId};
use backstay_common::keys::Epoch;
use backstay_common::name::ObjectName;
use backstay_common::pool;
use backstay_common::seal::{self, Draft, Frame, FrameSpan, ObjectKind, Sealed, TAG_BYTES};
use backstay_common::snapshot::{FrameRef, FrameUse, PackEntry, PackFrame, PackMeta};
use backstay_common::{Error, Kind, Result};
use std::sync::{Arc, OnceLock};
use tokio::task::JoinSet;

/// Sealed bytes at which a pack is full; it may be larger by one frame.
const PACK_BYTES: usize = 32 << 20;
/// Bounds the footer of a pack of highly compressible frames.
const PACK_FRAMES_MAX: usize = 4096;

/// A pack, known by its frames' places before it is known by its name.
#[derive(Debug, Default)]
struct Slot(OnceLock<(ObjectId, Vec<FrameSpan>)>);

/// Where a frame is, or will be.
#[derive(Clone, Debug)]
pub struct Place {
    slot: Arc<Slot>,
    number: usize,
}

impl Place {
    /// The frame's address; none until its pack is sealed.
    pub fn frame(&self) -> Option<FrameRef> {
        let (pack, spans) = self.slot.0.get()?;
        Some(FrameRef { pack: *pack, span: spans[self.number] })
    }
}

/// All packs of one snapshot.
#[derive(Debug)]
pub struct Packs {
    system: SystemId,
    epochs: Arc<Epochs>,
    fleet: Arc<Fleet>,
    meter: Arc<Meter>,
    /// Told of what is sealed.
    journal: Arc<Journal>,
    filling: Filling,
    sealing: JoinSet<Result<(EpochId, PackEntry)>>,
    done: Sealing,
}

/// What has been sealed so far.
#[derive(Debug, Default)]
pub struct Sealing {
    pub epochs: Vec<EpochId>,
    pub packs: Vec<PackEntry>,
}

#[derive(Debug, Default)]
struct Filling {
    slot: Arc<Slot>,
    frames: Vec<Frame>,
    meta: PackMeta,
    bytes: usize,
    notes: Notes,
}

/// Which pages the frames of a pack hold.
#[derive(Debug, Default)]
struct Notes {
    paths: Vec<String>,
    /// By the number of the frame.
    frames: Vec<(usize, Vec<RunNote>)>,
}

impl Packs {
    pub fn new(
        system: SystemId,
        epochs: Arc<Epochs>,
        fleet: Arc<Fleet>,
        meter: Arc<Meter>,
        journal: Arc<Journal>,
    ) -> Packs {
        let (filling, sealing, done) = (Filling::default(), JoinSet::new(), Sealing::default());
        Packs { system, epochs, fleet, meter, journal, filling, sealing, done }
    }

    /// Puts a frame into the pack that is being filled.
    pub fn add(&mut self, frame: Frame, usage: FrameUse, hashes: Vec<u8>) -> Place {
        let place = Place { slot: self.filling.slot.clone(), number: self.filling.frames.len() };
        self.filling.bytes += frame.bytes.len() + TAG_BYTES;
        self.filling.frames.push(frame);
        self.filling.meta.frames.push(PackFrame { usage, hashes });
        place
    }

    /// Says what pages the frame that was added last holds, in their order: the file's path, its first page, how many, and
    /// where the first lies in the frame.
    pub fn holds<'p>(&mut self, runs: impl Iterator<Item = (&'p str, u32, u32, u32)>) {
        let notes = &mut self.filling.notes;
        let runs = runs.map(|(path, first_page, pages, at)| {
            if notes.paths.last().is_none_or(|last| last != path) {
                notes.paths.push(path.to_string());
            }
            RunNote { path: notes.paths.len() as u32 - 1, first_page, pages, at }
        });
        let runs = runs.collect();
        notes.frames.push((self.filling.frames.len() - 1, runs));
    }

    pub fn is_full(&self) -> bool {
        self.filling.bytes >= PACK_BYTES || self.filling.frames.len() >= PACK_FRAMES_MAX
    }

    /// Begins to seal what is being filled, after waiting for the one before.
    pub async fn seal(&mut self) -> Result<()> {
        self.settle().await?;
        let filled = std::mem::take(&mut self.filling);
        if filled.frames.is_empty() {
            return Ok(());
        }
        let (fleet, epochs, meter) = (self.fleet.clone(), self.epochs.clone(), self.meter.clone());
        let (system, journal) = (self.system, self.journal.clone());
        self.sealing.spawn(async move {
            let room = fleet.admit().await?;
            let epoch = epochs.current().await?;
            let id = epoch.id();
            let slot = filled.slot.clone();
            let sealed = pool::run(move || {
                let (sealed, note, hashes) = seal_pack(filled, &epoch, system);
                // Before it can be stored, so that no pages are stored which are not noted.
                if !note.frames.is_empty() {
                    journal.note(note, &hashes);
                }
                sealed
            });
            let sealed = sealed.await?;
            let entry = entry(&sealed);
            meter.sealed(entry.size);
            let known = slot.0.set((entry.id(), sealed.spans));
            known.map_err(|_| Error::new(Kind::Bug, "a pack was sealed twice"))?;
            fleet.send(Parcel::new(sealed.name, id, sealed.bytes, room));
            Ok((id, entry))
        });
        Ok(())
    }

    /// Waits until all that was begun is sealed, and every place in it has its address.
    pub async fn settle(&mut self) -> Result<()> {
        while let Some(sealed) = self.sealing.join_next().await {
            let (epoch, mut entry) =
                sealed.map_err(|e| Error::new(Kind::Bug, format!("sealing a pack: {e}")))??;
            let known = self.done.epochs.iter().position(|known| *known == epoch);
            entry.epoch = known.unwrap_or(self.done.epochs.len()) as u32;
            if known.is_none() {
                self.done.epochs.push(epoch);
            }
            self.done.packs.push(entry);
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn fleet(&self) -> &Arc<Fleet> {
        &self.fleet
    }

    pub fn into_sealed(self) -> Sealing {
        self.done
    }
}

/// Also what is to be noted of it, and the page hashes that belong to that.
fn seal_pack(filled: Filling, epoch: &Epoch, system: SystemId) -> (Sealed, PackNote, Vec<u8>) {
    let Filling { frames, meta, notes, .. } = filled;
    let draft =
        Draft { kind: ObjectKind::Pack, plain: Vec::new(), frames, meta: cbor::encode(&meta) };
    let sealed = seal::seal(draft, epoch, |id| ObjectName::Pack { system, id });
    let (entry, mut hashes) = (entry(&sealed), Vec::new());
    let frame = |(number, runs): (usize, Vec<RunNote>)| {
        hashes.extend_from_slice(&meta.frames[number].hashes);
        FrameNote { frame: FrameRef { pack: entry.id(), span: sealed.spans[number] }, runs }
    };
    let frames = notes.frames.into_iter().map(frame).collect();
    let note = PackNote { epoch: epoch.id(), entry, paths: notes.paths, frames };
    (sealed, note, hashes)
}

/// `epoch` is filled in by whoever keeps the list of epochs, `live_bytes` by whoever knows which frames are used.
fn entry(sealed: &Sealed) -> PackEntry {
    PackEntry {
        epoch: 0,
        salt: *sealed.header.salt(),
        commitment: *sealed.header.commitment(),
        size: sealed.bytes.len() as u64,
        hash: sealed.hash(),
        live_bytes: 0,
        frame_bytes: Some(sealed.spans.iter().map(|span| u64::from(span.sealed_bytes)).sum()),
    }
}
