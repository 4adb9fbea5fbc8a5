//! The threads that read, and the cutter that gives them their jobs.

use super::assemble::Message;
use super::cache::CacheWriter;
use super::cut::{Cutter, Links};
use super::leftover::Leftover;
use super::pace::Pace;
use super::parent::Parent;
use super::priority;
use super::progress::Meter;
use super::read::{Reader, Reading};
use super::walk::Tree;
use backstay_common::config::Priority;
use backstay_common::{Context, Result};
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Frames that wait for the assembler, of at most 1 MiB each.
const MESSAGES_MAX: usize = 16;

/// The threads that read, and what they are given.
#[derive(Clone, Debug)]
pub struct Pool {
    pub reading: Arc<Reading>,
    pub parent: Option<Arc<Parent>>,
    pub leftover: Arc<Leftover>,
    pub cache: Arc<CacheWriter>,
    pub meter: Arc<Meter>,
    pub pace: Arc<Pace>,
    pub priority: Priority,
    pub readers: usize,
    /// Jobs that may wait for them.
    pub jobs_max: usize,
}

impl Pool {
    /// Starts the cutter and the readers. They end by themselves when the receiver is dropped. What they say is all only if the
    /// cutter ended without a panic.
    pub fn start_on(self, tree: &Tree) -> Result<(mpsc::Receiver<Message>, JoinHandle<()>)> {
        let (links, messages) = self.start()?;
        let (cutter, tree) = (Cutter::new(links), tree.clone());
        Ok((messages, tokio::task::spawn_blocking(move || cutter.cut(&tree))))
    }

    /// Starts the readers. They end by themselves when the links or the receiver are dropped.
    pub fn start(self) -> Result<(Links, mpsc::Receiver<Message>)> {
        let (messages, receiver) = mpsc::channel(MESSAGES_MAX);
        let (give, jobs) = std::sync::mpsc::sync_channel(self.jobs_max);
        let jobs = Arc::new(Mutex::new(jobs));
        let Pool { reading, parent, leftover, cache, meter, pace, priority, .. } = self;
        for _ in 0..self.readers {
            let (leftover, pace) = (leftover.clone(), pace.clone());
            let (cache, meter) = (cache.clone(), meter.clone());
            let messages = messages.clone();
            let reader = Reader::new(reading.clone(), meter, cache, leftover, pace, messages)?;
            let jobs = jobs.clone();
            // A thread of its own, since it can't take its priority back.
            let thread = std::thread::Builder::new().name("snapshot-reader".into());
            let work = move || {
                priority::take(priority);
                reader.work(&jobs);
            };
            thread.spawn(work).context("start a thread that reads files")?;
        }
        let page_bytes = reading.page_bytes;
        Ok((Links { jobs: give, messages, parent, cache, meter, page_bytes }, receiver))
    }
}
