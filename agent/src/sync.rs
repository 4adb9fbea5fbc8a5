//! Makes the locations equal again: what one of them lacks, or has damaged, is copied from another, byte for byte.
//!
//! ```text
//! place       each location: what it lists, what of that is damaged ─┐
//! prune       what nobody needs any more                             ├─► compare ─► mend, or only report
//! superseded  pieces whose span is there                            ─┘
//! ```
//!
//! Needed after an agent was killed between the writes to two locations, and after a location was away. Runs at start,
//! then every hour, and when asked, never beside a snapshot of this agent; `check` changes nothing, and runs at any
//! time. Copying keeps the order of the format (wraps, origins, packs and WAL, manifests last), so that a manifest at a
//! location still implies all that it needs, and brings the newest snapshot before the others; it needs no key. A damaged object is found by its size, by whoever
//! reads it, or by a deep pass, which reads everything.
//!
//! A crash leaves whole objects, or one fewer where a damaged one was being replaced.

mod compare;
mod mend;
mod place;
mod report;
mod strays;
pub mod superseded;

pub use place::{Damage, Findings};
pub use report::{Difference, LocationSync, NotCompared, SyncReport, What};
pub use strays::Strays;

use crate::context::AgentContext;
use crate::keeper::PENDING;
use crate::prune::{self, System};
use backstay_common::id::LocationName;
use backstay_common::ledger::Event;
use backstay_common::name::ObjectName;
use backstay_common::retention::{Gone, Stays, Verdict, View};
use backstay_common::{Error, Kind, Result};
use compare::Newest;
use mend::{Mended, Mending};
use place::{Expectations, Place};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A difference is told only if it is still there after so many looks with a pause between them: objects on their way are
/// none.
const LOOKS: usize = 4;
const LOOK_PAUSE: Duration = Duration::from_secs(2);

/// How a pass was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncOptions {
    /// Only say what differs.
    pub check: bool,
    /// Read every object, everywhere.
    pub deep: bool,
}

/// All systems at all locations.
async fn systems(context: &AgentContext) -> Result<Vec<System>> {
    let mut systems = vec![context.systems.own(context).await];
    systems.extend(context.systems.others(context).await?);
    Ok(systems)
}

/// Lists all locations, copies to each what another one has, and replaces what is damaged: by `findings`, or by what is
/// known of before. What comes to light on the way is seen to at once.
pub async fn run(context: &AgentContext, deep: bool, findings: Findings) -> Result<SyncReport> {
    let known = context.damage.0.lock().expect("no panic while held").clone();
    let mut damage = known.clone();
    join(&mut damage, findings);
    let (mut report, mut left) = pass(context, deep, &damage).await?;
    if left.iter().any(|(place, names)| damage.get(place).map(BTreeMap::len) < Some(names.len())) {
        join(&mut damage, left);
        let before = report;
        (report, left) = pass(context, deep, &damage).await?;
        report.after(&before);
    }
    // Of a location that could not be asked what was known stays known.
    for failed in &report.failed {
        if let Some(entry) = damage.remove_entry(&failed.location) {
            join(&mut left, Findings::from([entry]));
        }
    }
    let mut noted = context.damage.0.lock().expect("no panic while held");
    for (location, names) in noted.iter() {
        let is_new = |name: &ObjectName| !known.get(location).is_some_and(|k| k.contains_key(name));
        let new = names.iter().filter(|(name, _)| is_new(name));
        let new = new.map(|(name, why)| (name.clone(), why.clone())).collect();
        join(&mut left, Findings::from([(location.clone(), new)]));
    }
    left.retain(|_, names| !names.is_empty());
    alarm(context, &report, &left);
    *noted = left;
    drop(noted);
    Ok(report)
}

/// Returns what stays damaged, too.
async fn pass(
    context: &AgentContext,
    deep: bool,
    damage: &Findings,
) -> Result<(SyncReport, Findings)> {
    let mut report = SyncReport { deep, ..SyncReport::default() };
    let mut left = Findings::new();
    for system in systems(context).await? {
        join(&mut left, synchronise(context, &system, damage, &mut report).await);
    }
    Ok((report, left))
}

fn join(findings: &mut Findings, more: Findings) {
    for (location, names) in more {
        findings.entry(location).or_default().extend(names);
    }
}

/// Says what differs, and changes nothing.
pub async fn check(context: &AgentContext, deep: bool) -> Result<SyncReport> {
    let mut report = SyncReport { check: true, deep, ..SyncReport::default() };
    let findings = match deep {
        true => inspect(context, &mut report).await?,
        false => Findings::new(),
    };
    for system in systems(context).await? {
        let mut found = differences(context, &system, &findings).await;
        for _ in 1..LOOKS {
            if found.locations.iter().all(|location| location.different == 0) {
                break;
            }
            tokio::time::sleep(LOOK_PAUSE).await;
            let again = differences(context, &system, &findings).await;
            found = found.still(again);
        }
        for (location, error) in found.failed {
            report.fail(&location, &error);
        }
        report.locations.extend(found.locations);
    }
    Ok(report)
}

/// Reads every object, everywhere. Returns what is damaged; what could not be read is in the report.
pub async fn inspect(context: &AgentContext, report: &mut SyncReport) -> Result<Findings> {
    let mut findings = Findings::new();
    for system in systems(context).await? {
        let (mut places, failed) = place::list(&system).await;
        let expected = match prune::judgement(context, &system).await {
            Some((view, _)) => expectations(&view),
            None => Expectations::new(),
        };
        let unread = place::examine(&mut places, None, &expected).await;
        for (location, error) in failed.into_iter().chain(unread) {
            report.fail(&location, &error);
        }
        for place in places {
            join(&mut findings, Findings::from([(place.name().clone(), place.damaged)]));
        }
    }
    Ok(findings)
}

fn expectations(view: &View) -> Expectations {
    let packs = view.manifests.values().flat_map(|plain| &plain.packs);
    packs.map(|entry| (entry.name(view.system), entry.into())).collect()
}

/// What all locations together have and need.
#[derive(Debug, Default)]
struct Live {
    /// Whole somewhere.
    all: BTreeSet<ObjectName>,
    expected: Expectations,
    verdict: Verdict,
    newest: Option<Newest>,
}

impl Live {
    fn of(places: &[Place], judgement: Option<(View, Verdict)>) -> Live {
        let mut all: BTreeSet<ObjectName> = places.iter().flat_map(Place::whole).collect();
        let (expected, verdict, newest) = match judgement {
            Some((view, verdict)) => {
                let newest = view.manifests.values().next_back().map(Newest::of);
                (expectations(&view), verdict, newest)
            }
            None => Default::default(),
        };
        // What one location has let go of does not come back from another that has it still. A piece is superseded only
        // by what is whole.
        all.retain(|name| matches!(verdict.goes.get(name), None | Some(Gone::Superseded)));
        for piece in superseded::superseded(&all).into_iter().flat_map(|(_, pieces)| pieces) {
            all.remove(&piece);
        }
        Live { all, expected, verdict, newest }
    }

    fn is_needed(&self, name: &ObjectName) -> bool {
        !self.verdict.goes.contains_key(name)
    }

    /// A snapshot that is being taken is compared when it is committed.
    fn is_settled(&self, name: &ObjectName) -> bool {
        self.verdict.stays.get(name) != Some(&Stays::Running)
    }
}

/// True if a location lacks something, or has it damaged.
fn differs(places: &[Place], live: &Live) -> bool {
    let lacks = |place: &Place| {
        !place.damaged.is_empty()
            || compare::missing(&place.whole(), &live.all).iter().any(|group| !group.is_empty())
    };
    places.iter().any(lacks)
}

/// Lists, and finds out which copies are not what they should be: those that were known to be damaged, and those whose sizes
/// differ.
async fn look(
    context: &AgentContext,
    system: &System,
    known: &Findings,
) -> (Vec<Place>, Vec<(LocationName, Error)>) {
    let (mut places, mut failed) = place::list(system).await;
    places.iter_mut().for_each(|place| place.know(known));
    let listings: Vec<&BTreeMap<ObjectName, u64>> = places.iter().map(|p| &p.listed).collect();
    let mut suspect = compare::unequal(&listings);
    suspect.extend(places.iter().flat_map(|place| place.damaged.keys().cloned()));
    if !suspect.is_empty() {
        let judgement = prune::judgement(context, system).await;
        let expected = judgement.map(|(view, _)| expectations(&view)).unwrap_or_default();
        failed.extend(place::examine(&mut places, Some(&suspect), &expected).await);
    }
    (places, failed)
}

/// What prune says is asked only if there is a difference.
async fn judge(context: &AgentContext, system: &System, places: &[Place]) -> Live {
    let live = Live::of(places, None);
    match differs(places, &live) {
        false => live,
        true => Live::of(places, prune::judgement(context, system).await),
    }
}

/// What a check of one system found.
struct Found {
    locations: Vec<LocationSync>,
    failed: Vec<(LocationName, Error)>,
}

impl Found {
    /// Only what is in both.
    fn still(self, mut again: Found) -> Found {
        for location in &mut again.locations {
            let before = self.locations.iter().find(|before| before.location == location.location);
            let was = |now: &Difference| {
                before.is_some_and(|before| {
                    before.differences.iter().any(|d| (&d.name, d.what) == (&now.name, now.what))
                })
            };
            location.differences.retain(was);
            location.different = location.differences.len() as u64;
        }
        again
    }
}

async fn differences(context: &AgentContext, system: &System, findings: &Findings) -> Found {
    let (places, failed) = look(context, system, findings).await;
    let live = judge(context, system, &places).await;
    let mut locations = Vec::new();
    for place in &places {
        let mut told = LocationSync::new(place.name(), system.id, place.listed.len());
        let missing = compare::missing(&place.whole(), &live.all).concat();
        for name in missing.iter().filter(|name| live.is_settled(name)) {
            if place.damaged.contains_key(name) {
                continue;
            }
            let has = |other: &&Place| {
                other.listed.contains_key(name) && !other.damaged.contains_key(name)
            };
            let at: Vec<&str> = places.iter().filter(has).map(|p| p.name().as_str()).collect();
            let error = Error::new(Kind::Missing, format!("it is at {}", at.join(", ")));
            told.differs(Difference::new(name, What::Missing, &error));
        }
        for (name, why) in place.damaged.iter().filter(|(name, _)| live.is_needed(name)) {
            told.differs(Difference::new(name, What::Damaged, &Error::new(Kind::Corrupt, why)));
        }
        locations.push(told);
    }
    Found { locations, failed }
}

/// One system, at the locations that take its backups. Returns what stays damaged.
async fn synchronise(
    context: &AgentContext,
    system: &System,
    known: &Findings,
    report: &mut SyncReport,
) -> Findings {
    let (mut places, failed) = look(context, system, known).await;
    for (location, error) in &failed {
        report.fail(location, error);
    }
    let mut deleted: BTreeMap<LocationName, u64> = BTreeMap::new();
    for place in places.iter_mut().filter(|_| is_own(context, system)) {
        let names = place.whole();
        let count = delete_superseded(context, place, names).await;
        deleted.insert(place.name().clone(), count);
    }
    let live = judge(context, system, &places).await;
    if is_own(context, system) {
        places.iter().for_each(|place| tell_what_is_pending(context, place, &live));
    }
    let mut left = Findings::new();
    for place in &places {
        let mut told = LocationSync::new(place.name(), system.id, place.listed.len());
        told.deleted = deleted.get(place.name()).copied().unwrap_or_default();
        let mut missing = compare::missing(&place.whole(), &live.all);
        if let Some(newest) = &live.newest {
            missing = newest.first(missing);
        }
        let mending = Mending::new(&places, place, &live.all, &live.expected, &context.strays);
        let telling = Telling { context, system, place, mending };
        telling.mending.run(missing).await;
        let mended = telling.end();
        let is_manifest =
            |left: &Difference| matches!(left.name.parse(), Ok(ObjectName::Manifest { .. }));
        if is_own(context, system) && !mended.left.iter().any(is_manifest) {
            context.alarms.clear(PENDING, place.name().as_str());
        }
        told.copied = mended.copied;
        join(&mut left, mended.damaged);
        let mut damaged = place.damaged.clone();
        for (name, size) in mended.repaired {
            damaged.remove(&name);
            told.repaired.add(size);
        }
        for difference in mended.left {
            match difference.name.parse::<ObjectName>().ok().and_then(|n| damaged.remove_entry(&n))
            {
                Some((name, why)) => {
                    let reason = format!("{why}; not replaced: {}", difference.reason);
                    told.differs(Difference { what: What::Damaged, reason, ..difference });
                    left.entry(place.name().clone()).or_default().insert(name, why);
                }
                None => told.differs(difference),
            }
        }
        for (name, why) in damaged {
            if live.is_needed(&name) {
                let reason = format!("{why}; no location has it whole");
                let error = Error::new(Kind::Corrupt, &reason);
                told.differs(Difference::new(&name, What::Damaged, &error));
                left.entry(place.name().clone()).or_default().insert(name, why);
            }
        }
        if mended.copied_wal && is_own(context, system) {
            // The span may have come meanwhile by itself.
            let (again, _) = place::list(system).await;
            if let Some(mut place) = again.into_iter().find(|again| again.name() == place.name()) {
                let names = place.whole();
                told.deleted += delete_superseded(context, &mut place, names).await;
            }
        }
        report.locations.push(told);
    }
    left
}

/// A location that lacks snapshots cannot be relied on alone, whatever WAL it has.
fn tell_what_is_pending(context: &AgentContext, place: &Place, live: &Live) {
    let whole = place.whole();
    let is_snapshot = |name: &&ObjectName| matches!(name, ObjectName::Manifest { .. });
    let all = live.all.iter().filter(|name| is_snapshot(name) && live.is_settled(name));
    let (has, lacks): (Vec<_>, Vec<_>) = all.partition(|name| whole.contains(*name));
    let reason = match (has.len(), lacks.len()) {
        (_, 0) => return context.alarms.clear(PENDING, place.name().as_str()),
        (0, _) => "it has no snapshot yet: nothing can be restored from it alone".to_string(),
        (has, lacks) => format!("it has {has} of {} snapshots", has + lacks),
    };
    context.alarms.raise(PENDING, place.name().as_str(), reason + "; the rest is being copied");
}

/// Tells what came of a mending, also if it is dropped half way.
struct Telling<'a> {
    context: &'a AgentContext,
    system: &'a System,
    place: &'a Place,
    mending: Mending<'a>,
}

impl Telling<'_> {
    fn end(self) -> Mended {
        let mended = self.mending.done();
        self.tell(&mended);
        mended
    }

    fn tell(&self, mended: &Mended) {
        let (context, place, copied) = (self.context, self.place.name(), mended.copied);
        if copied.objects > 0 {
            tracing::info!(location = %place, "copied what it lacked: {copied}");
        }
        // That the ledger was copied is nothing for the ledger: it would never end.
        if copied.objects > mended.copied_entries {
            context.tell(Event::Copied, place, format!("system {}: {copied}", self.system.id));
        }
        for (name, _) in &mended.repaired {
            let why = self.place.damaged.get(name).map_or("", String::as_str);
            context.tell(Event::Replaced, place, format!("{name}: {why}"));
        }
    }
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        let mended = self.mending.done();
        self.tell(&mended);
        for (location, names) in &mended.damaged {
            for (name, why) in names {
                let why = Error::new(Kind::Corrupt, why);
                self.context.damage.note(&self.context.alarms, location, name, &why);
            }
        }
    }
}

/// Of an earlier system prune deletes what is superseded.
fn is_own(context: &AgentContext, system: &System) -> bool {
    system.id == context.system
}

async fn delete_superseded(
    context: &AgentContext,
    place: &mut Place,
    names: BTreeSet<ObjectName>,
) -> u64 {
    let done = superseded::delete(context, place.writer.location(), &names).await;
    for name in &done.deleted {
        place.listed.remove(name);
        place.damaged.remove(name);
    }
    place.damaged.extend(done.damaged);
    done.deleted.len() as u64
}

/// The alarms about differences are kept here. That a location is down is another alarm's to say.
fn alarm(context: &AgentContext, report: &SyncReport, damage: &Findings) {
    for writer in &context.writers {
        let name = writer.location().name();
        let failed = report.failed.iter().any(|failed| failed.location == *name);
        let here: Vec<_> = report.locations.iter().filter(|told| told.location == *name).collect();
        for (alarm, what) in [(place::DAMAGED, What::Damaged), ("sync-failed", What::Missing)] {
            match here.iter().find_map(|told| told.summary(what)) {
                Some(reason) => context.alarms.raise(alarm, name.as_str(), reason),
                None if failed || here.is_empty() => {}
                None if what == What::Damaged && damage.contains_key(name) => {}
                None => context.alarms.clear(alarm, name.as_str()),
            }
        }
    }
}

#[cfg(test)]
mod tests;
