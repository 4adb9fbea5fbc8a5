//! What a snapshot does to each page, and what a restore undoes, in bytes of pages per second.
//!
//! The pages are made as pgbench leaves those of `pgbench_accounts`: full of tuples of 97 bytes with an id, a
//! balance and a filler, but with a UUID in the filler, for tables are seldom as empty as that one. How far they compress is printed, and the same work on bytes that do not compress is beside it.
//!
//! What is said to be of one core is measured in the time that the thread was on a core, so that a busy machine does
//! not spoil it; what is of all cores, by the wall clock.

use backstay_common::id::{ObjectId, SystemId};
use backstay_common::keys::Epoch;
use backstay_common::lsn::Lsn;
use backstay_common::name::ObjectName;
use backstay_common::page::{PageState, page_checksum, verify};
use backstay_common::pool::pool;
use backstay_common::seal::{
    Codec, Draft, FRAME_BYTES_MAX, Frame, FrameSpan, Object, ObjectKind, Packer, Sealed, Unpacker,
    seal,
};
use backstay_common::snapshot::{FileMap, FrameRef, Run, page_hashes};
use criterion::{Bencher, Criterion, Throughput, criterion_group, criterion_main};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Duration;

const PAGE: usize = 8192;
/// One pack's worth of pages.
const BYTES: usize = 32 << 20;
const LEVEL: i32 = 3;
const TUPLE: usize = 128;

/// A generator of bytes that do not compress.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Page header, line pointers, and tuples from the end: header of 24 bytes, id, branch, balance, 84 bytes of filler.
fn heap_page(block: u32, noise: &mut Noise) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let tuples = (PAGE - 24) / (TUPLE + 4);
    page[..8].copy_from_slice(&(noise.next() & 0xFFFF_FFFF).to_le_bytes());
    page[12..14].copy_from_slice(&(24 + 4 * tuples as u16).to_le_bytes());
    page[14..16].copy_from_slice(&((PAGE - TUPLE * tuples) as u16).to_le_bytes());
    page[16..20].copy_from_slice(&[0, 0x20, 4, 0x20]);
    for n in 0..tuples {
        let at = PAGE - TUPLE * (n + 1);
        let pointer = at as u32 | 1 << 15 | 121 << 17;
        page[24 + 4 * n..28 + 4 * n].copy_from_slice(&pointer.to_le_bytes());
        let tuple = &mut page[at..at + TUPLE];
        // A quarter of the rows were updated by transactions of their own.
        let updated = noise.next().is_multiple_of(4);
        let xid = if updated { 1_000_000 + (noise.next() % 500_000) as u32 } else { 750 };
        tuple[..4].copy_from_slice(&xid.to_le_bytes());
        tuple[12..16].copy_from_slice(&block.to_be_bytes());
        tuple[16..18].copy_from_slice(&(n as u16 + 1).to_le_bytes());
        tuple[18..24].copy_from_slice(&[4, 0, 2, 9, 24, 0]);
        let id = block * tuples as u32 + n as u32;
        tuple[24..28].copy_from_slice(&id.to_le_bytes());
        tuple[28..32].copy_from_slice(&(1 + id / 100_000).to_le_bytes());
        let balance = if updated { noise.next() as i32 % 5000 } else { 0 };
        tuple[32..36].copy_from_slice(&balance.to_le_bytes());
        tuple[36] = 0xAB;
        tuple[37..121].fill(b' ');
        tuple[40..48].copy_from_slice(&noise.next().to_le_bytes());
        tuple[48..56].copy_from_slice(&noise.next().to_le_bytes());
    }
    let checksum = page_checksum(&page, block);
    page[8..10].copy_from_slice(&checksum.to_le_bytes());
    page
}

fn heap() -> Vec<u8> {
    let mut noise = Noise(0x2545_F491_4F6C_DD1D);
    (0..(BYTES / PAGE) as u32).flat_map(|block| heap_page(block, &mut noise)).collect()
}

fn incompressible() -> Vec<u8> {
    let mut noise = Noise(0x9E37_79B9_7F4A_7C15);
    (0..BYTES / 8).flat_map(|_| noise.next().to_le_bytes()).collect()
}

fn sealed(frames: Vec<Frame>, epoch: &Epoch) -> Sealed {
    let draft = Draft { kind: ObjectKind::Pack, plain: Vec::new(), frames, meta: Vec::new() };
    seal(draft, epoch, |id| ObjectName::Pack { system: SystemId::new(7), id })
}

fn pack(bytes: &[u8]) -> Vec<Frame> {
    Frame::pack_all(&mut Packer::new(LEVEL).expect("a level of zstd"), bytes).expect("zstd packs")
}

fn pack_on_all_cores(bytes: &[u8]) -> Vec<Frame> {
    let packer = || Packer::new(LEVEL).expect("a level of zstd");
    pool().install(|| {
        let frames = bytes.par_chunks(FRAME_BYTES_MAX);
        frames
            .map_init(packer, |packer, plain| Frame::pack(packer, plain).expect("zstd packs"))
            .collect()
    })
}

fn unpack_on_all_cores(object: &Object) -> usize {
    pool().install(|| {
        let frames = 0..object.spans().len();
        let open = |unpacker: &mut Unpacker, n| object.frame(n, unpacker).expect("it opens").len();
        frames.into_par_iter().map_init(Unpacker::new, open).sum()
    })
}

/// Time that this thread has been on a core, to a few milliseconds ("Documentation/scheduler/sched-stats.rst").
fn time_on_core() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux counts it");
    let nanoseconds = stat.split(' ').next().and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.expect("the first number"))
}

fn on_one_core<T>(bencher: &mut Bencher<'_>, mut work: impl FnMut() -> T) {
    bencher.iter_custom(|times| {
        let start = time_on_core();
        for _ in 0..times {
            black_box(work());
        }
        time_on_core() - start
    });
}

fn seal_and_open(criterion: &mut Criterion, name: &str, bytes: &[u8]) {
    let epoch = Epoch::generate();
    let frames = pack(bytes);
    let object = sealed(frames.clone(), &epoch);
    eprintln!(
        "{name}: {} bytes of pages are {} stored, {:.1} to 1",
        bytes.len(),
        object.bytes.len(),
        bytes.len() as f64 / object.bytes.len() as f64
    );
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("compress, one core", |b| on_one_core(b, || pack(bytes)));
    group.bench_function("compress, all cores", |b| b.iter(|| black_box(pack_on_all_cores(bytes))));
    group.bench_function("seal what is compressed, one core", |b| {
        b.iter_custom(|times| {
            (0..times).fold(Duration::ZERO, |sum, _| {
                let frames = frames.clone();
                let start = time_on_core();
                black_box(sealed(frames, &epoch));
                sum + (time_on_core() - start)
            })
        });
    });
    group.bench_function("compress and seal, all cores", |b| {
        b.iter(|| black_box(sealed(pack_on_all_cores(bytes), &epoch)));
    });
    let open = || Object::open(object.bytes.clone(), &object.name, &epoch).expect("it opens");
    group.bench_function("open and unpack, one core", |b| {
        on_one_core(b, || open().contents().expect("it opens"));
    });
    group.bench_function("open and unpack, all cores", |b| {
        b.iter(|| black_box(unpack_on_all_cores(&open())));
    });
    group.finish();
}

fn pages(criterion: &mut Criterion) {
    let heap = heap();
    let mut group = criterion.benchmark_group("page");
    group.throughput(Throughput::Bytes(heap.len() as u64));
    let key = [7; 32];
    group.bench_function("hash", |b| {
        on_one_core(b, || {
            let mut hashes = Vec::new();
            page_hashes(&key, &heap, PAGE, &mut hashes);
            hashes.iter().fold(0, |sum, hash| sum ^ hash[0])
        });
    });
    group.bench_function("checksum", |b| {
        let verify = |(block, page)| verify(page, block as u32, Lsn::MAX);
        on_one_core(b, || {
            heap.chunks(PAGE)
                .enumerate()
                .map(verify)
                .filter(|state| *state == PageState::Valid)
                .count()
        });
    });
    group.finish();
}

/// The map of a file of 1 GiB: images of 128 pages, and every hundredth page newer in a delta.
fn map() -> FileMap {
    let mut map = FileMap::default();
    let frame = |number: u32| FrameRef {
        pack: ObjectId::from_bytes([(number / 200) as u8; 8]),
        span: FrameSpan {
            number: number % 200,
            offset: 200 + u64::from(number % 200) * 200_000,
            sealed_bytes: 200_000,
            plain_bytes: FRAME_BYTES_MAX as u32,
            codec: Codec::Zstd,
        },
    };
    map.frames = (0..1024 + 11).map(frame).collect();
    let mut delta = 0;
    for page in 0..131_072u32 {
        let at = page % 128 * PAGE as u32;
        match (page % 100 == 50, map.runs.last_mut()) {
            (true, _) => {
                let (frame, at) = (1024 + delta / 128, delta % 128 * PAGE as u32);
                map.runs.push(Run { first_page: page, pages: 1, frame, at });
                delta += 1;
            }
            (false, Some(run)) if run.frame == page / 128 => run.pages += 1,
            _ => map.runs.push(Run { first_page: page, pages: 1, frame: page / 128, at }),
        }
    }
    map
}

fn maps(criterion: &mut Criterion) {
    let (map, size) = (map(), 1 << 30);
    let bytes = map.encode();
    eprintln!("file map of 1 GiB: {} runs, {} bytes", map.runs.len(), bytes.len());
    let mut group = criterion.benchmark_group("file map");
    group.throughput(Throughput::Elements(map.runs.len() as u64));
    group.bench_function("decode", |b| {
        on_one_core(b, || FileMap::decode(&bytes, size, PAGE as u32).expect("it is whole"));
    });
    group.finish();
}

fn all(criterion: &mut Criterion) {
    seal_and_open(criterion, "heap", &heap());
    seal_and_open(criterion, "incompressible", &incompressible());
    pages(criterion);
    maps(criterion);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3));
    targets = all
}
criterion_main!(benches);
