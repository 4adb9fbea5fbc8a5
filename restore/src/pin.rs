//! Holds what a restore reads: a pin at each location that it reads from, renewed while it runs, given back at its end.
//!
//! The pin comes before the first pack is read, and it is looked again whether the manifest is still there after it. Prune looks
//! for pins just before it deletes manifests, and again before it deletes what they need: so either it saw the pin, or the restore sees
//! that the snapshot has gone. What is not excluded is a manifest that goes in the moment after both have looked: then prune leaves the
//! packs in that run, and a later run may take them. A restore that is killed leaves a pin that ends by
//! itself in some hours, enough to take the restore up again.

use crate::access::Access;
use crate::plan::Plan;
use backstay_common::catalog::Catalog;
use backstay_common::id::{ObjectId, SystemId};
use backstay_common::keys::Epoch;
use backstay_common::location::{Location, PutNew};
use backstay_common::name::ObjectName;
use backstay_common::pin::{Hold, PinRecord};
use backstay_common::seal::Header;
use backstay_common::{Error, Kind, Result};
use jiff::Timestamp;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::AbortHandle;

/// How long a pin holds, from when it was last renewed.
const HOLDS: Duration = Duration::from_secs(12 * 3600);
const RENEWED_EVERY: Duration = Duration::from_secs(3 * 3600);
/// How long a location may take before the restore goes on without a pin there.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
const REASON_CHARS_MAX: usize = 500;
/// How many numbers of a pin others may have taken since it was last renewed.
const NUMBERS_TRIED: usize = 16;

/// The pins of one restore.
#[derive(Debug)]
pub struct Held {
    pins: Vec<Arc<Pin>>,
    renewal: Option<AbortHandle>,
    /// Locations that could not be told, in words.
    pub notes: Vec<String>,
}

/// A pin at one location.
#[derive(Debug)]
struct Pin {
    location: Location,
    epoch: Arc<Epoch>,
    system: SystemId,
    id: ObjectId,
    record: PinRecord,
    next: AtomicU64,
}

impl Held {
    /// Pins the plan's snapshot wherever it is complete and may be pinned; goes on without where it may not. Fails with
    /// [`Kind::Missing`] if the snapshot has gone meanwhile.
    pub async fn take(access: &Access, catalog: &Catalog, plan: &Plan, dir: &Path) -> Result<Held> {
        let manifest = ObjectName::Manifest { system: plan.system, snapshot: plan.snapshot };
        let places = catalog.snapshots.get(&plan.snapshot).map(|entry| entry.manifest);
        let reason: String = format!("restore to {} into {}", plan.target, dir.display())
            .chars()
            .take(REASON_CHARS_MAX)
            .collect();
        let record = PinRecord {
            snapshot: plan.snapshot,
            hold: Hold::Onwards,
            reason,
            by: host(),
            made: Timestamp::now().as_second(),
            until: None,
            released: false,
            damage: None,
            restore: Some(true),
        };
        let mut held = Held { pins: Vec::new(), renewal: None, notes: Vec::new() };
        let mut gone = 0;
        for location in places.unwrap_or_default().iter().filter_map(|i| access.locations.get(i)) {
            let (location, record) = (location.clone(), record.clone());
            let making = Pin::make(access, location.clone(), record, &manifest);
            let made = tokio::time::timeout(ANSWER_TIME_MAX, making).await.unwrap_or_else(|_| {
                let seconds = ANSWER_TIME_MAX.as_secs();
                Err(Error::new(Kind::Storage, format!("no answer in {seconds} s")))
            });
            match made {
                Ok(pin) => held.pins.push(Arc::new(pin)),
                Err(error) if error.kind() == Kind::Missing => gone += 1,
                Err(error) => held.notes.push(format!(
                    "location {} was not told that it is read from, and may prune meanwhile what was condemned a day ago: {}",
                    location.name(),
                    error.message()
                )),
            }
        }
        if gone > 0 && held.pins.is_empty() && held.notes.is_empty() {
            let reason =
                format!("snapshot {} has been pruned since the plan was made", plan.snapshot);
            return Err(Error::new(Kind::Missing, reason).remedy("make the plan again"));
        }
        held.renew();
        Ok(held)
    }

    fn renew(&mut self) {
        let pins = self.pins.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(RENEWED_EVERY).await;
                for pin in &pins {
                    if let Err(error) = pin.put(false).await {
                        tracing::warn!(location = %pin.location.name(), "the pin is not renewed: {}", error.message());
                    }
                }
            }
        });
        self.renewal = Some(task.abort_handle());
    }

    /// Nothing more is read. A location that cannot be told keeps the pin until it ends by itself.
    pub async fn give_back(self) {
        let told = self.pins.iter().map(|pin| async move {
            let told = tokio::time::timeout(ANSWER_TIME_MAX, pin.put(true)).await;
            let reason = match told {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.message().to_string(),
                Err(_) => "no answer".to_string(),
            };
            tracing::info!(location = %pin.location.name(), "the pin ends by itself: {reason}");
        });
        futures::future::join_all(told).await;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(renewal) = &self.renewal {
            renewal.abort();
        }
    }
}

impl Pin {
    /// Sealed under the epoch of the manifest, whose wraps are at the location because the manifest is.
    async fn make(
        access: &Access,
        location: Location,
        record: PinRecord,
        manifest: &ObjectName,
    ) -> Result<Pin> {
        let bytes = location.get(manifest).await?;
        let epoch = Header::check(&bytes, manifest)?.epoch();
        let epoch = access.keyring.epoch(access.system, epoch, &location).await?;
        let next = AtomicU64::new(0);
        // Equal names are equal bytes: what is sealed for one location alone has a name of its own.
        let id = ObjectId::random();
        let pin = Pin { location, epoch, system: access.system, id, record, next };
        pin.put(false).await?;
        match pin.location.size(manifest).await? {
            Some(_) => Ok(pin),
            None => Err(Error::new(Kind::Missing, format!("{manifest} has been pruned"))),
        }
    }

    /// Under the next number that is free: another one may have been used to give the pin back by hand.
    async fn put(&self, released: bool) -> Result<()> {
        let until = Timestamp::now().checked_add(HOLDS).ok().map(Timestamp::as_second);
        let record = PinRecord { until, released, ..self.record.clone() };
        for _ in 0..NUMBERS_TRIED {
            let seq = self.next.fetch_add(1, Ordering::Relaxed);
            let sealed = record.seal(&self.epoch, self.system, self.id, seq);
            match self.location.put_new(&sealed.name, sealed.bytes).await? {
                PutNew::Conflict => {}
                PutNew::Created | PutNew::Present => return Ok(()),
            }
        }
        Err(Error::new(
            Kind::Storage,
            format!("others took {NUMBERS_TRIED} numbers of pin {}", self.id),
        ))
    }
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "a host without a name".into(),
        name => name.chars().take(255).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Repo, SYSTEM};

    #[tokio::test]
    async fn a_pin_that_was_given_back_by_hand_is_renewed() {
        let repo = Repo::new(1).await;
        let record = PinRecord {
            snapshot: "20261122T020000Z-1f2e3d4c".parse().unwrap(),
            hold: Hold::Onwards,
            reason: "restore".into(),
            by: "host".into(),
            made: 0,
            until: None,
            released: false,
            damage: None,
            restore: Some(true),
        };
        let (epoch, id, location) =
            (repo.epoch.clone(), ObjectId::random(), repo.access.locations[0].clone());
        let next = AtomicU64::new(0);
        let pin = Pin { location, epoch, system: SYSTEM, id, record, next };
        pin.put(false).await.unwrap();
        repo.put(&pin.record.given_back().seal(&pin.epoch, SYSTEM, id, 1), &[0]).await;
        pin.put(false).await.unwrap();
        let name = ObjectName::Pin { system: SYSTEM, pin: id, seq: 2 };
        let newest = PinRecord::read(&pin.location.get(&name).await.unwrap(), &name).unwrap();
        assert!(newest.holds(0) && newest.is_of_restore());
    }
}
