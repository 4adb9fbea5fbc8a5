//! Reading: whole objects, ranges, sizes.
//!
//! Every request asks for at most 64 MiB and has its own retries, so a reader that is slow to take
//! what it asked for never holds a connection open.

use super::url::Store;
use super::{Location, OBJECT_BYTES_MAX};
use crate::error::{Error, Kind, Result};
use crate::name::ObjectName;
use bytes::Bytes;
use object_store::{Error as StoreError, GetOptions, ObjectStore, ObjectStoreExt};
use std::ops::Range;

impl Location {
    /// The whole object. Kind `Missing` if it is not there; one of more than 64 MiB is none of
    /// ours: `Corrupt`.
    pub async fn get(&self, name: &ObjectName) -> Result<Bytes> {
        let path = name.to_string();
        let at = self.at(&path)?;
        let answer = match self.0.reads.get_opts(&at, GetOptions::default()).await {
            Ok(answer) => answer,
            Err(error) => return Err(self.read_fault(&path, &error).await),
        };
        let size = answer.meta.size;
        if size > OBJECT_BYTES_MAX {
            let reason = format!("{size} bytes are more than any object has");
            return Err(Error::new(Kind::Corrupt, self.say("read", &path, &reason)));
        }
        let bytes = answer.bytes().await.map_err(|e| self.fault("read", &path, &e))?;
        self.whole(&path, bytes, size)
    }

    /// Exactly the bytes of `range`, at most 64 MiB. Kind `Missing` if the object is not there,
    /// `Corrupt` if it ends before the range does.
    pub async fn get_range(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes> {
        self.range_at(&name.to_string(), range).await
    }

    /// The object's size in bytes; `None` if it is not there.
    pub async fn size(&self, name: &ObjectName) -> Result<Option<u64>> {
        self.size_at(&name.to_string()).await
    }

    pub(super) async fn range_at(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        let wanted = range.end.saturating_sub(range.start);
        if wanted > OBJECT_BYTES_MAX || range.start > range.end {
            let reason = format!("bytes {} to {} in one piece", range.start, range.end);
            return Err(Error::new(Kind::Bug, self.say("read", path, &reason)));
        }
        if wanted == 0 {
            return Ok(Bytes::new());
        }
        match self.0.reads.get_range(&self.at(path)?, range.clone()).await {
            Ok(bytes) => self.whole(path, bytes, wanted),
            Err(error @ StoreError::NotFound { .. }) => Err(self.read_fault(path, &error).await),
            // Stores have no common way to say that a range is outside the object.
            Err(error) => match self.size_at(path).await {
                Ok(Some(size)) if size < range.end => Err(self.short(path, size, range.end)),
                _ => Err(self.fault("read", path, &error)),
            },
        }
    }

    /// Whether the object at `path` is one of several versions that the store would keep; for the probe. Google's objects have a
    /// generation whether older ones are kept or not.
    pub(super) async fn has_versions(&self, path: &str) -> Result<bool> {
        if !matches!(self.0.store, Some(Store::S3 | Store::Azure)) {
            return Ok(false);
        }
        let meta = self.0.reads.head(&self.at(path)?).await;
        let meta = meta.map_err(|error| self.fault("look at", path, &error))?;
        // Where versions were kept once and are no more, all new ones have the same name.
        Ok(meta.version.is_some_and(|version| version != "null"))
    }

    pub(super) async fn size_at(&self, path: &str) -> Result<Option<u64>> {
        let at = self.at(path)?;
        let error = match self.0.reads.head(&at).await {
            Ok(meta) => return Ok(Some(meta.size)),
            Err(error @ StoreError::NotFound { .. }) => error,
            Err(error) => return Err(self.fault("look at", path, &error)),
        };
        // The answer to HEAD has no body that could tell a missing bucket from a missing object.
        let error = match self.0.disk {
            Some(_) => error,
            None => match self.0.reads.get_opts(&at, GetOptions::default()).await {
                Ok(answer) => return Ok(Some(answer.meta.size)),
                Err(error) => error,
            },
        };
        match self.read_fault(path, &error).await {
            error if error.kind() == Kind::Missing => Ok(None),
            error => Err(error),
        }
    }

    /// In a folder that is not mounted nothing is missing: it is the folder that is not there.
    async fn read_fault(&self, path: &str, error: &StoreError) -> Error {
        match self.on_disk(|disk| disk.check()).await {
            Ok(_) => self.fault("read", path, error),
            Err(error) => error,
        }
    }

    fn whole(&self, path: &str, bytes: Bytes, wanted: u64) -> Result<Bytes> {
        match bytes.len() as u64 {
            got if got == wanted => Ok(bytes),
            got => Err(self.short(path, got, wanted)),
        }
    }

    fn short(&self, path: &str, got: u64, wanted: u64) -> Error {
        let reason = format!("the object ends after {got} bytes, before byte {wanted}");
        Error::new(Kind::Corrupt, self.say("read", path, &reason))
    }
}
