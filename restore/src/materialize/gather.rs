//! Parts of a file whose pages come out of several frames: put together in memory, and written at once.
//!
//! After some snapshots the pages of a part lie in an image frame, and in delta frames of many packs. Written as the frames
//! come, nearly each would be a write of its own through the page cache. So the frames are read in the order of the files
//! ([`super::batch`]), and each part waits in memory until it is whole.
//!
//! What always holds: memory is bounded by [`ROOM_PARTS`]; a part that finds no room is written piece by piece, and
//! nobody waits for room; each byte is written once. Parts that are not whole are lost when the work ends early, and read as zeros.

use super::target::Target;
use backstay_common::{Error, Kind, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes of a part: those of an image frame.
pub const PART_BYTES: u64 = 1 << 20;
/// Parts that may be in memory at once.
const ROOM_PARTS: usize = 256;
/// What direct I/O asks of addresses in memory.
const ALIGNMENT: usize = 4096;

/// Memory for parts.
#[derive(Debug, Default)]
pub struct Room {
    free: Mutex<Vec<Vec<u8>>>,
    taken: AtomicUsize,
}

impl Room {
    fn take(&self) -> Option<Vec<u8>> {
        let less = |taken: usize| (taken < ROOM_PARTS).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok()?;
        let free = self.free.lock().expect("no panic while held").pop();
        Some(free.unwrap_or_else(|| vec![0; PART_BYTES as usize + ALIGNMENT]))
    }

    fn give_back(&self, buffer: Vec<u8>) {
        self.free.lock().expect("no panic while held").push(buffer);
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }

    /// An error if a part is not whole after all frames were written.
    pub fn check_empty(&self) -> Result<()> {
        match self.taken.load(Ordering::Relaxed) {
            0 => Ok(()),
            parts => {
                Err(Error::new(Kind::Bug, format!("{parts} parts of restored files are not whole")))
            }
        }
    }
}

/// One part on its way to the disk.
#[derive(Debug)]
pub struct Part {
    pub target: Arc<Target>,
    /// Of the part in the file.
    offset: u64,
    bytes: usize,
    room: Arc<Room>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Untouched,
    /// Its bytes so far, and how many are missing.
    Gathering(Vec<u8>, usize),
    /// There was no room when the first bytes came.
    Piecewise,
}

impl Part {
    /// `bytes` bytes from `offset` on, at most [`PART_BYTES`], each of which will be given once.
    pub fn new(target: Arc<Target>, offset: u64, bytes: u64, room: Arc<Room>) -> Part {
        let (bytes, state) = (bytes as usize, Mutex::new(State::Untouched));
        Part { target, offset, bytes, room, state }
    }

    /// Takes bytes of the part; `offset` is theirs in the file. True if the part takes care of them, false if they are to be written by
    /// whoever has them. Blocks when the part is whole.
    pub fn take(&self, bytes: &[u8], offset: u64) -> Result<bool> {
        let mut state = self.state.lock().expect("no panic while held");
        if matches!(*state, State::Untouched) {
            *state = match self.room.take() {
                Some(buffer) => State::Gathering(buffer, self.bytes),
                None => State::Piecewise,
            };
        }
        let State::Gathering(buffer, missing) = &mut *state else { return Ok(false) };
        let start = aligned(buffer) + (offset - self.offset) as usize;
        buffer[start..start + bytes.len()].copy_from_slice(bytes);
        *missing = missing.checked_sub(bytes.len()).ok_or_else(|| {
            Error::new(Kind::Bug, "a part of a restored file was given more than it has")
        })?;
        if *missing > 0 {
            return Ok(true);
        }
        let State::Gathering(buffer, _) = std::mem::replace(&mut *state, State::Piecewise) else {
            unreachable!("it was gathering just now")
        };
        drop(state);
        let start = aligned(&buffer);
        self.target.pen().write(&buffer[start..start + self.bytes], self.offset)?;
        self.room.give_back(buffer);
        Ok(true)
    }
}

/// Where in a part's memory it begins, so that it can be written to a disk directly.
fn aligned(buffer: &[u8]) -> usize {
    buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owner::Owner;

    fn target(folder: &tempfile::TempDir, bytes: u64) -> Arc<Target> {
        let path = folder.path().join("file");
        Arc::new(Target::new(path, 0o600, bytes, Owner::of_process()))
    }

    #[test]
    fn a_part_is_written_when_its_last_bytes_come_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let (room, size) = (Arc::new(Room::default()), PART_BYTES + 8192 + 100);
        let target = target(&folder, size);
        let part = Part::new(target.clone(), PART_BYTES, 8192 + 100, room.clone());
        assert!(part.take(&[2; 100], PART_BYTES + 8192).unwrap());
        assert!(!target.path.exists() && room.check_empty().is_err());
        assert!(part.take(&[1; 8192], PART_BYTES).unwrap());
        room.check_empty().unwrap();
        let read = std::fs::read(&target.path).unwrap();
        assert!(read.len() as u64 == size && read[..PART_BYTES as usize].iter().all(|b| *b == 0));
        let behind = &read[PART_BYTES as usize..];
        assert!(behind[..8192] == [1; 8192] && behind[8192..] == [2; 100]);
    }

    #[test]
    fn without_room_nothing_is_taken_until_there_is_some_again() {
        let folder = tempfile::tempdir().unwrap();
        let room = Arc::new(Room::default());
        let target = target(&folder, (ROOM_PARTS as u64 + 2) * 8192);
        let part = |n: u64| Part::new(target.clone(), n * 8192, 8192, room.clone());
        let full: Vec<Part> = (0..ROOM_PARTS as u64).map(part).collect();
        for (part, n) in full.iter().zip(0..) {
            assert!(part.take(&[1; 100], n * 8192).unwrap());
        }
        let left_out = part(ROOM_PARTS as u64);
        assert!(!left_out.take(&[1; 100], ROOM_PARTS as u64 * 8192).unwrap());
        assert!(full[0].take(&[1; 8092], 100).unwrap());
        // Once it is written in pieces, all of it is.
        assert!(!left_out.take(&[1; 8092], ROOM_PARTS as u64 * 8192 + 100).unwrap());
        assert!(
            part(ROOM_PARTS as u64 + 1).take(&[1; 100], (ROOM_PARTS as u64 + 1) * 8192).unwrap()
        );
    }
}
