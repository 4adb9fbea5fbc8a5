use super::super::board::Board;
use super::super::gaps::Gaps;
use super::super::sealed::Sealed;
use super::*;
use crate::context::AgentContext;
use crate::epochs::Epochs;
use crate::lease::Leasing;
use crate::ledger::Ledger;
use backstay_common::config::Settings;
use backstay_common::id::SystemId;
use backstay_common::keys::Keyring;
use backstay_common::keys::file::FileProvider;
use backstay_common::lsn::SPAN_BYTES;
use backstay_common::origin::Beginnings;
use backstay_common::segment::{SegmentSize, TimelineId};
use backstay_common::wal::testing::WalBuilder;
use std::path::Path;

const SYSTEM: SystemId = SystemId::new(7);
const BEGIN: Lsn = Lsn::new(SPAN_BYTES);

fn version() -> WalVersion {
    WalVersion::from_major(15).unwrap()
}

/// Valid WAL of at least `bytes` bytes: commits, and records that cross pages.
fn wal(bytes: u64) -> WalBuilder {
    let size = SegmentSize::DEFAULT;
    let mut wal = WalBuilder::new(version(), size, SYSTEM, TimelineId::FIRST, BEGIN);
    let mut xid = 700;
    while wal.position() < BEGIN.add(bytes) {
        xid += 1;
        wal.ordinary(xid, 30_000);
        wal.commit(xid, i64::from(xid));
    }
    wal
}

fn path(state: &Path, policy: &str) -> Arc<WalPath> {
    let text = format!(
        "cluster = \"orders\"\nagent = \"db1\"\nstate-dir = \"{}\"\n[[location]]\nname = \"a\"\n\
         url = \"file:///nowhere\"\n[durability]\nacknowledge = \"{policy}\"\n[keys]\nprovider = \"file\"\n\
         path = \"/nowhere\"\n",
        state.display()
    );
    let settings = Settings::parse(&text, None).unwrap();
    let keyring = Keyring::new(Arc::new(FileProvider::generate()), settings.cluster.clone());
    let context = Arc::new(AgentContext {
        epochs: Arc::new(Epochs::new(Arc::new(keyring), SYSTEM, state).unwrap()),
        system: SYSTEM,
        server_version: 150_018,
        segment_size: SegmentSize::DEFAULT,
        writers: Vec::new(),
        systems: Default::default(),
        strays: Default::default(),
        damage: Default::default(),
        nobody_waits: Default::default(),
        is_asynchronous: Default::default(),
        is_recalled: false,
        alarms: Arc::default(),
        ledger: Ledger::open(state, SYSTEM, settings.agent.clone(), 0).unwrap(),
        stop: CancellationToken::new(),
        settings,
    });
    let root = state.to_path_buf();
    let sealed = Sealed::create(&root, SYSTEM).unwrap();
    let gaps = Gaps::create(&root).unwrap();
    let leasing = Leasing::new(context.clone()).unwrap();
    let board = Board::new(Vec::new(), context.settings.durability.acknowledge);
    let (fatal, _) = mpsc::unbounded_channel();
    let halt = CancellationToken::new();
    Arc::new(WalPath { context, root, sealed, gaps, leasing, board, fatal, halt })
}

/// A pipeline over what the folder holds, or over a new line.
fn open(state: &Path) -> Pipeline {
    open_with(state, "spool")
}

fn open_with(state: &Path, policy: &str) -> Pipeline {
    let path = path(state, policy);
    let line = Line::open_all(&path.root).unwrap().pop();
    let line = line.unwrap_or_else(|| {
        Line::create(&path.root, 1, Beginnings::of_first_timeline(), BEGIN).unwrap()
    });
    let line = Arc::new(line);
    path.take_up(&line, Lsn::INVALID);
    Pipeline::open(path, line).unwrap()
}

/// Feeds `wal` from `start` in messages of `size` bytes, as one connection.
async fn feed(
    pipeline: Pipeline,
    wal: &[u8],
    start: Lsn,
    size: usize,
) -> (Pipeline, Result<(), Fault>) {
    let (sender, receiver) = mpsc::channel(wal.len() / size + 2);
    let mut at = start;
    for bytes in wal.chunks(size) {
        let (bytes, clock) = (Bytes::copy_from_slice(bytes), PgTime(5));
        let server_end = at.add(bytes.len() as u64);
        sender.send(Message::Wal { start: at, bytes, server_end, clock }).await.unwrap();
        at = server_end;
    }
    drop(sender);
    pipeline.run(receiver, CancellationToken::new()).await
}

fn cuts(pipeline: &Pipeline) -> Vec<Cut> {
    let next = || pipeline.line.pop_cut(true).or_else(|| pipeline.line.pop_cut(false));
    std::iter::from_fn(next).collect()
}

fn spooled(pipeline: &Pipeline) -> Vec<u8> {
    let spool = &pipeline.line.spool;
    spool.read(LsnRange::new(spool.begin(), spool.end())).unwrap()
}

#[tokio::test]
async fn what_comes_is_spooled_and_cut_at_borders_and_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let wal = wal(SPAN_BYTES + 100_000);
    let (pipeline, result) = feed(open(folder.path()), wal.bytes(), BEGIN, 128 << 10).await;
    assert!(result.is_ok());
    assert!(spooled(&pipeline) == wal.bytes());
    let cuts = cuts(&pipeline);
    let border = BEGIN.add(SPAN_BYTES);
    let ranges: Vec<LsnRange> = cuts.iter().map(|cut| cut.range).collect();
    assert_eq!(ranges, vec![LsnRange::new(BEGIN, border), LsnRange::new(border, wal.position())]);
    assert_eq!(cuts[0].summary.first_record, Some(wal.records()[0].start));
    assert_eq!(cuts[0].summary.least_time, Some(701));
    let last = wal.records().last().unwrap();
    assert_eq!(cuts[1].summary.last_record_end, Some(last.end));
    assert_eq!(cuts[1].clock, Some(PgTime(5)));
    let (before, after) = (cuts[0].summary.greatest_time, cuts[1].summary.least_time);
    assert_eq!(before.unwrap() + 1, after.unwrap(), "each commit is in one summary");
}

#[tokio::test]
async fn a_span_that_was_cut_into_pieces_is_cut_whole_too() {
    let folder = tempfile::tempdir().unwrap();
    let wal = wal(SPAN_BYTES);
    let half = wal.bytes().len() / 2;
    let (pipeline, _) = feed(open(folder.path()), &wal.bytes()[..half], BEGIN, 100_000).await;
    let piece = cuts(&pipeline).remove(0);
    assert_eq!(piece.range, LsnRange::new(BEGIN, BEGIN.add(half as u64)));
    let (pipeline, _) = feed(pipeline, wal.bytes(), BEGIN, 8192).await;
    let span = cuts(&pipeline).remove(0);
    assert_eq!(span.range, LsnRange::new(BEGIN, BEGIN.add(SPAN_BYTES)));
    assert_eq!(span.summary.first_record, piece.summary.first_record);
    assert_eq!(span.summary.least_time, piece.summary.least_time);
    assert!(span.summary.greatest_time > piece.summary.greatest_time);
}

/// Seals what is cut, in name only.
fn shelve(pipeline: &Pipeline, cut: &Cut) {
    let item = super::super::shelf::Item {
        line: pipeline.line.number,
        system: SYSTEM,
        branch: "00000001-01020304".parse().unwrap(),
        range: cut.range,
        id: backstay_common::id::ObjectId::random(),
        size: 1,
        epoch: backstay_common::id::EpochId::random(),
        since: Instant::now(),
    };
    pipeline.path.board.update(|state| state.shelf.add(item));
    pipeline.line.cut_is_sealed(cut);
}

/// Feeds it in runs, so that a piece is cut after each, and shelves the pieces. What was patient.
async fn feed_in_pieces(mut pipeline: Pipeline, wal: &[u8], runs: usize) -> (Pipeline, Vec<Cut>) {
    let (mut at, mut patient) = (BEGIN, Vec::new());
    for run in wal.chunks(wal.len().div_ceil(runs)) {
        (pipeline, _) = feed(pipeline, run, at, 100_000).await;
        at = at.add(run.len() as u64);
        for cut in cuts(&pipeline) {
            if cut.is_patient {
                patient.push(cut);
            } else {
                shelve(&pipeline, &cut);
            }
        }
    }
    (pipeline, patient)
}

#[tokio::test]
async fn many_pieces_are_cut_once_more_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let wal = wal(3_000_000);
    let count = GROUP_PIECES as usize;
    let whole = feed(open(folder.path()), wal.bytes(), BEGIN, 100_000).await.0;
    let whole = cuts(&whole).remove(0);
    let folder = tempfile::tempdir().unwrap();
    let (pipeline, groups) =
        feed_in_pieces(open_with(folder.path(), "all"), wal.bytes(), count).await;
    assert_eq!(pipeline.line.unsealed_from(), Some(BEGIN), "the spool is still read");
    let [group] = &groups[..] else { panic!("{} groups", groups.len()) };
    assert_eq!((group.range, &group.summary), (whole.range, &whole.summary));
    pipeline.line.cut_is_sealed(group);
    assert!(pipeline.line.is_sealed());
}

#[tokio::test]
async fn commits_do_not_wait_for_the_span_that_they_end_in() {
    for (policy, tail) in [("all", true), ("spool", false)] {
        let folder = tempfile::tempdir().unwrap();
        let wal = wal(SPAN_BYTES + 100_000);
        let border = BEGIN.add(SPAN_BYTES);
        let short = SPAN_BYTES as usize - 200_000;
        let (pipeline, _) =
            feed(open_with(folder.path(), policy), &wal.bytes()[..short], BEGIN, 90_000).await;
        cuts(&pipeline);
        let from = BEGIN.add(short as u64);
        let (pipeline, _) = feed(pipeline, &wal.bytes()[short..], from, 1 << 20).await;
        let cuts = cuts(&pipeline);
        let ahead = cuts.iter().find(|cut| cut.range == LsnRange::new(from, border));
        assert_eq!(ahead.is_some(), tail, "{policy}");
        assert!(cuts.iter().any(|cut| cut.range == LsnRange::new(BEGIN, border) && cut.is_patient));
    }
}

#[tokio::test]
async fn a_span_whose_pieces_are_all_there_is_cut_whole_after_a_kill_too() {
    let folder = tempfile::tempdir().unwrap();
    let wal = wal(2 * SPAN_BYTES + 100_000);
    let (pipeline, lost) = feed_in_pieces(open_with(folder.path(), "all"), wal.bytes(), 40).await;
    assert_eq!(lost.len(), 2, "two spans");
    let path = pipeline.path.clone();
    let line = pipeline.line.clone();
    drop(pipeline);
    let pipeline = Pipeline::open(path, line).unwrap();
    let (pipeline, _) = feed(
        pipeline,
        &wal.bytes()[wal.bytes().len() - 10..],
        Lsn::new(wal.position().get() - 10),
        10,
    )
    .await;
    let again: Vec<Cut> = cuts(&pipeline).into_iter().filter(|cut| cut.is_patient).collect();
    assert_eq!(again.len(), 2);
    for (before, after) in lost.iter().zip(&again) {
        assert_eq!((before.range, &before.summary), (after.range, &after.summary));
    }
}

#[tokio::test]
async fn a_kill_at_any_byte_loses_nothing_and_keeps_no_garbage() {
    let wal = wal(300_000);
    for (cut, garbage) in
        [(0, 0), (40, 0), (24 + 10, 5), (70_001, 0), (100_000, 4096), (299_999, 1)]
    {
        let folder = tempfile::tempdir().unwrap();
        let (pipeline, _) = feed(open(folder.path()), &wal.bytes()[..cut], BEGIN, 9000).await;
        let file = pipeline.line.spool.folder().join(format!("{}.wal", BEGIN.name()));
        drop(pipeline);
        let torn = [&wal.bytes()[..cut], &vec![0xAB; garbage][..]].concat();
        std::fs::write(&file, torn).unwrap();
        let pipeline = open(folder.path());
        let kept = spooled(&pipeline);
        assert!(kept.starts_with(&wal.bytes()[..kept.len().min(cut)]), "{cut}");
        assert!(garbage > 0 || kept.len() == cut, "bytes were dropped at {cut}");
        let whole = pipeline.decoder.record_end();
        let (pipeline, _) = feed(pipeline, &[], BEGIN, 8192).await;
        for early in cuts(&pipeline) {
            assert!(early.range.end <= whole, "what may be garbage was cut at {cut}");
        }
        let (mut pipeline, mut result) = feed(pipeline, wal.bytes(), BEGIN, 8192).await;
        if matches!(result, Err(Fault::Hole { .. })) {
            // The torn record began in an earlier message: the connection is dropped, and begins before it.
            (pipeline, result) = feed(pipeline, wal.bytes(), BEGIN, 8192).await;
        }
        assert!(result.is_ok(), "{cut}: {result:?}");
        assert!(spooled(&pipeline) == wal.bytes());
    }
}

#[tokio::test]
async fn a_hole_and_other_bytes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let wal = wal(100_000);
    let (pipeline, _) = feed(open(folder.path()), &wal.bytes()[..50_000], BEGIN, 10_000).await;
    let rest = &wal.bytes()[60_000..];
    let (pipeline, result) = feed(pipeline, rest, BEGIN.add(60_000), 10_000).await;
    assert!(matches!(result, Err(Fault::Hole { .. })), "{result:?}");
    let mut other = wal.bytes().to_vec();
    other[30_000] ^= 1;
    let (pipeline, result) = feed(pipeline, &other, BEGIN, 10_000).await;
    assert!(matches!(result, Err(Fault::Diverged { at }) if at == BEGIN.add(30_000)), "{result:?}");
    assert!(spooled(&pipeline) == wal.bytes()[..50_000]);
}

#[tokio::test]
async fn broken_wal_is_not_kept_and_the_stream_can_be_taken_up_again() {
    let wal = wal(200_000);
    let mut damaged = wal.bytes().to_vec();
    damaged[150_000] ^= 1;
    let whole = wal.records().iter().map(|r| r.end).filter(|end| *end <= BEGIN.add(150_000)).max();
    for size in [8192, 128 << 10, 1 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let (pipeline, result) = feed(open(folder.path()), &damaged, BEGIN, size).await;
        assert!(matches!(result, Err(Fault::Broken(_))), "{result:?}");
        assert_eq!(Some(pipeline.line.spool.end()), whole, "messages of {size} bytes");
        assert_eq!(cuts(&pipeline).last().map(|cut| cut.range.end), whole);
        let (pipeline, result) = feed(pipeline, wal.bytes(), BEGIN, size).await;
        assert!(result.is_ok(), "{result:?}");
        assert!(spooled(&pipeline) == wal.bytes());
    }
}

#[tokio::test]
async fn a_line_that_another_follows_keeps_nothing_that_is_never_cut() {
    let wal = wal(100_000);
    let record_end = |until: u64| {
        let ends = wal.records().iter().map(|record| record.end);
        ends.filter(|end| *end <= BEGIN.add(until)).max().unwrap()
    };
    // Killed in the middle of a record.
    let folder = tempfile::tempdir().unwrap();
    feed(open(folder.path()), &wal.bytes()[..50_000], BEGIN, 10_000).await.1.unwrap();
    let pipeline = open(folder.path());
    let line = pipeline.line.clone();
    assert_eq!(line.spool.end(), BEGIN.add(50_000));
    pipeline.end().unwrap();
    assert_eq!(line.spool.end(), record_end(50_000));
    assert_eq!(line.pop_cut(false).unwrap().range, LsnRange::new(BEGIN, record_end(50_000)));
    // The connection was lost while there was no room for what had been decoded.
    let folder = tempfile::tempdir().unwrap();
    let mut pipeline = open(folder.path());
    let line = pipeline.line.clone();
    line.spool.append(&wal.bytes()[..50_000]).unwrap();
    pipeline.advance(&wal.bytes()[..80_000]).unwrap();
    pipeline.end().unwrap();
    assert_eq!(line.spool.end(), record_end(50_000));
    let cut = line.pop_cut(false).unwrap();
    assert_eq!(cut.range, LsnRange::new(BEGIN, record_end(50_000)));
    assert_eq!(cut.summary.last_record_end, Some(record_end(50_000)));
}

#[tokio::test]
async fn a_full_span_that_may_end_in_garbage_is_cut_only_when_the_server_has_sent_it_again() {
    let wal = wal(SPAN_BYTES + 100_000);
    let border = BEGIN.add(SPAN_BYTES);
    let crosses = |r: &&LsnRange| r.start < border && r.end > border;
    let across = *wal.records().iter().find(crosses).expect("records of 30,000 bytes cross it");
    let folder = tempfile::tempdir().unwrap();
    let until = SPAN_BYTES as usize + 8;
    let (pipeline, _) = feed(open(folder.path()), &wal.bytes()[..until], BEGIN, 1 << 17).await;
    let file = pipeline.line.spool.folder().join(format!("{}.wal", BEGIN.name()));
    drop(pipeline);
    let mut torn = std::fs::read(&file).unwrap();
    torn[SPAN_BYTES as usize - 100..].fill(0xAB);
    std::fs::write(&file, torn).unwrap();
    let pipeline = open(folder.path());
    assert!(cuts(&pipeline).is_empty());
    assert_eq!(pipeline.decoder.record_end(), across.start);
    let (pipeline, result) = feed(pipeline, wal.bytes(), BEGIN, 1 << 17).await;
    assert!(matches!(result, Ok(()) | Err(Fault::Hole { .. })), "{result:?}");
    let (pipeline, result) = feed(pipeline, wal.bytes(), BEGIN, 1 << 17).await;
    assert!(result.is_ok(), "{result:?}");
    assert!(spooled(&pipeline) == wal.bytes());
    assert!(cuts(&pipeline).iter().any(|cut| cut.range == LsnRange::new(BEGIN, border)));
}
