//! File maps and table parts: bytes that are collected into frames of their own.

use super::pack::{Packs, Place};
use backstay_common::seal::{FRAME_BYTES_MAX, Frame, Packer};
use backstay_common::snapshot::filemap::BytesPiece;
use backstay_common::snapshot::{BytesRef, FrameUse};
use backstay_common::{Result, pool};
use std::sync::{Arc, OnceLock};

/// A frame that is being written.
#[derive(Debug)]
pub struct Loose {
    usage: FrameUse,
    level: i32,
    bytes: Vec<u8>,
    place: Arc<OnceLock<Place>>,
}

/// Bytes in a frame that may yet have to be written and sealed.
#[derive(Clone, Debug)]
pub struct Piece {
    place: Arc<OnceLock<Place>>,
    at: u32,
    bytes: u32,
}

impl Loose {
    /// `level` is zstd's.
    pub fn new(usage: FrameUse, level: i32) -> Loose {
        Loose { usage, level, bytes: Vec::new(), place: Arc::default() }
    }

    /// Appends `bytes`; frames that are full go into the pack. Where the bytes will be.
    pub async fn write(&mut self, packs: &mut Packs, mut bytes: &[u8]) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let at = self.bytes.len();
            let (now, later) = bytes.split_at(bytes.len().min(FRAME_BYTES_MAX - at));
            self.bytes.extend_from_slice(now);
            let place = self.place.clone();
            pieces.push(Piece { place, at: at as u32, bytes: now.len() as u32 });
            if self.bytes.len() == FRAME_BYTES_MAX {
                self.flush(packs).await?;
            }
            bytes = later;
        }
        Ok(pieces)
    }

    /// Puts what there is into the pack.
    pub async fn flush(&mut self, packs: &mut Packs) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let (bytes, level) = (std::mem::take(&mut self.bytes), self.level);
        let frame = pool::run(move || Frame::pack(&mut Packer::new(level)?, &bytes)).await??;
        let place = packs.add(frame, self.usage, Vec::new());
        // Nobody else sets it, and a new frame begins with a new one.
        let _ = std::mem::take(&mut self.place).set(place);
        Ok(())
    }
}

impl Piece {
    /// Where the bytes are; none until all of their frames are sealed.
    pub fn resolve(pieces: &[Piece]) -> Option<BytesRef> {
        let piece = |piece: &Piece| {
            let frame = piece.place.get()?.frame()?;
            Some(BytesPiece { frame, at: piece.at, bytes: piece.bytes })
        };
        Some(BytesRef { pieces: pieces.iter().map(piece).collect::<Option<_>>()? })
    }
}
