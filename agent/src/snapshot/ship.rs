//! Sends sealed packs to all locations at once, each at its own pace.
//!
//! The packs in memory are bounded ([`ROOM_PACKS`]), so the slowest location would set the pace. It does not: one
//! that refuses for [`PATIENCE`], or that makes the others wait too long in all, is left behind, and filled by copying when the
//! rest is done.

use crate::writer::Writer;
use backstay_common::id::{EpochId, LocationName};
use backstay_common::name::ObjectName;
use backstay_common::{Error, Kind, Result};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

/// Sealed packs that may be in memory, of about 32 MiB each.
const ROOM_PACKS: usize = 4;
/// Writes under way to one location.
const PUTS: usize = 2;
/// How long a location may refuse, without a break.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 60 });
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long one location may make the others wait, in all, besides a twentieth of the time.
const STALL_MAX: Duration = Duration::from_secs(10);
const STALL_TICK: Duration = Duration::from_millis(200);

/// A sealed object on its way.
#[derive(Debug)]
pub struct Parcel {
    pub name: ObjectName,
    pub epoch: EpochId,
    pub bytes: Bytes,
    /// Given back when no location waits for the parcel any more.
    _room: Option<OwnedSemaphorePermit>,
}

impl Parcel {
    pub fn new(
        name: ObjectName,
        epoch: EpochId,
        bytes: Bytes,
        room: impl Into<Option<OwnedSemaphorePermit>>,
    ) -> Parcel {
        Parcel { name, epoch, bytes, _room: room.into() }
    }
}

/// All locations.
#[derive(Debug)]
pub struct Fleet {
    lanes: Vec<Arc<Lane>>,
    room: Arc<Semaphore>,
    started: Instant,
    /// Dropped with the fleet, and ended by that.
    _tasks: JoinSet<()>,
}

/// One location, and what is on its way there.
#[derive(Debug)]
pub struct Lane {
    writer: Arc<Writer>,
    begin: Arc<Parcel>,
    queue: mpsc::UnboundedSender<Arc<Parcel>>,
    state: watch::Sender<LaneState>,
    task: OnceLock<AbortHandle>,
    stalled: Mutex<Duration>,
}

#[derive(Clone, Debug, Default)]
struct LaneState {
    outstanding: usize,
    left_behind: Option<String>,
}

impl Fleet {
    /// Sends `begin` to every location, before anything else.
    pub fn new(writers: &[Arc<Writer>], begin: Parcel) -> Fleet {
        let begin = Arc::new(begin);
        let mut tasks = JoinSet::new();
        let lanes = writers.iter().map(|writer| {
            let (queue, parcels) = mpsc::unbounded_channel();
            let state = LaneState { outstanding: 1, left_behind: None };
            let lane = Arc::new(Lane {
                writer: writer.clone(),
                begin: begin.clone(),
                queue,
                state: watch::Sender::new(state),
                task: OnceLock::new(),
                stalled: Mutex::default(),
            });
            let task = tasks.spawn(lane.clone().run_loudly(parcels));
            lane.task.set(task).expect("set once, here");
            lane
        });
        let lanes = lanes.collect();
        let room = Arc::new(Semaphore::new(ROOM_PACKS));
        Fleet { lanes, room, started: Instant::now(), _tasks: tasks }
    }

    pub fn lanes(&self) -> &[Arc<Lane>] {
        &self.lanes
    }

    /// Waits for room in memory for one more pack, leaving behind whoever is too slow. Kind `Storage` if no location
    /// is left. Safe to drop.
    pub async fn admit(&self) -> Result<OwnedSemaphorePermit> {
        loop {
            if self.lanes.iter().all(|lane| lane.left_behind().is_some()) {
                return Err(self.nobody_left());
            }
            tokio::select! {
                room = self.room.clone().acquire_owned() => {
                    return room.map_err(|_| Error::new(Kind::Bug, "the fleet's room was closed"));
                }
                () = tokio::time::sleep(STALL_TICK) => self.account(),
            }
        }
    }

    /// Somebody waits for room: who is to blame?
    fn account(&self) {
        let (idle, busy): (Vec<&Arc<Lane>>, Vec<&Arc<Lane>>) = (self.lanes.iter())
            .filter(|lane| lane.left_behind().is_none())
            .partition(|lane| lane.state.borrow().outstanding == 0);
        if idle.is_empty() {
            return;
        }
        let limit = STALL_MAX + self.started.elapsed() / 20;
        for lane in busy {
            let mut stalled = lane.stalled.lock().expect("no panic while held");
            *stalled += STALL_TICK;
            if *stalled > limit {
                let reason =
                    format!("slower than the others, which waited {} s for it", stalled.as_secs());
                lane.leave_behind(reason);
            }
        }
    }

    /// Sends a pack to every location that is not left behind.
    pub fn send(&self, parcel: Parcel) {
        let parcel = Arc::new(parcel);
        for lane in &self.lanes {
            if lane.left_behind().is_some() {
                continue;
            }
            lane.state.send_modify(|state| state.outstanding += 1);
            // A lane that is left behind just now takes nothing any more.
            let _ = lane.queue.send(parcel.clone());
        }
    }

    fn nobody_left(&self) -> Error {
        let reasons = self
            .lanes
            .iter()
            .map(|lane| format!("{}: {}", lane.name(), lane.left_behind().unwrap_or_default()));
        let reasons = reasons.collect::<Vec<_>>().join("; ");
        Error::new(Kind::Storage, format!("no location takes the snapshot: {reasons}"))
            .remedy("bring a location back; the next attempt begins anew")
    }
}

impl Lane {
    pub fn name(&self) -> &LocationName {
        self.writer.location().name()
    }

    pub fn writer(&self) -> &Writer {
        &self.writer
    }

    pub fn begin(&self) -> &Parcel {
        &self.begin
    }

    /// Why nothing is sent there any more.
    pub fn left_behind(&self) -> Option<String> {
        self.state.borrow().left_behind.clone()
    }

    /// Waits until all that was sent is stored, or the location is left behind. Safe to drop.
    pub async fn settled(&self) {
        let settled = |state: &LaneState| state.outstanding == 0 || state.left_behind.is_some();
        // The sender lives in `self`.
        let _ = self.state.subscribe().wait_for(settled).await;
    }

    /// A panic leaves the location behind: nobody waits for it for ever.
    async fn run_loudly(self: Arc<Lane>, parcels: mpsc::UnboundedReceiver<Arc<Parcel>>) {
        let run = AssertUnwindSafe(self.clone().run(parcels)).catch_unwind();
        if run.await.is_err() {
            self.leave_behind("what sends to it has panicked".to_string());
        }
    }

    async fn run(self: Arc<Lane>, parcels: mpsc::UnboundedReceiver<Arc<Parcel>>) {
        if let Err(error) = self.start().await {
            return self.leave_behind(error.message().to_string());
        }
        let parcels = stream::unfold(parcels, |mut parcels| async {
            let parcel = parcels.recv().await?;
            Some((parcel, parcels))
        });
        parcels.for_each_concurrent(PUTS, |parcel| self.clone().deliver(parcel)).await;
    }

    async fn deliver(self: Arc<Lane>, parcel: Arc<Parcel>) {
        match put_patiently(&self.writer, &parcel).await {
            Ok(()) => self.state.send_modify(|state| state.outstanding -= 1),
            Err(error) => self.leave_behind(error.message().to_string()),
        }
    }

    async fn start(&self) -> Result<()> {
        put_patiently(&self.writer, &self.begin).await?;
        self.state.send_modify(|state| state.outstanding -= 1);
        Ok(())
    }

    /// Ends what is under way, and forgets what waits: it takes no more memory.
    fn leave_behind(&self, reason: String) {
        let is_new = self.state.send_if_modified(|state| {
            let is_new = state.left_behind.is_none();
            state.left_behind.get_or_insert(reason.clone());
            is_new
        });
        if is_new {
            tracing::warn!(location = %self.name(), "snapshot goes on without this location for now: {reason}");
        }
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

/// Stores an object, trying again for [`PATIENCE`] while the location refuses.
pub async fn put_patiently(writer: &Writer, parcel: &Parcel) -> Result<()> {
    patiently(|| writer.put(&parcel.name, parcel.epoch, parcel.bytes.clone())).await.map(drop)
}

/// Does `work` until it succeeds, or has been refused by the location for [`PATIENCE`].
pub async fn patiently<T, F>(work: impl Fn() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let started = Instant::now();
    let mut pause = PAUSE_FIRST;
    loop {
        match work().await {
            Err(error) if error.kind() == Kind::Storage && started.elapsed() < PATIENCE => {
                tracing::debug!("trying again in {} ms: {error}", pause.as_millis());
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            done => return done,
        }
    }
}
