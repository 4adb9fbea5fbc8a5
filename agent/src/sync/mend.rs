//! Puts one location right: copies what it lacks, replaces what is damaged there.
//!
//! In the order of the format. An object that cannot be copied keeps back only those that need it: WAL its
//! branch's origin, a manifest all that it names. A location that refuses several times in a row is left for now.

use super::compare::{coverage, covers};
use super::place::{Expectations, Findings, Place};
use super::report::{Difference, What};
use super::strays::Strays;
use crate::copy::{self, Fault, Whole};
use crate::prune::Amount;
use backstay_common::id::EpochId;
use backstay_common::location::Location;
use backstay_common::name::ObjectName;
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::{Error, Kind, Result};
use futures::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

/// Objects copied at the same time; bounds memory to this many objects of at most 64 MiB.
const COPIES_MAX: usize = 3;
/// A location that could not be read or written so many times in a row is left for now.
const REFUSALS_MAX: u32 = 5;

/// One location that is put right.
#[derive(Debug)]
pub struct Mending<'a> {
    places: &'a [Place],
    to: &'a Place,
    /// What all locations together have whole.
    all: &'a BTreeSet<ObjectName>,
    expected: &'a Expectations,
    strays: &'a Strays,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What is there whole, with its size.
    has: BTreeMap<ObjectName, u64>,
    /// Epochs that something was stored under just now: their wraps are there.
    epochs: BTreeSet<EpochId>,
    refusals: u32,
    done: Mended,
}

/// Why an object was not copied.
enum Obstacle {
    /// What it needs is not there.
    Unmet(String),
    Fault(Error),
}

impl From<Error> for Obstacle {
    fn from(error: Error) -> Obstacle {
        Obstacle::Fault(error)
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Mended {
    pub copied: Amount,
    pub repaired: Vec<(ObjectName, u64)>,
    /// What could not be copied.
    pub left: Vec<Difference>,
    /// Copies that were found damaged on the way.
    pub damaged: Findings,
    pub copied_wal: bool,
    /// How many of the copied are entries of the ledger.
    pub copied_entries: u64,
}

impl<'a> Mending<'a> {
    pub fn new(
        places: &'a [Place],
        to: &'a Place,
        all: &'a BTreeSet<ObjectName>,
        expected: &'a Expectations,
        strays: &'a Strays,
    ) -> Mending<'a> {
        let whole = to.listed.iter().filter(|(name, _)| !to.damaged.contains_key(*name));
        let has = whole.map(|(name, size)| (name.clone(), *size)).collect();
        let state = State { has, epochs: BTreeSet::new(), refusals: 0, done: Mended::default() };
        Mending { places, to, all, expected, strays, state: Mutex::new(state) }
    }

    /// Copies `groups`, one after the other. Safe to drop: what is copied stays, and [`Mending::done`] has it.
    pub async fn run(&self, groups: Vec<Vec<ObjectName>>) {
        for group in groups {
            let work = |name| async { self.one(name).await };
            futures::stream::iter(group).for_each_concurrent(COPIES_MAX, work).await;
        }
    }

    /// What has come of it since this was last asked.
    pub fn done(&self) -> Mended {
        self.with(|state| std::mem::take(&mut state.done))
    }

    async fn one(&self, name: ObjectName) {
        let mut faults = Vec::new();
        let result = match self.with(|state| state.refusals >= REFUSALS_MAX) {
            true => {
                let reason = "not tried: the locations refuse for now";
                Err(Obstacle::Fault(Error::new(Kind::Storage, reason)))
            }
            false => self.bring(&name, &mut faults).await,
        };
        self.with(|state| {
            for (location, error) in faults {
                if error.kind() == Kind::Corrupt {
                    let found = state.done.damaged.entry(location).or_default();
                    found.insert(name.clone(), error.message().to_string());
                }
            }
            match result {
                Ok(whole) => self.note(state, &whole),
                // Deleted since it was listed, as superseded pieces are: nothing to copy.
                Err(Obstacle::Fault(error)) if error.kind() == Kind::Missing => {}
                Err(Obstacle::Fault(error)) => {
                    let is_refusal = error.kind() == Kind::Storage;
                    state.refusals = if is_refusal { state.refusals + 1 } else { 0 };
                    self.leave(state, &name, &error);
                }
                Err(Obstacle::Unmet(what)) => {
                    let is_for_now =
                        |left: &Difference| left.exit_code == Kind::Storage.exit_code();
                    let is_for_now = state.done.left.iter().any(is_for_now);
                    let kind = if is_for_now { Kind::Storage } else { Kind::Corrupt };
                    let reason = format!("it needs what could not be copied: {what}");
                    self.leave(state, &name, &Error::new(kind, reason));
                }
            }
        });
    }

    fn leave(&self, state: &mut State, name: &ObjectName, error: &Error) {
        tracing::warn!(location = %self.to.name(), "not copied: {name}: {}", error.message());
        state.done.left.push(Difference::new(name, What::Missing, error));
    }

    fn note(&self, state: &mut State, whole: &Whole) {
        let (name, size) = (whole.name.clone(), whole.bytes.len() as u64);
        state.refusals = 0;
        state.epochs.insert(whole.epoch);
        state.done.copied_wal |= matches!(name, ObjectName::Wal { .. });
        match self.to.damaged.contains_key(&name) {
            true => {
                tracing::info!(location = %self.to.name(), "replaced {name}, which was damaged");
                state.done.repaired.push((name.clone(), size));
            }
            false => {
                tracing::debug!(location = %self.to.name(), "copied {name}");
                state.done.copied.add(size);
                state.done.copied_entries += u64::from(matches!(name, ObjectName::Ledger { .. }));
            }
        }
        state.has.insert(name, size);
    }

    /// Fetches the object, sees that what it needs is there, and stores it.
    async fn bring(&self, name: &ObjectName, faults: &mut Vec<Fault>) -> Result<Whole, Obstacle> {
        if let ObjectName::Wal { system, branch, .. } = *name {
            self.needs(&ObjectName::Origin { system, branch })?;
        }
        let sources: Vec<&Location> = (self.places.iter())
            .filter(|place| place.name() != self.to.name() && place.listed.contains_key(name))
            .filter(|place| !place.damaged.contains_key(name))
            .map(|place| place.writer.location())
            .collect();
        let expected = self.expected.get(name).copied();
        let whole = copy::fetch(name, &sources, expected, faults).await?;
        if let ObjectName::Manifest { .. } = name {
            self.needs_of_manifest(&whole)?;
        }
        let writer = &self.to.writer;
        match self.to.damaged.contains_key(name) {
            true => copy::replace(writer, &whole, &sources).await?,
            false => {
                self.strays.note(self.to.name(), name);
                copy::store(writer, &whole, &sources).await?
            }
        };
        Ok(whole)
    }

    /// Fails if some location has `other` and this one does not.
    fn needs(&self, other: &ObjectName) -> Result<(), Obstacle> {
        let is_there = self.with(|state| state.has.contains_key(other));
        match is_there || !self.all.contains(other) {
            true => Ok(()),
            false => Err(Obstacle::Unmet(format!("{other} is not there"))),
        }
    }

    /// A manifest at a location implies that all that it needs is there.
    fn needs_of_manifest(&self, whole: &Whole) -> Result<(), Obstacle> {
        let (_, plain) = read_plain(&whole.bytes, &whole.name)?;
        let (system, branch) = (plain.system, plain.branch);
        self.needs(&ObjectName::Origin { system, branch })?;
        self.with(|state| {
            for entry in &plain.packs {
                let name = entry.name(system);
                if state.has.get(&name) != Some(&entry.size) {
                    return Err(Obstacle::Unmet(format!("{name} is not there")));
                }
            }
            let wal = plain.wal_needed();
            if !covers(&coverage(state.has.keys()), branch, wal) {
                return Err(Obstacle::Unmet(format!("the WAL of {wal} is not there")));
            }
            for epoch in &plain.epochs {
                let is_of = |name: &&ObjectName| matches!(name, ObjectName::Wrap { epoch: of, .. } if of == epoch);
                let is_there =
                    state.epochs.contains(epoch) || state.has.keys().any(|name| is_of(&name));
                if !is_there && self.all.iter().any(|name| is_of(&name)) {
                    return Err(Obstacle::Unmet(format!("the wraps of epoch {epoch} are not there")));
                }
            }
            Ok(())
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().expect("no panic while held"))
    }
}

#[cfg(test)]
mod tests;
