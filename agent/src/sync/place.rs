//! One location, as a pass sees it: what it lists, and what of that is damaged.

use super::compare::is_equal_everywhere;
use crate::alarms::Alarms;
use crate::copy::{self, Expected};
use crate::prune::System;
use crate::writer::Writer;
use backstay_common::id::LocationName;
use backstay_common::name::{ObjectName, folder};
use backstay_common::{Error, Kind, Result};
use futures::StreamExt;
use futures::future::join_all;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// Objects read at the same time at one location; bounds memory to this many of at most 64 MiB.
const READS_MAX: usize = 3;

/// The alarm about damage that has not been put right.
pub const DAMAGED: &str = "object-damaged";

/// What is damaged, by location, and how.
pub type Findings = BTreeMap<LocationName, BTreeMap<ObjectName, String>>;

/// What was found damaged, and has not been put right. Forgotten when the agent ends.
#[derive(Debug, Default)]
pub struct Damage(pub(super) Mutex<Findings>);

impl Damage {
    /// Raises the alarm too; the next comparison sees to it.
    pub fn note(&self, alarms: &Alarms, location: &LocationName, name: &ObjectName, why: &Error) {
        alarms.raise(DAMAGED, location.as_str(), why.message());
        let mut findings = self.0.lock().expect("no panic while held");
        let here = findings.entry(location.clone()).or_default();
        here.insert(name.clone(), why.message().to_string());
    }
}

/// What manifests say of objects.
pub type Expectations = BTreeMap<ObjectName, Expected>;

#[derive(Debug)]
pub struct Place {
    pub writer: Arc<Writer>,
    /// With their sizes in bytes.
    pub listed: BTreeMap<ObjectName, u64>,
    pub damaged: BTreeMap<ObjectName, String>,
}

impl Place {
    pub fn name(&self) -> &LocationName {
        self.writer.location().name()
    }

    /// What it lists and is not known to be damaged.
    pub fn whole(&self) -> BTreeSet<ObjectName> {
        let is_whole = |name: &&ObjectName| !self.damaged.contains_key(*name);
        self.listed.keys().filter(is_whole).cloned().collect()
    }

    /// Takes over what is known to be damaged, of what is still listed.
    pub fn know(&mut self, findings: &Findings) {
        let known = findings.get(self.name()).into_iter().flatten();
        let listed = known.filter(|(name, _)| self.listed.contains_key(*name));
        let listed: Vec<_> = listed.map(|(name, why)| (name.clone(), why.clone())).collect();
        self.damaged.extend(listed);
    }

    /// Reads `names` whole, and notes what is damaged and what is not, whatever was known before. What has gone since it was listed, and what cannot be read just now, is
    /// left as it is. Returns the trailers of what is whole. Safe to drop.
    pub async fn examine(
        &mut self,
        names: Vec<ObjectName>,
        expected: &Expectations,
    ) -> Result<Vec<(ObjectName, [u8; 32])>> {
        let location = self.writer.location().clone();
        let reads = futures::stream::iter(names).map(|name| {
            let (location, expected) = (location.clone(), expected.get(&name).copied());
            async move {
                let read = copy::read(&location, &name, expected).await;
                let hash = read.map(|whole| *whole.bytes.last_chunk().expect("it has a trailer"));
                (name, hash)
            }
        });
        let mut reads = std::pin::pin!(reads.buffer_unordered(READS_MAX));
        let mut whole = Vec::new();
        while let Some((name, read)) = reads.next().await {
            match read {
                Ok(hash) => {
                    self.damaged.remove(&name);
                    whole.push((name, hash));
                }
                Err(error) if error.kind() == Kind::Corrupt => {
                    self.damaged.insert(name, error.message().to_string());
                }
                Err(error) if error.kind() == Kind::Missing => {}
                Err(error) => return Err(error),
            }
        }
        Ok(whole)
    }
}

/// Lists the locations of a system; those that cannot be listed with the reason.
pub async fn list(system: &System) -> (Vec<Place>, Vec<(LocationName, Error)>) {
    let folder = &folder::system(system.id);
    let listings = join_all(system.stores.iter().map(|store| async {
        let location = store.writer.location();
        let listed = async {
            location.require_cluster().await?;
            location.list(folder).await
        };
        (store.writer.clone(), listed.await)
    }))
    .await;
    let (mut places, mut failed) = (Vec::new(), Vec::new());
    for (writer, listed) in listings {
        match listed {
            Ok(listed) => {
                let named = listed.into_iter().filter_map(|one| Some((one.name?, one.size)));
                let listed = named.collect();
                places.push(Place { writer, listed, damaged: BTreeMap::new() });
            }
            Err(error) => failed.push((writer.location().name().clone(), error)),
        }
    }
    (places, failed)
}

/// Looks into `names`, or all objects, at each place: which are damaged, and which have another whole content than elsewhere.
pub async fn examine(
    places: &mut [Place],
    names: Option<&BTreeSet<ObjectName>>,
    expected: &Expectations,
) -> Vec<(LocationName, Error)> {
    let mut hashes: BTreeMap<ObjectName, ([u8; 32], LocationName)> = BTreeMap::new();
    let mut failed = Vec::new();
    for place in places {
        let is_wanted = |name: &&ObjectName| match names {
            Some(names) => names.contains(*name),
            None => is_equal_everywhere(name),
        };
        let wanted = place.listed.keys().filter(is_wanted).cloned().collect();
        let whole = match place.examine(wanted, expected).await {
            Ok(whole) => whole,
            Err(error) => {
                failed.push((place.name().clone(), error));
                continue;
            }
        };
        for (name, hash) in whole {
            match hashes.get(&name) {
                Some((other, at)) if *other != hash => {
                    let reason = format!("whole, and with another content than at {at}");
                    place.damaged.insert(name, reason);
                }
                Some(_) => {}
                None => drop(hashes.insert(name, (hash, place.name().clone()))),
            }
        }
    }
    failed
}
