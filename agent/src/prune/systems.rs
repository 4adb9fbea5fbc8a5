//! The systems that the cluster has had: its own, and those of before `pg_upgrade` that its locations still take for its own.
//!
//! Each is judged and pruned by itself: nothing of one refers to another.

use super::store::AgentStore;
use crate::context::AgentContext;
use crate::epochs::Epochs;
use crate::writer::Writer;
use backstay_common::Result;
use backstay_common::cluster::Identity;
use backstay_common::id::SystemId;
use backstay_common::name::{ObjectName, folder};
use futures::future::join_all;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::Mutex;

/// One system at the locations that take its backups.
#[derive(Clone, Debug)]
pub struct System {
    pub id: SystemId,
    pub epochs: Arc<Epochs>,
    pub stores: Vec<AgentStore>,
    /// The cluster has another one now, and a snapshot of that at every location.
    pub is_succeeded: bool,
}

type Stores = (Arc<Epochs>, Vec<AgentStore>);

/// Made when they are first asked for, and kept, for what has been read is remembered with them.
#[derive(Debug, Default)]
pub struct Systems(Mutex<BTreeMap<SystemId, Stores>>);

impl Systems {
    /// The server's own system, at all locations.
    pub async fn own(&self, context: &AgentContext) -> System {
        let mut known = self.0.lock().await;
        let (epochs, stores) = known.entry(context.system).or_insert_with(|| {
            let store = |writer: &Arc<Writer>| {
                AgentStore::new(writer.clone(), context.epochs.keyring(), context.system)
            };
            (context.epochs.clone(), context.writers.iter().map(store).collect())
        });
        System {
            id: context.system,
            epochs: epochs.clone(),
            stores: stores.clone(),
            is_succeeded: false,
        }
    }

    /// The others, newest first, each at the locations that answer and take its backups.
    pub async fn others(&self, context: &AgentContext) -> Result<Vec<System>> {
        let reads = context.writers.iter().map(|writer| Identity::read(writer.location()));
        let identities = join_all(reads).await;
        let mut since: BTreeMap<SystemId, i64> = BTreeMap::new();
        for (system, made) in identities.iter().flatten().flat_map(|found| &found.systems) {
            let known = since.entry(*system).or_insert(*made);
            *known = (*known).min(*made);
        }
        since.remove(&context.system);
        let mut ids: Vec<(SystemId, i64)> = since.into_iter().collect();
        ids.sort_by_key(|&(system, made)| std::cmp::Reverse((made, system)));
        let is_succeeded = !ids.is_empty() && has_snapshots(context).await;
        let mut found = Vec::new();
        for (id, _) in ids {
            let takes: BTreeSet<usize> = (identities.iter().enumerate())
                .filter(|(_, read)| read.as_ref().is_ok_and(|identity| identity.has(id)))
                .map(|(index, _)| index)
                .collect();
            let (epochs, stores) = self.of(context, id).await?;
            let stores = stores.into_iter().enumerate();
            let stores =
                stores.filter(|(index, _)| takes.contains(index)).map(|(_, store)| store).collect();
            found.push(System { id, epochs, stores, is_succeeded });
        }
        Ok(found)
    }

    async fn of(&self, context: &AgentContext, id: SystemId) -> Result<Stores> {
        let mut known = self.0.lock().await;
        if let Some(stores) = known.get(&id) {
            return Ok(stores.clone());
        }
        let keyring = context.epochs.keyring();
        let state_dir = context.settings.state_dir.join("systems").join(id.to_string());
        let epochs = Arc::new(Epochs::new(keyring.clone(), id, &state_dir)?);
        let store = |writer: &Arc<Writer>| {
            let expected = (context.settings.cluster.clone(), id);
            let writer = Writer::new(writer.location().clone(), epochs.clone(), expected);
            AgentStore::new(Arc::new(writer), keyring, id)
        };
        let stores: Stores = (epochs.clone(), context.writers.iter().map(store).collect());
        known.insert(id, stores.clone());
        Ok(stores)
    }
}

/// True if each location has a snapshot of the server's own system; false if one does not answer.
async fn has_snapshots(context: &AgentContext) -> bool {
    let folder = &folder::snapshots(context.system);
    let listings = context.writers.iter().map(|writer| writer.location().list(folder));
    let is_manifest = |name: &Option<ObjectName>| matches!(name, Some(ObjectName::Manifest { .. }));
    join_all(listings).await.into_iter().all(|listed| {
        listed.is_ok_and(|listed| listed.iter().any(|listed| is_manifest(&listed.name)))
    })
}
