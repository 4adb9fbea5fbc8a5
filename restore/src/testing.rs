//! A repository made up for tests: real objects in real folders, sealed as the agent seals them.

use crate::access::Access;
use crate::plan::{Plan, PlanRequest, make};
use crate::target::Target;
use backstay_common::head::Head;
use backstay_common::id::{Branch, SnapshotId, SystemId};
use backstay_common::keys::{Epoch, Keyring, file::FileProvider};
use backstay_common::location::{Location, LocationSettings};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_common::origin::{Beginnings, Origin};
use backstay_common::pgtime::PgTime;
use backstay_common::seal::{Packer, Sealed};
use backstay_common::segment::{SegmentSize, TimelineId};
use backstay_common::snapshot::{Manifest, ManifestPlain, Root, testing};
use backstay_common::span::{SpanMeta, seal_wal};
use backstay_common::wal::testing::WalBuilder;
use backstay_common::wal::{Decoder, Summary, WalVersion};
use backstay_common::{Kind, Result};
use jiff::Timestamp;
use std::path::PathBuf;
use std::sync::Arc;

pub const SYSTEM: SystemId = SystemId::new(7_312_345_678_901_234_567);
pub const MIB: u64 = 1 << 20;
const MAJOR: u32 = 15;

/// 2026-11-22 12:00 UTC and so many seconds.
pub fn at(seconds: i64) -> Timestamp {
    let noon: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
    Timestamp::from_second(noon.as_second() + seconds).unwrap()
}

/// The same as WAL records carry it.
pub fn micros(seconds: i64) -> i64 {
    PgTime::from(at(seconds)).micros()
}

pub fn segment_size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

pub fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

pub struct Repo {
    pub folder: tempfile::TempDir,
    pub access: Access,
    pub epoch: Arc<Epoch>,
}

impl Repo {
    /// With so many locations, `a`, `b` and so on.
    pub async fn new(count: u8) -> Repo {
        let folder = tempfile::tempdir().unwrap();
        let cluster: backstay_common::id::ClusterName = "orders".parse().unwrap();
        let keyring = Keyring::new(Arc::new(FileProvider::generate()), cluster.clone());
        let (epoch, wrap) = keyring.new_epoch(SYSTEM).await.unwrap();
        let mut locations = Vec::new();
        for number in 0..count {
            let name = char::from(b'a' + number).to_string();
            let root = folder.path().join(&name);
            std::fs::create_dir(&root).unwrap();
            let url = format!("file://{}", root.display());
            let settings = LocationSettings::new(name.parse().unwrap(), url);
            let location = Location::open(&settings).unwrap();
            location.put(&wrap.name, wrap.bytes.clone()).await.unwrap();
            locations.push(location);
        }
        let (keyring, unreachable) = (Arc::new(keyring), Vec::new());
        let systems = vec![SYSTEM];
        let access = Access { cluster, system: SYSTEM, systems, locations, keyring, unreachable };
        Repo { folder, access, epoch }
    }

    /// Stores at the locations with these indexes.
    pub async fn put(&self, sealed: &Sealed, places: &[usize]) {
        for &index in places {
            self.access.locations[index].put(&sealed.name, sealed.bytes.clone()).await.unwrap();
        }
    }

    pub fn path(&self, place: usize, name: &ObjectName) -> PathBuf {
        let location = self.access.locations[place].name();
        self.folder.path().join(location.as_str()).join(name.to_string())
    }

    /// Flips a bit in the middle of an object.
    pub fn damage(&self, place: usize, name: &ObjectName) {
        let path = self.path(place, name);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }

    /// The first timeline, whose WAL begins with the fourth segment.
    pub async fn first_branch(&self, places: &[usize]) -> Writer {
        let branch: Branch = "00000001-0000000a".parse().unwrap();
        let origin = Origin::new(&Beginnings::of_first_timeline()).unwrap();
        self.put(&origin.seal(&self.epoch, SYSTEM, branch), places).await;
        let start = Lsn::new(3 * MIB);
        let version = WalVersion::from_major(MAJOR).unwrap();
        let wal = WalBuilder::new(version, segment_size(), SYSTEM, timeline(1), start);
        Writer::new(branch, wal, start, places)
    }

    /// Timeline `number` with branch id `id`, promoted where `parent` is.
    pub async fn promote(&self, parent: &Writer, number: u32, id: u8) -> Writer {
        let switch = parent.wal.position();
        let branch: Branch = format!("{number:08X}-000000{id:02x}").parse().unwrap();
        let history = format!("{}{}\t{switch}\tpromoted\n", parent.history, parent.branch.timeline);
        let beginnings = Beginnings {
            timeline: branch.timeline,
            history: Some(history.clone().into_bytes()),
            first_record: Some(vec![id]),
        };
        let origin = Origin::new(&beginnings).unwrap();
        self.put(&origin.seal(&self.epoch, SYSTEM, branch), &parent.places).await;
        let mut wal = parent.wal.clone();
        wal.set_timeline(branch.timeline);
        wal.end_of_recovery(micros(0), parent.branch.timeline);
        let mut writer = Writer::new(branch, wal, segment_size().start_of(switch), &parent.places);
        writer.history = history;
        writer
    }

    pub async fn snapshot(
        &self,
        branch: Branch,
        (start, stop): (Lsn, Lsn),
        began: i64,
        places: &[usize],
    ) -> SnapshotId {
        let id = SnapshotId::new(at(began), [1, 2, 3, 4]);
        let plain = ManifestPlain {
            start,
            stop,
            segment_bytes: 1 << 20,
            epochs: vec![self.epoch.id()],
            database_bytes: 400_000_000,
            ..testing::plain(SYSTEM, id, branch)
        };
        let root = Root { cluster: self.access.cluster.clone(), ..testing::root() };
        self.put(&Manifest { plain, root }.seal(&self.epoch).unwrap(), places).await;
        id
    }

    pub async fn head(&self, branch: Branch, covered: Lsn, seconds: i64, places: &[usize]) {
        let head = Head { branch, covered, clock: PgTime(micros(seconds)) };
        let seq = seconds as u64;
        self.put(&head.seal(&self.epoch, SYSTEM, "db1".parse().unwrap(), seq), places).await;
    }

    pub async fn plan(&self, target: &str) -> Result<Plan> {
        self.plan_with(target, |_| {}).await
    }

    pub async fn plan_with(
        &self,
        target: &str,
        set: impl FnOnce(&mut PlanRequest),
    ) -> Result<Plan> {
        let now = at(100_000);
        let mut request = PlanRequest::new(Target::parse(target, None, now)?, now);
        set(&mut request);
        make(&self.access, &request).await
    }

    /// The refusal of a target.
    pub async fn refusal(&self, target: &str) -> String {
        let error = self.plan(target).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Target, "{error}");
        error.to_string()
    }
}

/// Writes one branch as an agent does: what has come since the last time becomes one object.
pub struct Writer {
    pub branch: Branch,
    pub wal: WalBuilder,
    pub places: Vec<usize>,
    decoder: Decoder,
    history: String,
}

impl Writer {
    fn new(branch: Branch, wal: WalBuilder, from: Lsn, places: &[usize]) -> Writer {
        let version = WalVersion::from_major(MAJOR).unwrap();
        let decoder = Decoder::new(version, segment_size(), SYSTEM, branch.timeline, from);
        Writer { branch, wal, places: places.to_vec(), decoder, history: String::new() }
    }

    pub fn position(&self) -> Lsn {
        self.wal.position()
    }

    /// Where what was sealed last ends.
    pub fn stored(&self) -> Lsn {
        self.decoder.position()
    }

    /// The WAL of `range`.
    pub fn bytes(&self, range: LsnRange) -> &[u8] {
        let start = range.start.since(self.wal.start()) as usize;
        &self.wal.bytes()[start..start + range.len() as usize]
    }

    /// Stores all that is new.
    pub async fn ship(&mut self, repo: &Repo) -> ObjectName {
        self.ship_until(repo, self.position(), None).await
    }

    /// Stores all that is new, and what the server's clock was when there was no more.
    pub async fn ship_with_clock(&mut self, repo: &Repo, seconds: i64) -> ObjectName {
        self.ship_until(repo, self.position(), Some(PgTime(micros(seconds)))).await
    }

    pub async fn ship_until(&mut self, repo: &Repo, end: Lsn, clock: Option<PgTime>) -> ObjectName {
        let sealed = self.seal(repo, end, clock);
        repo.put(&sealed, &self.places).await;
        sealed.name
    }

    /// What would be stored next, without storing it.
    pub fn seal(&mut self, repo: &Repo, end: Lsn, clock: Option<PgTime>) -> Sealed {
        let range = LsnRange::new(self.decoder.position(), end);
        let bytes = self.bytes(range).to_vec();
        let mut summary = Summary::default();
        self.decoder.feed(&bytes, &mut |event| summary.note(&event)).unwrap();
        let summary = summary.finish(&mut self.decoder);
        let meta = SpanMeta { summary, clock, major: MAJOR, segment_bytes: 1 << 20 };
        let mut packer = Packer::new(1).unwrap();
        seal_wal(&repo.epoch, SYSTEM, self.branch, range, &bytes, &meta, &mut packer).unwrap()
    }

    /// A range that has been stored before as one object, with a footer that says nothing.
    pub fn sealed(&self, repo: &Repo, range: LsnRange) -> Sealed {
        let summary = Summary::default();
        let meta = SpanMeta { summary, clock: None, major: MAJOR, segment_bytes: 1 << 20 };
        let mut packer = Packer::new(1).unwrap();
        let bytes = self.bytes(range);
        seal_wal(&repo.epoch, SYSTEM, self.branch, range, bytes, &meta, &mut packer).unwrap()
    }

    /// A snapshot that begins here and ends behind two records.
    pub async fn snapshot(&mut self, repo: &Repo, began: i64) -> SnapshotId {
        let start = self.wal.checkpoint(false, self.position(), true);
        self.wal.ordinary(5, 100);
        self.wal.ordinary(5, 100);
        repo.snapshot(self.branch, (start, self.position()), began, &self.places).await
    }
}
