//! With indexes and without, good ones and bad ones: the answers are the same.

use crate::plan::Plan;
use crate::testing::{Repo, SYSTEM, Writer, micros};
use backstay_common::Result;
use backstay_common::catalog::Catalog;
use backstay_common::id::{Branch, ObjectId};
use backstay_common::keys::Epoch;
use backstay_common::lsn::{Lsn, LsnRange, SPAN_BYTES};
use backstay_common::name::ObjectName;
use backstay_common::seal::Sealed;
use backstay_common::span::{SpanMeta, WalObject};
use backstay_common::walindex::{IndexEntry, WalIndex};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// What happens at a server, and to its backups.
#[derive(Clone, Debug)]
enum Step {
    Work(u8),
    Commit,
    Abort,
    Point,
    ClockBack,
    Ship,
    ShipWithClock,
    Snapshot,
    Promote,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u8..60).prop_map(Step::Work),
        6 => Just(Step::Commit),
        1 => Just(Step::Abort),
        1 => Just(Step::Point),
        1 => Just(Step::ClockBack),
        8 => Just(Step::Ship),
        2 => Just(Step::ShipWithClock),
        1 => Just(Step::Snapshot),
        1 => Just(Step::Promote),
    ]
}

/// Lives through `steps`; the targets that may be asked for afterwards.
async fn live(repo: &Repo, steps: &[Step]) -> Vec<String> {
    let mut writer = repo.first_branch(&[0]).await;
    writer.wal.ordinary(3, 50);
    writer.ship(repo).await;
    writer.snapshot(repo, 1).await;
    writer.ship(repo).await;
    let (mut second, mut xid, mut timeline) = (10, 700, 1);
    let mut targets = vec!["latest".to_string()];
    for step in steps {
        second += 7;
        match step {
            Step::Work(amount) => drop(writer.wal.ordinary(xid, usize::from(*amount) * 1000)),
            Step::Commit | Step::Abort => {
                xid += 1;
                let lsn = match step {
                    Step::Commit => writer.wal.commit(xid, micros(second)),
                    _ => writer.wal.abort(xid, micros(second)),
                };
                targets.extend([format!("xid:{xid}"), format!("lsn:{lsn}")]);
                targets.push(crate::testing::at(second).to_string());
            }
            Step::Point => {
                let name = format!("point {second}");
                writer.wal.restore_point(&name, micros(second));
                targets.push(format!("name:{name}"));
            }
            Step::ClockBack => second = (second - 60).max(10),
            Step::Ship => drop(ship(repo, &mut writer, None).await),
            Step::ShipWithClock => drop(ship(repo, &mut writer, Some(second)).await),
            Step::Snapshot => {
                ship(repo, &mut writer, None).await;
                writer.snapshot(repo, second).await;
                ship(repo, &mut writer, None).await;
            }
            Step::Promote => {
                ship(repo, &mut writer, None).await;
                timeline += 1;
                writer = repo.promote(&writer, timeline, timeline as u8).await;
                ship(repo, &mut writer, None).await;
            }
        }
    }
    ship(repo, &mut writer, Some(second)).await;
    targets.push(crate::testing::at(second - 3).to_string());
    targets.push(crate::testing::at(second + 1000).to_string());
    targets
}

/// If there is anything new. Objects do not reach from one span into the next.
async fn ship(repo: &Repo, writer: &mut Writer, clock: Option<i64>) -> Option<ObjectName> {
    let (from, to) = (writer.stored(), writer.position());
    assert!(to <= from.next_span(), "histories are shorter than a span");
    match (from < to, clock) {
        (false, _) => None,
        (true, Some(clock)) => Some(writer.ship_with_clock(repo, clock).await),
        (true, None) => Some(writer.ship(repo).await),
    }
}

/// The plans, or why there is none, in words.
async fn answers(repo: &Repo, targets: &[String]) -> Vec<String> {
    let mut answers = Vec::new();
    for target in targets {
        let plan: Result<Plan> = repo.plan(target).await;
        let said = plan.map(|plan| serde_json::to_string(&plan).unwrap());
        answers.push(said.unwrap_or_else(|error| format!("{:?}: {error}", error.kind())));
    }
    answers
}

/// The entries of an honest index of each branch.
async fn entries(repo: &Repo) -> BTreeMap<Branch, Vec<IndexEntry>> {
    let catalog = Catalog::load(&repo.access.locations, SYSTEM).await.unwrap();
    let mut all = BTreeMap::new();
    for (branch, stored) in catalog.branches {
        let mut entries = Vec::new();
        for e in stored.wal {
            let name = ObjectName::Wal { system: SYSTEM, branch, range: e.range, id: e.id };
            let object = repo.access.read(&name, e.places, WalObject::open).await.unwrap();
            entries.push(IndexEntry::new(e.range, e.id, e.size, object.meta));
        }
        all.insert(branch, entries);
    }
    all
}

fn block() -> LsnRange {
    LsnRange::new(Lsn::new(0), Lsn::new(4 * SPAN_BYTES))
}

fn sealed(epoch: &Epoch, branch: Branch, entries: Vec<IndexEntry>) -> Sealed {
    WalIndex::new(block(), entries).seal(epoch, SYSTEM, branch).unwrap().unwrap()
}

fn gets(repo: &Repo) -> u64 {
    repo.access.locations[0].requests().get
}

/// Other ranges, other sizes, other objects: everything that an index could say of what is not there.
fn lies(entries: &[IndexEntry]) -> Vec<IndexEntry> {
    let nonsense = SpanMeta { major: 99, ..SpanMeta::clone(&entries[0].meta) };
    let wrong = |entry: &IndexEntry| IndexEntry { meta: nonsense.clone(), ..entry.clone() };
    let shorter = entries.iter().map(|e| IndexEntry { bytes: e.bytes - 1, ..wrong(e) });
    let shifted = entries.iter().map(|e| IndexEntry { start: e.start.add(8), ..wrong(e) });
    let resized = entries.iter().map(|e| IndexEntry { size: e.size + 1, ..wrong(e) });
    let gone = entries.iter().map(|e| IndexEntry { id: ObjectId::random(), ..wrong(e) });
    let whole = IndexEntry::new(
        LsnRange::new(Lsn::new(0), Lsn::new(SPAN_BYTES)),
        ObjectId::random(),
        9,
        nonsense.clone(),
    );
    // The same object twice with different ranges is sorted apart, so an index can hold all of these at once.
    shorter.chain(shifted).chain(gone).chain([whole]).chain(resized).collect()
}

async fn same_answers(steps: Vec<Step>) {
    let repo = Repo::new(1).await;
    let targets = live(&repo, &steps).await;
    let plain = answers(&repo, &targets).await;

    let honest = entries(&repo).await;
    let mut stored = Vec::new();
    for (branch, entries) in &honest {
        let some = entries.iter().enumerate().filter(|(n, _)| n % 3 != 0);
        let some = some.map(|(_, entry)| entry.clone()).collect();
        for index in
            [sealed(&repo.epoch, *branch, lies(entries)), sealed(&repo.epoch, *branch, some)]
        {
            repo.put(&index, &[0]).await;
            stored.push(index.name);
        }
    }
    assert_eq!(answers(&repo, &targets).await, plain, "lies, and an index that lacks some");
    for name in &stored {
        repo.damage(0, name);
    }
    assert_eq!(answers(&repo, &targets).await, plain, "damaged indexes");
    for (branch, entries) in honest {
        repo.put(&sealed(&repo.epoch, branch, entries), &[0]).await;
    }
    assert_eq!(answers(&repo, &targets).await, plain, "a good one beside damaged ones");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn indexes_change_no_answer(steps in proptest::collection::vec(step(), 10..60)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(same_answers(steps));
    }
}

#[tokio::test]
async fn an_index_spares_a_request_for_each_footer() {
    let repo = Repo::new(1).await;
    let steps: Vec<Step> = (0..40).flat_map(|_| [Step::Commit, Step::Ship]).collect();
    let targets = live(&repo, &steps).await;
    let target = &targets[targets.len() - 4..][..1];
    let before = gets(&repo);
    let plain = answers(&repo, target).await;
    let without = gets(&repo) - before;
    for (branch, entries) in entries(&repo).await {
        repo.put(&sealed(&repo.epoch, branch, entries), &[0]).await;
    }
    let before = gets(&repo);
    assert_eq!(answers(&repo, target).await, plain);
    let with = gets(&repo) - before;
    assert!(with + 35 <= without, "{with} reads with an index, {without} without");
}

/// Prune deletes spans and not the index that names them: what only an index names is a hole.
#[tokio::test]
async fn what_only_an_index_names_is_not_there() {
    let repo = Repo::new(1).await;
    let steps: Vec<Step> = (0..20).flat_map(|_| [Step::Commit, Step::Ship]).collect();
    live(&repo, &steps).await;
    let honest = entries(&repo).await;
    let (branch, entries) = honest.first_key_value().unwrap();
    repo.put(&sealed(&repo.epoch, *branch, entries.clone()), &[0]).await;
    let gone = &entries[10];
    let name =
        ObjectName::Wal { system: SYSTEM, branch: *branch, range: gone.range(), id: gone.id };
    std::fs::remove_file(repo.path(0, &name)).unwrap();
    let plan = repo.plan("latest").await.unwrap();
    assert!(plan.end <= gone.start, "{} is beyond the hole at {}", plan.end, gone.start);
    let said = repo.refusal(&format!("lsn:{}", gone.range().end)).await;
    assert!(!said.is_empty());
}
