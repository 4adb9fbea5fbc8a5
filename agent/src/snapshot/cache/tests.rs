use super::*;
use backstay_common::id::SnapshotId;
use backstay_common::seal::{Codec, FrameSpan};
use backstay_common::snapshot::{BytesRef, FrameRef};

const PAGE: u32 = 8192;

fn summary() -> Summary {
    Summary {
        snapshot: SnapshotId::new(jiff::Timestamp::UNIX_EPOCH, [1, 2, 3, 4]),
        system: SystemId::new(7),
        key: fingerprint(&[7; 32]),
        page_bytes: PAGE,
        judged: true,
        timeline: 1,
        all_read: 5,
        table: vec![SharedPart { hash: [3; 32], place: BytesRef::default() }],
    }
}

fn frame(pack: u8, number: u32) -> FrameRef {
    let (offset, sealed_bytes, plain_bytes) = (200, 1000, 1 << 20);
    let span = FrameSpan { number, offset, sealed_bytes, plain_bytes, codec: Codec::Zstd };
    FrameRef { pack: ObjectId::from_bytes([pack; 8]), span }
}

/// A file of 130 pages, the last of which is short, in two frames, of two packs.
fn big(writer: &CacheWriter, path: &str) -> FileRecord {
    let size = 129 * u64::from(PAGE) + 100;
    let runs = vec![
        Run { first_page: 0, pages: 128, frame: 0, at: 0 },
        Run { first_page: 128, pages: 2, frame: 1, at: PAGE },
    ];
    let map = FileMap { frames: vec![frame(1, 0), frame(2, 9)], runs };
    let hashes: Vec<u8> = (0..130u64).flat_map(u64::to_le_bytes).collect();
    let chunks = vec![writer.chunk(&hashes[..1024]), writer.chunk(&hashes[1024..])];
    let map = Some(writer.map(&map.encode()));
    let content = Content::Mapped(BytesRef::default());
    let doubts = vec![DoubtRecord { page: 129 }];
    let (digest, path) = ([9; 32], path.to_string());
    FileRecord { path, size, digest, content, chunks, map, stat: None, doubts }
}

fn small(writer: &CacheWriter, n: u64) -> FileRecord {
    let chunks = vec![writer.chunk(&n.to_le_bytes())];
    let (path, content) = (format!("base/5/{n}"), Content::Within { frame: frame(1, 3), at: 77 });
    let (digest, doubts) = ([1; 32], Vec::new());
    FileRecord { path, size: 100, digest, content, chunks, map: None, stat: None, doubts }
}

fn written(dir: &Path) -> (PathBuf, FileRecord) {
    let path = dir.join("7.pages");
    let writer = CacheWriter::create(dir.join("7.pages.new"));
    let big = big(&writer, "base/5/16384");
    writer.record(&big, 1 << 20);
    for n in 0..5000 {
        writer.record(&small(&writer, n), 0);
    }
    assert!(writer.finish(&summary()));
    writer.publish(&path).unwrap();
    (path, big)
}

#[test]
fn what_was_written_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let (path, big) = written(dir.path());
    let cache = Arc::new(Cache::open(&path, HashSet::new()).unwrap());
    assert_eq!(cache.summary, summary());
    let known = cache.known("base/5/16384").unwrap().unwrap();
    assert_eq!(known.record, big);
    assert_eq!((known.parts(), known.is_fresh()), (2, true));
    let hashes: Vec<u8> = (128..130u64).flat_map(u64::to_le_bytes).collect();
    assert_eq!((known.hashes(1).unwrap(), known.hashes(2).unwrap()), (hashes, Vec::new()));
    assert_eq!(known.map().unwrap().runs.len(), 2);
    assert!(known.is_sound(128) && !known.is_sound(129));
    for n in [0, 1, 4999] {
        let known = cache.known(&format!("base/5/{n}")).unwrap().unwrap();
        assert_eq!(known.hashes(0).unwrap(), (n as u64).to_le_bytes());
        assert_eq!(known.map().unwrap().runs, [Run { first_page: 0, pages: 1, frame: 0, at: 77 }]);
    }
    assert!(cache.known("base/5/5000").unwrap().is_none());
}

#[test]
fn pages_in_a_pack_that_is_given_up_are_worn() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = written(dir.path());
    let worn = HashSet::from([ObjectId::from_bytes([2; 8])]);
    let known = Arc::new(Cache::open(&path, worn).unwrap()).known("base/5/16384").unwrap().unwrap();
    assert!(!known.is_fresh() && !known.again);
    let worn: Vec<u32> = (0..200).filter(|page| known.is_worn(*page)).collect();
    assert_eq!(worn, [128, 129]);
}

/// Whatever is cut off, changed or added is found, before anything of it is believed.
#[test]
fn damage_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = written(dir.path());
    let bytes = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Cache::open(&path, HashSet::new()).unwrap_err().kind()
    };
    for length in [0, 1, 31, 32, 40, 60, bytes.len() / 2, bytes.len() - 1] {
        assert_eq!(refused(&bytes[..length]), Kind::Corrupt, "{length} bytes");
    }
    for at in (0..bytes.len()).step_by(bytes.len() / 50) {
        let mut bent = bytes.clone();
        bent[at] ^= 1;
        assert_eq!(refused(&bent), Kind::Corrupt, "byte {at}");
    }
    assert_eq!(refused(&[&bytes[..], b"x"].concat()), Kind::Corrupt);
    // Whole, but of nothing that is known: a hash over garbage.
    let garbage = [MAGIC, &[0xFF; 200][..]].concat();
    assert_eq!(refused(&[&garbage[..], blake3::hash(&garbage).as_bytes()].concat()), Kind::Corrupt);
}

#[test]
fn a_disk_that_refuses_costs_the_cache_and_nothing_else() {
    let writer = CacheWriter::create(PathBuf::from("/nowhere/7.pages.new"));
    writer.record(&small(&writer, 1), 0);
    assert!(!writer.finish(&summary()));
}
