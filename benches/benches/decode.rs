//! WAL decoder throughput on one core: at least 1 GB/s.
//!
//! `WAL_FILE=segment cargo bench --bench decode` measures a real segment (its first page must begin a segment) instead of
//! WAL with the mix of record sizes that pgbench leaves.

use backstay_common::id::SystemId;
use backstay_common::lsn::Lsn;
use backstay_common::segment::{SegmentSize, TimelineId};
use backstay_common::wal::testing::WalBuilder;
use backstay_common::wal::{Decoder, WalVersion};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

struct Wal {
    bytes: Vec<u8>,
    version: WalVersion,
    size: SegmentSize,
    system: SystemId,
    timeline: TimelineId,
    start: Lsn,
}

fn synthetic(image_every: usize) -> Wal {
    let (size, system, timeline) = (SegmentSize::DEFAULT, SystemId::new(7), TimelineId::FIRST);
    let (version, start) = (WalVersion::from_major(17).expect("known"), Lsn::new(size.bytes()));
    let mut wal = WalBuilder::new(version, size, system, timeline, start);
    for n in 0usize.. {
        match n % 8 {
            7 => wal.commit(n as u32, n as i64),
            m if image_every > 0 && n % image_every == m => wal.ordinary(n as u32, 8_000),
            m => wal.ordinary(n as u32, 40 + 12 * m),
        };
        if wal.bytes().len() > size.bytes() as usize {
            break;
        }
    }
    let mut bytes = wal.into_bytes();
    bytes.truncate(size.bytes() as usize);
    Wal { bytes, version, size, system, timeline, start }
}

fn from_file(path: &str) -> Wal {
    let bytes = std::fs::read(path).expect("WAL_FILE can be read");
    let u32_at = |n: usize| u32::from_le_bytes(bytes[n..n + 4].try_into().expect("four bytes"));
    let u64_at = |n: usize| u64::from_le_bytes(bytes[n..n + 8].try_into().expect("eight bytes"));
    Wal {
        version: WalVersion::from_magic(u32_at(0) as u16).expect("a known version"),
        timeline: TimelineId::new(u32_at(4)).expect("a timeline"),
        start: Lsn::new(u64_at(8)),
        system: SystemId::new(u64_at(24)),
        size: SegmentSize::new(u32_at(32)).expect("a segment size"),
        bytes,
    }
}

fn measure(criterion: &mut Criterion, name: &str, wal: &Wal) {
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Bytes(wal.bytes.len() as u64));
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            let mut decoder =
                Decoder::new(wal.version, wal.size, wal.system, wal.timeline, wal.start);
            let mut events = 0u64;
            for chunk in wal.bytes.chunks(128 << 10) {
                decoder.feed(chunk, &mut |_| events += 1).expect("the WAL is good");
            }
            black_box(events)
        });
    });
    group.finish();
}

fn decode(criterion: &mut Criterion) {
    if let Ok(path) = std::env::var("WAL_FILE") {
        return measure(criterion, "file", &from_file(&path));
    }
    measure(criterion, "small records", &synthetic(0));
    measure(criterion, "with page images", &synthetic(50));
}

criterion_group!(benches, decode);
criterion_main!(benches);
