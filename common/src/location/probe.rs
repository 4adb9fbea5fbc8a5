//! Does the store keep the promises that the layout rests on?
//!
//! Asked by `init` and `check`, with small objects under `probe/` that are deleted afterwards. The
//! one that matters most cannot be seen from answers alone: some servers accept a create-if-absent
//! and write over the object all the same, and two agents would then believe that each of them was
//! first. Such a store is refused, unless the config declares that one agent only writes there.

use super::{Listed, Location, OBJECT_BYTES_MAX};
use crate::error::{Context, Error, Kind, Result};
use crate::id::random_bytes;
use bytes::Bytes;
use jiff::SignedDuration;
use std::time::{Duration, Instant};

/// What a probe found. What the layout cannot do without is an error instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Whether this identity may delete. One that may not can still ship and snapshot, and cannot
    /// prune.
    pub deletes: bool,
    /// Whether a create-if-absent leaves alone what is there. False only where the config has `single-writer`.
    pub honours_conditions: bool,
    /// Whether a listing can begin behind a key. If not, whole folders are listed and cut here.
    pub lists_from_key: bool,
    /// Whether an upload that is damaged on its way is refused; `None` for folders.
    pub checks_uploads: Option<bool>,
    /// Whether what is deleted is only hidden, as an older version. Not known of Google's buckets: false.
    pub keeps_versions: bool,
    /// How far the store's clock is ahead of ours, to about a second.
    pub clock_ahead: SignedDuration,
    /// How long the first small object took to store.
    pub put_time: Duration,
    /// The largest object that is ever written, in bytes.
    pub object_bytes_max: u64,
}

const FOLDER: &str = "probe/";
const PROBE_BYTES: usize = 8192;
/// No probe takes so long: an object of this age is one that could not be deleted.
const LEFT_AFTER: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);
/// How often an overloaded store is asked again to delete, so that nothing is left behind.
const DELETED_AGAIN: usize = 3;
const DELETED_AGAIN_AFTER: Duration = Duration::from_millis(700);

impl Location {
    /// Writes, reads, lists and deletes; refuses by name a store that cannot hold a location.
    pub async fn probe(&self) -> Result<Probe> {
        let stamp = u64::from_be_bytes(random_bytes());
        let folder = format!("{FOLDER}{stamp:016x}/");
        let paths = ["1", "2", "3"].map(|n| format!("{folder}{n}"));
        let result = self.try_out(&folder, &paths).await;
        let mut deleted = self.delete_at(&paths).await;
        for _ in 0..DELETED_AGAIN {
            match &deleted {
                Err(error) if super::is_overload(error) => {}
                _ => break,
            }
            tokio::time::sleep(DELETED_AGAIN_AFTER).await;
            deleted = self.delete_at(&paths).await;
        }
        let probe = result.context("probe")?;
        let deletes = deleted.is_ok() && self.size_at(&paths[0]).await?.is_none();
        Ok(Probe { deletes, ..probe })
    }

    /// The store's clock, as a fresh object shows it: the one clock that tells how long an object has been there. The
    /// object, under `probe/`, is deleted again if this identity may, with those that others could not delete.
    pub async fn clock(&self) -> Result<jiff::Timestamp> {
        let path = format!("{FOLDER}{:016x}/clock", u64::from_be_bytes(random_bytes()));
        self.put_at(&path, Bytes::from(random_bytes::<16>().to_vec())).await?;
        let listed = self.list(FOLDER).await;
        let ours = |object: &&Listed| object.path == path;
        let now = listed.as_ref().ok().and_then(|all| all.iter().find(ours)).map(|o| o.modified);
        let is_left = |object: &&Listed| {
            now.is_some_and(|now| now.duration_since(object.modified) > LEFT_AFTER)
        };
        let left = listed.iter().flatten().filter(is_left).map(|object| object.path.clone());
        // Nobody misses what is left until the next time.
        let _ = self.delete_at(&left.chain([path.clone()]).collect::<Vec<_>>()).await;
        listed?;
        now.ok_or_else(|| self.unfit("a listing does not show what has just been stored"))
    }

    async fn try_out(&self, folder: &str, paths: &[String; 3]) -> Result<Probe> {
        let bytes = Bytes::from(random_bytes::<PROBE_BYTES>().to_vec());
        let start = Instant::now();
        self.put_at(&paths[0], bytes.clone()).await?;
        let (put_time, stored) = (start.elapsed(), jiff::Timestamp::now());
        self.put_at(&paths[1], bytes.clone()).await?;
        let some = self.range_at(&paths[0], 100..4196).await?;
        if some != bytes.slice(100..4196) {
            return Err(self.unfit("it answered a range of an object with other bytes"));
        }
        let listed = self.list(folder).await?;
        let from = self.raw_listing(folder, Some(&paths[0])).await?;
        let second = paths[1].as_str();
        if names(&listed) != [&paths[0], second] || !names(&from).contains(&second) {
            return Err(self.unfit("a listing does not show what has just been stored"));
        }
        Ok(Probe {
            deletes: false,
            honours_conditions: self.try_conditions(&paths[0], &bytes).await?,
            lists_from_key: names(&from) == [second],
            checks_uploads: self.refuses_damage(&paths[2], bytes).await?,
            keeps_versions: self.has_versions(&paths[0]).await?,
            clock_ahead: listed[0].modified.duration_since(stored),
            put_time,
            object_bytes_max: OBJECT_BYTES_MAX,
        })
    }

    /// True if the object at `path` stands against other bytes, and nothing else claims to have stored any.
    async fn try_conditions(&self, path: &str, bytes: &Bytes) -> Result<bool> {
        let other = Bytes::from(random_bytes::<PROBE_BYTES>().to_vec());
        let refused = match self.refuses_to_overwrite(path, other).await {
            // Some say that they do not know conditions.
            Err(error) if self.has_single_writer() && !super::is_overload(&error) => false,
            refused => refused?,
        };
        let kept = self.range_at(path, 0..PROBE_BYTES as u64).await?;
        match refused && kept == *bytes {
            false if !self.has_single_writer() => Err(self
                .unfit("it wrote over an object in spite of create-if-absent (a conditional write)")
                .remedy(
                    "use a store that honours conditional writes; or, if one agent only ever \
                     writes there, declare it with single-writer = true",
                )),
            honours => Ok(honours),
        }
    }

    fn unfit(&self, reason: &str) -> Error {
        let what = format!("the store at {} cannot be used: {reason}", self.url());
        Error::new(Kind::Storage, format!("location {}: {what}", self.name()))
            .remedy("use a store that honours conditional writes and consistent reads and listings")
    }
}

fn names(listed: &[Listed]) -> Vec<&str> {
    listed.iter().map(|object| object.path.as_str()).collect()
}
