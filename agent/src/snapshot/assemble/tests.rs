use super::super::SnapshotProgress;
use super::super::fixture::pool;
use super::super::fixture::{PAGE, ReadBack, SYSTEM, Store};
use super::super::leftover::Journal;
use super::super::walk::Tree;
use super::pending::*;
use super::*;
use backstay_common::cbor;
use backstay_common::id::SnapshotId;
use backstay_common::lsn::Lsn;
use backstay_common::seal::Packer;
use backstay_common::snapshot::{FileDigest, PackMeta, TablePart, page_hash};
use proptest::prelude::*;
use std::path::Path;
use tokio::sync::watch;

fn snapshot_id() -> SnapshotId {
    SnapshotId::new(jiff::Timestamp::UNIX_EPOCH, [1, 2, 3, 4])
}

fn reading() -> Arc<Reading> {
    Arc::new(Reading {
        page_bytes: PAGE,
        segment_pages: 131_072,
        checksums: false,
        start: Lsn::new(0),
        hash_key: [7; 32],
        level: 1,
    })
}

fn no_cache(dir: &Path) -> Arc<CacheWriter> {
    Arc::new(CacheWriter::create(dir.join("unused.pages")))
}

fn no_journal() -> Arc<Journal> {
    Arc::new(Journal::none())
}

async fn assembler(dir: &Path, store: &Store) -> Assembler {
    let meter =
        Arc::new(Meter::new(snapshot_id(), watch::Sender::new(SnapshotProgress::default())));
    let fleet = Arc::new(store.fleet(snapshot_id()).await);
    // The packs keep the fleet alive until the last of them is handed over.
    let packs = Packs::new(SYSTEM, store.epochs.clone(), fleet, meter.clone(), no_journal());
    Assembler::new(packs, None, Arc::default(), no_cache(dir), reading(), meter)
}

async fn settled(fleet: &Arc<super::super::ship::Fleet>) {
    for lane in fleet.lanes() {
        lane.settled().await;
        assert_eq!(lane.left_behind(), None);
    }
}

/// Bytes that differ from page to page; the odd ones hardly compress.
fn content(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    match seed % 2 {
        0 => (0..size).map(|at| (at as u64 / 8192 + seed) as u8).collect(),
        _ => (0..size.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(size).collect(),
    }
}

/// Takes in everything below `dir/data`, and gives the table and the assembled rest.
async fn take_in(dir: &Path, store: &Store) -> (Assembled, Vec<FileEntry>) {
    let tree =
        Tree { data_dir: dir.join("data"), major: 15, catalog_version: 1, foreign: Vec::new() };
    let meter =
        Arc::new(Meter::new(snapshot_id(), watch::Sender::new(SnapshotProgress::default())));
    let fleet = Arc::new(store.fleet(snapshot_id()).await);
    let packs =
        Packs::new(SYSTEM, store.epochs.clone(), fleet.clone(), meter.clone(), no_journal());
    let pool = pool(reading(), no_cache(dir), meter.clone());
    let (leftover, cache) = (pool.leftover.clone(), pool.cache.clone());
    let mut assembler = Assembler::new(packs, None, leftover, cache, reading(), meter);
    let (messages, _) = pool.start_on(&tree).unwrap();
    assembler.take_all(messages).await.unwrap();
    assembler.add_control("global/pg_control", 0o600, content(99, 8192)).await.unwrap();
    let assembled = assembler.finish().await.unwrap();
    settled(&fleet).await;
    let entries = table(&assembled, store).await;
    (assembled, entries)
}

async fn table(assembled: &Assembled, store: &Store) -> Vec<FileEntry> {
    let mut entries = Vec::new();
    let mut back = ReadBack::new(store);
    for part in &assembled.table {
        let part: TablePart = cbor::decode(&back.bytes(part).await).unwrap();
        entries.extend(part.files);
    }
    entries
}

fn digest_of(bytes: &[u8]) -> [u8; 32] {
    let mut digest = FileDigest::new();
    let hashes: Vec<_> =
        bytes.chunks(PAGE as usize).map(|page| page_hash(&[7; 32], page)).collect();
    digest.push(&hashes);
    digest.finish(bytes.len() as u64)
}

fn on_a_runtime<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(work)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn any_files_read_back(
        sizes in proptest::collection::vec(
            prop_oneof![
                4 => 0usize..20_000, 2 => Just(0), 2 => 60_000usize..70_000, 2 => 900_000usize..3_500_000,
                1 => Just(1 << 20), 1 => Just(2 << 20),
            ],
            0..40,
        ),
    ) {
        on_a_runtime(async {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::new(dir.path(), &["here"]);
            store.init(0).await;
            std::fs::create_dir_all(dir.path().join("data/base/5")).unwrap();
            for (n, size) in sizes.iter().enumerate() {
                std::fs::write(dir.path().join(format!("data/base/5/{n:05}")), content(n as u64, *size)).unwrap();
            }
            let (assembled, entries) = take_in(dir.path(), &store).await;
            let mut back = ReadBack::new(&store);
            assert_eq!(entries.len(), sizes.len() + 3);
            assert_eq!((&entries[0].path[..], entries[0].kind), ("base", FileKind::Directory));
            assert_eq!(assembled.bytes, sizes.iter().sum::<usize>() as u64 + 8192);
            for (n, (size, entry)) in sizes.iter().zip(&entries[2..]).enumerate() {
                let expected = content(n as u64, *size);
                assert_eq!((&entry.path, entry.size), (&format!("base/5/{n:05}"), *size as u64));
                assert!(back.file(entry).await == expected, "{}", entry.path);
                assert_eq!(entry.digest, Some(digest_of(&expected)));
            }
            assert_eq!(back.file(entries.last().unwrap()).await, content(99, 8192));
        });
    }
}

#[test]
fn a_footer_has_the_hashes_of_the_pages_in_its_frames() {
    on_a_runtime(async {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &["here"]);
        store.init(0).await;
        std::fs::create_dir_all(dir.path().join("data")).unwrap();
        let bytes = content(3, 20_000);
        std::fs::write(dir.path().join("data/a"), &bytes).unwrap();
        let (_, entries) = take_in(dir.path(), &store).await;
        let Content::Within { frame, at: 0 } = &entries[0].content else {
            panic!("{:?}", entries[0])
        };
        let mut back = ReadBack::new(&store);
        back.frame(frame).await;
        let meta: PackMeta = cbor::decode(back.meta(frame)).unwrap();
        let stored = &meta.frames[frame.span.number as usize];
        let expected: Vec<u8> =
            bytes.chunks(8192).flat_map(|page| page_hash(&[7; 32], page)).collect();
        assert_eq!((stored.usage, &stored.hashes), (FrameUse::Small, &expected));
    });
}

fn packed(file: u64, part: u32, bytes: &[u8], whole: bool) -> [Message; 2] {
    let hashes: Vec<u8> =
        bytes.chunks(PAGE as usize).flat_map(|page| page_hash(&[7; 32], page)).collect();
    let frame = Frame::pack(&mut Packer::new(1).unwrap(), bytes).unwrap();
    let first_page = part * super::super::part_pages(PAGE);
    let holds = vec![Held { file, first_page, pages: (hashes.len() / 8) as u32, at: 0 }];
    let (usage, state) = (FrameUse::Image, if whole { PartState::Whole } else { PartState::Short });
    let (size, doubts) = (bytes.len() as u32, Vec::new());
    let (hashes_of_part, reused) = (hashes.clone(), Vec::new());
    let part =
        Part { file, part, bytes: size, state, hashes: hashes_of_part, chunk: 0, doubts, reused };
    [Message::Packed(Packed { usage, frame, hashes, holds }), Message::Read(vec![part])]
}

fn begun(path: &str, parts: u32) -> Message {
    let (path, mode, is_folder) = (path.into(), 0o600, false);
    Message::Begun(Begun { path, mode, is_folder, parts, known: None, stat: None })
}

#[test]
fn a_file_that_shrank_ends_there_and_one_that_vanished_is_not_listed() {
    on_a_runtime(async {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &["here"]);
        store.init(0).await;
        let mut assembler = assembler(dir.path(), &store).await;
        let (whole, rest, ghost) = (content(1, 1 << 20), content(3, 5 * 8192), content(5, 8192));
        let (send, messages) = mpsc::channel(16);
        let begun = [begun("shrank", 3), begun("vanished", 1), begun("after", 1)];
        // Out of order: what lies behind the end was read before the end was known.
        let parts = [
            packed(0, 2, &ghost, false),
            packed(2, 0, &ghost, true),
            packed(0, 1, &rest, false),
            packed(0, 0, &whole, true),
        ];
        let gone = Message::Read(vec![Part::vanished(1)]);
        for message in begun.into_iter().chain(parts.into_iter().flatten()).chain([gone]) {
            send.send(message).await.unwrap();
        }
        drop(send);
        assembler.take_all(messages).await.unwrap();
        let fleet = assembler.packs.fleet().clone();
        let assembled = assembler.finish().await.unwrap();
        settled(&fleet).await;
        let entries = table(&assembled, &store).await;
        let listed: Vec<_> = entries.iter().map(|e| (e.path.as_str(), e.size)).collect();
        assert_eq!(listed, [("after", 8192), ("shrank", (1 << 20) + 5 * 8192)]);
        let expected = [whole, rest].concat();
        assert!(ReadBack::new(&store).file(&entries[1]).await == expected);
        assert_eq!(entries[1].digest, Some(digest_of(&expected)));
        // The frame behind the end is in the pack, but nothing needs it.
        let pack = &assembled.packs[0];
        assert!(pack.live_bytes + 8192 <= pack.size, "{pack:?}");
        assert!(pack.live_bytes > 1 << 20);
    });
}

#[test]
fn a_reader_that_ends_too_early_is_noticed() {
    on_a_runtime(async {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &["here"]);
        store.init(0).await;
        let mut assembler = assembler(dir.path(), &store).await;
        let (send, messages) = mpsc::channel(8);
        send.send(begun("a", 2)).await.unwrap();
        for message in packed(0, 0, &content(1, 8192), true) {
            send.send(message).await.unwrap();
        }
        drop(send);
        assert_eq!(assembler.take_all(messages).await.unwrap_err().kind(), Kind::Bug);
    });
}

#[test]
fn a_page_from_the_future_is_damaged() {
    let page = |block| CorruptPage { path: "base/5/1".into(), block };
    let mut doubts = Doubts {
        newer: vec![(page(1), Lsn::new(50)), (page(2), Lsn::new(51))],
        ..Doubts::default()
    };
    doubts.judge(Lsn::new(50));
    assert_eq!((doubts.corrupt_count, doubts.corrupt), (1, vec![page(2)]));
}
