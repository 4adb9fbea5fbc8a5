//! Create-if-absent, and finding out what became of a write.
//!
//! A store that lost the connection after it stored an object answers the second try with "exists",
//! and one that hangs answers nothing: only the object itself says whose write it was. So after
//! "exists", and after any failure that may have come too late, the object is looked at: equal
//! means done, absent means try again, and other bytes under the name are never taken for ours.
//!
//! A store that ignores conditions gets one writer only, and is looked at before each write as well. Within
//! this process writers of one name take turns there.

use super::connector::{Crc32c, Instead};
use super::url::Store;
use super::{Location, OBJECT_BYTES_MAX, fault};
use crate::error::{Context, Error, Kind, Result};
use crate::id::random_bytes;
use crate::name::ObjectName;
use bytes::Bytes;
use object_store::path::Path;
use object_store::{Attribute, Error as StoreError, ObjectStore, PutMode, PutOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{Mutex, MutexGuard};

/// Writes of one `put`, with growing pauses between them.
const ATTEMPTS: u32 = 4;
const PAUSE_FIRST: Duration = Duration::from_millis(200);

/// Up to here what is found is compared whole; beyond, its size, its head and its trailer.
const COMPARED_WHOLE_MAX: u64 = 1 << 20;
/// The header of a sealed object is shorter.
const HEAD_BYTES: u64 = 4096;
/// Smaller objects cost more in the classes that bill a least size, and are wanted soon and often.
const CLASSED_BYTES_MIN: usize = 128 << 10;
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

/// Turns of the writers of one process, by name: few enough to be cheap, and enough not to be in each other's way.
pub(super) struct Turns([Mutex<()>; 64]);

impl Default for Turns {
    fn default() -> Turns {
        Turns(std::array::from_fn(|_| Mutex::default()))
    }
}

impl Turns {
    async fn take(&self, path: &str) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        path.hash(&mut hasher);
        self.0[hasher.finish() as usize % self.0.len()].lock().await
    }
}

/// Refuses a storage class whose objects must be asked for hours before they can be read.
pub(super) fn check_storage_class(store: Store, class: &str) -> Result<()> {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    if class.is_empty() || !class.bytes().all(is_word) {
        return Err(Error::new(Kind::Config, "storage-class is not the name of one")
            .remedy("write for example \"STANDARD_IA\", \"NEARLINE\" or \"Cool\""));
    }
    let (offline, instead): (&[&str], _) = match store {
        Store::S3 => (&["GLACIER", "DEEP_ARCHIVE"], "\"GLACIER_IR\" or \"STANDARD_IA\""),
        Store::Azure => (&["ARCHIVE"], "\"Cold\" or \"Cool\""),
        Store::Google => (&[], ""),
    };
    match offline.contains(&class.to_ascii_uppercase().as_str()) {
        false => Ok(()),
        true => Err(Error::new(
            Kind::Config,
            format!("storage-class {class}: what is in it cannot be read at once"),
        )
        .remedy(format!("choose one that can, such as {instead}"))),
    }
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
            .remedy("run `backstay-agent sync --check --deep` to find out which of the locations holds a bad copy")),
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
        let _turn = match self.has_single_writer() {
            true => Some(self.0.turns.take(path).await),
            false => None,
        };
        if self.has_single_writer() {
            match self.compare(path, bytes).await? {
                Found::Equal => return Ok(Outcome::Equal),
                Found::Different => return Ok(Outcome::Different),
                Found::Absent => {}
            }
        }
        let mut last = None;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(pause(attempt)).await;
            }
            let failure = match self.create(at, bytes, self.mode()).await {
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

    /// Some stores that ignore conditions in silence have others beside them that refuse to know them.
    fn mode(&self) -> PutMode {
        match self.has_single_writer() {
            true => PutMode::Overwrite,
            false => PutMode::Create,
        }
    }

    fn options(&self, bytes: &Bytes, mode: PutMode) -> PutOptions {
        let mut options = PutOptions { mode, ..Default::default() };
        let class = self.0.settings.storage_class.as_ref();
        if let Some(class) = class.filter(|_| bytes.len() >= CLASSED_BYTES_MIN) {
            options.attributes.insert(Attribute::StorageClass, class.clone().into());
        }
        options.extensions.insert(Crc32c(crc32c::crc32c(bytes)));
        options
    }

    /// One request.
    async fn create(&self, at: &Path, bytes: &Bytes, mode: PutMode) -> Answer {
        let path = &self.relative(at);
        let options = self.options(bytes, mode);
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
        match self.create(&self.at(path)?, &bytes, PutMode::Create).await {
            Answer::Exists => Ok(true),
            Answer::Created => Ok(false),
            Answer::Unknown(error) | Answer::Refused(error) => Err(error),
        }
    }

    /// Whether the store refuses an object that was damaged on its way; for the probe. `None` where nothing is sent.
    pub(super) async fn refuses_damage(&self, path: &str, bytes: Bytes) -> Result<Option<bool>> {
        if self.0.store.is_none() {
            return Ok(None);
        }
        let mut damaged = bytes.to_vec();
        damaged.iter_mut().take(1).for_each(|byte| *byte ^= 1);
        let mut options = self.options(&bytes, PutMode::Overwrite);
        options.extensions.insert(Instead(damaged.into()));
        let at = self.at(path)?;
        // Any refusal will do. What counts is whether the object is there, for a store may check too late.
        let _ = self.0.writes.put_opts(&at, bytes.into(), options).await;
        Ok(Some(self.size_at(path).await?.is_none()))
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
