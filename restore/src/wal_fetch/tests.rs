use super::*;
use crate::directory::{self, Found, Mark};
use crate::owner::Owner;
use crate::plan::{History, StopPoint};
use crate::settings_files::tests::plan as any_plan;
use crate::wal_spool::SavedAccess;
use backstay_common::segment::SegmentNumber;
use std::path::PathBuf;

/// Timeline 1 from segment 2 to the middle of 3, timeline 3 from 3 to the middle of 5; histories 2 and 3.
fn plan() -> Plan {
    let history = |number| History {
        timeline: TimelineId::new(number).unwrap(),
        content: format!("of {number}\n"),
    };
    Plan { histories: vec![history(2), history(3)], ..any_plan(StopPoint::Consistent) }
}

#[test]
fn only_what_is_beyond_the_plan_is_not_found() {
    let plan = plan();
    let size = segment_size(&plan).unwrap();
    let ask = |name: &str| find(&plan, size, name);
    let segment = |leg, number: u64| {
        let number =
            std::iter::successors(Some(size.number(Default::default())), |n: &SegmentNumber| {
                Some(n.next())
            })
            .nth(number as usize)
            .unwrap();
        Asked::Segment(Segment { leg, number })
    };
    assert_eq!(ask("00000002.history"), Asked::History(TimelineId::new(2).unwrap()));
    assert_eq!(ask("00000004.history"), Asked::Beyond);
    assert_eq!(ask("000000010000000000000002"), segment(0, 2));
    assert_eq!(ask("000000010000000000000003"), segment(0, 3));
    assert_eq!(ask("000000030000000000000003"), segment(1, 3));
    assert_eq!(ask("000000030000000000000005"), segment(1, 5));
    for beyond in [
        "000000030000000000000006",
        "000000010000000000000004",
        "000000010000000000000001",
        "000000030000000000000002",
        "000000020000000000000003",
        "000000040000000000000003",
    ] {
        assert_eq!(ask(beyond), Asked::Beyond, "{beyond}");
    }
    for unknown in [
        "",
        "000000010000000000000002.partial",
        "x.history",
        "00000000.history",
        "../00000002.history",
        "0000000a.history",
    ] {
        assert_eq!(ask(unknown), Asked::Unknown, "{unknown}");
    }
}

struct Restore {
    folder: tempfile::TempDir,
    spool: Spool,
}

impl Restore {
    fn new() -> Restore {
        let folder = tempfile::tempdir().unwrap();
        let frozen = Frozen { plan: plan(), access: SavedAccess::default() };
        let ours = folder.path().join(directory::OURS);
        std::fs::create_dir(&ours).unwrap();
        let spool = Spool::create(&ours, Owner::of_process(), &frozen).unwrap();
        Restore { folder, spool }
    }

    fn to(&self) -> PathBuf {
        self.folder.path().join("RECOVERYXLOG")
    }

    fn ask(&self, name: &str) -> Result<u8> {
        let nobody: &FetchAlone<'_> =
            &|_, _, _, _| Err(Error::new(Kind::Storage, "no location answers"));
        answer(self.spool.folder(), name, &self.to(), nobody)
    }
}

const SEGMENT: &str = "000000030000000000000005";

#[test]
fn files_are_given_and_faults_are_never_not_found() {
    let restore = Restore::new();
    assert_eq!(restore.ask("00000003.history").unwrap(), 0);
    assert_eq!(std::fs::read_to_string(restore.to()).unwrap(), "of 3\n");
    assert_eq!(restore.ask("00000004.history").unwrap(), NOT_FOUND);
    assert_eq!(restore.ask("000000030000000000000006").unwrap(), NOT_FOUND);
    let error = restore.ask(SEGMENT).unwrap_err();
    assert!(error.to_string().contains("no location answers"), "{error}");
    std::fs::write(restore.spool.segment(SEGMENT), b"short").unwrap();
    assert_eq!(restore.ask(SEGMENT).unwrap_err().kind(), Kind::Corrupt);
    std::fs::write(restore.spool.segment(SEGMENT), vec![7; 16 << 20]).unwrap();
    assert_eq!(restore.ask(SEGMENT).unwrap(), 0);
    assert!(restore.spool.segment(SEGMENT).exists(), "a second recovery may ask again");
    std::fs::remove_file(restore.spool.folder().join("plan.json")).unwrap();
    assert!(
        restore.ask("000000030000000000000006").is_err(),
        "without a plan nothing is beyond it"
    );
}

#[test]
fn a_segment_that_a_running_restore_still_fetches_is_waited_for() {
    let restore = Restore::new();
    let mark = Mark {
        cluster: plan().cluster,
        system: plan().system,
        snapshot: plan().snapshot,
        target: "latest".into(),
        outside: Vec::new(),
        delta: false,
    };
    let claim = directory::claim(
        restore.folder.path(),
        Found::EmptyDirectory,
        false,
        Owner::of_process(),
        &mark,
    )
    .unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| restore.ask(SEGMENT));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!asked.is_finished(), "it waits");
        let path = restore.spool.segment(SEGMENT);
        directory::write_durably(&path, &vec![7; 16 << 20], Owner::of_process()).unwrap();
        assert_eq!(asked.join().unwrap().unwrap(), 0);
    });
    drop(claim);
    assert!(restore.ask("000000030000000000000004").is_err(), "nobody fetches any more");
}
