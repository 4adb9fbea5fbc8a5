//! Tests: one snapshot after the other of files that change, each read back whole.

use super::assemble::{Assembled, Assembler};
use super::cache::{self, Cache, CacheWriter, Summary};
use super::fixture::{PAGE, ReadBack, SYSTEM, Store, pool};
use super::leftover::{self, Begun, Journal};
use super::pack::Packs;
use super::parent::{Parent, Server, is_still_listed, worn_packs};
use super::progress::Meter;
use super::read::Reading;
use super::readers::Pool;
use super::walk::Tree;
use super::{SnapshotProgress, rebuild};
use backstay_common::cbor;
use backstay_common::id::SnapshotId;
use backstay_common::lsn::Lsn;
use backstay_common::segment::TimelineId;
use backstay_common::snapshot::packs::PackReader;
use backstay_common::snapshot::{
    Content, FileEntry, FileMap, FrameUse, Manifest, ManifestPlain, PackMeta, Root, TablePart,
    testing,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

const KEY: [u8; 32] = [7; 32];

/// A data directory of which snapshots are taken, one after the other.
struct History {
    dir: tempfile::TempDir,
    store: Store,
    files: BTreeMap<String, Vec<u8>>,
    parent: Option<Arc<Parent>>,
    /// Of the last snapshot.
    manifest: Option<Manifest>,
    taken: u8,
    server: Server,
}

impl History {
    async fn new() -> History {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &["here"]);
        store.init(0).await;
        std::fs::create_dir_all(dir.path().join("data/base/5")).unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let server = Server { page_bytes: PAGE, checksums: false, timeline, wal_timeline: None };
        let (files, parent, manifest) = (BTreeMap::new(), None, None);
        History { dir, store, files, parent, manifest, taken: 0, server }
    }

    fn write(&mut self, name: &str, content: Vec<u8>) {
        std::fs::write(self.dir.path().join("data/base/5").join(name), &content).unwrap();
        self.files.insert(name.to_string(), content);
    }

    fn remove(&mut self, name: &str) {
        std::fs::remove_file(self.dir.path().join("data/base/5").join(name)).unwrap();
        self.files.remove(name);
    }

    fn cache_path(&self) -> PathBuf {
        self.dir.path().join("7.pages")
    }

    /// Takes a snapshot, and makes sure that all of it reads back. What it stored, in bytes.
    async fn snapshot(&mut self) -> u64 {
        self.take(false).await
    }

    /// Begins one that stores its packs and is never committed.
    async fn interrupted(&mut self) -> u64 {
        self.take(true).await
    }

    /// Reads what is left as the next snapshot would, and begins its journal.
    async fn take_up(&self, id: SnapshotId) -> (Journal, leftover::Leftover) {
        let listed = leftover::listed(&self.store.writers, SYSTEM).await;
        let key = cache::fingerprint(&KEY);
        let begun = Begun { snapshot: id, system: SYSTEM, key, page_bytes: PAGE };
        Journal::take_up(self.dir.path(), &begun, &listed, jiff::Timestamp::UNIX_EPOCH)
    }

    async fn take(&mut self, is_interrupted: bool) -> u64 {
        self.taken += 1;
        let id = SnapshotId::new(jiff::Timestamp::UNIX_EPOCH, [self.taken; 4]);
        let data_dir = self.dir.path().join("data");
        let tree = Tree { data_dir, major: 15, catalog_version: 1, foreign: Vec::new() };
        let meter = Arc::new(Meter::new(id, watch::Sender::new(SnapshotProgress::default())));
        let reading = Arc::new(Reading {
            page_bytes: PAGE,
            segment_pages: 131_072,
            checksums: false,
            start: Lsn::new(0),
            hash_key: KEY,
            level: 1,
        });
        let fleet = Arc::new(self.store.fleet(id).await);
        let (journal, leftover) = self.take_up(id).await;
        let (journal, leftover) = (Arc::new(journal), Arc::new(leftover));
        let epochs = self.store.epochs.clone();
        let packs = Packs::new(SYSTEM, epochs, fleet.clone(), meter.clone(), journal.clone());
        let (parent, new) = (self.parent.clone(), self.dir.path().join("7.pages.new"));
        let writer = Arc::new(CacheWriter::create(new));
        let mut assembler = Assembler::new(
            packs,
            parent.clone(),
            leftover.clone(),
            writer.clone(),
            reading.clone(),
            meter.clone(),
        );
        let pool = Pool { parent, leftover, ..pool(reading, writer.clone(), meter) };
        let (messages, _) = pool.start_on(&tree).unwrap();
        assembler.take_all(messages).await.unwrap();
        let assembled = assembler.finish().await.unwrap();
        for lane in fleet.lanes() {
            lane.settled().await;
            assert_eq!(lane.left_behind(), None);
        }
        let stored = assembled.stored_bytes;
        if is_interrupted {
            return stored;
        }
        journal.remove();
        let manifest = manifest(id, &assembled);
        self.check(&manifest).await;
        let summary = Summary {
            snapshot: id,
            system: SYSTEM,
            key: cache::fingerprint(&KEY),
            page_bytes: PAGE,
            judged: false,
            timeline: 1,
            all_read: 0,
            table: assembled.shared,
        };
        assert!(writer.finish(&summary));
        writer.publish(&self.cache_path()).unwrap();
        self.manifest = Some(manifest);
        self.adopt_cache();
        stored
    }

    fn adopt_cache(&mut self) {
        let plain = self.manifest.as_ref().unwrap().plain.clone();
        let cache = Cache::open(&self.cache_path(), worn_packs(&plain)).unwrap();
        // A clock of 1970: all files were read just now.
        let parent = Parent::new(plain, vec!["here".parse().unwrap()], cache, &self.server, 0);
        self.parent = Some(Arc::new(parent));
    }

    async fn entries(&self, manifest: &Manifest) -> Vec<FileEntry> {
        let mut back = ReadBack::new(&self.store);
        let mut entries = Vec::new();
        for part in &manifest.root.table {
            entries.extend(cbor::decode::<TablePart>(&back.bytes(part).await).unwrap().files);
        }
        entries
    }

    /// Every file reads back, only listed packs are used, and what is said to be alive in them is what is used.
    async fn check(&self, manifest: &Manifest) {
        let mut back = ReadBack::new(&self.store);
        let entries = self.entries(manifest).await;
        let files: Vec<&FileEntry> = entries.iter().filter(|e| e.digest.is_some()).collect();
        let names: Vec<String> = self.files.keys().map(|name| format!("base/5/{name}")).collect();
        assert_eq!(files.iter().map(|f| f.path.clone()).collect::<Vec<_>>(), names);
        let mut used = HashSet::new();
        for place in &manifest.root.table {
            used.extend(place.pieces.iter().map(|piece| {
                (piece.frame.pack, piece.frame.span.number, piece.frame.span.sealed_bytes)
            }));
        }
        for (entry, content) in files.iter().zip(self.files.values()) {
            assert!(back.file(entry).await == *content, "{} of {}", entry.path, content.len());
            let mut frames = Vec::new();
            match &entry.content {
                Content::Empty => {}
                Content::Within { frame, .. } => frames.push(*frame),
                Content::Mapped(map) => {
                    frames.extend(map.pieces.iter().map(|piece| piece.frame));
                    let map = back.bytes(map).await;
                    frames.extend(FileMap::decode(&map, entry.size, PAGE).unwrap().frames);
                }
            }
            used.extend(frames.iter().map(|f| (f.pack, f.span.number, f.span.sealed_bytes)));
        }
        let mut live = BTreeMap::new();
        for (pack, _, bytes) in used {
            *live.entry(pack).or_insert(0) += u64::from(bytes);
        }
        let listed = manifest.plain.packs.iter().map(|pack| (pack.id(), pack.live_bytes));
        assert_eq!(listed.collect::<BTreeMap<_, _>>(), live);
    }
}

fn manifest(id: SnapshotId, assembled: &Assembled) -> Manifest {
    let plain = ManifestPlain {
        epochs: assembled.epochs.clone(),
        packs: assembled.packs.clone(),
        database_bytes: assembled.bytes,
        stored_bytes: assembled.stored_bytes,
        files: assembled.files,
        ..testing::plain(SYSTEM, id, "00000001-01020304".parse().unwrap())
    };
    let root =
        Root { hash_key: KEY, page_bytes: PAGE, table: assembled.table.clone(), ..testing::root() };
    Manifest { plain, root }
}

/// Bytes that do not compress, and are others for another seed.
fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut out = vec![0; size];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn on_a_runtime<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(work)
}

#[derive(Clone, Debug)]
enum Edit {
    Write { file: usize, page: usize, pages: usize },
    Resize { file: usize, size: usize },
    Remove { file: usize },
}

fn edit() -> impl Strategy<Value = Edit> {
    let size = prop_oneof![Just(0), 1usize..70_000, 900_000usize..2_500_000, Just(1 << 20)];
    let pages = prop_oneof![3 => Just(1), 1 => 1usize..200];
    prop_oneof![
        6 => (0usize..8, 0usize..300, pages).prop_map(|(file, page, pages)| Edit::Write { file, page, pages }),
        3 => (0usize..8, size).prop_map(|(file, size)| Edit::Resize { file, size }),
        1 => (0usize..8).prop_map(|file| Edit::Remove { file }),
    ]
}

fn apply(history: &mut History, edit: &Edit, seed: &mut u64) {
    let name = |file: &usize| format!("{file}");
    let content = |history: &History, file: &usize| {
        history.files.get(&name(file)).cloned().unwrap_or_default()
    };
    *seed += 1;
    match edit {
        Edit::Write { file, page, pages } => {
            let mut content = content(history, file);
            let (at, page_bytes) = (page * PAGE as usize, PAGE as usize);
            let new = noise(*seed, pages * page_bytes);
            content.iter_mut().skip(at).zip(new).for_each(|(old, new)| *old = new);
            history.write(&name(file), content);
        }
        Edit::Resize { file, size } => {
            let mut content = content(history, file);
            let before = content.len();
            content.resize(*size, 0);
            if *size > before {
                content[before..].copy_from_slice(&noise(*seed, size - before));
            }
            history.write(&name(file), content);
        }
        Edit::Remove { file } => {
            if history.files.contains_key(&name(file)) {
                history.remove(&name(file));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_history_reads_back(
        generations in proptest::collection::vec(
            (proptest::collection::vec(edit(), 0..12), proptest::bool::weighted(0.3)), 2..9,
        ),
    ) {
        on_a_runtime(async {
            let (mut history, mut seed) = (History::new().await, 0);
            for (edits, is_interrupted) in &generations {
                for edit in edits {
                    apply(&mut history, edit, &mut seed);
                }
                history.take(*is_interrupted).await;
            }
            history.snapshot().await;
        });
    }
}

#[test]
fn what_an_interrupted_snapshot_stored_is_not_stored_again() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 8 << 20));
        for n in 10..40 {
            history.write(&format!("{n}"), noise(n, 1 + 1777 * n as usize));
        }
        assert!(history.interrupted().await > 9 << 20);
        // Some pages change, a file grows, one shrinks.
        let mut content = history.files["1"].clone();
        content[70 * 8192] ^= 1;
        content[300 * 8192] ^= 1;
        content.extend(noise(77, 100_000));
        history.write("1", content);
        history.write("11", noise(99, 20_000));
        history.write("39", noise(139, 8192));
        let stored = history.interrupted().await;
        assert!((100_000 + 2 * 8192..300_000).contains(&stored), "{stored}");
        // Nor what two of them have stored.
        let stored = history.snapshot().await;
        assert!(stored < 30_000, "maps, the table and what is not in one piece: {stored}");
        assert!(
            history
                .take_up(SnapshotId::new(jiff::Timestamp::UNIX_EPOCH, [99; 4]))
                .await
                .1
                .abandoned
                .is_empty()
        );
        let stored = history.snapshot().await;
        assert!(stored < 1000, "{stored}");
    });
}

#[test]
fn what_no_location_has_is_stored_again() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 3 << 20));
        history.interrupted().await;
        let packs: Vec<PathBuf> = walk_files(history.dir.path(), "/pack/");
        assert!(!packs.is_empty());
        packs.iter().for_each(|pack| std::fs::remove_file(pack).unwrap());
        assert!(history.snapshot().await > 3 << 20);
    });
}

#[test]
fn a_journal_counts_up_to_the_first_damage_and_only_for_its_own() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 80 << 20));
        history.interrupted().await;
        let path = history.dir.path().join("7.packs");
        let whole = std::fs::read(&path).unwrap();
        let id = SnapshotId::new(jiff::Timestamp::UNIX_EPOCH, [99; 4]);
        let restored = |bytes: &[u8]| std::fs::write(&path, bytes).unwrap();
        assert_eq!(history.take_up(id).await.1.packs(), 3);
        let mut before = 3;
        for length in (0..whole.len()).rev().step_by(whole.len() / 20) {
            restored(&whole[..length]);
            let packs = history.take_up(id).await.1.packs();
            assert!(packs <= before && packs < 3, "{packs} of {length} bytes");
            before = packs;
        }
        let mut bent = whole.clone();
        bent[whole.len() / 2] ^= 1;
        restored(&bent);
        assert!(history.take_up(id).await.1.packs() < 3);
        let listed = leftover::listed(&history.store.writers, SYSTEM).await;
        let begun = |key, page_bytes| Begun { snapshot: id, system: SYSTEM, key, page_bytes };
        let (key, epoch) = (cache::fingerprint(&KEY), jiff::Timestamp::UNIX_EPOCH);
        let days = |days: i64| jiff::Timestamp::from_second(days * 86_400).unwrap();
        let dir = history.dir.path();
        for (begun, now, packs, abandoned) in [
            (begun(key, PAGE), epoch, 3, 1),
            (begun(key, PAGE), days(2), 3, 1),
            (begun(key, PAGE), days(4), 0, 1),
            (begun(key, PAGE), days(9), 0, 0),
            (begun([0; 32], PAGE), epoch, 0, 1),
            (begun(key, 4096), epoch, 0, 1),
        ] {
            restored(&whole);
            let (_, leftover) = Journal::take_up(dir, &begun, &listed, now);
            assert_eq!(
                (leftover.packs(), leftover.abandoned.len()),
                (packs, abandoned),
                "{begun:?}"
            );
        }
    });
}

fn walk_files(dir: &Path, part: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(walk_files(&path, part)),
            false if path.to_string_lossy().contains(part) => found.push(path),
            false => {}
        }
    }
    found
}

#[test]
fn only_what_changed_is_stored_and_scattered_pages_share_frames() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 8 << 20));
        history.write("2", noise(2, 3 << 20));
        assert!(history.snapshot().await > 11 << 20);
        assert!(history.snapshot().await < 1000, "nothing changed");
        let mut content = history.files["1"].clone();
        for page in (0..1024).step_by(64) {
            content[page * 8192..][..8192].copy_from_slice(&noise(page as u64, 8192));
        }
        history.write("1", content);
        let stored = history.snapshot().await;
        assert!((16 * 8192..20 * 8192).contains(&stored), "{stored}");
        let manifest = history.manifest.as_ref().unwrap();
        let entries = history.entries(manifest).await;
        let entry = entries.iter().find(|entry| entry.path == "base/5/1").unwrap();
        let Content::Mapped(map) = &entry.content else { panic!("{entry:?}") };
        let mut back = ReadBack::new(&history.store);
        let map = FileMap::decode(&back.bytes(map).await, entry.size, PAGE).unwrap();
        let mut deltas = Vec::new();
        for frame in &map.frames {
            back.frame(frame).await;
            let meta: PackMeta = cbor::decode(back.meta(frame)).unwrap();
            let frame = &meta.frames[frame.span.number as usize];
            if frame.usage == FrameUse::Delta {
                deltas.push(frame.hashes.len() / 8);
            }
        }
        assert_eq!(deltas, [16], "all scattered pages of a stretch are in one frame");
    });
}

#[test]
fn a_restore_never_reads_much_more_than_the_database() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 8 << 20));
        history.write("2", noise(2, 2 << 20));
        history.snapshot().await;
        let mut stored = Vec::new();
        for round in 0..12u64 {
            let mut content = history.files["1"].clone();
            for page in (round as usize % 8..1024).step_by(8) {
                content[page * 8192..][..8192]
                    .copy_from_slice(&noise(round << 20 | page as u64, 8192));
            }
            history.write("1", content);
            stored.push(history.snapshot().await >> 20);
            let manifest = history.manifest.as_ref().unwrap();
            let mut read = 0;
            for entry in history.entries(manifest).await.iter().filter(|e| e.size > 0) {
                let Content::Mapped(map) = &entry.content else { continue };
                let map = ReadBack::new(&history.store).bytes(map).await;
                read +=
                    super::overlay::read_bytes(&FileMap::decode(&map, entry.size, PAGE).unwrap());
            }
            // The bound holds for the parent; what changed since comes on top.
            assert!(read <= (10 << 20) * 135 / 100 + (2 << 20), "round {round}: {read}");
        }
        assert!(stored.contains(&1) && stored.iter().any(|mib| *mib >= 8), "{stored:?}");
    });
}

#[test]
fn what_is_left_in_a_pack_that_is_hardly_used_is_stored_again() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 2 << 20));
        history.write("2", noise(2, 1 << 20));
        history.snapshot().await;
        let first = history.manifest.as_ref().unwrap().plain.packs[0].id();
        history.write("1", noise(3, 2 << 20));
        history.snapshot().await;
        let pack = |history: &History| {
            let packs = &history.manifest.as_ref().unwrap().plain.packs;
            packs.iter().find(|pack| pack.id() == first).map(|pack| pack.live_bytes >> 20)
        };
        assert_eq!(pack(&history), Some(1));
        let stored = history.snapshot().await;
        assert!((1 << 20..1_200_000).contains(&stored), "{stored}");
        assert_eq!(pack(&history), None);
        assert!(history.snapshot().await < 1000);
    });
}

/// Of frames of zeros the footer, with the pages' hashes, is nearly all of the pack.
#[test]
fn pages_of_zeros_are_stored_once() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", vec![0; 32 << 20]);
        history.snapshot().await;
        assert!(history.snapshot().await < 1000);
        history.write("2", noise(1, 100_000));
        history.snapshot().await;
        assert!(history.snapshot().await < 1000, "a pack of the parent's parent");
    });
}

#[test]
fn without_the_cache_everything_is_known_from_the_parent() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 4 << 20));
        history.write("2", noise(2, 100_000));
        for n in 10..40 {
            history.write(&format!("{n}"), noise(n, 1 + 1777 * n as usize));
        }
        history.snapshot().await;
        let mut content = history.files["1"].clone();
        content[70 * 8192] ^= 1;
        content[300 * 8192] ^= 1;
        history.write("1", content);
        history.write("11", noise(99, 20_000));
        history.snapshot().await;
        std::fs::remove_file(history.cache_path()).unwrap();
        let manifest = history.manifest.clone().unwrap();
        let location = history.store.writers[0].location().clone();
        let keyring = history.store.epochs.keyring();
        let reader = PackReader::open(vec![location], keyring, &manifest.plain).await.unwrap();
        rebuild::rebuild(&reader, &manifest, &history.cache_path()).await.unwrap();
        history.adopt_cache();
        let left: Vec<String> = names(history.dir.path());
        assert!(
            !left.iter().any(|name| name.contains("hashes") || name.contains("made")),
            "{left:?}"
        );
        assert!(history.snapshot().await < 1000, "all is known");
        history.write("39", noise(5, 10));
        assert!(history.snapshot().await < 20_000);
    });
}

#[test]
fn a_parent_that_is_gone_from_where_it_was_is_noticed() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 5000));
        history.snapshot().await;
        let (parent, manifest) =
            (history.parent.clone().unwrap(), history.manifest.clone().unwrap());
        let location = history.store.writers[0].location();
        let error = is_still_listed(&parent, location).await.unwrap_err();
        assert!(error.message().contains(&parent.id().to_string()), "{error}");
        let epoch = history.store.epochs.current().await.unwrap();
        let sealed = manifest.seal(&epoch).unwrap();
        location.put(&sealed.name, sealed.bytes).await.unwrap();
        assert!(is_still_listed(&parent, location).await.unwrap());
    });
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A file that the file system says is unchanged is not read, and keeps the time of its last reading.
#[test]
fn an_unchanged_file_is_left_unread_on_the_same_timeline_only() {
    on_a_runtime(async {
        let mut history = History::new().await;
        history.write("1", noise(1, 2 << 20));
        history.write("2", noise(2, 5000));
        tokio::time::sleep(std::time::Duration::from_millis(2100)).await;
        history.snapshot().await;
        let unread = |history: &History| {
            let parent = history.parent.as_ref().unwrap();
            let path = history.dir.path().join("data/base/5/1");
            let known = parent.known("base/5/1").unwrap().unwrap();
            let device = known.record.stat.unwrap().device;
            (parent.may_skip(device, &path), known.record.stat.unwrap().read_began)
        };
        let (may, began) = unread(&history);
        assert!(may);
        history.snapshot().await;
        assert_eq!(unread(&history), (true, began), "it was not read again");
        history.server.timeline = TimelineId::new(2).unwrap();
        history.adopt_cache();
        assert!(!unread(&history).0);
        history.snapshot().await;
        assert!(unread(&history).1 > began, "it was read again");
    });
}
