//! The catalog of a month of a busy database: 200,000 spans on three branches, in an S3 store 20 ms away.
//!
//! `cargo bench -p backstay-benches --bench catalog [-- LATENCY_MS [SPANS]]`. The store is the tests' own, in this process and
//! on the same cores. WAL objects are names with a few bytes, for neither listings nor indexes look into them.

use backstay::access::Access;
use backstay::resolve::line;
use backstay::resolve::survey::Survey;
use backstay_common::catalog::Catalog;
use backstay_common::id::{Branch, ObjectId, SnapshotId, SystemId};
use backstay_common::keys::file::FileProvider;
use backstay_common::keys::{Epoch, Keyring};
use backstay_common::location::{Location, Requests};
use backstay_common::lsn::{Lsn, LsnRange, SPAN_BYTES};
use backstay_common::name::{ObjectName, folder};
use backstay_common::origin::{Beginnings, Origin};
use backstay_common::pgtime::PgTime;
use backstay_common::seal::{Packer, Sealed};
use backstay_common::snapshot::{Manifest, ManifestPlain, Root, testing};
use backstay_common::span::{SpanMeta, seal_wal};
use backstay_common::wal::Summary;
use backstay_common::walindex::blocks::{Blocks, Work, superseded};
use backstay_common::walindex::{IndexEntry, WalIndex};
use backstay_tests::bucket::{Action, Bucket, Fault};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SYSTEM: SystemId = SystemId::new(7_312_345_678_901_234_567);
const BRANCHES: u64 = 3;
/// The default of `[index] spans`.
const BLOCK_SPANS: u64 = 128;
const OBJECT: &[u8] = b"a name is all that is asked for";
const RUNS: usize = 5;

fn main() {
    let mut args = std::env::args().skip(1).filter_map(|arg| arg.parse::<u64>().ok());
    let latency = Duration::from_millis(args.next().unwrap_or(20));
    let spans = args.next().unwrap_or(200_000);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
    runtime.block_on(measure(latency, spans));
}

/// A location under construction.
struct Month {
    bucket: Bucket,
    epoch: Arc<Epoch>,
    access: Access,
}

impl Month {
    fn put(&self, name: &ObjectName, bytes: impl Into<bytes::Bytes>) {
        self.bucket.replace(&format!("month/{name}"), bytes);
    }

    fn seal(&self, sealed: &Sealed) {
        self.put(&sealed.name, sealed.bytes.clone());
    }
}

async fn month(spans: u64) -> Month {
    let bucket = Bucket::start().await;
    let settings = bucket.settings("month");
    let cluster: backstay_common::id::ClusterName = "orders".parse().expect("a name");
    let keyring = Keyring::new(Arc::new(FileProvider::generate()), cluster.clone());
    let (epoch, wrap) = keyring.new_epoch(SYSTEM).await.expect("a key");
    let locations = vec![Location::open(&settings).expect("a location")];
    let (keyring, unreachable) = (Arc::new(keyring), Vec::new());
    let access =
        Access { cluster, system: SYSTEM, systems: vec![SYSTEM], locations, keyring, unreachable };
    let month = Month { bucket, epoch, access };
    month.seal(&wrap);

    let mut history = String::new();
    let mut from = 1;
    for number in 1..=BRANCHES {
        let to = if number == BRANCHES { spans + 1 } else { from + spans / BRANCHES };
        let switch = Lsn::new(from * SPAN_BYTES);
        let branch: Branch = format!("{number:08X}-0000000{number}").parse().expect("a branch");
        let beginnings = match number {
            1 => Beginnings::of_first_timeline(),
            _ => {
                history += &format!("{}\t{switch}\tpromoted\n", number - 1);
                Beginnings {
                    timeline: branch.timeline,
                    history: Some(history.clone().into_bytes()),
                    first_record: Some(vec![7]),
                }
            }
        };
        let origin = Origin::new(&beginnings).expect("an origin");
        month.seal(&origin.seal(&month.epoch, SYSTEM, branch));
        wal(&month, branch, from, to);
        from = to;
    }
    month.seal(&manifest(&month, spans).seal(&month.epoch).expect("a manifest"));
    month
}

/// All spans of a branch, and its indexes as an agent leaves them.
fn wal(month: &Month, branch: Branch, from: u64, to: u64) {
    let entries: Vec<IndexEntry> = (from..to)
        .map(|n| {
            let range = LsnRange::new(Lsn::new(n * SPAN_BYTES), Lsn::new((n + 1) * SPAN_BYTES));
            if n >= to - to % BLOCK_SPANS {
                return tail(month, branch, range, meta(n, range));
            }
            let id = ObjectId::random();
            month.put(&ObjectName::Wal { system: SYSTEM, branch, range, id }, OBJECT);
            IndexEntry::new(range, id, OBJECT.len() as u64, meta(n, range))
        })
        .collect();
    let all = LsnRange::new(Lsn::new(from * SPAN_BYTES), Lsn::new(to * SPAN_BYTES));
    let mut made = Vec::new();
    for work in Blocks::new(BLOCK_SPANS).work(&[], all) {
        let (Work::Read(block) | Work::Merge(block)) = work;
        let first = entries.partition_point(|entry| entry.start < block.start);
        let end = entries.partition_point(|entry| entry.start < block.end);
        let index = WalIndex::new(block, entries[first..end].to_vec());
        let sealed =
            index.seal(&month.epoch, SYSTEM, branch).expect("sealed").expect("short enough");
        let id = sealed.name.id().expect("an id");
        let places = Default::default();
        made.push(backstay_common::catalog::WalEntry { range: block, id, size: 0, places });
        month.seal(&sealed);
    }
    for gone in superseded(&made) {
        let (range, id) = (gone.range, gone.id);
        let name = ObjectName::WalIndex { system: SYSTEM, branch, range, id };
        month.bucket.remove(&format!("month/{name}"));
    }
}

/// Beyond the last whole block nothing is indexed, and footers are read one by one: so there the objects are real.
fn tail(month: &Month, branch: Branch, range: LsnRange, meta: SpanMeta) -> IndexEntry {
    let (mut packer, wal) = (Packer::new(1).expect("a packer"), vec![0; SPAN_BYTES as usize]);
    let sealed = seal_wal(&month.epoch, SYSTEM, branch, range, &wal, &meta, &mut packer);
    let sealed = sealed.expect("sealed");
    month.seal(&sealed);
    IndexEntry::new(range, sealed.name.id().expect("an id"), sealed.bytes.len() as u64, meta)
}

/// What a footer says under load: 13 seconds for a span, thousands of transactions.
fn meta(n: u64, range: LsnRange) -> SpanMeta {
    let time = 848_541_600_000_000 + n as i64 * 13_000_000;
    let noise = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    let summary = Summary {
        first_record: Some(range.start.add(noise % 4096 * 8)),
        last_record: Some(
            range.end.get().checked_sub(noise % 8000 + 200).map_or(range.end, Lsn::new),
        ),
        last_record_end: Some(range.end),
        least_time: Some(time + noise as i64 % 1000),
        greatest_time: Some(time + 12_990_000 + noise as i64 % 1000),
        least_xid: Some((n * 4000 + noise % 100) as u32),
        greatest_xid: Some((n * 4000 + 4000) as u32),
        checkpoint: n.is_multiple_of(20),
        ..Summary::default()
    };
    SpanMeta { summary, clock: Some(PgTime(time + 13_000_000)), major: 17, segment_bytes: 16 << 20 }
}

/// Of the beginning: everything is replayed from there.
fn manifest(month: &Month, spans: u64) -> Manifest {
    let began = jiff::Timestamp::from_second(1_795_000_000).expect("a time");
    let start = Lsn::new(SPAN_BYTES);
    let snapshot = SnapshotId::new(began, [1, 2, 3, 4]);
    let branch = "00000001-00000001".parse().expect("a branch");
    let plain = ManifestPlain {
        start,
        stop: start.add(spans.min(100)),
        epochs: vec![month.epoch.id()],
        database_bytes: 1 << 40,
        ..testing::plain(SYSTEM, snapshot, branch)
    };
    let root = Root { cluster: month.access.cluster.clone(), ..testing::root() };
    Manifest { plain, root }
}

fn requests(before: Requests, after: Requests) -> String {
    format!("{} listings, {} reads", after.list - before.list, after.get - before.get)
}

/// Processor time of this process so far, store included, in seconds.
fn processor_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / TICKS_PER_SECOND
}

async fn measure(latency: Duration, spans: u64) {
    let built = Instant::now();
    let month = month(spans).await;
    let location = &month.access.locations[0];
    println!(
        "{spans} spans on {BRANCHES} branches, {} ms a request (made in {:.1} s)",
        latency.as_millis(),
        built.elapsed().as_secs_f64()
    );
    month.bucket.faults().add(Fault::always(Action::Delay(latency)));

    for _ in 0..RUNS {
        let before = location.requests();
        let (started, processor) = (Instant::now(), processor_seconds());
        let catalog =
            Arc::new(Catalog::load(&month.access.locations, SYSTEM).await.expect("loads"));
        let (listed, listing) = (started.elapsed(), processor_seconds() - processor);
        let between = location.requests();
        let found: usize = catalog.branches.values().map(|branch| branch.wal.len()).sum();
        assert_eq!(found as u64, spans, "every span is found");

        let survey = Survey::load(&month.access, catalog.clone()).await.expect("a survey");
        let (_, snapshot) = survey.snapshots.first_key_value().expect("a snapshot");
        let tip = *catalog.branches.last_key_value().expect("a branch").0;
        let line = line::line_of(tip, &survey.pasts);
        let reach = survey.reach(&line, snapshot).expect("a reach");
        let footers = survey.footers(&reach.stretches).await.expect("footers");
        let all = started.elapsed();
        assert!(footers.len() as u64 + BRANCHES >= spans, "{} footers", footers.len());
        println!(
            "catalog {:.2} s, {listing:.2} s of processor time ({}); and all footers {:.2} s, {:.2} s ({})",
            listed.as_secs_f64(),
            requests(before, between),
            all.as_secs_f64(),
            processor_seconds() - processor,
            requests(before, location.requests()),
        );
    }
    let (before, started) = (location.requests(), Instant::now());
    let listed = location.list(&folder::wal(SYSTEM)).await.expect("lists");
    println!(
        "for comparison, the same {} names page by page: {:.2} s ({})",
        listed.len(),
        started.elapsed().as_secs_f64(),
        requests(before, location.requests())
    );
}
