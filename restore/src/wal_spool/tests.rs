use super::*;
use crate::plan::StopPoint;
use crate::settings_files::tests::plan as any_plan;
use std::sync::Mutex;

const MIB: u64 = 1 << 20;

fn plan(segment_bytes: u32, legs: &[(&str, u64, u64)]) -> Plan {
    let leg = |&(branch, start, end): &(&str, u64, u64)| Leg {
        branch: branch.parse().unwrap(),
        start: Lsn::new(start),
        end: Lsn::new(end),
    };
    let legs: Vec<Leg> = legs.iter().map(leg).collect();
    let end = legs.last().unwrap().end;
    Plan { segment_bytes, legs, end, ..any_plan(StopPoint::Consistent) }
}

const FIRST: &str = "00000001-01020304";
const SECOND: &str = "00000002-05060708";

/// Each byte tells its place and its branch.
fn byte(branch: Branch, lsn: u64) -> u8 {
    (lsn / 512) as u8 ^ (branch.timeline.get() as u8) << 6 | 1
}

fn read(asked: &Mutex<Vec<LsnRange>>) -> Box<ReadWal<'_>> {
    Box::new(move |branch, range| {
        asked.lock().unwrap().push(range);
        let bytes = (range.start.get()..range.end.get()).map(|lsn| byte(branch, lsn)).collect();
        Box::pin(async move { Ok(bytes) })
    })
}

#[test]
fn a_switch_within_a_segment_takes_its_beginning_from_the_parent() {
    let (switch, end) = (35 * MIB, 40 * MIB);
    for own_start in [32 * MIB, switch] {
        let plan = plan(16 << 20, &[(FIRST, 16 * MIB, switch), (SECOND, own_start, end)]);
        let size = segment_size(&plan).unwrap();
        let names: Vec<String> = segments(&plan, size)
            .iter()
            .map(|s| size.file_name(plan.legs[s.leg].timeline(), s.number))
            .collect();
        assert_eq!(
            names,
            ["000000010000000000000001", "000000010000000000000002", "000000020000000000000002"]
        );
        let last = sources(&plan, size, segments(&plan, size)[2]);
        let lengths: Vec<u64> = last.iter().map(|(_, range)| range.len()).collect();
        let expected = if own_start == switch { vec![3 * MIB, 5 * MIB] } else { vec![8 * MIB] };
        assert_eq!(lengths, expected, "child from {own_start}");
    }
}

#[test]
fn an_empty_leg_has_no_segments() {
    let plan = plan(1 << 20, &[(FIRST, MIB, MIB)]);
    assert!(segments(&plan, segment_size(&plan).unwrap()).is_empty());
}

#[tokio::test]
async fn segments_are_whole_and_zero_behind_the_end() {
    for (segment_bytes, start, end) in [
        (1 << 20, 3 * MIB, 5 * MIB + 77),
        (16 << 20, 16 * MIB, 16 * MIB + 5),
        (64 << 20, 64 * MIB, 70 * MIB),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(segment_bytes, &[(FIRST, start, end)]);
        let size = segment_size(&plan).unwrap();
        let frozen = Frozen { plan: plan.clone(), access: SavedAccess::default() };
        let spool = Spool::create(folder.path(), Owner::of_process(), &frozen).unwrap();
        let asked = Mutex::default();
        let progress = Progress::new("WAL", 1, true);
        spool.fill(&plan, &*read(&asked), &progress).await.unwrap();
        for segment in segments(&plan, size) {
            let name = size.file_name(plan.legs[0].timeline(), segment.number);
            let wal = std::fs::read(spool.segment(&name)).unwrap();
            assert_eq!(wal.len() as u64, size.bytes());
            let first = size.start(segment.number).get();
            let right = wal.iter().zip(first..).all(|(found, lsn)| {
                *found == if lsn < end { byte(plan.legs[0].branch, lsn) } else { 0 }
            });
            assert!(right, "{name}");
        }
        let times = asked.lock().unwrap().len();
        spool.fill(&plan, &*read(&asked), &progress).await.unwrap();
        assert_eq!(asked.lock().unwrap().len(), times, "what is there is not fetched again");
        Spool::create(folder.path(), Owner::of_process(), &frozen).unwrap();
        let left = std::fs::read_dir(folder.path().join("wal")).unwrap().count();
        assert_eq!(left, 0, "another plan may end elsewhere");
    }
}

#[tokio::test]
async fn what_cannot_be_read_leaves_no_segment() {
    let folder = tempfile::tempdir().unwrap();
    let plan = plan(1 << 20, &[(FIRST, MIB, 2 * MIB)]);
    let frozen = Frozen { plan: plan.clone(), access: SavedAccess::default() };
    let spool = Spool::create(folder.path(), Owner::of_process(), &frozen).unwrap();
    let read: Box<ReadWal<'_>> =
        Box::new(|_, _| Box::pin(async { Err(Error::new(Kind::Corrupt, "object x")) }));
    let error = spool.fill(&plan, &*read, &Progress::new("WAL", 1, true)).await.unwrap_err();
    assert!(error.to_string().contains("WAL segment 000000010000000000000001: object x"));
    assert_eq!(std::fs::read_dir(folder.path().join("wal")).unwrap().count(), 0);
}
