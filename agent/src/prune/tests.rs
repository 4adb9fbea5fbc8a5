use super::pins::{PinRequest, answer};
use super::*;
use backstay_common::id::{BranchId, EpochId, ObjectId, SnapshotId};
use backstay_common::location::Listed;
use backstay_common::lsn::{Lsn, SPAN_BYTES};
use backstay_common::name::ObjectName;
use backstay_common::origin::{Beginnings, Origin};
use backstay_common::seal::Sealed;
use backstay_common::segment::TimelineId;
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::snapshot::{Begin, Manifest, ManifestPlain, PackEntry, testing};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

const SYSTEM: SystemId = SystemId::new(7);
const SEGMENT: u64 = 1 << 20;
const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;
const WINDOW: i64 = 3 * DAY;
const GRACE: i64 = DAY;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

type Objects = BTreeMap<ObjectName, (Bytes, Timestamp)>;

/// A store with a clock of its own, that can be cut off after any number of requests.
struct Sim {
    name: LocationName,
    objects: Mutex<Objects>,
    /// Everything that was ever stored.
    ever: Mutex<BTreeMap<ObjectName, u64>>,
    epoch: Arc<Epoch>,
    clock: AtomicI64,
    /// Requests that are still answered.
    fuse: AtomicU64,
    used: AtomicU64,
    /// Objects younger than this cannot be deleted, in seconds.
    lock: AtomicI64,
    /// Or not at all.
    is_forbidden: AtomicBool,
    /// It takes nothing, so it has no clock to show.
    is_full: AtomicBool,
    memory: Memory,
    /// What somebody else does just before the request of this number.
    hook: Mutex<Option<(u64, Hook)>>,
}

type Hook = Box<dyn FnOnce(&Sim) + Send>;

impl Sim {
    fn new(name: &str, epoch: &Arc<Epoch>) -> Sim {
        Sim {
            name: name.parse().unwrap(),
            objects: Mutex::default(),
            ever: Mutex::default(),
            epoch: epoch.clone(),
            clock: AtomicI64::new(0),
            fuse: AtomicU64::new(u64::MAX),
            used: AtomicU64::new(0),
            lock: AtomicI64::new(0),
            is_forbidden: AtomicBool::new(false),
            is_full: AtomicBool::new(false),
            memory: Memory::default(),
            hook: Mutex::default(),
        }
    }

    /// Counts requests anew, and lets `act` come in between before the one of this number, from 1.
    fn before(&self, number: u64, act: impl FnOnce(&Sim) + Send + 'static) {
        self.used.store(0, Ordering::Relaxed);
        *self.hook.lock().unwrap() = Some((number, Box::new(act)));
    }

    fn now(&self) -> Timestamp {
        at(self.clock.load(Ordering::Relaxed))
    }

    fn request(&self) -> Result<()> {
        let number = self.used.fetch_add(1, Ordering::Relaxed) + 1;
        let hook = self.hook.lock().unwrap().take_if(|(due, _)| *due == number);
        if let Some((_, act)) = hook {
            act(self);
        }
        let left =
            self.fuse.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        left.map(drop).map_err(|_| Error::new(Kind::Storage, "cut off"))
    }

    fn store(&self, name: ObjectName, bytes: Bytes) {
        self.ever.lock().unwrap().insert(name.clone(), bytes.len() as u64);
        let now = self.now();
        self.objects.lock().unwrap().entry(name).or_insert((bytes, now));
    }

    fn names(&self) -> BTreeSet<ObjectName> {
        self.objects.lock().unwrap().keys().cloned().collect()
    }
}

impl Store for Sim {
    fn name(&self) -> &LocationName {
        &self.name
    }

    async fn list(&self, folder: &str) -> Result<Vec<Listed>> {
        self.request()?;
        let objects = self.objects.lock().unwrap();
        let listed = objects.iter().map(|(name, (bytes, modified))| Listed {
            path: name.to_string(),
            name: Some(name.clone()),
            size: bytes.len() as u64,
            modified: *modified,
        });
        Ok(listed.filter(|listed| listed.path.starts_with(folder)).collect())
    }

    async fn get(&self, name: &ObjectName) -> Result<Bytes> {
        self.request()?;
        let objects = self.objects.lock().unwrap();
        let found = objects.get(name).map(|(bytes, _)| bytes.clone());
        found.ok_or_else(|| Error::new(Kind::Missing, name))
    }

    async fn put(&self, sealed: Sealed, _: EpochId) -> Result<()> {
        self.request()?;
        self.store(sealed.name, sealed.bytes);
        Ok(())
    }

    /// One request for each object: a batch may be carried out in part.
    async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        let mut refused = None;
        for name in names {
            self.request()?;
            let mut objects = self.objects.lock().unwrap();
            let Some((_, modified)) = objects.get(name) else { continue };
            let age = self.now().as_second() - modified.as_second();
            let reason = match age < self.lock.load(Ordering::Relaxed) {
                true => "AccessDenied: object protected by object lock",
                false if self.is_forbidden.load(Ordering::Relaxed) => "AccessDenied: not allowed",
                false => {
                    objects.remove(name);
                    continue;
                }
            };
            refused = Some(Error::new(Kind::Storage, reason));
        }
        refused.map_or(Ok(()), Err)
    }

    async fn clock(&self) -> Result<Timestamp> {
        self.request()?;
        match self.is_full.load(Ordering::Relaxed) {
            true => Err(Error::new(Kind::Storage, "no space is left")),
            false => Ok(self.now()),
        }
    }

    async fn epoch(&self, _: EpochId) -> Result<Arc<Epoch>> {
        Ok(self.epoch.clone())
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }
}

/// Where a branch came from, as it really was.
#[derive(Clone)]
struct Truth {
    branch: Branch,
    parent: Option<(usize, u64)>,
    history: String,
    pos: u64,
    /// Where the unshipped, and where the span, begins.
    shipped: u64,
    goes_on: bool,
}

#[derive(Clone)]
struct Snap {
    branch: usize,
    start: u64,
    stop: u64,
    packs: Vec<(ObjectId, u64)>,
    marked: bool,
    finished: i64,
}

struct Running {
    id: SnapshotId,
    branch: usize,
    start: u64,
    packs: Vec<(ObjectId, u64)>,
    parent: Option<SnapshotId>,
}

/// A restore that reads with its pin in place.
struct Reading {
    snapshot: SnapshotId,
    branch: usize,
    lsn: u64,
    ends: i64,
    store: usize,
}

struct World {
    random: u64,
    clock: i64,
    epoch: Arc<Epoch>,
    stores: [Sim; 2],
    /// What the second store is still to get.
    late: Vec<(ObjectName, Bytes)>,
    is_late: bool,
    branches: Vec<Truth>,
    commits: Vec<(usize, u64, i64)>,
    snaps: BTreeMap<SnapshotId, Snap>,
    running: Option<Running>,
    reading: Vec<Reading>,
    /// With where it was when it was pinned.
    pinned: Vec<(SnapshotId, [bool; 2])>,
    rules: Rules,
    /// Of the lease.
    generation: u64,
    /// Pages go bad now and then.
    is_damaging: bool,
}

impl World {
    fn new(seed: u64) -> World {
        let epoch = Arc::new(Epoch::generate());
        let stores = ["near", "far"].map(|name| Sim::new(name, &epoch));
        let mut world = World {
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            clock: 0,
            epoch,
            stores,
            late: Vec::new(),
            is_late: false,
            generation: 1,
            branches: Vec::new(),
            commits: Vec::new(),
            snaps: BTreeMap::new(),
            running: None,
            reading: Vec::new(),
            pinned: Vec::new(),
            rules: Rules::window(Duration::from_secs(WINDOW as u64)),
            is_damaging: true,
        };
        world.branch(None, 3 * SEGMENT, String::new());
        world
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % bound
    }

    fn pass(&mut self, seconds: i64) {
        self.clock += seconds;
        self.stores.iter().for_each(|store| store.clock.store(self.clock, Ordering::Relaxed));
    }

    /// Both locations get it, the second perhaps later.
    fn put(&mut self, name: ObjectName, bytes: Bytes) {
        self.stores[0].store(name.clone(), bytes.clone());
        match self.is_late {
            true => self.late.push((name, bytes)),
            false => self.stores[1].store(name, bytes),
        }
    }

    fn put_sealed(&mut self, sealed: Sealed) {
        self.put(sealed.name, sealed.bytes);
    }

    /// In the order in which it should have come. A manifest is committed only where what it needs is.
    fn catch_up(&mut self) {
        self.is_late = false;
        for (name, bytes) in std::mem::take(&mut self.late) {
            let there = self.stores[1].names();
            let is_complete = match &name {
                ObjectName::Manifest { snapshot, .. } => {
                    let snap = &self.snaps[snapshot];
                    has_packs(&there, snap) && self.has_wal(&there, snap.branch, snap, snap.stop)
                }
                _ => true,
            };
            if is_complete {
                self.stores[1].store(name, bytes);
            }
        }
    }

    fn branch(&mut self, parent: Option<(usize, u64)>, pos: u64, history: String) {
        let timeline = TimelineId::new(self.branches.len() as u32 + 1).unwrap();
        let id = BranchId::from_bytes((self.branches.len() as u32).to_be_bytes());
        let branch = Branch { timeline, id };
        let beginnings = Beginnings {
            timeline,
            history: parent.map(|_| history.clone().into_bytes()),
            first_record: parent.map(|_| vec![1]),
        };
        let origin = Origin::new(&beginnings).unwrap().seal(&self.epoch, SYSTEM, branch);
        self.put_sealed(origin);
        let shipped = pos / SEGMENT * SEGMENT;
        self.branches.push(Truth { branch, parent, history, pos, shipped, goes_on: true });
    }

    fn write(&mut self, index: usize, bytes: u64) {
        self.branches[index].pos += bytes;
        let (pos, branch) = (self.branches[index].pos, self.branches[index].branch);
        self.commits.push((index, pos, self.clock));
        while self.branches[index].shipped < pos {
            let start = self.branches[index].shipped;
            let end = pos.min((start / SPAN_BYTES + 1) * SPAN_BYTES);
            self.wal(branch, start, end);
            if end % SPAN_BYTES == 0 && self.below(4) > 0 {
                let least = self.branches[index]
                    .parent
                    .map_or(3 * SEGMENT, |(_, at)| at / SEGMENT * SEGMENT);
                self.wal(branch, least.max(end - SPAN_BYTES), end);
            }
            self.branches[index].shipped = end;
        }
    }

    fn wal(&mut self, branch: Branch, start: u64, end: u64) {
        let range = LsnRange::new(Lsn::new(start), Lsn::new(end));
        let id = ObjectId::random();
        self.put(ObjectName::Wal { system: SYSTEM, branch, range, id }, Bytes::from_static(b"wal"));
    }

    fn alive(&mut self) -> usize {
        let alive: Vec<usize> =
            (0..self.branches.len()).filter(|&b| self.branches[b].goes_on).collect();
        alive[self.below(alive.len() as u64) as usize]
    }

    fn begin(&mut self) {
        let branch = self.alive();
        let random = (self.below(u64::MAX) as u32).to_be_bytes();
        let id = SnapshotId::new(at(self.clock), random);
        let parent = self.snaps.keys().next_back().copied().filter(|id| {
            let name = ObjectName::Manifest { system: SYSTEM, snapshot: *id };
            self.stores.iter().all(|store| store.names().contains(&name))
        });
        let begin = Begin { snapshot: id, agent: "db1".parse().unwrap(), parent, generation: 0 };
        self.put_sealed(begin.seal(&self.epoch, SYSTEM));
        let start = self.branches[branch].pos;
        self.running = Some(Running { id, branch, start, packs: Vec::new(), parent });
    }

    fn pack(&mut self) {
        let size = 1 + self.below(40) as usize;
        let id = ObjectId::random();
        self.put(ObjectName::Pack { system: SYSTEM, id }, vec![0; size].into());
        self.running.as_mut().unwrap().packs.push((id, size as u64));
    }

    fn finish(&mut self) {
        self.pack();
        let branch = self.running.as_ref().unwrap().branch;
        let bytes = 1000 + self.below(SEGMENT);
        self.write(branch, bytes);
        let mut running = self.running.take().unwrap();
        // What did not change is in the parent's packs.
        let of_parent = running.parent.map(|id| self.snaps[&id].packs.clone()).unwrap_or_default();
        let reused: Vec<_> = of_parent.into_iter().filter(|_| self.below(3) > 0).collect();
        running.packs.extend(reused);
        let stop = self.branches[branch].pos;
        let marked = self.is_damaging && self.below(6) == 0;
        let finished = self.clock;
        let snap =
            Snap { branch, start: running.start, stop, packs: running.packs, marked, finished };
        let manifest = manifest(running.id, &snap, self.branches[branch].branch, &self.epoch);
        self.snaps.insert(running.id, snap);
        self.put_sealed(manifest);
    }

    /// A server restored or promoted goes on from some moment of a branch.
    fn promote(&mut self) {
        let from = self.below(self.branches.len() as u64) as usize;
        let least = self.branches[from].parent.map_or(0, |(_, at)| at);
        let switches: Vec<u64> = (self.commits.iter())
            .filter(|(branch, lsn, _)| *branch == from && *lsn > least)
            .map(|(_, lsn, _)| *lsn)
            .collect();
        if switches.is_empty() || self.branches.len() > 8 {
            return;
        }
        let recent = (self.below(4) + 1).min(switches.len() as u64) as usize;
        let switch = switches[switches.len() - recent];
        let is_reachable = |store: &Sim| self.reached_from(&store.names(), from, switch).is_some();
        if !self.stores.iter().all(is_reachable) {
            return;
        }
        let parent = &self.branches[from];
        let (timeline, lsn) = (parent.branch.timeline, Lsn::new(switch));
        let history = format!("{}{timeline}\t{lsn}\tpromoted\n", parent.history);
        if self.below(3) > 0 {
            self.branches[from].goes_on = false;
        }
        self.branch(Some((from, switch)), switch, history);
    }

    /// The branches of a line with the part of each, as it was: newest first.
    fn chain(&self, tip: usize) -> Vec<(usize, u64, u64)> {
        let (mut at, mut to) = (Some(tip), u64::MAX);
        let mut chain = Vec::new();
        while let Some(branch) = at {
            let from = self.branches[branch].parent.map_or(0, |(_, switch)| switch);
            chain.push((branch, from, to));
            to = from;
            at = self.branches[branch].parent.map(|(parent, _)| parent);
        }
        chain
    }

    /// True if replay of `snap` to `lsn` on the line of `tip` finds all its WAL.
    fn has_wal(&self, names: &BTreeSet<ObjectName>, tip: usize, snap: &Snap, lsn: u64) -> bool {
        let chain = self.chain(tip);
        let Some(first) = chain.iter().position(|(branch, ..)| *branch == snap.branch) else {
            return false;
        };
        if snap.stop > chain[first].2 || snap.stop > lsn {
            return false;
        }
        chain[..=first].iter().all(|&(branch, from, to)| {
            let begin = if branch == snap.branch { snap.start } else { from };
            let (mut reached, end) = (begin / SEGMENT * SEGMENT, to.min(lsn));
            let mut ranges: Vec<(u64, u64)> = (names.iter())
                .filter_map(|name| match name {
                    ObjectName::Wal { branch: of, range, .. }
                        if *of == self.branches[branch].branch =>
                    {
                        Some((range.start.get(), range.end.get()))
                    }
                    _ => None,
                })
                .collect();
            ranges.sort_unstable();
            for (start, end) in ranges {
                if start <= reached {
                    reached = reached.max(end);
                }
            }
            from >= lsn || reached >= end
        })
    }

    /// The newest whole snapshot from which a moment can be reached.
    fn reached_from(
        &self,
        names: &BTreeSet<ObjectName>,
        tip: usize,
        lsn: u64,
    ) -> Option<SnapshotId> {
        let usable = self.snaps.iter().filter(|(id, snap)| {
            let name = ObjectName::Manifest { system: SYSTEM, snapshot: **id };
            !snap.marked
                && names.contains(&name)
                && has_packs(names, snap)
                && self.has_wal(names, tip, snap, lsn)
        });
        usable.max_by_key(|(_, snap)| snap.stop).map(|(id, _)| *id)
    }

    /// The commits that must be reachable: all inside the window, and on each of their lines the last one before it.
    fn moments(&self) -> BTreeSet<(usize, u64)> {
        let edge = self.clock - WINDOW;
        let inside = self.commits.iter().filter(|(_, _, time)| *time >= edge);
        let mut moments: BTreeSet<(usize, u64)> = inside.map(|(b, lsn, _)| (*b, *lsn)).collect();
        let tips: BTreeSet<usize> = moments.iter().map(|(branch, _)| *branch).collect();
        for tip in tips {
            let on_line = |(branch, lsn, time): &&(usize, u64, i64)| {
                let leg = self.chain(tip).into_iter().find(|leg| leg.0 == *branch);
                *time < edge && leg.is_some_and(|(_, from, to)| *lsn > from && *lsn <= to)
            };
            let before = self.commits.iter().filter(on_line).map(|(_, lsn, _)| *lsn).max();
            moments.extend(before.map(|lsn| (tip, lsn)));
        }
        moments
    }

    /// What must hold at any moment, whoever was interrupted where.
    fn check(&self, what: &str) {
        for (number, store) in self.stores.iter().enumerate() {
            let names = store.names();
            let ever: BTreeSet<ObjectName> = store.ever.lock().unwrap().keys().cloned().collect();
            for (tip, lsn) in self.moments() {
                if self.reached_from(&ever, tip, lsn).is_some() {
                    assert!(
                        self.reached_from(&names, tip, lsn).is_some(),
                        "{what}: {} cannot reach {} on branch {tip} any more, at {}",
                        store.name,
                        Lsn::new(lsn),
                        self.clock
                    );
                }
            }
            for (id, snap) in &self.snaps {
                let name = ObjectName::Manifest { system: SYSTEM, snapshot: *id };
                let is_whole =
                    has_packs(&names, snap) && self.has_wal(&names, snap.branch, snap, snap.stop);
                assert!(
                    is_whole || !names.contains(&name),
                    "{what}: {id} at {} lacks something",
                    store.name
                );
                let is_pinned = self.pinned.iter().any(|(pin, there)| pin == id && there[number]);
                assert!(is_whole || !is_pinned, "{what}: pinned {id} is gone");
            }
            if let Some(running) = &self.running {
                for (id, _) in &running.packs {
                    let name = ObjectName::Pack { system: SYSTEM, id: *id };
                    assert!(
                        names.contains(&name) || !ever.contains(&name),
                        "{what}: a running pack is gone"
                    );
                }
                let parent = running.parent.map(|id| &self.snaps[&id]);
                assert!(
                    parent.is_none_or(|snap| has_packs(&names, snap)),
                    "{what}: the parent is gone"
                );
            }
            for reading in self.reading.iter().filter(|reading| reading.store == number) {
                let snap = &self.snaps[&reading.snapshot];
                assert!(has_packs(&names, snap), "{what}: a restore lacks a pack");
                let has_wal = self.has_wal(&names, reading.branch, snap, reading.lsn);
                assert!(has_wal, "{what}: a restore lacks WAL");
            }
        }
    }

    /// By the truth: the newest three that were ever whole here, and the first of each of the newest weeks and months.
    fn check_kept_besides(&self, ever: &BTreeSet<ObjectName>) {
        let names = self.stores[0].names();
        let manifest = |id: &SnapshotId| ObjectName::Manifest { system: SYSTEM, snapshot: *id };
        let mut newest: Vec<(&SnapshotId, &Snap)> =
            self.snaps.iter().filter(|(id, _)| ever.contains(&manifest(id))).collect();
        newest.sort_by_key(|(_, snap)| std::cmp::Reverse(snap.finished));
        for (id, snap) in newest.iter().take(3) {
            let is_whole = names.contains(&manifest(id))
                && has_packs(&names, snap)
                && self.has_wal(&names, snap.branch, snap, snap.stop);
            assert!(is_whole, "{id} is one of the last three");
        }
        let mut all: Vec<_> = self.snaps.iter().filter(|(_, snap)| !snap.marked).collect();
        all.retain(|(id, _)| ever.contains(&manifest(id)));
        let mut weeks: BTreeMap<(i16, i8), SnapshotId> = BTreeMap::new();
        let mut months: BTreeMap<(i16, i8), SnapshotId> = BTreeMap::new();
        for (id, _) in all {
            let date = id.began().to_zoned(jiff::tz::TimeZone::UTC).date();
            let week = date.iso_week_date();
            weeks.entry((week.year(), week.week())).or_insert(*id);
            months.entry((date.year(), date.month())).or_insert(*id);
        }
        for (period, id) in weeks.iter().rev().take(3).chain(months.iter().rev().take(2)) {
            assert!(names.contains(&manifest(id)), "{id} was the first of {period:?}");
        }
    }

    fn pruner(&self) -> Pruner<'_, Sim> {
        static AGENT: std::sync::LazyLock<AgentName> =
            std::sync::LazyLock::new(|| "db1".parse().unwrap());
        Pruner {
            stores: &self.stores,
            system: SYSTEM,
            agent: &AGENT,
            rules: self.rules,
            grace: Duration::from_secs(GRACE as u64),
            generation: self.generation,
            epoch: self.epoch.clone(),
            now: at(self.clock),
        }
    }

    fn prune(&self) -> PruneReport {
        let report = futures::executor::block_on(self.pruner().run(PruneOptions::default()));
        self.check("prune");
        report
    }

    /// Cut off after each request that it makes, one after the other; then it is left as it is after one of them.
    fn prune_interrupted(&mut self) {
        let before = self.stores.each_ref().map(|store| store.objects.lock().unwrap().clone());
        let reset = |world: &World, fuses: [u64; 2]| {
            for ((store, objects), fuse) in world.stores.iter().zip(&before).zip(fuses) {
                *store.objects.lock().unwrap() = objects.clone();
                store.fuse.store(fuse, Ordering::Relaxed);
                store.used.store(0, Ordering::Relaxed);
            }
        };
        reset(self, [u64::MAX; 2]);
        futures::executor::block_on(self.pruner().run(PruneOptions::default()));
        let used = self.stores.each_ref().map(|store| store.used.load(Ordering::Relaxed));
        let last = self.below(used[0] + used[1] + 1);
        for cut in (0..used[0] + used[1]).chain([last]) {
            let fuses = match cut < used[0] {
                true => [cut, u64::MAX],
                false => [u64::MAX, cut - used[0]],
            };
            reset(self, fuses);
            futures::executor::block_on(self.pruner().run(PruneOptions::default()));
            self.check(&format!("prune cut after {cut} requests"));
        }
        self.stores.iter().for_each(|store| store.fuse.store(u64::MAX, Ordering::Relaxed));
    }

    /// A restore chooses what it can read from, pins it, and reads for some hours.
    fn restore(&mut self) {
        let moments: Vec<_> = self.moments().into_iter().collect();
        if moments.is_empty() {
            return;
        }
        let (branch, lsn) = moments[self.below(moments.len() as u64) as usize];
        let store = self.below(2) as usize;
        let names = self.stores[store].names();
        let Some(snapshot) = self.reached_from(&names, branch, lsn) else { return };
        let ends = self.clock + HOUR + self.below(60 * HOUR as u64) as i64;
        let pin = pin(snapshot, Hold::Onwards, Some(at(ends)));
        let sealed = pin.seal(&self.epoch, SYSTEM, ObjectId::random(), 0);
        self.stores[store].store(sealed.name, sealed.bytes);
        self.reading.push(Reading { snapshot, branch, lsn, ends, store });
    }

    fn pin(&mut self) {
        let names = [self.stores[0].names(), self.stores[1].names()];
        let there = |id: &&SnapshotId| {
            let name = ObjectName::Manifest { system: SYSTEM, snapshot: **id };
            names.iter().any(|names| names.contains(&name))
        };
        let there: Vec<SnapshotId> = self.snaps.keys().filter(there).copied().collect();
        if there.is_empty() || self.pinned.len() > 1 {
            return;
        }
        let snapshot = there[self.below(there.len() as u64) as usize];
        let request = PinRequest::Pin {
            snapshot: snapshot.to_string(),
            reason: "kept".into(),
            until: None,
            with_wal: false,
        };
        futures::executor::block_on(answer(&self.pruner(), request)).unwrap();
        let name = ObjectName::Manifest { system: SYSTEM, snapshot };
        self.pinned.push((snapshot, names.map(|names| names.contains(&name))));
    }

    fn unpin(&mut self) {
        let Some((snapshot, _)) = self.pinned.pop() else { return };
        self.pinned.retain(|(other, _)| *other != snapshot);
        let request = PinRequest::Unpin { which: snapshot.to_string() };
        futures::executor::block_on(answer(&self.pruner(), request)).unwrap();
    }

    /// What is damaged, and anywhere, counts as whole from now on.
    fn acknowledge(&mut self) {
        futures::executor::block_on(answer(&self.pruner(), PinRequest::AckDamage)).unwrap();
        let there: BTreeSet<SnapshotId> = self.stores.iter().flat_map(left).collect();
        for (_, snap) in self.snaps.iter_mut().filter(|(id, _)| there.contains(id)) {
            snap.marked = false;
        }
    }

    fn step(&mut self) {
        let hours = 1 + self.below(14) as i64;
        self.pass(hours * HOUR);
        self.reading.retain(|reading| reading.ends > self.clock);
        let branch = self.alive();
        let bytes = 1000 + self.below(3 * SEGMENT);
        self.write(branch, bytes);
        match (self.below(16), self.running.is_some()) {
            (0..5, false) => self.begin(),
            (0..2, true) => self.pack(),
            (2..9, true) => self.finish(),
            (9, true) => self.running = None,
            (10, _) => self.promote(),
            (11, _) => self.is_late = true,
            (12, _) => self.restore(),
            (13, _) => self.pin(),
            (14, _) => self.unpin(),
            _ => {}
        }
        if self.is_late && (self.late.len() > 12 || self.below(4) == 0) {
            self.catch_up();
        }
        self.check("a step");
        match self.below(5) {
            0 => drop(self.prune()),
            1 => self.prune_interrupted(),
            _ => {}
        }
    }

    /// Everything ends, and what is left is what the window needs: judged by the truth, not by the rules.
    fn check_nothing_is_left_over(&mut self) {
        self.catch_up();
        self.is_damaging = false;
        self.running = None;
        while !self.pinned.is_empty() {
            self.unpin();
        }
        self.acknowledge();
        self.reading.clear();
        // Snapshots that were begun count as running for a week, and restores' pins end before that.
        self.pass(8 * DAY);
        for round in 0..9 {
            for branch in 0..self.branches.len() {
                if self.branches[branch].goes_on {
                    self.write(branch, SEGMENT / 3);
                }
            }
            self.begin();
            self.finish();
            if round > 4 {
                self.prune();
            }
            self.pass(GRACE + 60);
        }
        self.prune();
        // What came to be unneeded since is condemned, and waits.
        let edge = self.clock - WINDOW - HOUR - 2 * (GRACE + 60);
        let is_alive =
            |tip: &usize| self.commits.iter().any(|(b, _, time)| b == tip && *time >= edge);
        let alive: Vec<usize> = (0..self.branches.len()).filter(is_alive).collect();
        for store in &self.stores {
            let names = store.names();
            let listed: Vec<(&SnapshotId, &Snap)> = (self.snaps.iter())
                .filter(|(id, _)| {
                    names.contains(&ObjectName::Manifest { system: SYSTEM, snapshot: **id })
                })
                .collect();
            let newest = listed.iter().map(|(id, _)| **id).max();
            for (id, snap) in &listed {
                let is_begun_with = |tip: &usize| {
                    let chain = self.chain(*tip);
                    let on_line =
                        |s: &Snap| chain.iter().any(|leg| leg.0 == s.branch && s.stop <= leg.2);
                    let serves = |other: &Snap| {
                        on_line(other)
                            && other.stop > snap.stop
                            && !other.marked
                            && other.finished <= edge
                    };
                    on_line(snap) && !listed.iter().any(|(_, other)| serves(other))
                };
                let is_needed = Some(**id) == newest || alive.iter().any(is_begun_with);
                assert!(is_needed, "{id} is left at {} for nothing", store.name);
            }
            for name in &names {
                let is_needed = match name {
                    ObjectName::Pack { id, .. } => {
                        listed.iter().any(|(_, snap)| snap.packs.iter().any(|(pack, _)| pack == id))
                    }
                    ObjectName::Begin { snapshot, .. } => {
                        listed.iter().any(|(id, _)| **id == *snapshot)
                    }
                    ObjectName::Wal { branch, range, .. } => {
                        let index = self.branches.iter().position(|b| b.branch == *branch).unwrap();
                        listed.iter().any(|(_, snap)| {
                            (0..self.branches.len()).any(|tip| {
                                let chain = self.chain(tip);
                                let leg = chain.iter().find(|leg| leg.0 == index);
                                let first = chain
                                    .iter()
                                    .any(|leg| leg.0 == snap.branch && snap.stop <= leg.2);
                                let is_later = snap.branch != index
                                    || range.end.get() > snap.start / SEGMENT * SEGMENT;
                                first
                                    && is_later
                                    && leg.is_some_and(|leg| range.start.get() < leg.2)
                            })
                        })
                    }
                    // The word that damage was acknowledged stays as long as the damage is there.
                    ObjectName::Pin { .. } => {
                        let bytes = store.objects.lock().unwrap()[name].0.clone();
                        let pin = PinRecord::read(&bytes, name).unwrap();
                        pin.released && pin.damage.is_some()
                    }
                    _ => true,
                };
                assert!(is_needed, "{name} is left at {} for nothing", store.name);
            }
        }
    }
}

fn has_packs(names: &BTreeSet<ObjectName>, snap: &Snap) -> bool {
    snap.packs.iter().all(|(id, _)| names.contains(&ObjectName::Pack { system: SYSTEM, id: *id }))
}

fn pin(snapshot: SnapshotId, hold: Hold, until: Option<Timestamp>) -> PinRecord {
    PinRecord {
        snapshot,
        hold,
        reason: "test".into(),
        by: "host".into(),
        made: 0,
        until: until.map(Timestamp::as_second),
        released: false,
        damage: None,
        restore: None,
    }
}

fn manifest(id: SnapshotId, snap: &Snap, branch: Branch, epoch: &Epoch) -> Sealed {
    let entry = |(pack, size): &(ObjectId, u64)| {
        let mut salt = [0; 32];
        salt[..8].copy_from_slice(pack.as_bytes());
        PackEntry {
            epoch: 0,
            salt,
            commitment: [0; 32],
            size: *size,
            hash: [0; 32],
            live_bytes: 1,
            frame_bytes: None,
        }
    };
    let plain = ManifestPlain {
        start: Lsn::new(snap.start),
        stop: Lsn::new(snap.stop),
        segment_bytes: SEGMENT as u32,
        finished: at(snap.finished).as_second(),
        epochs: vec![epoch.id()],
        packs: snap.packs.iter().map(entry).collect(),
        corrupt_pages: u64::from(snap.marked),
        ..testing::plain(SYSTEM, id, branch)
    };
    let root = testing::root();
    Manifest { plain, root }.seal(epoch).unwrap()
}

/// Random histories on two locations: branches, interrupted and running snapshots, restores, pins, a location that lags, and
/// prunes that are cut off after each of their requests.
#[test]
fn every_moment_of_the_window_is_reachable_and_nothing_is_left_over() {
    let (from, to) = match std::env::var("BACKSTAY_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => (seed, seed + 1),
        None => (1, 8),
    };
    for seed in from..to {
        println!("BACKSTAY_SEED={seed}");
        let mut world = World::new(seed);
        for _ in 0..70 {
            world.step();
        }
        world.check_nothing_is_left_over();
    }
}

/// The same with snapshots that are kept besides: each of them stays whole, and no other does.
#[test]
fn what_is_kept_besides_the_window_stays_whole() {
    for seed in 1..4 {
        println!("BACKSTAY_SEED={seed}");
        let mut world = World::new(seed);
        world.rules = Rules { keep_last: 3, weekly: 3, monthly: 2, ..world.rules };
        for _ in 0..70 {
            world.step();
        }
        world.running = None;
        for _ in 0..3 {
            world.catch_up();
            let ever = world.stores[0].ever.lock().unwrap().keys().cloned().collect();
            world.check_kept_besides(&ever);
            // By then every restore has ended.
            world.reading.clear();
            world.pass(20 * DAY);
            world.write(0, SEGMENT / 3);
            prune_for_good(&mut world);
        }
    }
}

/// A world in which all that was taken is whole, and as many snapshots, a day apart.
fn daily(seed: u64, days: u64) -> World {
    let mut world = World::new(seed);
    world.is_damaging = false;
    for _ in 0..days {
        world.write(0, SEGMENT / 3);
        world.begin();
        world.finish();
        world.pass(DAY);
    }
    world
}

/// One page is bad in all snapshots but so many, the first after them shows it.
fn damage_after(world: &World, count: usize) {
    let ids: Vec<SnapshotId> = world.snaps.keys().copied().collect();
    for (number, &snapshot) in ids.iter().enumerate().skip(count) {
        let name = ObjectName::Manifest { system: SYSTEM, snapshot };
        for store in &world.stores {
            let mut objects = store.objects.lock().unwrap();
            let Some((bytes, _)) = objects.get_mut(&name) else { continue };
            let plain = ManifestPlain {
                corrupt_pages: 1,
                new_corrupt_pages: Some(u64::from(number == count)),
                parent: number.checked_sub(1).map(|before| ids[before]),
                ..read_plain(bytes, &name).unwrap().1
            };
            let root = testing::root();
            *bytes = Manifest { plain, root }.seal(&world.epoch).unwrap().bytes;
        }
    }
}

#[test]
fn damage_that_was_acknowledged_and_stays_keeps_nothing_for_ever() {
    let mut world = daily(1, 3);
    damage_after(&world, 2);
    world.acknowledge();
    for _ in 0..12 {
        world.write(0, SEGMENT / 3);
        world.begin();
        world.finish();
        damage_after(&world, 2);
        world.prune();
        world.pass(DAY + 60);
    }
    let ids: Vec<SnapshotId> = world.snaps.keys().copied().collect();
    for store in &world.stores {
        let left = left(store);
        assert!(left.len() < 8 && !left.contains(&ids[2]), "{left:?}");
        // Each that is left has a word of its own, but perhaps the newest.
        let words = store.names().into_iter().filter(|name| matches!(name, ObjectName::Pin { .. }));
        let words: BTreeSet<ObjectId> = words
            .filter_map(|name| match name {
                ObjectName::Pin { pin, .. } => Some(pin),
                _ => None,
            })
            .collect();
        assert!(left.iter().all(|id| words.contains(&damage_pin(*id))), "{words:?}");
    }
}

fn left(store: &Sim) -> Vec<SnapshotId> {
    let manifest = |name: ObjectName| match name {
        ObjectName::Manifest { snapshot, .. } => Some(snapshot),
        _ => None,
    };
    store.names().into_iter().filter_map(manifest).collect()
}

/// What is condemned, and two days later deleted.
fn prune_for_good(world: &mut World) -> PruneReport {
    world.prune();
    world.pass(2 * DAY);
    world.prune()
}

#[test]
fn what_the_store_keeps_under_lock_is_counted_and_deleted_later() {
    let mut world = daily(1, 9);
    world.prune();
    world.pass(GRACE + 60);
    world.stores.iter().for_each(|store| store.lock.store(60 * DAY, Ordering::Relaxed));
    let before = world.stores[0].names();
    let report = world.prune();
    let done = &report.locations[0];
    assert!(report.failed.is_empty() && done.deleted.objects == 0, "{report}");
    assert!(done.left.objects > 5 && before.is_subset(&world.stores[0].names()), "{report}");
    assert_eq!(report.refused_at(&done.location), None, "a lock is as it should be");
    let left = done.left;
    world.stores.iter().for_each(|store| store.lock.store(0, Ordering::Relaxed));
    let report = world.prune();
    assert_eq!(report.locations[0].left, Amount::default(), "{report}");
    assert!(report.locations[0].deleted.objects >= left.objects, "{report}");
}

#[test]
fn deletions_that_are_refused_for_lack_of_rights_are_told() {
    let mut world = daily(1, 9);
    due(&mut world);
    world.stores[0].is_forbidden.store(true, Ordering::Relaxed);
    let report = world.prune();
    let done = &report.locations[0];
    assert!(report.failed.is_empty() && done.left.objects > 5, "{report}");
    let refused = report.refused_at(&done.location);
    assert_eq!(refused, Some((done.left, "AccessDenied: not allowed")));
    let words = refusal(refused.unwrap());
    assert!(words.contains(&done.left.to_string()) && words.contains("not allowed"), "{words}");
    assert_eq!(report.refused_at(&report.locations[1].location), None, "it is allowed there");
    world.stores[0].is_forbidden.store(false, Ordering::Relaxed);
    let report = world.prune();
    assert_eq!(report.refused_at(&report.locations[0].location), None, "{report}");
}

#[test]
fn what_is_deleted_is_not_wanted_back_from_a_location_that_takes_nothing() {
    let mut world = daily(1, 9);
    due(&mut world);
    world.stores[1].is_full.store(true, Ordering::Relaxed);
    let report = world.prune();
    assert_eq!(report.failed.len(), 1, "{report}");
    let has = world.stores[0].names();
    let is_gone =
        |name: &ObjectName| !has.contains(name) && !matches!(name, ObjectName::Condemned { .. });
    let gone: Vec<_> = world.stores[1].names().into_iter().filter(is_gone).collect();
    assert!(gone.len() > 5, "{report}");
    let (_, verdict) = futures::executor::block_on(world.pruner().judgement()).unwrap();
    let wanted: Vec<_> = gone.iter().filter(|name| !verdict.goes.contains_key(name)).collect();
    assert!(wanted.is_empty(), "{wanted:?}");
}

/// What a look asks for when all is known: the clock, and the listing.
const LOOK_REQUESTS: u64 = 2;

/// The manifests that are due, when all of the world is known to be so.
fn due(world: &mut World) -> Vec<SnapshotId> {
    world.prune();
    world.pass(GRACE + 60);
    let report = futures::executor::block_on(
        world.pruner().run(PruneOptions { dry_run: true, ..PruneOptions::default() }),
    );
    let done = &report.locations[0];
    let goes = done.snapshots.iter().filter(|word| !word.stays).map(|word| word.id).collect();
    assert!(done.deleted.objects > 5, "{report}");
    goes
}

#[test]
fn a_pin_between_the_look_and_the_deletions_keeps_its_manifest() {
    let mut world = daily(1, 9);
    let due = due(&mut world);
    let (first, last) = (due[0], due[1]);
    for snapshot in [first, last] {
        let name = ObjectName::Manifest { system: SYSTEM, snapshot };
        assert!(world.stores[0].names().contains(&name));
    }
    let sealed =
        pin(last, Hold::Consistent, None).seal(&world.epoch, SYSTEM, ObjectId::random(), 0);
    world.stores[0].before(LOOK_REQUESTS + 1, move |sim| sim.store(sealed.name, sealed.bytes));
    let report = world.prune();
    assert!(report.failed.is_empty(), "{report}");
    let left = left(&world.stores[0]);
    assert!(left.contains(&last) && !left.contains(&first), "{report}");
}

#[test]
fn a_pin_on_what_goes_meanwhile_is_no_success() {
    let mut world = daily(1, 9);
    let snapshot = due(&mut world)[0];
    let request = PinRequest::Pin {
        snapshot: snapshot.to_string(),
        reason: "kept".into(),
        until: None,
        with_wal: false,
    };
    let forget = move |sim: &Sim| {
        let name = ObjectName::Manifest { system: SYSTEM, snapshot };
        sim.objects.lock().unwrap().remove(&name);
    };
    world.stores.iter().for_each(|store| store.before(LOOK_REQUESTS + 1, forget));
    let answered = futures::executor::block_on(answer(&world.pruner(), request));
    let error = answered.unwrap_err();
    assert_eq!(error.kind(), Kind::Missing);
    assert!(error.message().contains("has been pruned meanwhile"), "{error}");
}

#[test]
fn the_pins_of_restores_are_given_back_by_their_own_id_only() {
    let world = daily(1, 2);
    let snapshot = *world.snaps.keys().next().unwrap();
    let (restores, by_hand) = (ObjectId::from_bytes([1; 8]), ObjectId::from_bytes([2; 8]));
    let store = |id, record: PinRecord| {
        let sealed = record.seal(&world.epoch, SYSTEM, id, 0);
        world.stores.iter().for_each(|s| s.store(sealed.name.clone(), sealed.bytes.clone()));
    };
    let until = Some(at(world.clock + HOUR));
    let record = pin(snapshot, Hold::Onwards, until);
    store(restores, PinRecord { restore: Some(true), ..record.clone() });
    store(by_hand, record);
    let unpin = |which: String| {
        let pruner = world.pruner();
        let answered = answer(&pruner, PinRequest::Unpin { which });
        futures::executor::block_on(answered).map(|outcome| outcome.pins)
    };
    assert_eq!(unpin(snapshot.to_string()).unwrap(), [(by_hand, snapshot)]);
    let error = unpin(snapshot.to_string()).unwrap_err();
    assert!(error.message().contains(&format!("pin {restores} (test, on host)")), "{error}");
    assert!(error.to_string().contains("end by themselves"), "{error}");
    assert_eq!(unpin(restores.to_string()).unwrap(), [(restores, snapshot)]);
    let error = unpin(snapshot.to_string()).unwrap_err();
    assert!(error.message().contains("nothing is pinned"), "{error}");
}

#[test]
fn a_clock_that_is_off_stops_pruning_there() {
    let world = daily(1, 9);
    world.stores[1].clock.store(world.clock + 301, Ordering::Relaxed);
    let before = world.stores[1].names();
    let report = futures::executor::block_on(world.pruner().run(PruneOptions::default()));
    assert_eq!(report.locations.len(), 1, "{report}");
    assert!(report.failed[0].1.contains("301 s off"), "{report}");
    assert_eq!(world.stores[1].names(), before);
    world.stores[1].clock.store(world.clock + 299, Ordering::Relaxed);
    let report = futures::executor::block_on(world.pruner().run(PruneOptions::default()));
    assert!(report.failed.is_empty(), "{report}");
}

#[test]
fn what_is_damaged_at_one_location_is_read_from_another() {
    let mut world = daily(1, 9);
    let damage = |store: &Sim, name: &ObjectName| {
        let mut objects = store.objects.lock().unwrap();
        let (bytes, _) = objects.get_mut(name).unwrap();
        let mut bent = bytes.to_vec();
        let middle = bent.len() / 2;
        bent[middle] ^= 1;
        *bytes = bent.into();
    };
    let is_needed =
        |name: &ObjectName| matches!(name, ObjectName::Manifest { .. } | ObjectName::Origin { .. });
    let names: Vec<ObjectName> = world.stores[0].names().into_iter().filter(is_needed).collect();
    names.iter().for_each(|name| damage(&world.stores[0], name));
    let report = prune_for_good(&mut world);
    assert!(report.failed.is_empty() && report.locations[0].deleted.objects > 5, "{report}");
    assert!(!report.locations[0].damaged.is_empty(), "{report}");
    // Damaged at both, it blocks both: it may be what keeps the rest.
    let mut world = daily(1, 9);
    world.stores.iter().for_each(|store| damage(store, &names[0]));
    let before = world.stores[0].names();
    let report = prune_for_good(&mut world);
    assert_eq!((report.failed.len(), report.locations.len()), (2, 0), "{report}");
    assert_eq!(world.stores[0].names(), before);
}

#[test]
fn what_was_read_is_not_read_again() {
    let world = daily(1, 4);
    let requests = || {
        world.stores[0].used.store(0, Ordering::Relaxed);
        world.prune();
        world.stores[0].used.load(Ordering::Relaxed)
    };
    let first = requests();
    // The list of what was condemned is new; after that there is the clock, and the listing.
    requests();
    assert_eq!(requests(), 2, "at first it were {first}");
    assert!(first > 6 && world.stores[0].memory.count() > 4);
}

#[test]
fn a_system_that_was_succeeded_goes_when_its_last_commit_has_left_the_window() {
    let mut world = daily(1, 5);
    world.pass(10 * DAY);
    prune_for_good(&mut world);
    assert_eq!(left(&world.stores[0]).len(), 1, "the newest never goes");
    world.rules.is_succeeded = true;
    prune_for_good(&mut world);
    let names = world.stores[0].names();
    let is_word = |name: &ObjectName| matches!(name, ObjectName::Condemned { .. });
    assert!(names.iter().all(is_word), "{names:?}");
    // Inside the window all of it stays.
    let mut world = daily(1, 2);
    world.rules.is_succeeded = true;
    world.prune();
    assert_eq!(left(&world.stores[0]).len(), 2);
}

/// Whoever takes the lease over judges anew, and lets the grace pass anew.
#[test]
fn what_another_generation_condemned_is_not_due() {
    let mut world = World::new(3);
    for _ in 0..40 {
        let (branch, bytes) = (world.alive(), SEGMENT);
        world.pass(8 * HOUR);
        world.write(branch, bytes);
        match world.running.is_some() {
            true => world.finish(),
            false => world.begin(),
        }
    }
    let amounts = |report: &PruneReport| {
        assert_eq!(report.failed, []);
        let done = &report.locations[0];
        (done.condemned.objects > 0, done.deleted.objects > 0)
    };
    assert_eq!(amounts(&world.prune()), (true, false));
    world.pass(GRACE + 60);
    world.generation = 2;
    assert_eq!(amounts(&world.prune()), (true, false), "condemned by somebody else");
    world.pass(GRACE + 60);
    assert!(amounts(&world.prune()).1);
}
