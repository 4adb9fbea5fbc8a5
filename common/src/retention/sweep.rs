//! From what the rules keep to a word on each object.

use super::snapshots::{Kept, back, running};
use super::verdict::{Gone, Stays, Verdict};
use super::view::{Seen, View};
use super::{BEGIN_SLACK, Rules};
use crate::id::{AgentName, Branch, ObjectId, SnapshotId};
use crate::lsn::LsnRange;
use crate::name::ObjectName;
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};

/// What is asked of each object, prepared.
struct Sweep<'a> {
    view: &'a View,
    kept: Kept,
    packs: BTreeMap<ObjectId, Stays>,
    /// When the first of the running snapshots was begun, less the slack.
    running_since: Option<Timestamp>,
    running: BTreeSet<SnapshotId>,
    superseded: BTreeSet<(Branch, LsnRange)>,
    edge: Timestamp,
    newest_heads: BTreeMap<&'a AgentName, u64>,
    newest_condemned: Option<&'a ObjectName>,
    is_succeeded: bool,
    newest_lease: Option<u64>,
    /// Of the snapshots that are listed.
    oldest_generation: Option<u64>,
}

pub(super) fn sweep(view: &View, rules: &Rules, kept: Kept) -> Verdict {
    let mut packs: BTreeMap<ObjectId, Stays> = BTreeMap::new();
    for (id, &why) in &kept.snapshots {
        for pack in view.manifests.get(id).iter().flat_map(|plain| &plain.packs) {
            let known = packs.entry(pack.id()).or_insert(why);
            *known = (*known).min(why);
        }
    }
    let begun = || running(view, rules);
    let mut newest_heads: BTreeMap<&AgentName, u64> = BTreeMap::new();
    for name in view.objects.keys() {
        if let ObjectName::Head { agent, seq, .. } = name {
            let newest = newest_heads.entry(agent).or_insert(*seq);
            *newest = (*newest).max(*seq);
        }
    }
    let newest_condemned = view.condemned.keys().max_by_key(|name| (stored(view, name), *name));
    let sweep = Sweep {
        view,
        packs,
        running_since: begun().map(|(at, _)| back(at, BEGIN_SLACK)).min(),
        running: begun().map(|(_, begin)| begin.snapshot).collect(),
        superseded: superseded(view),
        edge: back(back(view.now, rules.window), rules.margin),
        newest_heads,
        newest_condemned,
        is_succeeded: rules.is_succeeded,
        newest_lease: view.objects.keys().filter_map(generation).max(),
        oldest_generation: view.oldest_generation(),
        kept,
    };
    let mut verdict = Verdict::default();
    for (name, seen) in &view.objects {
        match sweep.word(name, seen) {
            Ok(why) => drop(verdict.stays.insert(name.clone(), why)),
            Err(why) => drop(verdict.goes.insert(name.clone(), why)),
        }
    }
    sweep.condemned(&mut verdict);
    verdict.snapshots = sweep.kept.snapshots;
    verdict.wal = sweep.kept.wal;
    verdict.holds = sweep.kept.holds;
    verdict.acknowledged = sweep.kept.acknowledged;
    verdict
}

fn generation(name: &ObjectName) -> Option<u64> {
    match name {
        ObjectName::Lease { generation, .. } => Some(*generation),
        _ => None,
    }
}

fn stored(view: &View, name: &ObjectName) -> Option<Timestamp> {
    view.objects.get(name).map(|seen| seen.stored)
}

/// WAL that one longer object covers. Of equal ranges none: they may differ, and only opening them would tell.
fn superseded(view: &View) -> BTreeSet<(Branch, LsnRange)> {
    let mut found = BTreeSet::new();
    for (branch, mut ranges) in view.wal() {
        ranges.sort_unstable_by_key(|range| (range.start, std::cmp::Reverse(range.end)));
        let mut longest: Option<LsnRange> = None;
        for range in ranges {
            match longest.filter(|longest| longest.end >= range.end) {
                Some(longest) if longest != range => drop(found.insert((branch, range))),
                Some(_) => {}
                None => longest = Some(range),
            }
        }
    }
    found
}

impl Sweep<'_> {
    /// Why it stays, or else why it may go.
    fn word(&self, name: &ObjectName, seen: &Seen) -> Result<Stays, Gone> {
        match name {
            ObjectName::Cluster | ObjectName::Accepted { .. } | ObjectName::Wrap { .. } => {
                Ok(Stays::Bookkeeping)
            }
            ObjectName::Ledger { .. } => Ok(Stays::Bookkeeping),
            // Judged when it is known what goes.
            ObjectName::Condemned { .. } => Ok(Stays::Bookkeeping),
            ObjectName::Manifest { snapshot, .. } => {
                self.kept.snapshots.get(snapshot).copied().ok_or(Gone::Snapshot)
            }
            ObjectName::Begin { snapshot, .. } => self.begin(snapshot),
            ObjectName::Pack { id, .. } => self.pack(id, seen),
            ObjectName::Wal { branch, range, .. } => self.wal(*branch, *range),
            ObjectName::Origin { branch, .. } => match self.kept.branches.contains(branch) {
                true => Ok(Stays::Window),
                false => Err(Gone::Branch),
            },
            ObjectName::Head { agent, seq, .. } => {
                let is_newest = !self.is_succeeded && self.newest_heads.get(agent) == Some(seq);
                match is_newest || seen.stored >= self.edge {
                    true => Ok(Stays::Window),
                    false => Err(Gone::Head),
                }
            }
            ObjectName::Pin { pin, .. } => self.pin(*pin, name),
            ObjectName::Lease { generation, .. } => self.lease(*generation),
            ObjectName::Gap { branch, range, .. } => self.gap(*branch, *range),
            ObjectName::WalIndex { branch, range, .. } => match self.is_needed(*branch, *range) {
                true => Ok(Stays::Window),
                false => Err(Gone::Index),
            },
        }
    }

    fn begin(&self, snapshot: &SnapshotId) -> Result<Stays, Gone> {
        if let Some(why) = self.kept.snapshots.get(snapshot) {
            return Ok(*why);
        }
        match (self.running.contains(snapshot), self.view.manifests.contains_key(snapshot)) {
            (true, _) => Ok(Stays::Running),
            (false, true) => Err(Gone::Snapshot),
            (false, false) => Err(Gone::Abandoned),
        }
    }

    fn pack(&self, id: &ObjectId, seen: &Seen) -> Result<Stays, Gone> {
        let of_running = self.running_since.is_some_and(|since| seen.stored >= since);
        let running = of_running.then_some(Stays::Running);
        self.packs.get(id).copied().or(running).ok_or(Gone::Pack)
    }

    /// Whether WAL of the range stays.
    fn is_needed(&self, branch: Branch, range: LsnRange) -> bool {
        let needed = self.kept.wal.get(&branch).map_or(&[][..], Vec::as_slice);
        // Disjoint and sorted, so the ends are sorted too.
        let next = needed.partition_point(|need| need.end <= range.start);
        needed.get(next).is_some_and(|need| need.start < range.end)
    }

    fn wal(&self, branch: Branch, range: LsnRange) -> Result<Stays, Gone> {
        match self.is_needed(branch, range) {
            false if !self.kept.branches.contains(&branch) => Err(Gone::Branch),
            false => Err(Gone::Wal),
            true if self.superseded.contains(&(branch, range)) => Err(Gone::Superseded),
            true => Ok(Stays::Window),
        }
    }

    /// A snapshot is judged by the leases of later generations, and the newest says who may go on: of a system that was
    /// succeeded until its last snapshot has gone.
    fn lease(&self, generation: u64) -> Result<Stays, Gone> {
        let judges = self.oldest_generation.is_some_and(|oldest| oldest < generation);
        let is_over = self.is_succeeded && self.oldest_generation.is_none();
        match judges || (self.newest_lease == Some(generation) && !is_over) {
            true => Ok(Stays::Bookkeeping),
            false => Err(Gone::Lease),
        }
    }

    /// It tells why no moment in it can be reached, as long as one before or behind it can.
    fn gap(&self, branch: Branch, range: LsnRange) -> Result<Stays, Gone> {
        let needed = self.kept.wal.get(&branch).map_or(&[][..], Vec::as_slice);
        match needed.iter().any(|need| need.start <= range.end && range.start <= need.end) {
            true => Ok(Stays::Window),
            false => Err(Gone::Gap),
        }
    }

    fn pin(&self, pin: ObjectId, name: &ObjectName) -> Result<Stays, Gone> {
        let later = ObjectName::Pin { system: self.view.system, pin, seq: u64::MAX };
        let last = self.view.pins.range(name..=&later).next_back();
        let Some((last, record)) = last else { return Ok(Stays::Bookkeeping) };
        // Forgetting that damage was acknowledged would bring its pin back.
        let is_word_on_damage =
            record.damage.is_some_and(|damaged| self.view.manifests.contains_key(&damaged));
        let counts = record.holds(self.view.now.as_second()) || is_word_on_damage;
        match last == name && counts {
            true => Ok(Stays::Bookkeeping),
            false => Err(Gone::Pin),
        }
    }

    /// A list is done with when nothing that it names is still to go. The newest stays: it knows the window.
    fn condemned(&self, verdict: &mut Verdict) {
        for (name, condemned) in &self.view.condemned {
            let is_open = condemned
                .objects(self.view.system)
                .any(|object| verdict.goes.contains_key(&object));
            if !is_open && Some(name) != self.newest_condemned {
                verdict.stays.remove(name);
                verdict.goes.insert(name.clone(), Gone::Condemned);
            }
        }
    }
}
