//! Does the store keep the promises that the layout rests on?
//!
//! Asked by `init` and `check`, with small objects under `probe/` that are deleted afterwards. The
//! one that matters most cannot be seen from answers alone: some servers accept a create-if-absent
//! and write over the object all the same, and two agents would then believe that each of them was
//! first.

use super::{Location, OBJECT_BYTES_MAX};
use crate::error::{Context, Error, Kind, Result};
use crate::id::random_bytes;
use bytes::Bytes;
use std::time::{Duration, Instant};

/// What a probe found. What the layout cannot do without is an error instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Whether this identity may delete. One that may not can still ship and snapshot, and cannot
    /// prune.
    pub deletes: bool,
    /// How long the first small object took to store.
    pub put_time: Duration,
    /// The largest object that is ever written, in bytes.
    pub object_bytes_max: u64,
}

const PROBE_BYTES: usize = 8192;

impl Location {
    /// Writes, reads, lists and deletes; refuses by name a store that cannot hold a location.
    pub async fn probe(&self) -> Result<Probe> {
        let stamp = u64::from_be_bytes(random_bytes());
        let folder = format!("probe/{stamp:016x}/");
        let paths = [format!("{folder}1"), format!("{folder}2")];
        let result = self.try_out(&folder, &paths).await;
        let deleted = self.delete_at(&paths).await;
        let put_time = result.context("probe")?;
        let deletes = deleted.is_ok() && self.size_at(&paths[0]).await?.is_none();
        Ok(Probe { deletes, put_time, object_bytes_max: OBJECT_BYTES_MAX })
    }

    /// The store's clock, as a fresh object shows it: the one clock that tells how long an object has been there. The
    /// object, under `probe/`, is deleted again if this identity may.
    pub async fn clock(&self) -> Result<jiff::Timestamp> {
        let folder = format!("probe/{:016x}/", u64::from_be_bytes(random_bytes()));
        let path = format!("{folder}clock");
        self.put_at(&path, Bytes::from(random_bytes::<16>().to_vec())).await?;
        let listed = self.list(&folder).await;
        // Nobody misses what is left under `probe/`.
        let _ = self.delete_at(std::slice::from_ref(&path)).await;
        let found = listed?.into_iter().find(|object| object.path == path);
        found
            .map(|object| object.modified)
            .ok_or_else(|| self.unfit("a listing does not show what has just been stored"))
    }

    async fn try_out(&self, folder: &str, paths: &[String; 2]) -> Result<Duration> {
        let bytes = Bytes::from(random_bytes::<PROBE_BYTES>().to_vec());
        let other = Bytes::from(random_bytes::<PROBE_BYTES>().to_vec());
        let start = Instant::now();
        self.put_at(&paths[0], bytes.clone()).await?;
        let put_time = start.elapsed();
        let refused = self.refuses_to_overwrite(&paths[0], other).await?;
        let kept = self.range_at(&paths[0], 0..PROBE_BYTES as u64).await?;
        if !refused || kept != bytes {
            return Err(self
                .unfit("it wrote over an object in spite of create-if-absent (If-None-Match: *)"));
        }
        let some = self.range_at(&paths[0], 100..4196).await?;
        if some != bytes.slice(100..4196) {
            return Err(self.unfit("it answered a range of an object with other bytes"));
        }
        self.put_at(&paths[1], bytes).await?;
        let seen = |listed: Vec<super::Listed>| -> Vec<String> {
            listed.into_iter().map(|object| object.path).collect()
        };
        if seen(self.list(folder).await?) != paths[..]
            || seen(self.list_from(folder, &paths[0]).await?) != paths[1..]
        {
            return Err(self.unfit("a listing does not show what has just been stored"));
        }
        Ok(put_time)
    }

    fn unfit(&self, reason: &str) -> Error {
        let what = format!("the store at {} cannot be used: {reason}", self.url());
        Error::new(Kind::Storage, format!("location {}: {what}", self.name()))
            .remedy("use a store that honours conditional writes and consistent reads and listings")
    }
}
