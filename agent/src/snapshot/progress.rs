//! How far a snapshot has come: counted by the threads that read, told by a watch and, now and then, by the log.

use super::{Phase, SnapshotProgress};
use backstay_common::id::SnapshotId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;

const TOLD_EVERY: Duration = Duration::from_millis(250);
const LOGGED_EVERY: Duration = Duration::from_secs(10);

/// The counters of one snapshot.
#[derive(Debug)]
pub struct Meter {
    told: watch::Sender<SnapshotProgress>,
    bytes_done: AtomicU64,
    read_bytes: AtomicU64,
    changed_bytes: AtomicU64,
    files_done: AtomicU64,
    stored_bytes: AtomicU64,
}

impl Meter {
    pub fn new(id: SnapshotId, told: watch::Sender<SnapshotProgress>) -> Meter {
        told.send_replace(SnapshotProgress {
            id: Some(id),
            started: Some(jiff::Timestamp::now()),
            ..SnapshotProgress::default()
        });
        let zero = AtomicU64::default;
        Meter {
            told,
            bytes_done: zero(),
            read_bytes: zero(),
            changed_bytes: zero(),
            files_done: zero(),
            stored_bytes: zero(),
        }
    }

    pub fn expect(&self, files: u64, bytes: u64) {
        self.told.send_modify(|told| (told.files_total, told.bytes_total) = (files, bytes));
    }

    pub fn enter(&self, phase: Phase) {
        self.told.send_modify(|told| told.phase = phase);
        self.tell();
    }

    /// So many bytes of the database are done, whether they had to be read or not.
    pub fn done(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes were read, of which so many are not as the parent has them.
    pub fn read(&self, bytes: u64, changed: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.changed_bytes.fetch_add(changed, Ordering::Relaxed);
    }

    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    pub fn changed_bytes(&self) -> u64 {
        self.changed_bytes.load(Ordering::Relaxed)
    }

    pub fn file(&self) {
        self.files_done.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes of an object that was sealed; counted once, whatever the number of locations.
    pub fn sealed(&self, bytes: u64) {
        self.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Tells how far it is, from time to time. Never ends; safe to drop.
    pub async fn keep_telling(&self) {
        let mut logged = Instant::now();
        loop {
            tokio::time::sleep(TOLD_EVERY).await;
            self.tell();
            if logged.elapsed() >= LOGGED_EVERY {
                logged = Instant::now();
                self.log();
            }
        }
    }

    fn tell(&self) {
        self.told.send_modify(|told| {
            told.bytes_done = self.bytes_done.load(Ordering::Relaxed);
            told.files_done = self.files_done.load(Ordering::Relaxed);
            told.stored_bytes = self.stored_bytes.load(Ordering::Relaxed);
            // The database grows while it is counted.
            told.bytes_total = told.bytes_total.max(told.bytes_done);
            told.files_total = told.files_total.max(told.files_done);
        });
    }

    fn log(&self) {
        let told = self.told.borrow();
        let percent = told.bytes_done * 100 / told.bytes_total.max(1);
        tracing::info!(
            snapshot = told.id.map(tracing::field::display),
            bytes_done = told.bytes_done,
            bytes_total = told.bytes_total,
            stored_bytes = told.stored_bytes,
            "snapshot {}, {percent} % read",
            told.phase
        );
    }
}
