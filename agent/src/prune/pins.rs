//! Pins by hand: to hold a snapshot, to give it back, and to acknowledge damage.

use super::Pruner;
use super::look::{Look, look};
use super::store::Store;
use crate::context::AgentContext;
use backstay_common::id::{LocationName, ObjectId, SnapshotId};
use backstay_common::name::{ObjectName, folder};
use backstay_common::pin::{Hold, PinRecord, REASON_BYTES_MAX, damage_pin};
use backstay_common::retention::is_trusted;
use backstay_common::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Who pins needs no lease.
const ANYBODY: u64 = 0;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PinRequest {
    /// Hold a snapshot; `snapshot` is its id or a beginning of it that no other has.
    Pin { snapshot: String, reason: String, until: Option<jiff::Timestamp>, with_wal: bool },
    /// Give back all pins of a snapshot that no restore holds, or the one pin of that id.
    Unpin { which: String },
    /// The damage that is known is known to a person too.
    AckDamage,
}

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinOutcome {
    /// The pins that were made, or given back, and their snapshots.
    pub pins: Vec<(ObjectId, SnapshotId)>,
    pub locations: Vec<LocationName>,
    /// Where it could not be written, and why.
    pub failed: Vec<(LocationName, String)>,
}

impl PinOutcome {
    fn add(&mut self, other: PinOutcome) {
        self.pins.extend(other.pins);
        for location in other.locations {
            if !self.locations.contains(&location) {
                self.locations.push(location);
            }
        }
        self.failed.extend(other.failed);
    }
}

impl fmt::Display for PinOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (pin, snapshot) in &self.pins {
            writeln!(f, "pin {pin} of snapshot {snapshot}")?;
        }
        if self.pins.is_empty() {
            writeln!(f, "nothing was to be done")?;
        }
        for (location, reason) in &self.failed {
            writeln!(f, "NOT written at {location}: {reason}")?;
        }
        Ok(())
    }
}

/// Writes the records of one request to every location. Those that are down get them by copying, later.
pub async fn run(context: &AgentContext, request: PinRequest) -> Result<PinOutcome> {
    let own = context.systems.own(context).await;
    let mut answered = answer(&super::pruner(context, &own, ANYBODY).await?, request.clone()).await;
    for system in context.systems.others(context).await? {
        let is_unknown = |error: &Error| error.kind() == Kind::Config;
        match &mut answered {
            Ok(outcome) if request == PinRequest::AckDamage => {
                let more =
                    answer(&super::pruner(context, &system, ANYBODY).await?, request.clone())
                        .await?;
                outcome.add(more);
            }
            // The snapshot may be one of an earlier system.
            Err(error) if is_unknown(error) => {
                let pruner = super::pruner(context, &system, ANYBODY).await?;
                match answer(&pruner, request.clone()).await {
                    Err(error) if is_unknown(&error) => {}
                    other => answered = other,
                }
            }
            _ => break,
        }
    }
    answered
}

pub(super) async fn answer<S: Store>(
    pruner: &Pruner<'_, S>,
    request: PinRequest,
) -> Result<PinOutcome> {
    let mut outcome = PinOutcome::default();
    let mut known = Known::default();
    let looks = pruner
        .stores
        .iter()
        .map(|store| async move { (store, look(store, pruner.stores, pruner.system).await) });
    for (store, looked) in futures::future::join_all(looks).await {
        match looked {
            Ok(look) => known.add(&look),
            Err(error) => outcome.failed.push((store.name().clone(), error.to_string())),
        }
    }
    let is_pin = matches!(request, PinRequest::Pin { .. });
    let records = known.records(pruner, request)?;
    for (pin, seq, record) in records {
        outcome.pins.push((pin, record.snapshot));
        let sealed = record.seal(&pruner.epoch, pruner.system, pin, seq);
        for store in pruner.stores {
            match store.put(sealed.clone(), pruner.epoch.id()).await {
                Ok(()) if outcome.locations.contains(store.name()) => {}
                Ok(()) => outcome.locations.push(store.name().clone()),
                Err(error) => outcome.failed.push((store.name().clone(), error.to_string())),
            }
        }
        if is_pin && !outcome.locations.is_empty() {
            still_listed(pruner, record.snapshot).await?;
        }
    }
    if !outcome.pins.is_empty() && outcome.locations.is_empty() {
        let reasons: Vec<_> = outcome.failed.iter().map(|(l, r)| format!("{l}: {r}")).collect();
        return Err(Error::new(Kind::Storage, format!("written nowhere: {}", reasons.join("; "))));
    }
    Ok(outcome)
}

/// Fails unless one location still has the manifest: prune may have been about to delete it when the pin was written.
async fn still_listed<S: Store>(pruner: &Pruner<'_, S>, snapshot: SnapshotId) -> Result<()> {
    let manifest = ObjectName::Manifest { system: pruner.system, snapshot };
    let mut unknown = None;
    for store in pruner.stores {
        match store.list(&folder::snapshots(pruner.system)).await {
            Ok(listed) if listed.iter().any(|l| l.name.as_ref() == Some(&manifest)) => {
                return Ok(());
            }
            Ok(_) => {}
            Err(error) => unknown = Some(error),
        }
    }
    let gone = || {
        Error::new(Kind::Missing, format!("snapshot {snapshot} has been pruned meanwhile"))
            .remedy("see `backstay list` for what is left")
    };
    Err(unknown.map_or_else(gone, |e| e.context("look whether the pinned snapshot is still there")))
}

/// What the locations together know of snapshots and pins.
#[derive(Debug, Default)]
struct Known {
    snapshots: BTreeSet<SnapshotId>,
    damaged: BTreeSet<SnapshotId>,
    /// The record that counts, with its number.
    pins: BTreeMap<ObjectId, (u64, PinRecord)>,
}

impl Known {
    fn add(&mut self, look: &Look) {
        self.snapshots.extend(look.view.manifests.keys());
        let damaged = look.view.manifests.values().filter(|plain| !is_trusted(plain));
        self.damaged.extend(damaged.map(|plain| plain.snapshot));
        for (name, record) in look.view.newest_pins() {
            let ObjectName::Pin { pin, seq, .. } = name else { continue };
            if self.pins.get(pin).is_none_or(|(known, _)| known < seq) {
                self.pins.insert(*pin, (*seq, record.clone()));
            }
        }
    }

    fn records<S>(
        &self,
        pruner: &Pruner<'_, S>,
        request: PinRequest,
    ) -> Result<Vec<(ObjectId, u64, PinRecord)>> {
        match request {
            PinRequest::Pin { snapshot, reason, until, with_wal } => {
                check(&reason, until, pruner.now)?;
                let record = PinRecord {
                    snapshot: self.snapshot(&snapshot)?,
                    hold: if with_wal { Hold::Onwards } else { Hold::Consistent },
                    reason,
                    by: pruner.agent.to_string(),
                    made: pruner.now.as_second(),
                    until: until.map(|until| until.as_second()),
                    released: false,
                    damage: None,
                    restore: None,
                };
                Ok(vec![(ObjectId::random(), 0, record)])
            }
            PinRequest::Unpin { which } => self.unpin(&which, pruner.now),
            PinRequest::AckDamage => Ok(self.acknowledged(pruner)),
        }
    }

    /// The one snapshot whose id begins so.
    fn snapshot(&self, prefix: &str) -> Result<SnapshotId> {
        let fits = |id: &&SnapshotId| !prefix.is_empty() && id.to_string().starts_with(prefix);
        let found: Vec<&SnapshotId> = self.snapshots.iter().filter(fits).collect();
        match found[..] {
            [id] => Ok(*id),
            [] => {
                Err(Error::new(Kind::Config, format!("no snapshot {prefix:?} is at any location"))
                    .remedy("see `backstay list`"))
            }
            _ => Err(Error::new(
                Kind::Config,
                format!("{} snapshots begin with {prefix:?}", found.len()),
            )
            .remedy("give more of the id")),
        }
    }

    /// Of a snapshot all pins but those of restores, which read it; or the one pin of that id, whoever holds it.
    fn unpin(&self, which: &str, now: jiff::Timestamp) -> Result<Vec<(ObjectId, u64, PinRecord)>> {
        let (one, snapshot) = (which.parse::<ObjectId>().ok(), self.snapshot(which).ok());
        let is_meant = |pin: &ObjectId, record: &PinRecord| match one {
            Some(one) => *pin == one,
            None => snapshot == Some(record.snapshot),
        };
        let is_held = |record: &PinRecord| !record.released && record.damage.is_none();
        let held = self.pins.iter().filter(|(pin, (_, r))| is_held(r) && is_meant(pin, r));
        let (restores, by_hand): (Vec<_>, Vec<_>) =
            held.partition(|(_, (_, record))| one.is_none() && record.is_of_restore());
        if !by_hand.is_empty() {
            let given_back = |(pin, (seq, record)): (&ObjectId, &(u64, PinRecord))| {
                (*pin, seq + 1, record.given_back())
            };
            return Ok(by_hand.into_iter().map(given_back).collect());
        }
        let running: Vec<String> = (restores.iter())
            .filter(|(_, (_, record))| record.holds(now.as_second()))
            .map(|(pin, (_, record))| format!("{pin} ({}, on {})", record.reason, record.by))
            .collect();
        match running.is_empty() {
            false => Err(Error::new(
                Kind::Config,
                format!("only restores hold {which:?}: pin {}", running.join("; pin ")),
            )
            .remedy(
                "these pins end by themselves when the restores do, or hours later; give a pin's own id to give it back all the same",
            )),
            true => Err(Error::new(Kind::Config, format!("nothing is pinned by {which:?}")).remedy(
                "give a snapshot or a pin as `backstay list` shows them; for damage there is `backstay-agent ack-damage`",
            )),
        }
    }

    /// A pin that was given back for every damaged snapshot, and for those that have gone.
    fn acknowledged<S>(&self, pruner: &Pruner<'_, S>) -> Vec<(ObjectId, u64, PinRecord)> {
        let held = self.pins.iter().filter(|(_, (_, pin))| pin.damage.is_some());
        let open = held.clone().filter(|(_, (_, pin))| !pin.released);
        let mut records: Vec<_> =
            open.map(|(pin, (seq, record))| (*pin, seq + 1, record.given_back())).collect();
        let told: BTreeSet<SnapshotId> = held.filter_map(|(_, (_, pin))| pin.damage).collect();
        for damaged in self.damaged.difference(&told) {
            let record = acknowledgement(pruner, *damaged, "the damage was acknowledged");
            records.push((damage_pin(*damaged), 0, record));
        }
        records
    }
}

/// What a damage pin says when nothing, or nothing more, is held for the sake of `damaged`.
pub(super) fn acknowledgement<S>(
    pruner: &Pruner<'_, S>,
    damaged: SnapshotId,
    reason: &str,
) -> PinRecord {
    PinRecord {
        snapshot: damaged,
        hold: Hold::Consistent,
        reason: reason.into(),
        by: pruner.agent.to_string(),
        made: pruner.now.as_second(),
        until: None,
        released: true,
        damage: Some(damaged),
        restore: None,
    }
}

fn check(reason: &str, until: Option<jiff::Timestamp>, now: jiff::Timestamp) -> Result<()> {
    let refuse = |what: &str, remedy: &str| Err(Error::new(Kind::Config, what).remedy(remedy));
    match () {
        () if reason.trim().is_empty() => {
            refuse("a pin without a reason", "say why, with --reason")
        }
        () if reason.len() > REASON_BYTES_MAX => {
            refuse("the reason is longer than 1024 bytes", "say it in fewer words")
        }
        () if until.is_some_and(|until| until <= now) => {
            refuse("the pin would have ended already", "give a time to come with --until")
        }
        () => Ok(()),
    }
}
