//! Cuts what the walk finds into jobs for the readers: big files into runs of pages, small files into bundles.
//!
//! The assembler is told of each file, in order, before any job of it can be done.

use super::assemble::{Begun, Message};
use super::walk::{self, Found, Tree, What, unreadable};
use backstay_common::seal::FRAME_BYTES_MAX;
use backstay_common::{Error, Kind, Result};
use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use tokio::sync::mpsc;

/// Files below this share frames.
const SMALL_BELOW: u64 = 64 << 10;
const BUNDLE_FILES_MAX: usize = 1024;
/// A bundle is read at the latest when so many runs came after its first file: what waits for it is bounded.
const BUNDLE_WAITS_MAX: u32 = 256;

/// Something to read that becomes one frame.
#[derive(Debug)]
pub enum Job {
    Run(Run),
    Bundle(Vec<SmallFile>),
}

/// Pages of one file, in order.
#[derive(Debug)]
pub struct Run {
    pub file: Arc<OpenFile>,
    /// Which run of the file.
    pub part: u32,
    pub offset: u64,
    pub bytes: usize,
}

/// A file that is read by several readers at once.
#[derive(Debug)]
pub struct OpenFile {
    pub number: u64,
    pub path: String,
    pub handle: File,
    pub segment: Option<u32>,
}

/// A file that is read whole.
#[derive(Debug)]
pub struct SmallFile {
    pub number: u64,
    pub source: PathBuf,
    pub bytes: usize,
    pub segment: Option<u32>,
}

/// The files in order, and what is to be done with them.
#[derive(Debug)]
pub struct Cutter {
    jobs: SyncSender<Job>,
    messages: mpsc::Sender<Message>,
    run_bytes: usize,
    next_number: u64,
    bundle: Vec<SmallFile>,
    bundle_bytes: usize,
    runs_since: u32,
}

impl Cutter {
    pub fn new(jobs: SyncSender<Job>, messages: mpsc::Sender<Message>, page_bytes: u32) -> Cutter {
        let run_bytes = FRAME_BYTES_MAX - FRAME_BYTES_MAX % page_bytes as usize;
        Cutter {
            jobs,
            messages,
            run_bytes,
            next_number: 0,
            bundle: Vec::new(),
            bundle_bytes: 0,
            runs_since: 0,
        }
    }

    /// Cuts all of `tree`; a fault goes to the assembler. Blocks.
    pub fn cut(mut self, tree: &Tree) {
        let done = walk::walk(tree, &mut |found| self.found(found)).and_then(|()| self.flush());
        if let Err(error) = done {
            // Nobody listens if the snapshot has been given up.
            let _ = self.messages.blocking_send(Message::Failed(error));
        }
    }

    fn found(&mut self, found: Found) -> Result<()> {
        match found.what {
            What::Folder => self.begin(&found, true, 0).map(drop),
            What::File { size: 0, .. } => self.begin(&found, false, 0).map(drop),
            What::File { size, segment } if size < SMALL_BELOW => self.small(found, size, segment),
            What::File { size, segment } => self.big(found, size, segment),
        }
    }

    fn begin(&mut self, found: &Found, is_folder: bool, parts: u32) -> Result<u64> {
        let number = self.next_number;
        self.next_number += 1;
        let begun = Begun { path: found.path.clone(), mode: found.mode, is_folder, parts };
        self.messages.blocking_send(Message::Begun(begun)).map_err(|_| given_up())?;
        Ok(number)
    }

    fn small(&mut self, found: Found, size: u64, segment: Option<u32>) -> Result<()> {
        let bytes = size as usize;
        if self.bundle_bytes + bytes > FRAME_BYTES_MAX || self.bundle.len() == BUNDLE_FILES_MAX {
            self.flush()?;
        }
        let number = self.begin(&found, false, 1)?;
        self.bundle.push(SmallFile { number, source: found.source, bytes, segment });
        self.bundle_bytes += bytes;
        Ok(())
    }

    fn big(&mut self, found: Found, size: u64, segment: Option<u32>) -> Result<()> {
        let handle = match File::open(&found.source) {
            Ok(handle) => handle,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(unreadable(&found.source, e)),
        };
        let parts = u32::try_from(size.div_ceil(self.run_bytes as u64)).map_err(|_| {
            Error::new(Kind::Local, format!("{} is too large", found.source.display()))
        })?;
        let number = self.begin(&found, false, parts)?;
        let file = Arc::new(OpenFile { number, path: found.path, handle, segment });
        for part in 0..parts {
            let offset = u64::from(part) * self.run_bytes as u64;
            let bytes = (size - offset).min(self.run_bytes as u64) as usize;
            self.give(Job::Run(Run { file: file.clone(), part, offset, bytes }))?;
            self.runs_since += 1;
            if self.runs_since >= BUNDLE_WAITS_MAX {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        (self.bundle_bytes, self.runs_since) = (0, 0);
        match std::mem::take(&mut self.bundle) {
            bundle if bundle.is_empty() => Ok(()),
            bundle => self.give(Job::Bundle(bundle)),
        }
    }

    fn give(&self, job: Job) -> Result<()> {
        self.jobs.send(job).map_err(|_| given_up())
    }
}

fn given_up() -> Error {
    Error::new(Kind::Cancelled, "the snapshot was given up")
}
