//! Create-if-absent, and finding out what became of a write.
//!
//! A store that lost the connection after it stored an object answers the second try with "exists",
//! and one that hangs answers nothing: only the object itself says whose write it was. So after
//! "exists", and after any failure that may have come too late, the object is looked at: equal
//! means done, absent means try again, and other bytes under the name are never taken for ours.

use super::{Location, OBJECT_BYTES_MAX, fault};
use crate::error::{Context, Error, Kind, Result};
use crate::id::random_bytes;
use crate::name::ObjectName;
use bytes::Bytes;
use object_store::path::Path;
use object_store::{Error as StoreError, ObjectStore, PutMode, PutOptions};
use std::path::PathBuf;
use std::time::Duration;

/// Writes of one `put`, with growing pauses between them.
const ATTEMPTS: u32 = 4;
const PAUSE_FIRST: Duration = Duration::from_millis(200);

/// Up to here what is found is compared whole; beyond, its size, its head and its trailer.
const COMPARED_WHOLE_MAX: u64 = 1 << 20;
/// The header of a sealed object is shorter.
const HEAD_BYTES: u64 = 4096;
/// The length of the footer, and the BLAKE3 hash of all that precedes.
const TRAIL_BYTES: u64 = 4 + 32;

/// How an object came to be where it was to be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// This call stored it.
    Created,
    /// The same bytes are there: from before, or from a write of ours whose answer was lost.
    Present,
}

/// How a name came to be taken that several may want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutNew {
    /// This call took it.
    Created,
    /// It holds these very bytes already.
    Present,
    /// It holds other bytes: somebody else was first.
    Conflict,
}

enum Outcome {
    Created,
    Equal,
    Different,
}

/// What one request says.
enum Answer {
    Created,
    Exists,
    /// It failed, and may have been carried out all the same.
    Unknown(Error),
    Refused(Error),
}

/// What is found under a name.
enum Found {
    Equal,
    Different,
    Absent,
}

impl Location {
    /// Stores `bytes` under `name`, at most 64 MiB, unless it is there already. Other bytes under
    /// the name are an error of kind `Corrupt`; one that a store gives or is silent about, after
    /// some tries, of kind `Storage`.
    pub async fn put(&self, name: &ObjectName, bytes: Bytes) -> Result<Put> {
        let path = name.to_string();
        match self.store(&path, bytes).await? {
            Outcome::Created => Ok(Put::Created),
            Outcome::Equal => Ok(Put::Present),
            Outcome::Different => Err(Error::new(
                Kind::Corrupt,
                self.say("put", &path, "two contents under one name: other bytes are there"),
            )
            .remedy("run `backstay verify` to find out which of the locations holds a bad copy")),
        }
    }

    /// Like `put`, for a name that others may be taking at this moment: to find other bytes is an
    /// outcome, not an error.
    pub async fn put_new(&self, name: &ObjectName, bytes: Bytes) -> Result<PutNew> {
        Ok(match self.store(&name.to_string(), bytes).await? {
            Outcome::Created => PutNew::Created,
            Outcome::Equal => PutNew::Present,
            Outcome::Different => PutNew::Conflict,
        })
    }

    async fn store(&self, path: &str, bytes: Bytes) -> Result<Outcome> {
        if bytes.len() as u64 > OBJECT_BYTES_MAX {
            let reason = format!("{} bytes are more than one object may have", bytes.len());
            return Err(Error::new(Kind::Bug, self.say("put", path, &reason)));
        }
        let at = self.at(path)?;
        let file = PathBuf::from(format!("/{at}"));
        let folder = file.clone();
        let root = self.on_disk(move |disk| disk.prepare(&folder)).await?;
        let stored = self.store_prepared(path, &at, &file, &bytes).await?;
        if let Some(root) = root {
            self.on_disk(move |disk| disk.confirm(root)).await?;
        }
        Ok(stored)
    }

    async fn store_prepared(
        &self,
        path: &str,
        at: &Path,
        file: &std::path::Path,
        bytes: &Bytes,
    ) -> Result<Outcome> {
        let mut last = None;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(pause(attempt)).await;
            }
            let failure = match self.create(path, at, bytes).await {
                Answer::Created => return Ok(Outcome::Created),
                Answer::Refused(error) => return Err(error),
                Answer::Exists => None,
                Answer::Unknown(error) => Some(error),
            };
            match (self.compare(path, bytes).await, failure) {
                (Ok(Found::Equal), _) => {
                    let file = file.to_path_buf();
                    self.on_disk(move |disk| disk.settle(&file)).await?;
                    return Ok(Outcome::Equal);
                }
                (Ok(Found::Different), _) => return Ok(Outcome::Different),
                (Ok(Found::Absent), failure) => last = failure,
                (Err(_), Some(failure)) => return Err(failure),
                (Err(error), None) => {
                    return Err(error).context("read back what is there already");
                }
            }
        }
        Err(last.unwrap_or_else(|| {
            let reason = "the store says that it exists, and that it does not";
            Error::new(Kind::Storage, self.say("put", path, reason))
        }))
    }

    /// One request.
    async fn create(&self, path: &str, at: &Path, bytes: &Bytes) -> Answer {
        let options = PutOptions { mode: PutMode::Create, ..Default::default() };
        let put = self.0.writes.put_opts(at, bytes.clone().into(), options);
        let limit = self.patience(bytes.len() as u64);
        let error = match tokio::time::timeout(limit, put).await {
            Ok(Ok(_)) => return Answer::Created,
            Ok(Err(StoreError::AlreadyExists { .. })) => return Answer::Exists,
            Ok(Err(error)) => error,
            Err(_) => {
                let reason = format!("no answer in {} s", limit.as_secs());
                return Answer::Unknown(Error::new(Kind::Storage, self.say("put", path, &reason)));
            }
        };
        let said = self.fault("put", path, &error);
        // A disk that failed once is not tried again: what it forgot may look stored from then on.
        match fault::is_refusal(&error) || self.0.disk.is_some() {
            true => Answer::Refused(said),
            false => Answer::Unknown(said),
        }
    }

    async fn compare(&self, path: &str, bytes: &Bytes) -> Result<Found> {
        let ours = bytes.len() as u64;
        match self.size_at(path).await? {
            None => return Ok(Found::Absent),
            Some(size) if size != ours => return Ok(Found::Different),
            Some(_) => {}
        }
        let (head, trail) = match ours <= COMPARED_WHOLE_MAX {
            true => (ours, ours),
            false => (HEAD_BYTES, ours - TRAIL_BYTES),
        };
        for range in [0..head, trail..ours] {
            let mine = &bytes[range.start as usize..range.end as usize];
            match self.range_at(path, range).await {
                Ok(theirs) if theirs == mine => {}
                Ok(_) => return Ok(Found::Different),
                Err(error) if error.kind() == Kind::Missing => return Ok(Found::Absent),
                Err(error) => return Err(error),
            }
        }
        Ok(Found::Equal)
    }

    /// Whether the store refuses to write over `path`; for the probe.
    pub(super) async fn refuses_to_overwrite(&self, path: &str, bytes: Bytes) -> Result<bool> {
        match self.create(path, &self.at(path)?, &bytes).await {
            Answer::Exists => Ok(true),
            Answer::Created => Ok(false),
            Answer::Unknown(error) | Answer::Refused(error) => Err(error),
        }
    }

    /// `put` of what has no name of ours; for the probe.
    pub(super) async fn put_at(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.store(path, bytes).await.map(drop)
    }
}

/// Doubles each time, with up to as much again at random, so that many writers don't come back
/// together.
fn pause(attempt: u32) -> Duration {
    let base = PAUSE_FIRST * 2u32.pow(attempt - 1);
    base + base * u32::from(random_bytes::<1>()[0]) / 256
}
