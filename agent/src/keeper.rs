//! Keeps snapshots: takes one at first start, on schedule and when asked, and makes the locations equal in between. Prunes
//! after each snapshot, when something that was condemned is due, and when asked.
//!
//! One snapshot at a time: all of it happens in one task. To make the locations equal may take long where one of them is new:
//! a snapshot that is due, or a prune that is asked for, ends it, and then it begins again with what is still missing. A run that was missed while
//! the agent was down is caught up at the next start. A server that has come to another timeline, restored or promoted, gets a snapshot at once: replay
//! across the switch works, but the newest state deserves a near beginning. So does WAL behind a gap, which
//! cannot be reached in any other way. Only the agent that holds the lease takes snapshots and
//! prunes, and none while it stands by.

use crate::context::AgentContext;
use crate::lease::Leasing;
use crate::prune::{self, PruneOptions, PruneReport};
use crate::schedule::Schedule;
use crate::snapshot::{self, Reason, SnapshotOutcome, SnapshotProgress, SnapshotRequest};
use crate::status::SnapshotStatus;
use crate::sync::{self, Findings, SyncReport};
use crate::wal::WalStatus;
use backstay_common::id::{Branch, SnapshotId};
use backstay_common::lsn::Lsn;
use backstay_common::name::{ObjectName, folder};
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::{Error, Kind, Result};
use jiff::Timestamp;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};

/// How long after a failed snapshot the next attempt is made.
const RETRY_AFTER: Duration = Duration::from_secs(300);
/// How soon an agent that another one keeps from taking a snapshot looks again.
const FENCED_RETRY_AFTER: Duration = Duration::from_secs(10);
/// How often the locations are compared.
const SYNC_EVERY: Duration = Duration::from_secs(3600);
/// How often while a location lacks a snapshot that another one has.
const SYNC_WHILE_PENDING_EVERY: Duration = Duration::from_secs(30);
/// How long the WAL path may take to connect before a snapshot is tried without it.
const SLOT_PATIENCE: Duration = Duration::from_secs(10);
/// The alarm where a snapshot is committed at other locations only.
pub const PENDING: &str = "snapshot-pending";

/// Two prunes that nobody asked for are so far apart.
const PRUNE_PAUSE_MIN: Duration = Duration::from_secs(1);
/// After a prune that failed, and after one that failed again.
const PRUNE_AGAIN_AFTER: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(600)];

type Outcome = Result<SnapshotOutcome>;

/// What somebody asks of the keeper.
#[derive(Debug)]
enum Job {
    Snapshot(oneshot::Sender<Outcome>),
    Prune(PruneOptions, oneshot::Sender<Result<PruneReport>>),
    Sync(SyncAsked, oneshot::Sender<Result<SyncReport>>),
}

/// A comparison, with what has been found damaged by reading everything.
#[derive(Clone, Debug, Default)]
struct SyncAsked {
    deep: bool,
    findings: Findings,
}

/// Whoever waits for a comparison.
type SyncReply = Option<oneshot::Sender<Result<SyncReport>>>;

/// The handle of the keeper's task.
#[derive(Clone, Debug)]
pub struct Keeper {
    context: Arc<AgentContext>,
    leasing: Leasing,
    requests: mpsc::Sender<Job>,
    progress: watch::Receiver<SnapshotProgress>,
    status: Arc<Mutex<SnapshotStatus>>,
}

/// A snapshot that somebody asked for.
#[derive(Debug)]
pub struct Asked {
    pub progress: watch::Receiver<SnapshotProgress>,
    pub outcome: oneshot::Receiver<Outcome>,
}

impl Keeper {
    /// Asks for a snapshot now. Refused while another one runs.
    pub async fn ask(&self) -> Result<Asked> {
        let (send, outcome) = oneshot::channel();
        self.send(Job::Snapshot(send))?;
        Ok(Asked { progress: self.progress.clone(), outcome })
    }

    /// Prunes now, or when the snapshot that is being taken is done.
    pub async fn prune(&self, options: PruneOptions) -> Result<PruneReport> {
        let (send, report) = oneshot::channel();
        self.send(Job::Prune(options, send))?;
        let stopping = |_| Err(Error::new(Kind::Cancelled, "the agent is stopping"));
        report.await.unwrap_or_else(stopping)
    }

    /// Makes the locations equal now, or when the snapshot that is being taken is done; replaces what is in `findings`.
    pub async fn synchronise(&self, deep: bool, findings: Findings) -> Result<SyncReport> {
        let (send, report) = oneshot::channel();
        self.send(Job::Sync(SyncAsked { deep, findings }, send))?;
        let stopping = |_| Err(Error::new(Kind::Cancelled, "the agent is stopping"));
        report.await.unwrap_or_else(stopping)
    }

    /// What a prune by whoever holds the lease would do now. Changes nothing, and waits for no snapshot to end.
    pub async fn prune_dry_run(&self, options: PruneOptions) -> Result<PruneReport> {
        let generation = self.leasing.newest_generation().await?;
        prune::run(&self.context, generation, PruneOptions { dry_run: true, ..options }).await
    }

    fn send(&self, job: Job) -> Result<()> {
        self.requests.try_send(job).map_err(|refused| match refused {
            mpsc::error::TrySendError::Closed(_) => {
                Error::new(Kind::Cancelled, "the agent is stopping")
            }
            mpsc::error::TrySendError::Full(_) => {
                Error::new(Kind::Config, "another snapshot is running or waiting")
                    .remedy("see `backstay-agent status`, and ask again when it is done")
            }
        })
    }

    pub fn status(&self) -> SnapshotStatus {
        let status = self.status.lock().expect("no panic while held").clone();
        let running = status.running.map(|_| self.progress.borrow().clone());
        SnapshotStatus { running, ..status }
    }
}

/// The newest snapshot, and the branch that it was taken on if that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Newest {
    id: SnapshotId,
    branch: Option<Branch>,
    /// Gaps that end here or before are closed by it.
    gap_end: Option<Lsn>,
}

/// The task behind a [`Keeper`].
#[derive(Debug)]
pub struct KeeperTask {
    context: Arc<AgentContext>,
    leasing: Leasing,
    wal: watch::Receiver<WalStatus>,
    schedule: Schedule,
    requests: mpsc::Receiver<Job>,
    progress: watch::Sender<SnapshotProgress>,
    status: Arc<Mutex<SnapshotStatus>>,
    /// The branch, and the last gap, when the last snapshot began.
    behind: (Option<Branch>, Option<Lsn>),
    /// When something that was condemned is due.
    prune_due: Option<Timestamp>,
    /// The last prune failed, at one location at least.
    prune_failed: bool,
    /// A snapshot failed while the server was away: it is taken as soon as that is back.
    awaits_server: bool,
    /// When the last comparison ended.
    compared: Instant,
    /// Comparisons to be made,
    syncs: VecDeque<(SyncAsked, SyncReply)>,
    /// and the first of them while it is under way.
    syncing: JoinSet<Result<SyncReport>>,
}

/// Why the keeper woke up.
enum Wake {
    Stop,
    Asked(Job),
    Due(Reason),
    Sync,
    Synced(Result<SyncReport>),
    Prune,
    /// The server has left recovery.
    TakeOver,
}

pub fn new(
    context: Arc<AgentContext>,
    leasing: Leasing,
    wal: watch::Receiver<WalStatus>,
    schedule: Schedule,
) -> (Keeper, KeeperTask) {
    let (send, requests) = mpsc::channel(1);
    let (progress, seen) = watch::channel(SnapshotProgress::default());
    let status = Arc::new(Mutex::new(SnapshotStatus::default()));
    let keeper = Keeper {
        context: context.clone(),
        leasing: leasing.clone(),
        requests: send,
        progress: seen,
        status: status.clone(),
    };
    let task = KeeperTask {
        context,
        leasing,
        wal,
        schedule,
        requests,
        progress,
        status,
        behind: (None, None),
        prune_due: None,
        prune_failed: false,
        awaits_server: false,
        compared: Instant::now(),
        syncs: VecDeque::new(),
        syncing: JoinSet::new(),
    };
    (keeper, task)
}

impl KeeperTask {
    /// Runs until the agent stops.
    pub async fn run(mut self) -> Result<()> {
        self.synchronise(SyncAsked::default(), None);
        let mut last = self.last_snapshot().await;
        // What was condemned before a restart is due some time; a first snapshot prunes by itself.
        self.prune_due = last.map(|_| Timestamp::now());
        let mut due = self.due_at_start(last);
        loop {
            let next = self.schedule.next_after(Timestamp::now());
            self.update(|status| {
                status.last = last.map(|last| last.id);
                status.next = next;
            });
            let reason = match self.wait(due, next, last).await {
                Wake::Stop => return Ok(()),
                Wake::Sync => {
                    self.synchronise(SyncAsked::default(), None);
                    continue;
                }
                Wake::Asked(Job::Sync(_, reply)) if self.is_sync_asked_for() => {
                    let reason = "another comparison that was asked for is running or waiting";
                    let _ =
                        reply
                            .send(Err(Error::new(Kind::Config, reason)
                                .remedy("ask again when it is done")));
                    continue;
                }
                Wake::Asked(Job::Sync(asked, reply)) => {
                    self.synchronise(asked, Some(reply));
                    continue;
                }
                Wake::Synced(report) => {
                    self.synchronised(report);
                    continue;
                }
                Wake::Prune => {
                    // The alarm says what went wrong.
                    let _ = self.prune(PruneOptions::default()).await;
                    continue;
                }
                Wake::Asked(Job::Prune(options, reply)) => {
                    let _ = reply.send(self.prune(options).await);
                    continue;
                }
                Wake::TakeOver => {
                    last = self.last_snapshot().await;
                    due = self.due_at_start(last);
                    continue;
                }
                Wake::Asked(Job::Snapshot(reply)) => {
                    let outcome = self.take(Reason::Asked).await;
                    if let Ok(outcome) = &outcome {
                        last = self.newest(outcome);
                        due = None;
                    }
                    // Whoever asked may have gone away; the snapshot is there all the same.
                    let _ = reply.send(outcome);
                    continue;
                }
                Wake::Due(reason) => reason,
            };
            due = match self.take(reason).await {
                Ok(outcome) => {
                    last = self.newest(&outcome);
                    None
                }
                Err(error) if error.kind() == Kind::Fenced => {
                    // Whoever keeps us from it takes it in our place.
                    last = self.last_snapshot().await;
                    let is_due = self.due_at_start(last).is_some()
                        || last.is_some_and(|last| reason_of(&self.wal.borrow(), last).is_some());
                    is_due.then(|| (reason, Instant::now() + FENCED_RETRY_AFTER))
                }
                // Nothing is won by waiting where the WAL goes on behind a new gap.
                Err(_) if self.wal.borrow().gap_end > self.behind.1 => {
                    match (is_any_there(&self.wal.borrow()), last) {
                        (true, _) => Some((Reason::AfterGap, Instant::now())),
                        // As soon as a location is back.
                        (false, Some(_)) => None,
                        (false, None) => Some((reason, Instant::now() + RETRY_AFTER)),
                    }
                }
                Err(_) => {
                    self.awaits_server = !self.wal.borrow().connected;
                    Some((reason, Instant::now() + RETRY_AFTER))
                }
            };
        }
    }

    fn newest(&self, outcome: &SnapshotOutcome) -> Option<Newest> {
        if self.wal.borrow().gap_end == self.behind.1 {
            self.context.alarms.clear("wal-gap", "");
            self.context.alarms.clear("wal-diverged", "");
            for location in &outcome.committed {
                self.context.alarms.clear("location-hole", location.as_str());
            }
        }
        let (branch, gap_end) = self.behind;
        let branch = branch.or(self.wal.borrow().branch);
        Some(Newest { id: outcome.id, branch, gap_end })
    }

    async fn wait(
        &mut self,
        due: Option<(Reason, Instant)>,
        next: Option<Timestamp>,
        last: Option<Newest>,
    ) -> Wake {
        let is_prune_due = self.prune_due.is_some_and(|due| due <= Timestamp::now());
        let stands_by = self.wal.borrow().standing_by;
        if stands_by || due.is_some() || !is_prune_due {
            self.begin_sync();
        }
        let is_syncing = !self.syncing.is_empty();
        if stands_by {
            return tokio::select! {
                () = self.context.stop.cancelled() => Wake::Stop,
                asked = self.requests.recv() => asked.map_or(Wake::Stop, Wake::Asked),
                Some(report) = self.syncing.join_next() => Wake::Synced(ended(report)),
                Ok(_) = self.wal.wait_for(|wal| !wal.standing_by) => Wake::TakeOver,
            };
        }
        let scheduled = (Reason::Scheduled, next.map_or(Duration::MAX, until));
        let due_after = |(reason, at): (Reason, Instant)| {
            (reason, at.saturating_duration_since(Instant::now()))
        };
        let (reason, after) =
            due.map(due_after).filter(|(_, after)| *after < scheduled.1).unwrap_or(scheduled);
        let urgent = |wal: &WalStatus| {
            wal.standing_by || last.is_some_and(|last| reason_of(wal, last).is_some())
        };
        let next_sync = self.next_sync().saturating_sub(self.compared.elapsed());
        let mut server = self.wal.clone();
        let is_back = self.awaits_server && due.is_some();
        let next_prune = self.prune_due.map_or(Duration::MAX, until);
        tokio::select! {
            () = self.context.stop.cancelled() => Wake::Stop,
            asked = self.requests.recv() => asked.map_or(Wake::Stop, Wake::Asked),
            () = tokio::time::sleep(after.min(Duration::from_secs(86_400 * 30))) => Wake::Due(reason),
            Ok(_) = server.wait_for(|wal| wal.connected), if is_back => Wake::Due(reason),
            Ok(wal) = self.wal.wait_for(urgent), if due.is_none() => match wal.standing_by {
                // Waits for the end of that, next.
                true => Wake::TakeOver,
                false => Wake::Due(last.and_then(|last| reason_of(&wal, last)).unwrap_or(reason)),
            },
            Some(report) = self.syncing.join_next() => Wake::Synced(ended(report)),
            () = tokio::time::sleep(next_sync), if self.syncs.is_empty() => Wake::Sync,
            () = tokio::time::sleep(next_prune.min(Duration::from_secs(86_400 * 30))), if due.is_none() && !is_syncing => Wake::Prune,
        }
    }

    fn due_at_start(&self, last: Option<Newest>) -> Option<(Reason, Instant)> {
        match last {
            None => Some((Reason::FirstStart, Instant::now())),
            Some(last) if self.schedule.missed(Some(last.id.began()), Timestamp::now()) => {
                Some((Reason::CaughtUp, Instant::now()))
            }
            Some(_) => None,
        }
    }

    async fn take(&mut self, reason: Reason) -> Outcome {
        let fast_checkpoint = self.context.settings.snapshot.fast_checkpoint
            || !matches!(reason, Reason::Scheduled | Reason::CaughtUp);
        self.wait_for_a_later_name().await;
        self.wait_for_the_slot().await;
        self.behind = {
            // One look at a time: two in one statement would wait for each other when a change comes between them.
            let wal = self.wal.borrow();
            (wal.branch, wal.gap_end)
        };
        self.awaits_server = false;
        let generation = self.generation().await?;
        self.pause_sync().await;
        let request = SnapshotRequest { fast_checkpoint, reason, generation };
        self.update(|status| status.running = Some(SnapshotProgress::default()));
        let taken = tokio::select! {
            () = self.context.stop.cancelled() => {
                Err(Error::new(Kind::Cancelled, "the agent was stopped during the snapshot"))
            }
            taken = snapshot::take(&self.context, self.wal.clone(), request, self.progress.clone()) => taken,
        };
        let error = taken.as_ref().err().map(Error::to_string);
        match &error {
            None => self.context.alarms.clear("snapshot-failed", ""),
            Some(_) if self.context.stop.is_cancelled() => {}
            Some(reason) => self.context.alarms.raise("snapshot-failed", "", reason),
        }
        self.update(|status| {
            status.running = None;
            status.last_error = error;
        });
        if taken.is_ok() {
            self.prune_due = Some(Timestamp::now());
        }
        taken
    }

    /// The lease; without it there is no snapshot. That another agent holds it is no failure of this one.
    async fn generation(&self) -> Result<u64> {
        let held = tokio::select! {
            () = self.context.stop.cancelled() => {
                return Err(Error::new(Kind::Cancelled, "the agent is stopping"));
            }
            held = self.leasing.held() => held,
        };
        if let Err(error) = &held {
            match error.kind() {
                Kind::Fenced => tracing::info!("no snapshot is taken here: {}", error.message()),
                _ => self.context.alarms.raise("snapshot-failed", "", error),
            }
            let message = error.to_string();
            self.update(|status| status.last_error = Some(message));
        }
        held
    }

    /// A snapshot's checkpoint removes WAL that no slot holds: at the first start the slot comes first. A server that
    /// cannot be reached is the snapshot's to report.
    async fn wait_for_the_slot(&self) {
        let mut wal = self.wal.clone();
        let streams = wal.wait_for(|wal| wal.connected || wal.standing_by);
        let _ = tokio::time::timeout(SLOT_PATIENCE, streams).await;
    }

    /// Never beside a snapshot or a copying of ours: all of it is this task.
    async fn prune(&mut self, options: PruneOptions) -> Result<PruneReport> {
        let stop = self.context.stop.clone();
        let report = tokio::select! {
            () = stop.cancelled() => return Err(Error::new(Kind::Cancelled, "the agent is stopping")),
            report = self.prune_with_lease(options) => report,
        };
        let again = Timestamp::now().checked_add(PRUNE_AGAIN_AFTER[usize::from(self.prune_failed)]);
        self.prune_failed = !report.as_ref().is_ok_and(|report| report.failed.is_empty());
        self.prune_due = match &report {
            // A moment later, for stores whose times are whole seconds.
            Ok(report) if report.failed.is_empty() => {
                let due =
                    report.next_due().and_then(|due| due.checked_add(Duration::from_secs(1)).ok());
                due.map(|due| due.max(Timestamp::now() + PRUNE_PAUSE_MIN))
            }
            Ok(_) => again.ok(),
            Err(error) if error.kind() == Kind::Fenced => {
                tracing::info!("not pruned here: {}", error.message());
                again.ok()
            }
            Err(error) => {
                tracing::warn!("not pruned: {error}");
                again.ok()
            }
        };
        report
    }

    /// Whoever holds the lease prunes, under its generation.
    async fn prune_with_lease(&mut self, options: PruneOptions) -> Result<PruneReport> {
        let generation = self.leasing.held().await?;
        self.pause_sync().await;
        prune::run(&self.context, generation, options).await
    }

    /// Snapshots sort by the second in their names: a new one must not share it with the newest.
    async fn wait_for_a_later_name(&self) {
        let last = self.status.lock().expect("no panic while held").last;
        let Some(next) =
            last.and_then(|last| last.began().checked_add(Duration::from_secs(1)).ok())
        else {
            return;
        };
        // A clock that was set back by more is not waited for.
        tokio::time::sleep(until(next).min(Duration::from_secs(1))).await;
    }

    /// Makes the locations equal when there is time for it.
    fn synchronise(&mut self, asked: SyncAsked, reply: SyncReply) {
        self.syncs.push_back((asked, reply));
    }

    fn is_sync_asked_for(&self) -> bool {
        self.syncs.iter().any(|(_, reply)| reply.is_some())
    }

    /// Begins the first that waits, unless it is under way.
    fn begin_sync(&mut self) {
        let Some((asked, _)) = self.syncs.front().filter(|_| self.syncing.is_empty()) else {
            return;
        };
        let (context, SyncAsked { deep, findings }) = (self.context.clone(), asked.clone());
        self.syncing.spawn(async move { sync::run(&context, deep, findings).await });
    }

    /// What is under way ends, and begins again later: what has been copied stays.
    async fn pause_sync(&mut self) {
        self.syncing.shutdown().await;
    }

    fn synchronised(&mut self, report: Result<SyncReport>) {
        match &report {
            Ok(report) => {
                self.nothing_is_pending(report);
                for failed in &report.failed {
                    tracing::warn!(location = %failed.location, "not compared with the other locations: {}", failed.reason);
                }
            }
            Err(error) => tracing::warn!("locations not compared: {error}"),
        }
        self.compared = Instant::now();
        if let Some((_, Some(reply))) = self.syncs.pop_front() {
            // Whoever asked may have gone away.
            let _ = reply.send(report);
        }
    }

    fn next_sync(&self) -> Duration {
        let is_pending = self.context.alarms.list().iter().any(|alarm| alarm.name == PENDING);
        if is_pending { SYNC_WHILE_PENDING_EVERY } else { SYNC_EVERY }
    }

    /// When every location could be compared and lacks nothing, each has every snapshot.
    fn nothing_is_pending(&self, report: &SyncReport) {
        if report.is_complete() && self.context.writers.len() > 1 {
            for writer in &self.context.writers {
                self.context.alarms.clear(PENDING, writer.location().name().as_str());
            }
        }
    }

    /// The newest snapshot that is committed anywhere. A location that cannot be asked is left out.
    async fn last_snapshot(&self) -> Option<Newest> {
        let folder = &folder::snapshots(self.context.system);
        let locations = self.context.writers.iter().map(|writer| writer.location());
        let listings = futures::future::join_all(locations.map(|location| async move {
            let listed = location.list(folder).await.unwrap_or_default();
            let snapshots = listed.into_iter().filter_map(|listed| match listed.name {
                Some(ObjectName::Manifest { snapshot, .. }) => Some(snapshot),
                _ => None,
            });
            snapshots.max().map(|snapshot| (snapshot, location))
        }))
        .await;
        let (id, location) = listings.into_iter().flatten().max_by_key(|(id, _)| *id)?;
        let name = ObjectName::Manifest { system: self.context.system, snapshot: id };
        let manifest = location.get(&name).await.and_then(|bytes| read_plain(&bytes, &name));
        let plain = manifest.ok().map(|(_, plain)| plain);
        let (branch, gap_end) = plain.map(|plain| (plain.branch, plain.start)).unzip();
        Some(Newest { id, branch, gap_end })
    }

    fn update(&self, change: impl FnOnce(&mut SnapshotStatus)) {
        change(&mut self.status.lock().expect("no panic while held"));
    }
}

fn ended(sync: std::result::Result<Result<SyncReport>, JoinError>) -> Result<SyncReport> {
    sync.unwrap_or_else(|panic| Err(Error::new(Kind::Bug, format!("a sync panicked: {panic}"))))
}

/// What the WAL path has met since the newest snapshot that wants another one at once.
fn reason_of(wal: &WalStatus, last: Newest) -> Option<Reason> {
    if wal.standing_by {
        return None;
    }
    // While every location is away, one would only fail, and then wait.
    if wal.gap_end > last.gap_end && is_any_there(wal) {
        return Some(Reason::AfterGap);
    }
    // The rest of an older timeline is on the way to the newer one.
    let (now, then) = wal.branch.zip(last.branch)?;
    (now != then && now.timeline >= then.timeline).then_some(Reason::NewTimeline)
}

/// True if a location takes WAL, as far as is known.
fn is_any_there(wal: &WalStatus) -> bool {
    wal.locations.iter().any(|location| location.last_error.is_none())
}

fn until(moment: Timestamp) -> Duration {
    moment.duration_since(Timestamp::now()).try_into().unwrap_or(Duration::ZERO)
}
