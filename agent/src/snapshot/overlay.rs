//! A file's map from its map in the parent and what was stored anew: pure.

use backstay_common::snapshot::{FileMap, FrameRef, Run};
use backstay_common::{Error, Kind, Result};
use std::collections::HashMap;

/// Pages that lie one behind the other in a new frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    pub first_page: u32,
    pub pages: u32,
    pub frame: FrameRef,
    /// Where the first page lies in the frame's plain bytes.
    pub at: u32,
}

/// The map of a file of `pages` pages: the new frames where there are any, else the parent's.
///
/// `stored` may come in any order, and may reach behind the file's end, for a file that shrank while it was read. Every page
/// that it does not name must be in `old`, unchanged.
pub fn overlay(
    old: &FileMap,
    mut stored: Vec<Stored>,
    pages: u32,
    page_bytes: u32,
) -> Result<FileMap> {
    stored.sort_unstable_by_key(|stored| stored.first_page);
    let mut map = Growing::new(page_bytes, pages);
    let mut rest = old.runs.as_slice();
    for new in stored.iter().filter(|new| new.first_page < pages) {
        map.keep(old, &mut rest, new.first_page)?;
        if new.first_page < map.next {
            return Err(Error::new(Kind::Bug, "a page of a snapshot was stored twice"));
        }
        map.push(new.frame, new.first_page, new.pages, new.at);
    }
    map.keep(old, &mut rest, pages)?;
    Ok(map.map)
}

/// Plain bytes of the frames that a restore of the file reads.
pub fn read_bytes(map: &FileMap) -> u64 {
    map.frames.iter().map(|frame| u64::from(frame.span.plain_bytes)).sum()
}

/// A map that is put together in the order of pages.
struct Growing {
    map: FileMap,
    numbers: HashMap<FrameRefKey, u32>,
    page_bytes: u32,
    pages: u32,
    next: u32,
}

type FrameRefKey = (backstay_common::id::ObjectId, u32);

impl Growing {
    fn new(page_bytes: u32, pages: u32) -> Growing {
        let (map, numbers) = (FileMap::default(), HashMap::new());
        Growing { map, numbers, page_bytes, pages, next: 0 }
    }

    /// Takes the parent's pages from `next` up to and without `end`.
    fn keep(&mut self, old: &FileMap, rest: &mut &[Run], end: u32) -> Result<()> {
        while self.next < end {
            let missing = || Error::new(Kind::Bug, "a page is neither stored nor in the parent");
            let (run, after) = rest.split_first().ok_or_else(missing)?;
            let run_end = run.first_page + run.pages;
            if run_end <= self.next {
                *rest = after;
                continue;
            }
            let skipped = self.next.checked_sub(run.first_page).ok_or_else(missing)?;
            let frame = *old.frames.get(run.frame as usize).ok_or_else(missing)?;
            let at = run.at + skipped * self.page_bytes;
            self.push(frame, self.next, run_end.min(end) - self.next, at);
        }
        Ok(())
    }

    fn push(&mut self, frame: FrameRef, first_page: u32, pages: u32, at: u32) {
        let pages = pages.min(self.pages - first_page);
        let map = &mut self.map;
        let number = *self.numbers.entry((frame.pack, frame.span.number)).or_insert_with(|| {
            map.frames.push(frame);
            map.frames.len() as u32 - 1
        });
        self.next = first_page + pages;
        match map.runs.last_mut() {
            Some(last) if last.frame == number && last.at + last.pages * self.page_bytes == at => {
                last.pages += pages;
            }
            _ => map.runs.push(Run { first_page, pages, frame: number, at }),
        }
    }
}

#[cfg(test)]
mod tests;
