//! Which frames a snapshot uses, and so how many bytes of each pack are alive.

use backstay_common::id::ObjectId;
use backstay_common::seal::OBJECT_BYTES_MAX;
use backstay_common::snapshot::{BytesRef, FrameRef, PackEntry};
use backstay_common::{Error, Kind, Result};
use std::collections::HashMap;

/// Frames marked so far. A bit for each frame of each pack: some 600 bytes for 32 MiB.
#[derive(Debug, Default)]
pub struct Usage(HashMap<ObjectId, PackUse>);

#[derive(Debug, Default)]
struct PackUse {
    marked: Vec<u64>,
    live_bytes: u64,
}

impl Usage {
    pub fn mark(&mut self, frame: &FrameRef) -> Result<()> {
        // A frame has a tag at least.
        if frame.span.number as usize > OBJECT_BYTES_MAX / 16 {
            return Err(Error::new(Kind::Corrupt, "a map names a frame that no pack can have"));
        }
        let pack = self.0.entry(frame.pack).or_default();
        let (word, bit) = (frame.span.number as usize / 64, frame.span.number % 64);
        if pack.marked.len() <= word {
            pack.marked.resize(word + 1, 0);
        }
        if pack.marked[word] & 1 << bit == 0 {
            pack.marked[word] |= 1 << bit;
            pack.live_bytes += u64::from(frame.span.sealed_bytes);
        }
        Ok(())
    }

    pub fn mark_bytes(&mut self, bytes: &BytesRef) -> Result<()> {
        bytes.pieces.iter().try_for_each(|piece| self.mark(&piece.frame))
    }

    /// Sets the live bytes of a pack; false if nothing uses it. Each pack is asked for once.
    pub fn settle(&mut self, entry: &mut PackEntry) -> bool {
        let found = self.0.remove(&entry.id());
        entry.live_bytes = found.as_ref().map_or(0, |pack| pack.live_bytes);
        found.is_some()
    }

    /// A pack that was marked and never settled.
    pub fn rest(&self) -> Option<ObjectId> {
        self.0.keys().next().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::seal::{Codec, FrameSpan};

    fn frame(pack: u8, number: u32) -> FrameRef {
        let (offset, sealed_bytes, plain_bytes) = (200 + u64::from(number) * 100, 100, 8192);
        let span = FrameSpan { number, offset, sealed_bytes, plain_bytes, codec: Codec::Zstd };
        FrameRef { pack: ObjectId::from_bytes([pack; 8]), span }
    }

    #[test]
    fn a_frame_counts_once() {
        let mut usage = Usage::default();
        for (pack, number) in [(1, 0), (1, 70), (1, 0), (2, 3)] {
            usage.mark(&frame(pack, number)).unwrap();
        }
        let mut entry = PackEntry {
            epoch: 0,
            salt: [1; 32],
            commitment: [0; 32],
            size: 1000,
            hash: [0; 32],
            live_bytes: 999,
            frame_bytes: None,
        };
        assert!(usage.settle(&mut entry));
        assert_eq!(entry.live_bytes, 200);
        assert!(!usage.settle(&mut entry) && entry.live_bytes == 0);
        assert_eq!(usage.rest(), Some(ObjectId::from_bytes([2; 8])));
        assert!(usage.mark(&frame(1, u32::MAX)).is_err());
    }
}
