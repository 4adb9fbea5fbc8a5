use super::*;
use crate::id::{Branch, ObjectId, SnapshotId, SystemId};
use crate::lease::Lease;
use crate::lsn::{Lsn, LsnRange};
use crate::name::ObjectName;
use crate::pin::{Hold, PinRecord, damage_pin};
use crate::segment::{Ancestor, TimelineId};
use crate::snapshot::{Begin, ManifestPlain, PackEntry, testing};
use jiff::Timestamp;
use std::collections::BTreeSet;

const SYSTEM: SystemId = SystemId::new(7);
const MIB: u64 = 1 << 20;
const DAY: i64 = 86_400;

/// So many days before now, which is a Sunday.
fn ago(days: f64) -> Timestamp {
    let now: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
    Timestamp::from_second(now.as_second() - (days * DAY as f64) as i64).unwrap()
}

fn branch(timeline: u32) -> Branch {
    format!("{timeline:08X}-0000000{timeline}").parse().unwrap()
}

/// A location that is described by what happened, each MiB of WAL on its own day.
struct Story(View);

impl Story {
    fn new() -> Story {
        let mut story = Story(View::empty(SYSTEM, ago(0.0)));
        story.origin(1, &[]);
        story
    }

    fn list(&mut self, name: ObjectName, stored: Timestamp, size: u64) {
        self.0.objects.insert(name, Seen { stored, size });
    }

    fn origin(&mut self, timeline: u32, ancestors: &[(u32, u64)]) {
        let ancestor = |&(timeline, switch): &(u32, u64)| Ancestor {
            timeline: TimelineId::new(timeline).unwrap(),
            switch: Lsn::new(switch),
        };
        let branch = branch(timeline);
        self.0.ancestors.insert(branch, ancestors.iter().map(ancestor).collect());
        self.list(ObjectName::Origin { system: SYSTEM, branch }, ago(500.0), 1);
    }

    fn wal(&mut self, timeline: u32, mib: std::ops::Range<u64>, days: f64) -> ObjectName {
        let range = LsnRange::new(Lsn::new(mib.start * MIB), Lsn::new(mib.end * MIB));
        let id = ObjectId::from_bytes((mib.start << 20 | mib.end).to_be_bytes());
        let name = ObjectName::Wal { system: SYSTEM, branch: branch(timeline), range, id };
        self.list(name.clone(), ago(days), 1);
        name
    }

    /// One that began in this MiB, and has a pack of its own.
    fn snapshot(&mut self, timeline: u32, mib: u64, days: f64) -> SnapshotId {
        let snapshot = SnapshotId::new(ago(days), [timeline as u8, 0, 0, 0]);
        let pack = ObjectId::from_bytes((mib << 8 | u64::from(timeline)).to_be_bytes());
        let mut salt = [0; 32];
        salt[..8].copy_from_slice(pack.as_bytes());
        let entry = PackEntry {
            epoch: 0,
            salt,
            commitment: [0; 32],
            size: 9,
            hash: [0; 32],
            live_bytes: 1,
            frame_bytes: None,
        };
        let plain = ManifestPlain {
            start: Lsn::new(mib * MIB + 40),
            stop: Lsn::new(mib * MIB + 400),
            segment_bytes: MIB as u32,
            began: ago(days).as_second(),
            finished: ago(days).as_second(),
            packs: vec![entry],
            ..testing::plain(SYSTEM, snapshot, branch(timeline))
        };
        self.list(ObjectName::Pack { system: SYSTEM, id: pack }, ago(days), 9);
        self.list(ObjectName::Begin { system: SYSTEM, snapshot }, ago(days), 1);
        self.list(ObjectName::Manifest { system: SYSTEM, snapshot }, ago(days), 1);
        self.0.manifests.insert(snapshot, plain);
        snapshot
    }

    /// A snapshot on each day, from so many days ago to yesterday, with WAL to now.
    fn daily(days: u64) -> (Story, Vec<SnapshotId>) {
        let mut story = Story::new();
        let snapshots = (0..days).map(|day| {
            let days_ago = (days - day) as f64;
            story.wal(1, day..day + 1, days_ago - 0.5);
            story.snapshot(1, day, days_ago)
        });
        let snapshots = snapshots.collect();
        (story, snapshots)
    }

    fn pin(&mut self, seq: u64, record: PinRecord, id: ObjectId) -> ObjectName {
        let name = ObjectName::Pin { system: SYSTEM, pin: id, seq };
        self.list(name.clone(), ago(0.1), 1);
        self.0.pins.insert(name.clone(), record);
        name
    }

    fn acknowledge(&mut self, damaged: SnapshotId, seq: u64) -> ObjectName {
        let word = held(damaged, Hold::Consistent).given_back();
        self.pin(seq, PinRecord { damage: Some(damaged), ..word }, damage_pin(damaged))
    }

    /// One page is bad in all of these; the first of them shows it.
    fn damage(&mut self, snapshots: &[SnapshotId]) {
        let mut parent = None;
        for id in snapshots {
            let plain = self.0.manifests.get_mut(id).unwrap();
            plain.corrupt_pages += 1;
            plain.new_corrupt_pages = Some(u64::from(parent.is_none()));
            plain.parent = parent.or(plain.parent);
            parent = Some(*id);
        }
    }

    fn kept(&self, rules: &Rules) -> BTreeSet<SnapshotId> {
        judge(&self.0, rules).snapshots.into_keys().collect()
    }
}

fn set(snapshots: &[SnapshotId]) -> BTreeSet<SnapshotId> {
    snapshots.iter().copied().collect()
}

fn week() -> Rules {
    Rules::window(Duration::from_secs(7 * DAY as u64))
}

fn held(snapshot: SnapshotId, hold: Hold) -> PinRecord {
    PinRecord {
        snapshot,
        hold,
        reason: "test".into(),
        by: "db1".into(),
        made: 0,
        until: None,
        released: false,
        damage: None,
        restore: None,
    }
}

#[test]
fn the_window_begins_with_the_newest_snapshot_an_hour_before_its_edge() {
    let (mut story, snapshots) = Story::daily(12);
    // The one of seven days ago lies on the edge, and the one before it is an hour away at least.
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.snapshots.keys().copied().collect::<Vec<_>>(), snapshots[4..]);
    let from = story.0.manifests[&snapshots[4]].wal_needed().start;
    assert_eq!(verdict.wal[&branch(1)], [LsnRange::new(from, Lsn::MAX)]);
    let gone = |kind: Gone| verdict.goes.values().filter(|why| **why == kind).count();
    assert_eq!((gone(Gone::Wal), gone(Gone::Pack), gone(Gone::Snapshot)), (4, 4, 8));
    assert_eq!(verdict.goes.len() + verdict.stays.len(), story.0.objects.len());
    // An hour later it is the next one's turn, and not a moment before.
    story.0.now = ago(-3599.0 / DAY as f64);
    assert_eq!(story.kept(&week()), set(&snapshots[4..]));
    story.0.now = ago(-3600.0 / DAY as f64);
    assert_eq!(story.kept(&week()), set(&snapshots[5..]));
}

#[test]
fn a_marked_an_unusable_and_a_late_snapshot_do_not_begin_the_window() {
    let (story, snapshots) = Story::daily(12);
    let mut marked = Story(story.0.clone());
    marked.0.manifests.get_mut(&snapshots[4]).unwrap().corrupt_pages = 1;
    assert_eq!(judge(&marked.0, &week()).snapshots[&snapshots[3]], Stays::Window);
    marked.acknowledge(snapshots[4], 0);
    assert_eq!(marked.kept(&week()), set(&snapshots[4..]));
    let mut lacking = Story(story.0.clone());
    let pack = lacking.0.manifests[&snapshots[4]].packs[0].name(SYSTEM);
    lacking.0.objects.remove(&pack);
    assert_eq!(lacking.kept(&week()), set(&snapshots[3..]));
    let mut holed = Story(story.0.clone());
    holed.0.objects.retain(|name, _| !matches!(name, ObjectName::Wal { range, .. } if range.start == Lsn::new(4 * MIB)));
    assert_eq!(holed.kept(&week()), set(&snapshots[3..]));
    // The agent's clock was behind: the store saw the manifest later than it says.
    let mut late = Story(story.0);
    late.list(ObjectName::Manifest { system: SYSTEM, snapshot: snapshots[4] }, ago(5.0), 1);
    assert_eq!(late.kept(&week()), set(&snapshots[3..]));
}

#[test]
fn the_oldest_stays_where_none_is_old_enough_and_all_wal_where_there_is_none() {
    let (story, snapshots) = Story::daily(4);
    assert_eq!(story.kept(&week()), set(&snapshots));
    let mut empty = Story::new();
    let old = empty.wal(1, 0..1, 90.0);
    empty.wal(1, 1..2, 1.0);
    assert!(judge(&empty.0, &week()).stays.contains_key(&old));
}

#[test]
fn the_newest_and_the_last_n_never_go() {
    let mut story = Story::new();
    let snapshots: Vec<_> = (0..5)
        .map(|day| {
            story.wal(1, day..day + 1, 99.0 - day as f64);
            story.snapshot(1, day, 100.0 - day as f64)
        })
        .collect();
    assert_eq!(story.kept(&week()), set(&snapshots[4..]));
    let verdict = judge(&story.0, &Rules { keep_last: 3, ..week() });
    assert_eq!(verdict.snapshots.len(), 3);
    assert_eq!(verdict.snapshots[&snapshots[4]], Stays::Newest);
    assert_eq!(verdict.snapshots[&snapshots[2]], Stays::KeepLast);
    assert_eq!(verdict.wal[&branch(1)], [LsnRange::new(Lsn::new(2 * MIB), Lsn::MAX)]);
}

#[test]
fn longer_lived_snapshots_keep_what_makes_them_consistent() {
    let (story, snapshots) = Story::daily(70);
    let verdict = judge(&story.0, &Rules { weekly: 4, monthly: 2, ..week() });
    let of = |why: Stays| -> Vec<String> {
        let found = verdict.snapshots.iter().filter(|(_, stays)| **stays == why);
        found.map(|(id, _)| id.to_string()[..8].to_owned()).collect()
    };
    // Mondays; the newest two are in the window. The first of November, and of October.
    assert_eq!(of(Stays::Weekly), ["20261026", "20261102", "20261109"]);
    assert_eq!(of(Stays::Monthly), ["20261001", "20261101"]);
    let monday = snapshots.iter().find(|id| id.to_string().starts_with("20261102")).unwrap();
    let needed = story.0.manifests[monday].wal_needed();
    assert!(
        verdict.wal[&branch(1)].iter().any(|range| range.covers(&needed) && range.len() <= 2 * MIB)
    );
}

#[test]
fn a_dead_branch_goes_with_its_last_commit_and_a_living_one_keeps_its_ancestors() {
    let mut story = Story::new();
    for day in 0..30 {
        story.wal(1, day..day + 1, 40.0 - day as f64);
    }
    let early = story.snapshot(1, 2, 38.0);
    let dead = story.snapshot(1, 20, 20.0);
    // Timeline 2 left timeline 1 before its second snapshot.
    story.origin(2, &[(1, 10 * MIB + 500)]);
    story.wal(2, 10..12, 1.0);
    let verdict = judge(&story.0, &week());
    // The newest stays, whatever branch it is on.
    assert_eq!(verdict.snapshots.keys().copied().collect::<BTreeSet<_>>(), set(&[early, dead]));
    let newer = story.snapshot(2, 11, 0.5);
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.snapshots.keys().copied().collect::<BTreeSet<_>>(), set(&[early, newer]));
    assert_eq!(
        verdict.wal[&branch(1)],
        [LsnRange::new(Lsn::new(2 * MIB), Lsn::new(10 * MIB + 500))]
    );
    // A server that writes nothing is heard of all the same.
    story.0.heard.insert(branch(1), ago(0.1));
    assert_eq!(story.kept(&week()), set(&[early, dead, newer]));
}

#[test]
fn pins_hold_until_they_end_are_renewed_or_given_back() {
    let (mut story, snapshots) = Story::daily(12);
    let id = ObjectId::from_bytes([1; 8]);
    let old = story.pin(
        0,
        PinRecord { until: Some(ago(-1.0).as_second()), ..held(snapshots[0], Hold::Consistent) },
        id,
    );
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.snapshots[&snapshots[0]], Stays::Pinned);
    assert_eq!(verdict.wal[&branch(1)].len(), 2, "no WAL after what makes it consistent");
    let renewed = story.pin(1, PinRecord { until: None, ..held(snapshots[0], Hold::Onwards) }, id);
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.wal[&branch(1)], [LsnRange::new(Lsn::new(0), Lsn::MAX)]);
    assert_eq!(verdict.goes[&old], Gone::Pin);
    assert!(verdict.stays.contains_key(&renewed));
    story.pin(2, held(snapshots[0], Hold::Onwards).given_back(), id);
    assert_eq!(story.kept(&week()), set(&snapshots[4..]));
    let ended =
        PinRecord { until: Some(ago(0.01).as_second()), ..held(snapshots[0], Hold::Onwards) };
    story.pin(3, ended, id);
    assert_eq!(story.kept(&week()), set(&snapshots[4..]));
}

#[test]
fn what_is_whole_stays_until_the_damage_is_acknowledged() {
    let (mut story, snapshots) = Story::daily(20);
    for damaged in &snapshots[3..5] {
        story.0.manifests.get_mut(damaged).unwrap().corrupt_pages = 1;
    }
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.snapshots[&snapshots[2]], Stays::Damage);
    let hold = DamageHold { whole: snapshots[2], damaged: snapshots[3] };
    assert_eq!(verdict.holds, [hold], "one pin for one run of damage");
    // The pin outlives the snapshots that showed the damage.
    let record = PinRecord { damage: Some(hold.damaged), ..held(hold.whole, Hold::Consistent) };
    story.pin(0, record.clone(), damage_pin(hold.damaged));
    assert!(judge(&story.0, &week()).holds.is_empty());
    let mut forgotten = Story(story.0.clone());
    forgotten.0.manifests.remove(&snapshots[3]);
    forgotten.0.manifests.remove(&snapshots[4]);
    assert!(forgotten.kept(&week()).contains(&snapshots[2]));
    let word = story.pin(1, record.given_back(), damage_pin(hold.damaged));
    let other = PinRecord { damage: Some(snapshots[4]), ..record.given_back() };
    story.pin(0, other, damage_pin(snapshots[4]));
    let verdict = judge(&story.0, &week());
    assert!(!verdict.snapshots.contains_key(&snapshots[2]) && verdict.holds.is_empty());
    assert!(verdict.stays.contains_key(&word), "or the pin would come back");
    story.0.manifests.remove(&snapshots[3]);
    assert_eq!(judge(&story.0, &week()).goes[&word], Gone::Pin);
}

#[test]
fn an_acknowledgement_lasts_while_no_other_page_goes_bad() {
    let (mut story, snapshots) = Story::daily(14);
    story.damage(&snapshots[3..]);
    assert!(story.kept(&week()).contains(&snapshots[2]), "nothing reaches the window but it");
    // Said of the first one, before the others were taken.
    let word = story.acknowledge(snapshots[3], 0);
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.snapshots.keys().copied().collect::<BTreeSet<_>>(), set(&snapshots[6..]));
    let from = story.0.manifests[&snapshots[6]].wal_needed().start;
    assert_eq!(verdict.wal[&branch(1)], [LsnRange::new(from, Lsn::MAX)]);
    assert_eq!(verdict.holds, []);
    let inherited: Vec<_> = snapshots[4..].iter().map(|&damaged| (damaged, 0)).collect();
    let said = |verdict: &Verdict| -> Vec<(SnapshotId, u64)> {
        verdict.acknowledged.iter().map(|word| (word.damaged, word.seq)).collect()
    };
    assert_eq!(said(&verdict), inherited);

    let mut other_page = Story(story.0.clone());
    other_page.damage(&snapshots[12..]);
    let verdict = judge(&other_page.0, &week());
    let hold = DamageHold { whole: snapshots[11], damaged: snapshots[12] };
    assert_eq!(verdict.holds, [hold], "the last that has the other page whole");
    assert_eq!(said(&verdict), inherited[..8]);
    let mut unknown = Story(story.0.clone());
    unknown.0.manifests.get_mut(&snapshots[9]).unwrap().new_corrupt_pages = None;
    let hold = DamageHold { whole: snapshots[8], damaged: snapshots[9] };
    assert_eq!(judge(&unknown.0, &week()).holds, [hold]);

    // Each has its own word when the first of them goes.
    for (damaged, seq) in inherited {
        story.acknowledge(damaged, seq);
    }
    story.0.manifests.retain(|id, _| snapshots[6..].contains(id));
    story.0.pins.remove(&word);
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.snapshots.keys().copied().collect::<BTreeSet<_>>(), set(&snapshots[6..]));
    assert_eq!((verdict.holds, verdict.acknowledged), (vec![], vec![]));
}

#[test]
fn an_open_pin_of_its_own_ends_where_the_damage_is_its_parents() {
    let (mut story, snapshots) = Story::daily(14);
    story.damage(&snapshots[3..5]);
    let own = PinRecord { damage: Some(snapshots[4]), ..held(snapshots[2], Hold::Consistent) };
    story.pin(0, own, damage_pin(snapshots[4]));
    story.acknowledge(snapshots[3], 0);
    let word = Acknowledged { damaged: snapshots[4], seq: 1 };
    assert_eq!(judge(&story.0, &week()).acknowledged, [word]);
}

#[test]
fn a_running_snapshot_keeps_its_parent_and_all_packs_since_it_was_begun() {
    let (mut story, snapshots) = Story::daily(12);
    let pack = |n: u8| ObjectName::Pack { system: SYSTEM, id: ObjectId::from_bytes([n; 8]) };
    story.list(pack(1), ago(3.0), 1);
    story.list(pack(2), ago(0.5), 1);
    let begun = SnapshotId::new(ago(1.0), [9; 4]);
    let begin = ObjectName::Begin { system: SYSTEM, snapshot: begun };
    story.list(begin.clone(), ago(1.0), 1);
    let parent = Some(snapshots[0]);
    let agent = "db1".parse().unwrap();
    story.0.begins.insert(begun, Begin { snapshot: begun, agent, parent, generation: 0 });
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.snapshots[&snapshots[0]], Stays::Running);
    assert_eq!(
        (verdict.goes.get(&pack(1)), verdict.stays.get(&pack(2))),
        (Some(&Gone::Pack), Some(&Stays::Running))
    );
    // A later one of the same agent says that it was interrupted.
    let mut later = story.0.clone();
    let newest = snapshots.iter().max().unwrap();
    later.manifests.get_mut(newest).unwrap().abandoned = Some(vec![begun]);
    let verdict = judge(&later, &week());
    assert_eq!(verdict.goes[&begin], Gone::Abandoned);
    assert_eq!(verdict.goes[&pack(2)], Gone::Pack);
    // A week later it has been given up.
    story.0.now = ago(-6.5);
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.goes[&begin], Gone::Abandoned);
    assert_eq!(verdict.goes[&pack(2)], Gone::Pack);
    assert!(!verdict.snapshots.contains_key(&snapshots[0]));
}

#[test]
fn pieces_go_when_one_longer_object_covers_them_and_equal_ones_stay() {
    let (mut story, _) = Story::daily(2);
    let piece = story.wal(1, 4..6, 0.2);
    let edge = story.wal(1, 6..9, 0.2);
    let span = story.wal(1, 4..8, 0.1);
    let twin = ObjectName::Wal {
        system: SYSTEM,
        branch: branch(1),
        range: LsnRange::new(Lsn::new(4 * MIB), Lsn::new(8 * MIB)),
        id: ObjectId::from_bytes([0xEE; 8]),
    };
    story.list(twin.clone(), ago(0.1), 1);
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.goes[&piece], Gone::Superseded);
    assert!([edge, span, twin].iter().all(|name| verdict.stays.contains_key(name)));
}

fn lease(story: &mut Story, generation: u64, begun: &[SnapshotId]) -> ObjectName {
    let name = ObjectName::Lease { system: SYSTEM, generation };
    story.list(name.clone(), ago(300.0), 1);
    story.0.leases.push(Lease {
        generation,
        agent: "db1".parse().unwrap(),
        slot: "backstay_db1".into(),
        holder: [1; 16],
        begun: begun.to_vec(),
        is_complete: true,
        made: 0,
    });
    name
}

#[test]
fn a_snapshot_that_was_begun_without_the_lease_does_not_begin_the_window() {
    let (mut story, snapshots) = Story::daily(12);
    for id in &snapshots {
        story.0.manifests.get_mut(id).unwrap().generation = 1;
    }
    let others: Vec<_> = snapshots.iter().copied().filter(|id| *id != snapshots[4]).collect();
    lease(&mut story, 2, &others);
    assert_eq!(story.kept(&week()), set(&snapshots[3..]));
}

#[test]
fn a_lease_stays_while_a_snapshot_is_judged_by_it_and_the_newest_stays() {
    let (mut story, snapshots) = Story::daily(3);
    for (id, generation) in snapshots.iter().zip([2, 2, 3]) {
        story.0.manifests.get_mut(id).unwrap().generation = generation;
    }
    let leases = [1, 2, 3, 4].map(|generation| lease(&mut story, generation, &snapshots));
    let stays = |story: &Story| {
        let verdict = judge(&story.0, &week());
        assert!(verdict.goes.values().all(|why| *why == Gone::Lease));
        leases.clone().map(|name| verdict.stays.contains_key(&name))
    };
    assert_eq!(stays(&story), [false, false, true, true]);
    story.0.manifests.values_mut().for_each(|plain| plain.generation = 4);
    assert_eq!(stays(&story), [false, false, false, true]);
    // Of a system that was succeeded it stays as long as a snapshot does.
    let stays = |story: &Story| {
        let verdict = judge(&story.0, &Rules { is_succeeded: true, ..week() });
        leases.clone().map(|name| verdict.stays.contains_key(&name))
    };
    assert_eq!(stays(&story), [false, false, false, true]);
    for snapshot in &snapshots {
        story.0.manifests.remove(snapshot);
        story.0.begins.remove(snapshot);
    }
    assert_eq!(stays(&story), [false; 4]);
}

#[test]
fn a_gap_goes_with_the_wal_on_both_sides() {
    let (mut story, snapshots) = Story::daily(12);
    let gap = |from: u64, to: u64| {
        let range = LsnRange::new(Lsn::new(from), Lsn::new(to));
        let id = ObjectId::from_bytes(from.to_be_bytes());
        ObjectName::Gap { system: SYSTEM, branch: branch(1), range, id }
    };
    let from = story.0.manifests[&snapshots[4]].wal_needed().start.get();
    let (before, edge, inside) = (gap(1, from - 1), gap(2, from), gap(from + MIB, from + 2 * MIB));
    for name in [&before, &edge, &inside] {
        story.list(name.clone(), ago(300.0), 1);
    }
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.goes.get(&before), Some(&Gone::Gap));
    assert!(verdict.stays.contains_key(&edge) && verdict.stays.contains_key(&inside));
}

#[test]
fn an_index_goes_when_no_wal_of_its_block_stays() {
    let (mut story, snapshots) = Story::daily(12);
    let from = story.0.manifests[&snapshots[4]].wal_needed().start.get() / MIB;
    let mut index = |from: u64, to: u64| {
        let range = LsnRange::new(Lsn::new(from * MIB), Lsn::new(to * MIB));
        let id = ObjectId::from_bytes((from << 20 | to).to_be_bytes());
        let name = ObjectName::WalIndex { system: SYSTEM, branch: branch(1), range, id };
        story.list(name.clone(), ago(300.0), 1);
        name
    };
    let (before, across) = (index(0, from), index(0, from + 1));
    let verdict = judge(&story.0, &week());
    assert_eq!(verdict.goes.get(&before), Some(&Gone::Index));
    assert!(verdict.stays.contains_key(&across));
}
