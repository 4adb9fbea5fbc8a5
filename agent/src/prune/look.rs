//! Reads all that a judgement needs to know of one location.
//!
//! All or nothing: where a manifest, a `begin`, an origin, a pin or a lease that is listed cannot be read, nothing is judged, for it
//! might keep anything. What has gone since it was listed counts as not listed.

use super::store::Store;
use backstay_common::condemned::Condemned;
use backstay_common::head::Head;
use backstay_common::id::{Branch, SystemId};
use backstay_common::lease::Lease;
use backstay_common::name::{ObjectName, folder};
use backstay_common::origin::Origin;
use backstay_common::pin::PinRecord;
use backstay_common::retention::{Seen, View};
use backstay_common::seal::Header;
use backstay_common::snapshot::Begin;
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::{Context, Error, Kind, Result};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};

/// Objects read at the same time; bounds memory to this many manifests.
const READS_MAX: usize = 8;

/// What a location showed.
#[derive(Debug)]
pub struct Look {
    pub view: View,
    /// When the location itself took each object.
    pub modified: BTreeMap<ObjectName, Timestamp>,
}

/// Lists and reads. Changes nothing but `probe/`; safe to drop.
pub async fn look(store: &impl Store, system: SystemId) -> Result<Look> {
    let now = store.clock().await?;
    let mut view = View::empty(system, now);
    let mut modified = BTreeMap::new();
    for listed in store.list(&folder::system(system)).await? {
        if let Some(name) = listed.name {
            let seen = Seen { stored: listed.modified, size: listed.size };
            modified.insert(name.clone(), listed.modified);
            view.objects.insert(name, seen);
        }
    }
    let mut look = Look { view, modified };
    read_all(store, &mut look).await?;
    Ok(look)
}

/// Looks again at what may have come to hold something back: snapshots and pins. What `look` knows besides is kept, also of what
/// has been deleted since. Returns what is listed now.
pub async fn look_again(store: &impl Store, look: &mut Look) -> Result<BTreeSet<ObjectName>> {
    let system = look.view.system;
    let mut present = BTreeSet::new();
    let mut fresh = Look { view: View::empty(system, look.view.now), modified: BTreeMap::new() };
    for folder in [folder::snapshots(system), folder::pins(system)] {
        for listed in store.list(&folder).await? {
            let Some(name) = listed.name else { continue };
            if !look.view.objects.contains_key(&name) {
                let seen = Seen { stored: listed.modified, size: listed.size };
                fresh.modified.insert(name.clone(), listed.modified);
                fresh.view.objects.insert(name.clone(), seen);
            }
            present.insert(name);
        }
    }
    read_all(store, &mut fresh).await?;
    look.modified.extend(fresh.modified);
    look.view.objects.extend(fresh.view.objects);
    look.view.manifests.extend(fresh.view.manifests);
    look.view.begins.extend(fresh.view.begins);
    look.view.pins.extend(fresh.view.pins);
    Ok(present)
}

async fn read_all(store: &impl Store, look: &mut Look) -> Result<()> {
    let names: Vec<ObjectName> = wanted(&look.view);
    let reads = futures::stream::iter(names).map(|name| async move {
        match store.get(&name).await {
            Ok(bytes) => Ok((name, Some(bytes))),
            Err(error) if error.kind() == Kind::Missing => Ok((name, None)),
            Err(error) => Err(error),
        }
    });
    let mut reads = std::pin::pin!(reads.buffer_unordered(READS_MAX));
    while let Some((name, bytes)) = reads.try_next().await? {
        match bytes {
            Some(bytes) => read(store, &mut look.view, &name, bytes).await.map_err(unreadable)?,
            None => {
                look.view.objects.remove(&name);
                look.modified.remove(&name);
            }
        }
    }
    Ok(())
}

fn unreadable(error: Error) -> Error {
    match error.kind() {
        Kind::Corrupt => error.context("it may be what keeps other objects").remedy(
            "nothing is pruned here until it is whole: copy the object from another location over it",
        ),
        _ => error,
    }
}

/// What must be read: of each agent's heads only the newest, and no `begin` whose manifest is there.
fn wanted(view: &View) -> Vec<ObjectName> {
    let mut heads = BTreeMap::new();
    let mut names = Vec::new();
    for name in view.objects.keys() {
        match name {
            ObjectName::Head { agent, .. } => drop(heads.insert(agent, name)),
            ObjectName::Begin { system, snapshot } => {
                let manifest = ObjectName::Manifest { system: *system, snapshot: *snapshot };
                if !view.objects.contains_key(&manifest) {
                    names.push(name.clone());
                }
            }
            ObjectName::Manifest { .. }
            | ObjectName::Origin { .. }
            | ObjectName::Pin { .. }
            | ObjectName::Lease { .. }
            | ObjectName::Condemned { .. } => names.push(name.clone()),
            _ => {}
        }
    }
    names.extend(heads.into_values().cloned());
    names
}

async fn read(store: &impl Store, view: &mut View, name: &ObjectName, bytes: Bytes) -> Result<()> {
    match name {
        ObjectName::Manifest { snapshot, .. } => {
            let (_, plain) = read_plain(&bytes, name)?;
            view.manifests.insert(*snapshot, plain);
        }
        ObjectName::Begin { snapshot, .. } => {
            view.begins.insert(*snapshot, Begin::read(&bytes, name)?);
        }
        ObjectName::Pin { .. } => {
            drop(view.pins.insert(name.clone(), PinRecord::read(&bytes, name)?))
        }
        ObjectName::Lease { .. } => view.leases.push(Lease::read(&bytes, name)?),
        ObjectName::Condemned { .. } => {
            view.condemned.insert(name.clone(), Condemned::read(&bytes, name)?);
        }
        ObjectName::Origin { branch, .. } => {
            let epoch = store.epoch(Header::check(&bytes, name)?.epoch()).await;
            let origin = Origin::open(bytes, name, &*epoch.context(format!("open {name}"))?)?;
            view.ancestors.insert(*branch, origin.ancestors()?);
        }
        ObjectName::Head { .. } => hear(store, view, name, bytes).await?,
        _ => {}
    }
    Ok(())
}

/// A head that is damaged may have spoken of any branch.
async fn hear(store: &impl Store, view: &mut View, name: &ObjectName, bytes: Bytes) -> Result<()> {
    let Some(at) = view.objects.get(name).map(|seen| seen.stored) else { return Ok(()) };
    let opened = match Header::check(&bytes, name) {
        Ok(header) => Head::open(bytes, name, &*store.epoch(header.epoch()).await?),
        Err(error) => Err(error),
    };
    let branches: Vec<Branch> = match opened {
        Ok(head) => vec![head.branch],
        Err(error) if error.kind() == Kind::Corrupt => {
            let wal = view.objects.keys().filter_map(|name| match name {
                ObjectName::Wal { branch, .. } => Some(*branch),
                _ => None,
            });
            wal.collect::<BTreeSet<Branch>>().into_iter().collect()
        }
        Err(error) => return Err(error),
    };
    for branch in branches {
        let heard = view.heard.entry(branch).or_insert(at);
        *heard = (*heard).max(at);
    }
    Ok(())
}
