//! What prune asks of a location: nothing else, so that it can be tried out against one that is made up.

use super::memory::Memory;
use crate::writer::Writer;
use backstay_common::Result;
use backstay_common::id::{EpochId, LocationName, SystemId};
use backstay_common::keys::{Epoch, Keyring};
use backstay_common::location::Listed;
use backstay_common::name::ObjectName;
use backstay_common::seal::Sealed;
use bytes::Bytes;
use jiff::Timestamp;
use std::sync::Arc;

/// One location. Every future may be dropped at any time; a change that is dropped may or may not have happened.
pub trait Store: Sync {
    fn name(&self) -> &LocationName;

    /// As [`backstay_common::location::Location::list`]; refuses a location that is not ours.
    fn list(&self, folder: &str) -> impl Future<Output = Result<Vec<Listed>>> + Send;

    fn get(&self, name: &ObjectName) -> impl Future<Output = Result<Bytes>> + Send;

    /// Stores what was sealed under `epoch`, whose wraps go first.
    fn put(&self, sealed: Sealed, epoch: EpochId) -> impl Future<Output = Result<()>> + Send;

    /// Deletes all of `names`, durably; tries all before it reports the first fault.
    fn delete(&self, names: &[ObjectName]) -> impl Future<Output = Result<()>> + Send;

    /// The store's own clock; refuses a location that is not ours.
    fn clock(&self) -> impl Future<Output = Result<Timestamp>> + Send;

    fn epoch(&self, id: EpochId) -> impl Future<Output = Result<Arc<Epoch>>> + Send;

    /// What has been read of it.
    fn memory(&self) -> &Memory;
}

/// A location of this agent.
#[derive(Clone, Debug)]
pub struct AgentStore {
    pub writer: Arc<Writer>,
    pub keyring: Arc<Keyring>,
    pub system: SystemId,
    memory: Arc<Memory>,
}

impl AgentStore {
    pub fn new(writer: Arc<Writer>, keyring: &Arc<Keyring>, system: SystemId) -> AgentStore {
        AgentStore { writer, keyring: keyring.clone(), system, memory: Arc::default() }
    }
}

impl Store for AgentStore {
    fn name(&self) -> &LocationName {
        self.writer.location().name()
    }

    async fn list(&self, folder: &str) -> Result<Vec<Listed>> {
        self.writer.location().require_cluster().await?;
        self.writer.location().list(folder).await
    }

    async fn get(&self, name: &ObjectName) -> Result<Bytes> {
        self.writer.location().get(name).await
    }

    async fn put(&self, sealed: Sealed, epoch: EpochId) -> Result<()> {
        self.writer.put(&sealed.name, epoch, sealed.bytes).await.map(drop)
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        self.writer.location().delete_durably(names).await
    }

    async fn clock(&self) -> Result<Timestamp> {
        self.writer.location().require_cluster().await?;
        self.writer.location().clock().await
    }

    async fn epoch(&self, id: EpochId) -> Result<Arc<Epoch>> {
        self.keyring.epoch(self.system, id, self.writer.location()).await
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }
}
