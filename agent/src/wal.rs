//! The WAL path, from PostgreSQL to every location.
//!
//! ```text
//!   walsender
//!      │                 session    connects, decides where to begin, follows timelines, stands by a standby
//!      │                 gaps       what became of WAL that nobody has, told to every location
//!      ▼
//!   receive ◄─────────── status reports: what `frontier` says is proved        slot: is it in danger?
//!      │ bounded queue
//!      ▼
//!   pipeline             continues? equal? decodes ─► cut: when a piece, when a span
//!      │                                                │
//!      ▼                                                │
//!   line, spool          one file per span, fsynced in   │
//!      │                 groups by `keep_synced`         ▼
//!      └───────────────────────────────────────────► seal      reads back, compresses, encrypts, once
//!                                                       │      branch: under which name
//!                                                       ▼
//!   sealed/  ◄───────────────────────────────────── shelf      who has what
//!      │
//!      ├─► ship (frankfurt) ─► location      each in its own time
//!      └─► ship (virginia)  ─► location      fill: what only another location has
//! ```
//!
//! What always holds: bytes leave the spool only when every required location has them and PostgreSQL has been told so, or
//! by `release`, where the operator wants that, and on record; nothing is acknowledged but what the policy proves, and
//! best-effort locations prove nothing; a dead location costs the others nothing but room in the spool, and a best-effort
//! one no more than half of it. A
//! crash at any instruction leaves the spool, whose folders say what they are, and whole objects; `board`, the only state in
//! memory, is made from them anew.

mod board;
mod branch;
mod cut;
mod fill;
mod frontier;
mod gaps;
mod line;
mod pipeline;
mod receive;
mod release;
mod seal;
mod sealed;
mod session;
mod shelf;
mod ship;
mod slot;
mod spool;

use crate::context::AgentContext;
use crate::durable::sync_folder;
use crate::lease::Leasing;
use backstay_common::id::{Branch, LocationName};
use backstay_common::location::Role;
use backstay_common::lsn::Lsn;
use backstay_common::segment::TimelineId;
use backstay_common::{Context, Error, Kind, Result};
use board::{Board, State};
use frontier::Frontier;
use gaps::Gaps;
use line::Line;
use pipeline::Pipeline;
use sealed::Sealed;
use serde::Serialize;
use shelf::Patience;
pub use slot::SlotStatus;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// How long the last piece may take when the agent stops.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
const STATUS_EVERY: Duration = Duration::from_millis(100);
/// From one fsync of the spool to the next where no commit waits for it: each costs the server, whose disk it may be.
const SYNC_PAUSE: Duration = Duration::from_millis(10);
const TIDY_EVERY: Duration = Duration::from_millis(500);
/// A location that has had an object waiting for so long is behind.
const BEHIND: Duration = Duration::from_secs(60);

/// The WAL path, as status shows it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct WalStatus {
    pub connected: bool,
    /// The server is a standby: another agent streams, and this one waits to take over.
    pub standing_by: bool,
    pub timeline: Option<TimelineId>,
    pub branch: Option<Branch>,
    pub received: Lsn,
    /// Fsynced in the spool.
    pub spooled: Lsn,
    pub acknowledged: Lsn,
    pub server_end: Lsn,
    /// The server's clock in its last message.
    pub server_clock: Option<jiff::Timestamp>,
    pub spool_bytes: u64,
    /// What the server says of our slot; none as long as it has not been asked.
    pub slot: Option<SlotStatus>,
    /// The start of the last gap that this agent met, if it is on `branch` and its WAL is lost.
    pub gap_start: Option<Lsn>,
    /// Where the WAL goes on behind the last gap that this agent met. Only a snapshot from there on closes it.
    pub gap_end: Option<Lsn>,
    /// In the order of the config.
    pub locations: Vec<LocationWal>,
    /// Of the connection.
    pub last_error: Option<String>,
}

/// One location's share of it.
#[derive(Clone, Debug, Serialize)]
pub struct LocationWal {
    pub name: LocationName,
    pub role: Role,
    /// All before is there; 0/0 as long as the location has not been listed.
    pub stored: Lsn,
    pub behind_bytes: u64,
    /// Age of the oldest object that waits.
    pub behind_seconds: u64,
    pub queued_objects: usize,
    pub last_error: Option<String>,
}

/// What the tasks of the WAL path share.
#[derive(Debug)]
struct WalPath {
    context: Arc<AgentContext>,
    /// `<state-dir>/spool/<system>`
    root: PathBuf,
    sealed: Sealed,
    gaps: Gaps,
    leasing: Leasing,
    board: Board,
    /// What must stop the process.
    fatal: mpsc::UnboundedSender<Error>,
    /// Cancelled when the last task may go.
    halt: CancellationToken,
}

/// Receives and ships WAL until `context.stop` is cancelled. Returns an error only for what must stop the process: a
/// failed fsync, a broken spool, a fault of ours.
pub async fn run(
    context: Arc<AgentContext>,
    leasing: Leasing,
    status: watch::Sender<WalStatus>,
) -> Result<()> {
    let (fatal, mut failures) = mpsc::unbounded_channel();
    let opening = context.clone();
    let (path, pipeline) = blocking(move || open(opening, leasing, fatal)).await?;
    path.spawn(publish(path.clone(), status));
    path.spawn(keep_synced(path.clone()));
    path.spawn(tidy(path.clone()));
    path.spawn(gaps::tell(path.clone()));
    path.spawn(slot::run(path.clone()));
    for location in 0..context.writers.len() {
        path.spawn(ship::run(path.clone(), location, path.halt.clone()));
    }
    let session = tokio::spawn(session::run(path.clone(), pipeline));
    let result = tokio::select! {
        ended = session => ended.unwrap_or_else(|_| Err(Error::new(Kind::Bug, "the WAL session panicked"))),
        Some(error) = failures.recv() => Err(error),
    };
    if result.is_ok() {
        let shipped = tokio::time::timeout(STOP_PATIENCE, all_shipped(&path));
        tokio::select! {
            _ = shipped => {}
            Some(error) = failures.recv() => tracing::error!(%error, "while stopping"),
        }
    }
    path.halt.cancel();
    result
}

/// Opens the spool, and puts on the shelf what it holds. Blocks.
fn open(
    context: Arc<AgentContext>,
    leasing: Leasing,
    fatal: mpsc::UnboundedSender<Error>,
) -> Result<(Arc<WalPath>, Option<Pipeline>)> {
    let root = context.settings.state_dir.join("spool").join(context.system.to_string());
    std::fs::create_dir_all(&root).context(format!("create {}", root.display()))?;
    let sealed = Sealed::create(&root, context.system)?;
    let gaps = Gaps::create(&root)?;
    let board = Board::new(required(&context), context.settings.durability.acknowledge);
    let halt = CancellationToken::new();
    let path = Arc::new(WalPath { context, root, sealed, gaps, leasing, board, fatal, halt });
    let lines: Vec<Arc<Line>> = Line::open_all(&path.root)?.into_iter().map(Arc::new).collect();
    for item in path.sealed.load(&lines)? {
        path.board.update(|state| state.shelf.add(item));
    }
    let last_gap = path.gaps.last()?.map(|gap| gap.in_short());
    path.board.update(|state| state.server.gap = last_gap);
    let mut current = None;
    for line in &lines {
        // Only the last goes on; the others were ended, or would have been.
        if let Some(before) = current.take() {
            Pipeline::end(before)?;
        }
        path.take_up(line, Lsn::INVALID);
        current = Some(Pipeline::open(path.clone(), line.clone())?);
        path.start_sealing(line);
        let end = line.spool.end();
        path.board.update(|state| state.frontier.retract(end));
    }
    Ok((path, current))
}

/// By location.
fn required(context: &AgentContext) -> Vec<bool> {
    context.writers.iter().map(|writer| writer.location().is_required()).collect()
}

impl WalPath {
    /// Best-effort locations are waited for while the spool is less than half full.
    fn patience(&self, state: &State) -> Patience {
        match state.spool_bytes() < self.context.settings.spool.bytes_max / 2 {
            true => Patience::WithAll,
            false => Patience::WithRequired,
        }
    }

    /// Runs a task whose error, or panic, stops the process.
    fn spawn(&self, work: impl Future<Output = Result<()>> + Send + 'static) {
        let (fatal, halt) = (self.fatal.clone(), self.halt.clone());
        let task = tokio::spawn(async move {
            tokio::select! {
                result = work => result,
                () = halt.cancelled() => Ok(()),
            }
        });
        tokio::spawn(async move {
            let panicked = |_| Err(Error::new(Kind::Bug, "a task of the WAL path panicked"));
            if let Err(error) = task.await.unwrap_or_else(panicked) {
                // The receiver is gone only if the process stops anyhow.
                let _ = fatal.send(error);
            }
        });
    }

    /// `line` is the current one from now on.
    fn take_up(&self, line: &Arc<Line>, switch: Lsn) {
        self.board.update(|state| {
            let floor = state.frontier.acknowledged().min(switch);
            let required = required(&self.context);
            state.frontier = Frontier::new(required, line.spool.end(), floor);
            state.lines.insert(line.number, line.clone());
            state.current = line.number;
        });
    }

    fn start_sealing(self: &Arc<Self>, line: &Arc<Line>) {
        self.spawn(seal::run(self.clone(), line.clone()));
    }
}

/// Fsyncs the spool whenever bytes wait and no fsync is under way.
async fn keep_synced(path: Arc<WalPath>) -> Result<()> {
    loop {
        let waiting = path.board.read(|state| {
            let line = state.lines.get(&state.current)?;
            (state.frontier.spooled() < state.frontier.received()).then(|| line.clone())
        });
        let Some(line) = waiting else {
            path.board.arrival().await;
            continue;
        };
        let number = line.number;
        if let Some(synced) = blocking(move || line.spool.sync()).await? {
            path.board.update(|state| {
                if state.current == number {
                    state.frontier.spool(synced);
                }
            });
        }
        if path.context.nobody_waits.load(Ordering::Relaxed) {
            tokio::time::sleep(SYNC_PAUSE).await;
        }
    }
}

/// Removes from the local disk what every location that is waited for has.
async fn tidy(path: Arc<WalPath>) -> Result<()> {
    loop {
        tokio::time::sleep(TIDY_EVERY).await;
        let path = path.clone();
        blocking(move || {
            let lines: Vec<Arc<Line>> = path.board.read(|s| s.lines.values().cloned().collect());
            lines.iter().try_for_each(|line| tidy_line(&path, line))
        })
        .await?;
    }
}

/// First the WAL, then the sealed objects: what is sealed tells a restart what has been cut.
fn tidy_line(path: &WalPath, line: &Arc<Line>) -> Result<()> {
    let (patience, until) = path.board.read(|state| {
        let patience = path.patience(state);
        (patience, forgettable(state, line, patience))
    });
    line.spool.forget(until)?;
    let begin = line.spool.begin();
    let gone = path.board.update_quietly(|state| state.shelf.retire(line.number, begin, patience));
    if !gone.is_empty() {
        path.sealed.remove(&gone)?;
    }
    match path.board.read(|state| is_over(state, line, patience)) {
        true => remove_line(path, line),
        false => Ok(()),
    }
}

/// What every location that is waited for has, and PostgreSQL has been told of. The span before the newest stays: a record may reach
/// from it into the next, and a restart reads it whole.
fn forgettable(state: &State, line: &Line, patience: Patience) -> Lsn {
    let locations = state.shelf.waited_for(patience);
    let stored = locations.map(|l| state.shelf.reach(l, line.number)).min();
    // Pieces may be everywhere while the span that supersedes them is yet to be sealed.
    let stored = stored.unwrap_or(Lsn::INVALID).min(line.unsealed_from().unwrap_or(Lsn::MAX));
    match line.number == state.current {
        false => stored,
        true => {
            let newest = line.spool.end().span_start();
            let before = Lsn::new(newest.get().saturating_sub(1)).span_start();
            stored.min(state.frontier.acknowledged()).min(before)
        }
    }
}

/// True if nothing of an old line is needed here any more.
fn is_over(state: &State, line: &Line, patience: Patience) -> bool {
    let end = line.spool.end();
    line.number != state.current
        && line.is_ended()
        && line.is_sealed()
        && line.branch().is_some()
        && state.shelf.is_line_done(line.number, patience)
        && state.shelf.waited_for(patience).all(|l| state.shelf.reach(l, line.number) >= end)
}

/// Nothing, this time, if something is on its way to a location all the same.
fn remove_line(path: &WalPath, line: &Arc<Line>) -> Result<()> {
    let (gone, is_empty) = path.board.update_quietly(|state| {
        let gone = state.shelf.retire(line.number, Lsn::MAX, Patience::WithRequired);
        (gone, state.shelf.ranges(line.number).is_empty())
    });
    path.sealed.remove(&gone)?;
    if !is_empty {
        return Ok(());
    }
    let folder = line.spool.folder();
    std::fs::remove_dir_all(&folder)
        .and_then(|()| sync_folder(&path.root))
        .context(format!("remove {}", folder.display()))?;
    path.board.update(|state| state.lines.remove(&line.number));
    Ok(())
}

/// Returns when every required location has all that was received.
async fn all_shipped(path: &WalPath) {
    let mut bell = path.board.listen();
    let is_shipped = |state: &State| {
        let done = state.lines.values().all(|line| line.is_sealed());
        let mut required = state.shelf.waited_for(Patience::WithRequired);
        done && required.all(|l| state.shelf.backlog(l).0 == 0)
    };
    while !path.board.read(is_shipped) {
        let _ = bell.changed().await;
    }
}

/// Publishes the status whenever something has changed, but not too often, and sees to the alarms about lag.
async fn publish(path: Arc<WalPath>, status: watch::Sender<WalStatus>) -> Result<()> {
    let mut bell = path.board.listen();
    loop {
        let now = path.board.read(|state| describe(&path.context, state));
        for location in &now.locations {
            watch_lag(&path.context, location);
        }
        status.send_replace(now);
        tokio::time::sleep(STATUS_EVERY).await;
        // Ages go on while nothing changes.
        let _ = tokio::time::timeout(Duration::from_secs(1), bell.changed()).await;
    }
}

fn watch_lag(context: &AgentContext, location: &LocationWal) {
    let limit = BEHIND.max(context.settings.durability.flush_interval * 6).as_secs();
    let name = location.name.to_string();
    if location.behind_seconds < limit {
        return context.alarms.clear("location-behind", &name);
    }
    let LocationWal { queued_objects, behind_seconds, behind_bytes, .. } = location;
    let reason = format!(
        "{queued_objects} objects wait, the oldest for {behind_seconds} s: {behind_bytes} bytes of WAL"
    );
    context.alarms.raise("location-behind", &name, reason);
}

fn describe(context: &AgentContext, state: &State) -> WalStatus {
    let line = state.lines.get(&state.current);
    let branch = line.and_then(|line| line.branch());
    let frontier = &state.frontier;
    let locations = context.writers.iter().enumerate().map(|(n, writer)| {
        let (queued_objects, oldest) = state.shelf.backlog(n);
        let begin = line.map_or(Lsn::INVALID, |line| line.spool.begin());
        LocationWal {
            name: writer.location().name().clone(),
            role: writer.location().role(),
            stored: frontier.stored(n),
            behind_bytes: frontier.received().since(frontier.stored(n).max(begin)),
            behind_seconds: oldest.map_or(0, |since: Instant| since.elapsed().as_secs()),
            queued_objects,
            last_error: state.health[n].last_error.clone(),
        }
    });
    WalStatus {
        connected: state.server.connected,
        standing_by: state.server.standing_by,
        timeline: line.map(|line| line.timeline()),
        branch,
        received: frontier.received(),
        spooled: frontier.spooled(),
        acknowledged: frontier.acknowledged(),
        server_end: state.server.end,
        server_clock: state.server.clock.map(|clock| clock.timestamp()),
        spool_bytes: state.spool_bytes(),
        slot: state.server.slot.clone(),
        gap_start: state.server.gap.filter(|gap| gap.is_lost_on(branch)).map(|gap| gap.range.start),
        gap_end: state.server.gap.map(|gap| gap.range.end),
        locations: locations.collect(),
        last_error: state.server.last_error.clone(),
    }
}

/// Runs what blocks away from the reactor, to its end even if the future is dropped.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let panicked = |_| Error::new(Kind::Bug, "work of the WAL path panicked");
    tokio::task::spawn_blocking(work).await.map_err(panicked)?
}

/// How long to wait after so many failures in a row: doubling from the first to the second bound, a random half of it.
pub(crate) fn backoff(failures: u32, (least, most): (Duration, Duration)) -> Duration {
    let full = least.saturating_mul(1 << failures.clamp(1, 16).saturating_sub(1)).min(most);
    let [random] = backstay_common::id::random_bytes::<1>();
    full / 2 + (full / 2).mul_f64(f64::from(random) / 255.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound() {
        let bounds = (Duration::from_millis(200), Duration::from_secs(15));
        for (failures, most) in [(0, 200), (1, 200), (2, 400), (5, 3200), (40, 15_000)] {
            for _ in 0..20 {
                let pause = backoff(failures, bounds).as_millis();
                assert!((most / 2..=most).contains(&pause), "{failures}: {pause}");
            }
        }
    }
}
