//! Reads all that a judgement needs to know of one location.
//!
//! All or nothing: where a manifest, a `begin`, an origin, a pin or a lease that is listed cannot be read, nothing is judged, for
//! it might keep anything. One that is damaged is read from another location that has it whole. What has gone since it was
//! listed counts as not listed.

use super::memory::Fact;
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
    /// What is damaged here and was read elsewhere.
    pub damaged: Vec<ObjectName>,
}

/// Lists, and reads what is new, by the store's clock. What is damaged is read from `others`. Changes nothing but `probe/`; safe
/// to drop.
pub async fn look<S: Store>(store: &S, others: &[S], system: SystemId) -> Result<Look> {
    let now = store.clock().await?;
    look_at(store, others, system, now).await
}

/// As [`look`], at a time that is known. Changes nothing.
pub async fn look_at<S: Store>(
    store: &S,
    others: &[S],
    system: SystemId,
    now: Timestamp,
) -> Result<Look> {
    let mut view = View::empty(system, now);
    let mut modified = BTreeMap::new();
    for listed in store.list(&folder::system(system)).await? {
        if let Some(name) = listed.name {
            let seen = Seen { stored: listed.modified, size: listed.size };
            modified.insert(name.clone(), listed.modified);
            view.objects.insert(name, seen);
        }
    }
    let mut look = Look { view, modified, damaged: Vec::new() };
    read_all(store, others, &mut look).await?;
    store.memory().forget_others(&look.view);
    Ok(look)
}

/// Looks again at what may have come to hold something back: snapshots and pins. What `look` knows besides is kept, also of what
/// has been deleted since. Returns what is listed now.
pub async fn look_again<S: Store>(
    store: &S,
    others: &[S],
    look: &mut Look,
) -> Result<BTreeSet<ObjectName>> {
    let system = look.view.system;
    let mut present = BTreeSet::new();
    let view = View::empty(system, look.view.now);
    let mut fresh = Look { view, modified: BTreeMap::new(), damaged: Vec::new() };
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
    read_all(store, others, &mut fresh).await?;
    look.modified.extend(fresh.modified);
    look.view.objects.extend(fresh.view.objects);
    look.view.manifests.extend(fresh.view.manifests);
    look.view.begins.extend(fresh.view.begins);
    look.view.pins.extend(fresh.view.pins);
    Ok(present)
}

/// Reads what is not remembered.
async fn read_all<S: Store>(store: &S, others: &[S], look: &mut Look) -> Result<()> {
    let mut unknown = Vec::new();
    for name in wanted(&look.view) {
        let size = look.view.objects.get(&name).map_or(0, |seen| seen.size);
        match store.memory().recall(&name, size) {
            Some(fact) => learn(&mut look.view, &name, Some(fact)),
            None => unknown.push((name, size)),
        }
    }
    let reads = futures::stream::iter(unknown).map(|(name, size)| async move {
        let found = find(store, others, &name).await?;
        Ok::<_, Error>((name, size, found))
    });
    let mut reads = std::pin::pin!(reads.buffer_unordered(READS_MAX));
    while let Some((name, size, found)) = reads.try_next().await? {
        match found {
            Found::Here(fact) => {
                store.memory().keep(&name, size, &fact);
                learn(&mut look.view, &name, Some(fact));
            }
            Found::Elsewhere(fact) => {
                look.damaged.push(name.clone());
                learn(&mut look.view, &name, Some(fact));
            }
            Found::Damaged => learn(&mut look.view, &name, None),
            Found::Gone => {
                look.view.objects.remove(&name);
                look.modified.remove(&name);
            }
        }
    }
    Ok(())
}

/// What became of one object.
enum Found {
    Here(Fact),
    /// Damaged here, and whole at another location: equal names are equal objects.
    Elsewhere(Fact),
    /// A head that is whole nowhere. It says nothing that is needed.
    Damaged,
    Gone,
}

async fn find<S: Store>(store: &S, others: &[S], name: &ObjectName) -> Result<Found> {
    let error = match store.get(name).await {
        Err(error) if error.kind() == Kind::Missing => return Ok(Found::Gone),
        Err(error) => error,
        Ok(bytes) => match fact(store, name, bytes).await {
            Ok(fact) => return Ok(Found::Here(fact)),
            Err(error) => error,
        },
    };
    if !is_damage(&error) {
        return Err(error);
    }
    for other in others.iter().filter(|other| other.name() != store.name()) {
        let Ok(bytes) = other.get(name).await else { continue };
        if let Ok(fact) = fact(other, name, bytes).await {
            tracing::warn!(location = %store.name(), "{name} is damaged, and read from {}: {error}", other.name());
            return Ok(Found::Elsewhere(fact));
        }
    }
    match name {
        ObjectName::Head { .. } => Ok(Found::Damaged),
        ObjectName::Condemned { .. } => Err(error.remedy(
            "nothing is pruned here until it is gone: delete this object, and see that the config's window is meant",
        )),
        _ => Err(error.context("it may be what keeps other objects").remedy(
            "nothing is pruned here until it is whole: copy the object from another location over it",
        )),
    }
}

/// The object, or the wrap that opens it, will not become whole by itself.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), Kind::Corrupt | Kind::Key | Kind::Missing)
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

/// What the object says. Fails unless it is whole.
async fn fact(store: &impl Store, name: &ObjectName, bytes: Bytes) -> Result<Fact> {
    Ok(match name {
        ObjectName::Begin { .. } => Fact::Begin(Begin::read(&bytes, name)?),
        ObjectName::Pin { .. } => Fact::Pin(PinRecord::read(&bytes, name)?),
        ObjectName::Lease { .. } => Fact::Lease(Lease::read(&bytes, name)?),
        ObjectName::Condemned { .. } => Fact::Condemned(Condemned::read(&bytes, name)?),
        ObjectName::Origin { .. } => {
            let epoch = store.epoch(Header::check(&bytes, name)?.epoch()).await;
            let origin = Origin::open(bytes, name, &*epoch.context(format!("open {name}"))?)?;
            Fact::Ancestors(origin.ancestors()?)
        }
        ObjectName::Head { .. } => {
            let epoch = store.epoch(Header::check(&bytes, name)?.epoch()).await?;
            Fact::Heard(Head::open(bytes, name, &epoch)?.branch)
        }
        _ => Fact::Manifest(read_plain(&bytes, name)?.1),
    })
}

/// Adds a fact to the view; a head without one may have spoken of any branch.
fn learn(view: &mut View, name: &ObjectName, fact: Option<Fact>) {
    match (fact, name) {
        (Some(Fact::Manifest(plain)), _) => drop(view.manifests.insert(plain.snapshot, plain)),
        (Some(Fact::Begin(begin)), _) => drop(view.begins.insert(begin.snapshot, begin)),
        (Some(Fact::Pin(pin)), _) => drop(view.pins.insert(name.clone(), pin)),
        (Some(Fact::Lease(lease)), _) => view.leases.push(lease),
        (Some(Fact::Condemned(list)), _) => drop(view.condemned.insert(name.clone(), list)),
        (Some(Fact::Ancestors(ancestors)), ObjectName::Origin { branch, .. }) => {
            view.ancestors.insert(*branch, ancestors);
        }
        (Some(Fact::Heard(branch)), _) => hear(view, name, [branch].into()),
        (Some(Fact::Ancestors(_)), _) => {}
        (None, _) => {
            let wal = view.objects.keys().filter_map(|name| match name {
                ObjectName::Wal { branch, .. } => Some(*branch),
                _ => None,
            });
            let branches = wal.collect();
            hear(view, name, branches);
        }
    }
}

fn hear(view: &mut View, name: &ObjectName, branches: BTreeSet<Branch>) {
    let Some(at) = view.objects.get(name).map(|seen| seen.stored) else { return };
    for branch in branches {
        let heard = view.heard.entry(branch).or_insert(at);
        *heard = (*heard).max(at);
    }
}
