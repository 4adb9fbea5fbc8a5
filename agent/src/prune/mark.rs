//! Marks what may go at one location: what neither this location by itself nor all locations together still need.
//!
//! By itself, because each location is a complete copy and must reach every moment of the window alone. Together, because what is
//! being copied here may be needed before the manifest that says so is here.

use super::look::Look;
use super::report::{Amount, LocationReport, NAMED_MAX, ObjectWord, SnapshotWord};
use backstay_common::condemned::Condemned;
use backstay_common::id::LocationName;
use backstay_common::name::ObjectName;
use backstay_common::retention::{Gone, Rules, Verdict, View, judge};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::time::Duration;

/// The window that applies at a location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub applied: Duration,
    /// What the config asks for, where it is shorter than what was applied before and nobody has accepted it.
    pub refused: Option<Duration>,
    /// The newest list of what is condemned does not say so yet.
    pub is_new: bool,
}

impl Window {
    /// `asked` is the config's.
    pub fn choose(look: &Look, asked: Duration, accept: bool) -> Window {
        let newest = look.view.condemned.iter().max_by_key(|(name, condemned)| {
            (look.modified.get(*name), condemned.made, (*name).clone())
        });
        let before = newest.map(|(_, condemned)| Duration::from_secs(condemned.window));
        let refused = (!accept && before.is_some_and(|before| asked < before)).then_some(asked);
        let applied = match (refused, before) {
            (Some(_), Some(before)) => before,
            _ => asked,
        };
        Window { applied, refused, is_new: before.map(|b| b.as_secs()) != Some(applied.as_secs()) }
    }
}

/// What may go, and what has become of it so far.
#[derive(Debug)]
pub struct Marked {
    pub window: Window,
    pub goes: BTreeMap<ObjectName, Gone>,
    is_succeeded: bool,
    own: Verdict,
    together: Verdict,
}

/// Judges `look` by itself and as a part of `union`.
pub fn mark(
    look: &Look,
    union: &View,
    window: Window,
    rules: &Rules,
    together: &Verdict,
) -> Marked {
    let margin = Rules::window(window.applied).margin;
    let rules = Rules { window: window.applied, margin, ..*rules };
    let mut view = look.view.clone();
    view.date_by(union);
    let own = judge(&view, &rules);
    let unneeded = |name: &ObjectName| !together.stays.contains_key(name);
    let goes = own.goes.iter().filter(|(name, _)| unneeded(name));
    let goes = goes.map(|(name, why)| (name.clone(), *why)).collect();
    Marked { window, goes, is_succeeded: rules.is_succeeded, own, together: together.clone() }
}

/// The lists that have been made under a generation of the lease, with when the store took them. Those of others say
/// nothing: their maker may have been superseded when it judged.
pub fn lists(look: &Look, generation: u64) -> impl Iterator<Item = (Timestamp, &Condemned)> {
    let ours = look.view.condemned.iter().filter(move |(_, list)| list.generation == generation);
    ours.filter_map(|(name, list)| Some((*look.modified.get(name)?, list)))
}

/// What has been condemned here, and since when. What was stored after it was condemned is something new.
pub fn condemned_since(look: &Look, generation: u64) -> BTreeMap<ObjectName, Timestamp> {
    let mut since: BTreeMap<ObjectName, Timestamp> = BTreeMap::new();
    for (at, list) in lists(look, generation) {
        for name in list.objects(look.view.system) {
            if look.modified.get(&name).is_some_and(|modified| *modified <= at) {
                let first = since.entry(name).or_insert(at);
                *first = (*first).min(at);
            }
        }
    }
    since
}

impl Marked {
    /// What is to be said of the location before anything is done.
    pub fn report(&self, location: &LocationName, look: &Look, dry_run: bool) -> LocationReport {
        let bytes = |name: &ObjectName| look.view.objects.get(name).map_or(0, |seen| seen.size);
        let mut reasons: BTreeMap<Gone, Amount> = BTreeMap::new();
        for (name, why) in &self.goes {
            reasons.entry(*why).or_default().add(bytes(name));
        }
        let mut kept = Amount::default();
        let stays = look.view.objects.iter().filter(|(name, _)| !self.goes.contains_key(name));
        stays.for_each(|(_, seen)| kept.add(seen.size));
        let word = |(name, why): (&ObjectName, &Gone)| ObjectWord {
            name: name.to_string(),
            reason: why.to_string(),
            bytes: bytes(name),
        };
        let named = if dry_run { NAMED_MAX } else { 0 };
        LocationReport {
            location: location.clone(),
            system: look.view.system,
            is_succeeded: self.is_succeeded,
            window: self.window.applied.as_secs(),
            window_refused: self.window.refused.map(|window| window.as_secs()),
            snapshots: self.snapshots(look),
            kept,
            goes: reasons.into_iter().map(|(why, amount)| (why.to_string(), amount)).collect(),
            deleted: Amount::default(),
            condemned: Amount::default(),
            waiting: Amount::default(),
            left: Amount::default(),
            refused: None,
            damaged: look.damaged.iter().map(ToString::to_string).collect(),
            next_due: None,
            objects: self.goes.iter().take(named).map(word).collect(),
        }
    }

    fn snapshots(&self, look: &Look) -> Vec<SnapshotWord> {
        let word = |id| {
            let kept = [&self.own, &self.together].map(|verdict| verdict.snapshots.get(id));
            let why = kept.into_iter().flatten().min();
            let reason = why.map_or_else(|| Gone::Snapshot.to_string(), ToString::to_string);
            SnapshotWord { id: *id, stays: why.is_some(), reason }
        };
        look.view.manifests.keys().map(word).collect()
    }
}
