//! Files cut as they arrive, put together again from the jobs.

use super::super::super::SnapshotProgress;
use super::super::super::progress::Meter;
use super::*;
use crate::snapshot::cache::CacheWriter;
use backstay_common::id::SnapshotId;
use proptest::prelude::*;
use std::collections::BTreeMap;
use tokio::sync::{mpsc, watch};

const PAGE: u32 = 8192;
const MIB: usize = 1 << 20;

/// What the assembler and the readers got: each file's name, how many parts it has, and its bytes.
fn cut(files: &[Vec<u8>], piece: usize) -> Vec<(String, u32, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let (jobs, given) = std::sync::mpsc::sync_channel(JOBS_MAX);
    let (messages, mut told) = mpsc::channel(10_000);
    let id = SnapshotId::new(jiff::Timestamp::UNIX_EPOCH, [1, 2, 3, 4]);
    let links = Links {
        jobs,
        messages,
        parent: None,
        cache: Arc::new(CacheWriter::create(dir.path().join("unused.pages"))),
        meter: Arc::new(Meter::new(id, watch::Sender::new(SnapshotProgress::default()))),
        page_bytes: PAGE,
    };
    let reading = std::thread::spawn(move || gathered(&given));
    let mut cutter = ArrivingCutter::new(links);
    cutter.folder("base", 0o700).unwrap();
    for (n, content) in files.iter().enumerate() {
        cutter.file(&format!("base/{n}"), 0o600, content.len() as u64, None).unwrap();
        for piece in content.chunks(piece) {
            cutter.bytes(&Bytes::copy_from_slice(piece)).unwrap();
        }
        cutter.file_end().unwrap();
    }
    cutter.finish().unwrap();
    let mut bytes = reading.join().unwrap();
    let mut begun = Vec::new();
    while let Ok(Message::Begun(file)) = told.try_recv() {
        let number = begun.len() as u64;
        begun.push((file.path, file.parts, bytes.remove(&number).unwrap_or_default()));
    }
    assert!(bytes.is_empty(), "bytes of a file that was not begun");
    begun
}

fn gathered(jobs: &std::sync::mpsc::Receiver<Job>) -> BTreeMap<u64, Vec<u8>> {
    let mut files: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Stretch(Stretch { file, parts, source: Source::Arrived(bytes) }) => {
                assert!(bytes.len() <= 16 * MIB && bytes.capacity() <= 16 * MIB);
                assert_eq!(parts.len(), bytes.len().div_ceil(MIB));
                let so_far = files.entry(file.number).or_default();
                assert_eq!(parts.start as usize * MIB, so_far.len(), "no part is left out");
                so_far.extend_from_slice(&bytes);
            }
            Job::Bundle(small) => {
                assert!(small.iter().map(|file| file.bytes).sum::<usize>() < BUNDLE_BYTES + 65_536);
                for file in small {
                    let SmallSource::Arrived(bytes) = file.source else { panic!("on disk") };
                    assert_eq!(file.bytes, bytes.len());
                    assert!(files.insert(file.number, bytes).is_none());
                }
            }
            Job::Stretch(_) => panic!("on disk"),
        }
    }
    files
}

fn content(n: usize, size: usize) -> Vec<u8> {
    (0..size).map(|at| (at / 511 + n * 7) as u8).collect()
}

fn check(sizes: &[usize], piece: usize) {
    let files: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(n, size)| content(n, *size)).collect();
    let found = cut(&files, piece);
    assert_eq!(found[0], ("base".to_string(), 0, Vec::new()));
    assert_eq!(found.len(), files.len() + 1);
    for (n, (content, (path, parts, bytes))) in files.iter().zip(&found[1..]).enumerate() {
        assert_eq!(
            (path.as_str(), *parts as usize),
            (&*format!("base/{n}"), content.len().div_ceil(MIB))
        );
        assert!(content == bytes, "{path} of {} bytes", content.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn every_byte_is_given_once_and_in_order(
        sizes in proptest::collection::vec(
            prop_oneof![3 => 0usize..20_000, 1 => Just(0), 1 => 65_000usize..66_000, 2 => 900_000usize..3_500_000],
            0..20,
        ),
        piece in 1000usize..40_000,
    ) {
        check(&sizes, piece);
    }
}

#[test]
fn a_large_file_comes_in_stretches() {
    check(&[16 * MIB, 33 * MIB + 5, 16 * MIB - 1, 48 * MIB], 32_768);
}

#[test]
fn many_small_files_do_not_pile_up() {
    check(&vec![60_000; 300], 32_768);
    check(&vec![10; 3000], 32_768);
}
