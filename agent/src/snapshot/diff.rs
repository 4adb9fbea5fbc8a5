//! What is stored of the pages that were read: nothing where they equal the parent's, else image, delta or small frames.
//!
//! ```text
//! a run of pages ── about half of it changed, or more ─► image frame of the run
//!                └─ fewer ─► gathered over a long stretch of the file ─► delta frames
//! a small file   ── changed ─► gathered with others ─► small frames
//! ```
//!
//! One [`Differ`] belongs to one thread. It sends its frames itself; whoever uses it flushes it before he tells that the
//! pages are done ([`Message::Read`]), so that the assembler knows all frames of a file when it knows all of its parts.

use super::assemble::{Held, Message, Packed};
use super::cache::Known;
use super::read::Reading;
use backstay_common::seal::{FRAME_BYTES_MAX, Frame, Packer};
use backstay_common::snapshot::FrameUse;
use backstay_common::{Error, Kind, Result};
use tokio::sync::mpsc;

/// A run of which this much changed is stored whole, in percent: it is then one frame, in order, and supersedes what was
/// stored of it before.
const IMAGE_FROM_PERCENT: usize = 50;

/// One thread's frames in the making.
#[derive(Debug)]
pub struct Differ {
    page_bytes: usize,
    packer: Packer,
    messages: mpsc::Sender<Message>,
    delta: Gather,
    small: Gather,
}

/// A frame that is being filled.
#[derive(Debug, Default)]
struct Gather {
    plain: Vec<u8>,
    hashes: Vec<u8>,
    holds: Vec<Held>,
}

/// Pages of one file that lie one behind the other, with their hashes.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    /// The file's number.
    pub file: u64,
    /// The number of the first in the file.
    pub first: u32,
    pub plain: &'a [u8],
    /// Eight bytes for each page.
    pub hashes: &'a [u8],
}

/// For each page, whether it is to be stored: those that differ from the parent's, and those that the parent has
/// where they cannot stay. `part` is the part of the file that `hashes` are of.
pub fn changed(known: Option<&Known>, part: u32, old: &[u8], hashes: &[u8]) -> Vec<bool> {
    let (old, new) = (old.as_chunks::<8>().0, hashes.as_chunks::<8>().0);
    let Some(known) = known.filter(|known| !known.again) else { return vec![true; new.len()] };
    let first = part * super::part_pages(known.page_bytes());
    let is_changed =
        |(n, hash): (usize, &[u8; 8])| old.get(n) != Some(hash) || known.is_worn(first + n as u32);
    new.iter().enumerate().map(is_changed).collect()
}

/// True if a run of which these pages are to be stored is stored whole.
pub fn is_image(changed: &[bool]) -> bool {
    let count = changed.iter().filter(|changed| **changed).count();
    count > 0 && count * 100 >= changed.len() * IMAGE_FROM_PERCENT
}

impl Differ {
    pub fn new(reading: &Reading, messages: mpsc::Sender<Message>) -> Result<Differ> {
        Ok(Differ {
            page_bytes: reading.page_bytes as usize,
            packer: Packer::new(reading.level)?,
            messages,
            delta: Gather::default(),
            small: Gather::default(),
        })
    }

    /// Stores what changed of a run: at most a frame's bytes.
    pub fn run(&mut self, pages: Pages<'_>, changed: &[bool]) -> Result<()> {
        match is_image(changed) {
            true => self.image(pages),
            false => self.scattered(pages, changed),
        }
    }

    /// Stores a small file whole, with others in one frame.
    pub fn small(&mut self, pages: Pages<'_>) -> Result<()> {
        if self.small.plain.len() + pages.plain.len() > FRAME_BYTES_MAX {
            self.flush_small()?;
        }
        let count = (pages.hashes.len() / 8) as u32;
        self.small.add(pages.file, 0, count, pages.plain, pages.hashes);
        Ok(())
    }

    /// Sends whatever is gathered.
    pub fn flush(&mut self) -> Result<()> {
        self.flush_delta()?;
        self.flush_small()
    }

    pub fn send(&self, message: Message) -> Result<()> {
        let given_up = || Error::new(Kind::Cancelled, "the snapshot was given up");
        self.messages.blocking_send(message).map_err(|_| given_up())
    }

    /// False once the snapshot was given up.
    pub fn is_wanted(&self) -> bool {
        !self.messages.is_closed()
    }

    fn image(&mut self, pages: Pages<'_>) -> Result<()> {
        let Pages { file, first: first_page, plain, hashes } = pages;
        let held = Held { file, first_page, pages: (hashes.len() / 8) as u32, at: 0 };
        self.pack(FrameUse::Image, plain, hashes.to_vec(), vec![held])
    }

    fn scattered(&mut self, pages: Pages<'_>, changed: &[bool]) -> Result<()> {
        let all = pages.plain.chunks(self.page_bytes).zip(pages.hashes.as_chunks::<8>().0);
        let page_numbers = pages.first..;
        for ((page, hash), (number, _)) in
            all.zip(page_numbers.zip(changed)).filter(|(_, (_, changed))| **changed)
        {
            let other = self.delta.holds.last().is_some_and(|held| held.file != pages.file);
            if other || self.delta.plain.len() + page.len() > FRAME_BYTES_MAX {
                self.flush_delta()?;
            }
            self.delta.add(pages.file, number, 1, page, hash);
        }
        Ok(())
    }

    fn flush_delta(&mut self) -> Result<()> {
        let gathered = std::mem::take(&mut self.delta);
        self.delta = self.give(FrameUse::Delta, gathered)?;
        Ok(())
    }

    fn flush_small(&mut self) -> Result<()> {
        let gathered = std::mem::take(&mut self.small);
        self.small = self.give(FrameUse::Small, gathered)?;
        Ok(())
    }

    /// Packs what was gathered; gives back the buffer, empty.
    fn give(&mut self, usage: FrameUse, gathered: Gather) -> Result<Gather> {
        let Gather { mut plain, hashes, holds } = gathered;
        if !holds.is_empty() {
            self.pack(usage, &plain, hashes, holds)?;
        }
        plain.clear();
        Ok(Gather { plain, ..Gather::default() })
    }

    fn pack(
        &mut self,
        usage: FrameUse,
        plain: &[u8],
        hashes: Vec<u8>,
        holds: Vec<Held>,
    ) -> Result<()> {
        let frame = Frame::pack(&mut self.packer, plain)?;
        self.send(Message::Packed(Packed { usage, frame, hashes, holds }))
    }
}

impl Gather {
    fn add(&mut self, file: u64, first_page: u32, pages: u32, plain: &[u8], hashes: &[u8]) {
        let at = self.plain.len() as u32;
        self.plain.extend_from_slice(plain);
        self.hashes.extend_from_slice(hashes);
        self.holds.push(Held { file, first_page, pages, at });
    }
}
