//! Which snapshots stay, and which WAL with them.

use super::Rules;
use super::verdict::{Acknowledged, DamageHold, Stays};
use super::view::{View, is_trusted};
use crate::id::{Branch, SnapshotId};
use crate::line::{Line, Past, line_of};
use crate::lsn::{Lsn, LsnRange};
use crate::name::ObjectName;
use crate::pin::{Hold, PinRecord, damage_pin};
use crate::snapshot::ManifestPlain;
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};

/// Days of a week, and at most of a month.
const WEEK_DAYS: u64 = 7;
const MONTH_DAYS: u64 = 31;

/// What the rules keep, before it is said of each object.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub snapshots: BTreeMap<SnapshotId, Stays>,
    pub wal: BTreeMap<Branch, Vec<LsnRange>>,
    /// Branches whose origins are needed.
    pub branches: BTreeSet<Branch>,
    pub holds: Vec<DamageHold>,
    pub acknowledged: Vec<Acknowledged>,
}

impl Kept {
    fn snapshot(&mut self, plain: &ManifestPlain, why: Stays) {
        let known = self.snapshots.entry(plain.snapshot).or_insert(why);
        *known = (*known).min(why);
        self.wal(plain.branch, plain.wal_needed());
    }

    fn wal(&mut self, branch: Branch, range: LsnRange) {
        self.branches.insert(branch);
        self.wal.entry(branch).or_default().push(range);
    }

    /// All WAL of a line from the segment of the snapshot's start on.
    fn onwards(&mut self, line: &Line, plain: &ManifestPlain) {
        let Some(first) = line.index_of(plain.branch) else { return };
        for (index, leg) in line.legs.iter().enumerate() {
            self.branches.insert(leg.branch);
            let segment = u64::from(plain.segment_bytes);
            let start = match index.cmp(&first) {
                std::cmp::Ordering::Less => continue,
                std::cmp::Ordering::Equal => plain.wal_needed().start,
                std::cmp::Ordering::Greater => leg.from.align_down(segment),
            };
            self.wal(leg.branch, LsnRange::new(start, leg.to));
        }
    }
}

/// One judgement under way.
struct Judge<'a> {
    view: &'a View,
    rules: &'a Rules,
    pasts: BTreeMap<Branch, Past>,
    lines: BTreeMap<Branch, Line>,
    /// Snapshots that can be restored from what is listed.
    usable: BTreeSet<SnapshotId>,
    /// Damaged ones that count as whole.
    acknowledged: BTreeSet<SnapshotId>,
    /// What is stored after this is inside the window.
    edge: Timestamp,
}

pub(super) fn judge(view: &View, rules: &Rules) -> Kept {
    let pasts = view.pasts();
    let lines = pasts.keys().map(|&branch| (branch, line_of(branch, &pasts))).collect();
    let edge = back(back(view.now, rules.window), rules.margin);
    let (usable, acknowledged) = (BTreeSet::new(), acknowledged(view));
    let mut judge = Judge { view, rules, pasts, lines, usable, acknowledged, edge };
    let is_usable = |plain: &&ManifestPlain| judge.is_usable(plain);
    judge.usable = view.manifests.values().filter(is_usable).map(|plain| plain.snapshot).collect();
    let mut kept = Kept::default();
    judge.window(&mut kept);
    judge.newest(&mut kept);
    judge.longer_lived(&mut kept);
    judge.pinned(&mut kept);
    judge.damage(&mut kept);
    judge.running(&mut kept);
    for ranges in kept.wal.values_mut() {
        *ranges = crate::catalog::cover::merged(std::mem::take(ranges).into_iter());
    }
    kept
}

/// `span` before `moment`.
pub(super) fn back(moment: Timestamp, span: std::time::Duration) -> Timestamp {
    moment.checked_sub(span).unwrap_or(Timestamp::MIN)
}

impl Judge<'_> {
    /// All its packs are listed with their sizes, and its WAL without a hole; and its agent held the lease.
    fn is_usable(&self, plain: &ManifestPlain) -> bool {
        let needed = plain.wal_needed();
        let covered = self.pasts.get(&plain.branch).map_or(&[][..], |past| &past.covered);
        let is_whole = needed.is_empty() || covered.iter().any(|range| range.covers(&needed));
        is_whole
            && !self.view.is_superseded(plain)
            && plain.packs.iter().all(|pack| {
                let seen = self.view.objects.get(&pack.name(self.view.system));
                seen.is_some_and(|seen| seen.size == pack.size)
            })
    }

    fn is_usable_and_trusted(&self, plain: &ManifestPlain) -> bool {
        self.usable.contains(&plain.snapshot) && self.is_trusted(plain)
    }

    fn is_trusted(&self, plain: &ManifestPlain) -> bool {
        is_trusted(plain) || self.acknowledged.contains(&plain.snapshot)
    }

    /// The snapshots on a line, in its order.
    fn on_line(&self, line: &Line) -> Vec<&ManifestPlain> {
        let fits =
            |plain: &&ManifestPlain| line.leaves(plain.branch).is_some_and(|to| plain.stop <= to);
        let mut found: Vec<_> = self.view.manifests.values().filter(fits).collect();
        found.sort_by_key(|plain| (plain.stop, plain.start, plain.snapshot));
        found
    }

    /// Branches with something inside the window, be it no more than its origin.
    fn alive(&self) -> Vec<Branch> {
        let mut last: BTreeMap<Branch, Timestamp> = self.view.heard.clone();
        for (name, seen) in &self.view.objects {
            if let ObjectName::Wal { branch, .. } | ObjectName::Origin { branch, .. } = name {
                let last = last.entry(*branch).or_insert(seen.stored);
                *last = (*last).max(seen.stored);
            }
        }
        last.into_iter().filter(|(_, last)| *last >= self.edge).map(|(branch, _)| branch).collect()
    }

    fn window(&self, kept: &mut Kept) {
        for branch in self.alive() {
            let Some(line) = self.lines.get(&branch) else { continue };
            kept.branches.extend(line.legs.iter().map(|leg| leg.branch));
            let on_line = self.on_line(line);
            let is_old_enough = |plain: &&&ManifestPlain| {
                self.is_usable_and_trusted(plain) && self.view.ended(plain) <= self.edge
            };
            let oldest = || on_line.iter().find(|plain| self.usable.contains(&plain.snapshot));
            let Some(first) = on_line.iter().rev().find(is_old_enough).or_else(oldest) else {
                kept.wal(branch, LsnRange::new(Lsn::INVALID, Lsn::MAX));
                continue;
            };
            kept.onwards(line, first);
            let later = on_line.iter().filter(|plain| plain.stop >= first.stop);
            later.for_each(|plain| kept.snapshot(plain, Stays::Window));
        }
    }

    /// The newest, whatever becomes of it, and the newest that can be restored.
    fn newest(&self, kept: &mut Kept) {
        if self.rules.is_succeeded {
            return;
        }
        let mut all: Vec<&ManifestPlain> = self.view.manifests.values().collect();
        all.sort_by_key(|plain| std::cmp::Reverse((self.view.ended(plain), plain.snapshot)));
        let usable = all.iter().filter(|plain| self.usable.contains(&plain.snapshot));
        let last = usable.take(self.rules.keep_last.max(1)).enumerate().map(|(number, plain)| {
            (*plain, if number == 0 { Stays::Newest } else { Stays::KeepLast })
        });
        for (plain, why) in all.first().map(|plain| (*plain, Stays::Newest)).into_iter().chain(last)
        {
            kept.snapshot(plain, why);
            self.lines.get(&plain.branch).iter().for_each(|line| kept.onwards(line, plain));
        }
    }

    fn longer_lived(&self, kept: &mut Kept) {
        let week = |time: Timestamp| {
            let week = time.to_zoned(jiff::tz::TimeZone::UTC).date().iso_week_date();
            (week.year(), week.week())
        };
        let month = |time: Timestamp| {
            let date = time.to_zoned(jiff::tz::TimeZone::UTC).date();
            (date.year(), date.month())
        };
        self.one_for_each(week, (self.rules.weekly, WEEK_DAYS), Stays::Weekly, kept);
        self.one_for_each(month, (self.rules.monthly, MONTH_DAYS), Stays::Monthly, kept);
    }

    /// The oldest of each period: so the choice does not change while the period goes on. Where no snapshots are added any more,
    /// the periods are counted by the calendar.
    fn one_for_each(
        &self,
        period: impl Fn(Timestamp) -> (i16, i8),
        (count, days): (usize, u64),
        why: Stays,
        kept: &mut Kept,
    ) {
        let periods = std::time::Duration::from_secs((count as u64).saturating_mul(days * 86_400));
        let since = match self.rules.is_succeeded {
            true => back(self.view.now, periods),
            false => Timestamp::MIN,
        };
        let fits =
            |p: &&ManifestPlain| self.is_usable_and_trusted(p) && p.snapshot.began() >= since;
        let mut oldest: BTreeMap<(i16, i8), &ManifestPlain> = BTreeMap::new();
        for plain in self.view.manifests.values().filter(fits) {
            let first = oldest.entry(period(plain.snapshot.began())).or_insert(plain);
            if plain.snapshot < first.snapshot {
                *first = plain;
            }
        }
        oldest.values().rev().take(count).for_each(|plain| kept.snapshot(plain, why));
    }

    fn pinned(&self, kept: &mut Kept) {
        let now = self.view.now.as_second();
        let holding = self.view.newest_pins().filter(|(_, pin)| pin.holds(now));
        for (_, pin) in holding {
            let Some(plain) = self.view.manifests.get(&pin.snapshot) else { continue };
            let why = if pin.damage.is_some() { Stays::Damage } else { Stays::Pinned };
            kept.snapshot(plain, why);
            if pin.hold == Hold::Onwards {
                // A restore may go to any history that passes through the snapshot, a dead one too.
                let through =
                    |line: &&Line| line.leaves(plain.branch).is_some_and(|to| plain.stop <= to);
                self.lines.values().filter(through).for_each(|line| kept.onwards(line, plain));
            }
        }
    }

    fn damage(&self, kept: &mut Kept) {
        self.inherited(kept);
        let records: Vec<_> = self.view.newest_pins().map(|(_, pin)| pin).collect();
        for damaged in self.view.manifests.values().filter(|plain| !self.is_trusted(plain)) {
            let Some(line) = self.lines.get(&damaged.branch) else { continue };
            let mut before =
                self.on_line(line).into_iter().filter(|plain| plain.stop < damaged.stop);
            let Some(whole) = before.rfind(|plain| self.is_usable_and_trusted(plain)) else {
                continue;
            };
            kept.snapshot(whole, Stays::Damage);
            let is_its = |pin: &&PinRecord| pin.damage == Some(damaged.snapshot) && !pin.released;
            let is_held = records.iter().any(is_its)
                || kept.holds.iter().any(|hold| hold.whole == whole.snapshot)
                || records.iter().any(|pin| {
                    pin.snapshot == whole.snapshot && pin.damage.is_some() && !pin.released
                });
            if !is_held {
                let (whole, damaged) = (whole.snapshot, damaged.snapshot);
                kept.holds.push(DamageHold { whole, damaged });
            }
        }
    }

    /// Says of whom no pin says yet that the damage is acknowledged.
    fn inherited(&self, kept: &mut Kept) {
        let listed = |id: &&SnapshotId| self.view.manifests.contains_key(*id);
        for &damaged in self.acknowledged.iter().filter(listed) {
            let newest = self.view.newest_pins().find_map(|(name, record)| match name {
                ObjectName::Pin { pin, seq, .. } if *pin == damage_pin(damaged) => {
                    Some((*seq, record.released))
                }
                _ => None,
            });
            let seq = match newest {
                Some((_, true)) => continue,
                Some((seq, false)) => seq + 1,
                None => 0,
            };
            kept.acknowledged.push(Acknowledged { damaged, seq });
        }
    }

    fn running(&self, kept: &mut Kept) {
        for (_, begin) in running(self.view, self.rules) {
            let parent = begin.parent.and_then(|parent| self.view.manifests.get(&parent));
            parent.iter().for_each(|plain| kept.snapshot(plain, Stays::Running));
        }
    }
}

/// Damaged snapshots whose damage a person has acknowledged: a pin that was given back says so, or else their parent is one of
/// them and has all pages damaged that they have.
fn acknowledged(view: &View) -> BTreeSet<SnapshotId> {
    let told = view.newest_pins().filter(|(_, pin)| pin.released);
    let mut known: BTreeSet<SnapshotId> = told.filter_map(|(_, pin)| pin.damage).collect();
    let inherits =
        |plain: &&ManifestPlain| !is_trusted(plain) && plain.new_corrupt_pages == Some(0);
    // Parents are older as a rule, so that once through is enough.
    loop {
        let before = known.len();
        for plain in view.manifests.values().filter(inherits) {
            if plain.parent.is_some_and(|parent| known.contains(&parent)) {
                known.insert(plain.snapshot);
            }
        }
        if known.len() == before {
            return known;
        }
    }
}

/// The snapshots that may be running, with when they were begun.
pub(super) fn running<'a>(
    view: &'a View,
    rules: &Rules,
) -> impl Iterator<Item = (Timestamp, &'a crate::snapshot::Begin)> {
    let since = back(view.now, rules.running_max);
    let abandoned: BTreeSet<SnapshotId> = view
        .manifests
        .values()
        .flat_map(|plain| plain.abandoned.iter().flatten().copied())
        .collect();
    view.begins.values().filter_map(move |begin| {
        let name = ObjectName::Begin { system: view.system, snapshot: begin.snapshot };
        let begun = view.objects.get(&name)?.stored;
        let has_ended =
            view.manifests.contains_key(&begin.snapshot) || abandoned.contains(&begin.snapshot);
        (begun >= since && !has_ended).then_some((begun, begin))
    })
}
