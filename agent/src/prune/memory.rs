//! What has been read of a location, so that it is read once: objects never change.
//!
//! By name and size. Bounded by what the location lists: what is not listed any more is forgotten.

use backstay_common::condemned::Condemned;
use backstay_common::id::Branch;
use backstay_common::lease::Lease;
use backstay_common::name::ObjectName;
use backstay_common::pin::PinRecord;
use backstay_common::retention::View;
use backstay_common::segment::Ancestor;
use backstay_common::snapshot::{Begin, ManifestPlain};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// A list of what is condemned, or a lease, that names more is read again each time: it may take megabytes.
const NAMES_KEPT_MAX: usize = 10_000;

/// What a judgement takes from one object.
#[derive(Clone, Debug)]
pub enum Fact {
    Manifest(ManifestPlain),
    Begin(Begin),
    Pin(PinRecord),
    Lease(Lease),
    Condemned(Condemned),
    /// Of an origin.
    Ancestors(Vec<Ancestor>),
    /// A head speaks of this branch.
    Heard(Branch),
}

/// Facts of one location.
#[derive(Debug, Default)]
pub struct Memory(Mutex<BTreeMap<ObjectName, (u64, Fact)>>);

impl Memory {
    /// What is known of the object of this name and size.
    pub fn recall(&self, name: &ObjectName, size: u64) -> Option<Fact> {
        let facts = self.0.lock().expect("no panic while held");
        facts.get(name).filter(|(known, _)| *known == size).map(|(_, fact)| fact.clone())
    }

    pub fn keep(&self, name: &ObjectName, size: u64, fact: &Fact) {
        let names = match fact {
            Fact::Condemned(list) => list.names.len(),
            Fact::Lease(lease) => lease.begun.len(),
            _ => 0,
        };
        if names > NAMES_KEPT_MAX {
            return;
        }
        self.0.lock().expect("no panic while held").insert(name.clone(), (size, fact.clone()));
    }

    /// Forgets what `view` does not list.
    pub fn forget_others(&self, view: &View) {
        let mut facts = self.0.lock().expect("no panic while held");
        facts.retain(|name, _| view.objects.contains_key(name));
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}
