//! Cuts files that arrive over the network into the same jobs, with their bytes in them: nothing can be read twice.
//!
//! What is in memory is bounded by the stretch: one that is being filled, one that waits, and one for each reader.

use super::{BUNDLE_FILES_MAX, BUNDLE_WAITS_MAX, Job, Links, OpenFile, SMALL_BELOW, SmallFile};
use super::{SmallSource, Source, Stretch, given_up};
use crate::snapshot::arrive::Sink;
use crate::snapshot::assemble::{Begun, Message};
use crate::snapshot::cache::Known;
use backstay_common::{Error, Kind, Result};
use bytes::Bytes;
use std::sync::Arc;

/// Parts in one stretch: 16 MiB.
const STRETCH_PARTS: u32 = 16;
/// Bytes in one bundle.
const BUNDLE_BYTES: usize = 4 << 20;
/// Stretches and bundles that wait for a reader.
pub const JOBS_MAX: usize = 1;
/// More readers than this a network does not feed.
pub const READERS_MAX: usize = 4;

/// The files as they come, and what is to be done with them.
#[derive(Debug)]
pub struct ArrivingCutter {
    links: Links,
    part_bytes: u64,
    next_number: u64,
    bundle: Vec<SmallFile>,
    bundle_bytes: usize,
    parts_since: u32,
    open: Option<Arriving>,
}

/// The file that is arriving.
#[derive(Debug)]
struct Arriving {
    file: Arc<OpenFile>,
    /// The first part that is in `bytes`.
    next_part: u32,
    bytes: Vec<u8>,
    /// Bytes that were given on already.
    given: u64,
}

impl ArrivingCutter {
    pub fn new(links: Links) -> ArrivingCutter {
        let part_bytes = super::part_bytes(links.page_bytes);
        let (bundle, open) = (Vec::new(), None);
        ArrivingCutter {
            links,
            part_bytes,
            next_number: 0,
            bundle,
            bundle_bytes: 0,
            parts_since: 0,
            open,
        }
    }

    fn begin(
        &mut self,
        path: &str,
        mode: u32,
        is_folder: bool,
        parts: u32,
        known: Option<Arc<Known>>,
    ) -> Result<u64> {
        let number = self.next_number;
        self.next_number += 1;
        let path = path.to_string();
        let begun = Begun { path, mode, is_folder, parts, known, stat: None };
        self.links.messages.blocking_send(Message::Begun(begun)).map_err(|_| given_up())?;
        Ok(number)
    }

    fn stretch_bytes(&self) -> u64 {
        u64::from(STRETCH_PARTS) * self.part_bytes
    }

    /// Gives on what has come of a big file.
    fn give_stretch(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let left = open.file.bytes.saturating_sub(open.given + open.bytes.len() as u64);
        let room = left.min(u64::from(STRETCH_PARTS) * self.part_bytes) as usize;
        let bytes = std::mem::replace(&mut open.bytes, Vec::with_capacity(room));
        let parts = (bytes.len() as u64).div_ceil(self.part_bytes) as u32;
        let range = open.next_part..open.next_part + parts;
        (open.next_part, open.given) = (range.end, open.given + bytes.len() as u64);
        let stretch =
            Stretch { file: open.file.clone(), parts: range, source: Source::Arrived(bytes) };
        self.parts_since += parts;
        self.give(Job::Stretch(stretch))?;
        match self.parts_since >= BUNDLE_WAITS_MAX {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn bundle(&mut self, file: &OpenFile, bytes: Vec<u8>) -> Result<()> {
        let (number, segment, known) = (file.number, file.segment, file.known.clone());
        let (size, source) = (bytes.len(), SmallSource::Arrived(bytes));
        let path = file.path.clone();
        self.bundle.push(SmallFile { number, path, source, bytes: size, segment, known });
        self.bundle_bytes += size;
        match self.bundle.len() == BUNDLE_FILES_MAX || self.bundle_bytes >= BUNDLE_BYTES {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<()> {
        (self.parts_since, self.bundle_bytes) = (0, 0);
        match std::mem::take(&mut self.bundle) {
            bundle if bundle.is_empty() => Ok(()),
            bundle => self.give(Job::Bundle(bundle)),
        }
    }

    fn give(&self, job: Job) -> Result<()> {
        self.links.jobs.send(job).map_err(|_| given_up())
    }
}

impl Sink for ArrivingCutter {
    fn folder(&mut self, path: &str, mode: u32) -> Result<()> {
        self.begin(path, mode, true, 0, None).map(drop)
    }

    fn file(&mut self, path: &str, mode: u32, size: u64, segment: Option<u32>) -> Result<()> {
        let parts = u32::try_from(size.div_ceil(self.part_bytes))
            .map_err(|_| Error::new(Kind::Postgres, format!("{path} is too large")))?;
        let known = match &self.links.parent {
            Some(parent) if size > 0 => parent.known(path)?.map(Arc::new),
            _ => None,
        };
        let number = self.begin(path, mode, false, parts, known.clone())?;
        let file = OpenFile { number, path: path.to_string(), bytes: size, segment, known };
        let bytes = Vec::with_capacity(size.min(self.stretch_bytes()) as usize);
        self.open = Some(Arriving { file: Arc::new(file), next_part: 0, bytes, given: 0 });
        Ok(())
    }

    fn bytes(&mut self, bytes: &Bytes) -> Result<()> {
        let (mut rest, most) = (&bytes[..], self.stretch_bytes() as usize);
        while let Some(open) = &mut self.open
            && !rest.is_empty()
        {
            let (now, later) = rest.split_at(rest.len().min(most - open.bytes.len()));
            open.bytes.extend_from_slice(now);
            rest = later;
            if open.bytes.len() == most {
                self.give_stretch()?;
            }
        }
        Ok(())
    }

    fn file_end(&mut self) -> Result<()> {
        let small = |open: &mut Arriving| open.file.bytes > 0 && open.file.bytes < SMALL_BELOW;
        if let Some(open) = self.open.take_if(small) {
            return self.bundle(&open.file, open.bytes);
        }
        if self.open.as_ref().is_some_and(|open| !open.bytes.is_empty()) {
            self.give_stretch()?;
        }
        self.open = None;
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.flush()
    }
}

#[cfg(test)]
mod tests;
