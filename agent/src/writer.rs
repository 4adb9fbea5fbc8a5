//! Writes sealed objects to one location, in the order that the format demands: first the wraps of the epoch,
//! read back, then the object.
//!
//! A location that does not show the `cluster` object of this cluster is unavailable: nothing is written there. That is
//! looked at before the first write, after every failure, and before each write to a local folder, whose disk may
//! have been unmounted.

use crate::epochs::Epochs;
use backstay_common::cluster::{ClusterRecord, accepts};
use backstay_common::id::{ClusterName, EpochId, SystemId};
use backstay_common::keys::WRAP_BYTES_MAX;
use backstay_common::location::{Location, Put};
use backstay_common::name::{ObjectName, folder};
use backstay_common::seal::Header;
use backstay_common::{Context, Error, Kind, Result};
use bytes::Bytes;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Mutex;

/// One location, as the agent writes to it. Cheap to share; safe to use from many tasks at once.
#[derive(Debug)]
pub struct Writer {
    location: Location,
    epochs: Arc<Epochs>,
    expected: (ClusterName, SystemId),
    is_known: AtomicBool,
    /// Epochs whose wraps this process has seen at the location.
    ensured: Mutex<HashSet<EpochId>>,
}

impl Writer {
    /// `expected` is the cluster and system whose backups the location must take.
    pub fn new(
        location: Location,
        epochs: Arc<Epochs>,
        expected: (ClusterName, SystemId),
    ) -> Writer {
        let is_known = AtomicBool::new(false);
        Writer { location, epochs, expected, is_known, ensured: Mutex::default() }
    }

    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Stores an object sealed under `epoch`. Tried once: whoever calls decides about trying again.
    pub async fn put(&self, name: &ObjectName, epoch: EpochId, bytes: Bytes) -> Result<Put> {
        let result = self.put_once(name, epoch, bytes).await;
        if result.is_err() {
            self.is_known.store(false, Ordering::Relaxed);
        }
        result
    }

    /// Makes the wraps of an epoch known that another agent, or this one before it lost its state, has stored: those of
    /// the first of `sources`, or else of the location itself, that has any. Objects that are sealed under it can then be copied.
    pub async fn learn_wraps(&self, epoch: EpochId, sources: &[&Location]) -> Result<()> {
        let mut fault = None;
        for from in sources.iter().copied().chain([&self.location]) {
            if self.epochs.wraps(epoch).is_ok() {
                return Ok(());
            }
            // Another may have them.
            fault = self.keep_wraps(epoch, from).await.err().or(fault);
        }
        self.epochs.wraps(epoch).map(drop).map_err(|_| {
            let reason = format!("no location that answers holds the wraps of epoch {epoch}");
            fault.unwrap_or_else(|| Error::new(Kind::Key, reason))
        })
    }

    async fn keep_wraps(&self, epoch: EpochId, from: &Location) -> Result<()> {
        for listed in from.list(&folder::epoch(self.expected.1, epoch)).await? {
            let Some(name @ ObjectName::Wrap { .. }) = listed.name else { continue };
            // Anybody who may write to the store can put junk beside a good wrap: it is passed by.
            if listed.size <= WRAP_BYTES_MAX {
                let bytes = from.get(&name).await?;
                if Header::check(&bytes, &name).is_ok() {
                    self.epochs.keep(&name, &bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Makes sure that objects of `epoch` may be stored: the location is the right one, and has the wraps.
    pub async fn ready(&self, epoch: EpochId) -> Result<()> {
        self.know().await?;
        self.ensure(epoch).await
    }

    async fn put_once(&self, name: &ObjectName, epoch: EpochId, bytes: Bytes) -> Result<Put> {
        let is_folder = self.location.url().starts_with("file:");
        if is_folder || !self.is_known.load(Ordering::Relaxed) {
            self.know().await?;
        }
        self.ensure(epoch).await?;
        self.location.put(name, bytes).await
    }

    async fn know(&self) -> Result<()> {
        let record = ClusterRecord::read(&self.location.require_cluster().await?)?;
        let (cluster, system) = (&self.expected.0, self.expected.1);
        if record.cluster != *cluster || !accepts(&self.location, &record, system).await? {
            let reason = format!(
                "location {} holds cluster {:?}, system {}, and not {system}",
                self.location.name(),
                record.cluster.as_str(),
                record.system
            );
            return Err(Error::new(Kind::Config, reason).remedy("correct the location's url"));
        }
        self.is_known.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn ensure(&self, epoch: EpochId) -> Result<()> {
        let mut ensured = self.ensured.lock().await;
        if ensured.contains(&epoch) {
            return Ok(());
        }
        for wrap in self.epochs.wraps(epoch)? {
            self.location
                .put(&wrap.name, wrap.bytes.clone())
                .await
                .context("store an epoch's wrap")?;
            let stored = self.location.get(&wrap.name).await.context("read a wrap back")?;
            if stored != wrap.bytes {
                let place = self.location.name();
                let reason = format!("location {place} gave back other bytes for {}", wrap.name);
                return Err(Error::new(Kind::Corrupt, reason));
            }
        }
        ensured.insert(epoch);
        Ok(())
    }
}
