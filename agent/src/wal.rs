//! The WAL path, from PostgreSQL to every location.
//!
//! ```text
//!   walsender
//!      │                 session    connects, decides where to begin, follows timelines, records gaps
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
//! What always holds: bytes leave the spool only when every location has them and PostgreSQL has been told so, or by
//! `release`, where the operator wants that, and on record; nothing is acknowledged but what the policy proves; a dead location costs the others nothing but room in the spool. A
//! crash at any instruction leaves the spool, whose folders say what they are, and whole objects; `board`, the only state in
//! memory, is made from them anew.

mod board;
mod branch;
mod cut;
mod fill;
mod frontier;
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
use backstay_common::id::{Branch, LocationName};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::segment::TimelineId;
use backstay_common::{Context, Error, Kind, Result};
use board::{Board, State};
use frontier::Frontier;
use line::Line;
use pipeline::Pipeline;
use sealed::Sealed;
use serde::Serialize;
pub use slot::SlotStatus;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// How long the last piece may take when the agent stops.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
const STATUS_EVERY: Duration = Duration::from_millis(100);
const TIDY_EVERY: Duration = Duration::from_millis(500);
/// A location that has had an object waiting for so long is behind.
const BEHIND: Duration = Duration::from_secs(60);

/// The WAL path, as status shows it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct WalStatus {
    pub connected: bool,
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
    /// Where the WAL goes on behind the last gap on record. Only a snapshot from there on closes it.
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
    board: Board,
    /// What must stop the process.
    fatal: mpsc::UnboundedSender<Error>,
    /// Cancelled when the last task may go.
    halt: CancellationToken,
}

/// Receives and ships WAL until `context.stop` is cancelled. Returns an error only for what must stop the process: a
/// failed fsync, a broken spool, a fault of ours.
pub async fn run(context: Arc<AgentContext>, status: watch::Sender<WalStatus>) -> Result<()> {
    let (fatal, mut failures) = mpsc::unbounded_channel();
    let opening = context.clone();
    let (path, pipeline) = blocking(move || open(opening, fatal)).await?;
    path.spawn(publish(path.clone(), status));
    path.spawn(keep_synced(path.clone()));
    path.spawn(tidy(path.clone()));
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
    fatal: mpsc::UnboundedSender<Error>,
) -> Result<(Arc<WalPath>, Option<Pipeline>)> {
    let root = context.settings.state_dir.join("spool").join(context.system.to_string());
    std::fs::create_dir_all(&root).context(format!("create {}", root.display()))?;
    let sealed = Sealed::create(&root, context.system)?;
    let board = Board::new(context.writers.len(), context.settings.durability.acknowledge);
    let halt = CancellationToken::new();
    let path = Arc::new(WalPath { context, root, sealed, board, fatal, halt });
    let lines: Vec<Arc<Line>> = Line::open_all(&path.root)?.into_iter().map(Arc::new).collect();
    for item in path.sealed.load(&lines)? {
        path.board.update(|state| state.shelf.add(item));
    }
    let gap_end = last_gap_end(&path.root)?;
    path.board.update(|state| state.server.gap_end = gap_end);
    let mut current = None;
    for line in &lines {
        // Only the last goes on; the others were ended, or would have been.
        if let Some(before) = current.take() {
            Pipeline::finish(before)?;
        }
        path.take_up(line, Lsn::INVALID);
        current = Some(Pipeline::open(path.clone(), line.clone())?);
        path.start_sealing(line);
        let end = line.spool.end();
        path.board.update(|state| state.frontier.retract(end));
    }
    Ok((path, current))
}

impl WalPath {
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
            let locations = state.health.len();
            state.frontier = Frontier::new(locations, line.spool.end(), floor);
            state.lines.insert(line.number, line.clone());
            state.current = line.number;
        });
    }

    fn start_sealing(self: &Arc<Self>, line: &Arc<Line>) {
        self.spawn(seal::run(self.clone(), line.clone()));
    }

    /// Records WAL that the server no longer has. Blocks for moments.
    fn record_gap(&self, gap: LsnRange) -> Result<()> {
        let current = self.board.read(|state| state.lines.get(&state.current).cloned());
        let Some(line) = current else { return Ok(()) };
        let reason = format!("the server no longer has the WAL of {gap}");
        self.record_gap_of(gap, line.timeline(), &reason)
    }

    /// Writes a gap to `gaps`, durably, and raises the alarm. Blocks for moments.
    fn record_gap_of(&self, gap: LsnRange, timeline: TimelineId, reason: &str) -> Result<()> {
        self.context.alarms.raise("wal-gap", "", reason);
        let entry = serde_json::json!({
            "start": gap.start,
            "end": gap.end,
            "timeline": timeline,
            "noticed": jiff::Timestamp::now(),
            "reason": reason,
        });
        let file = self.root.join("gaps");
        let write = || -> std::io::Result<()> {
            let mut gaps = std::fs::OpenOptions::new().create(true).append(true).open(&file)?;
            writeln!(gaps, "{entry}")?;
            gaps.sync_all()?;
            spool::sync_folder(&self.root)
        };
        write().context(format!("write {}", file.display()))?;
        self.board.update(|state| state.server.gap_end = Some(gap.end));
        Ok(())
    }
}

/// Where the WAL goes on behind the last gap on record; none if there is none. Blocks.
fn last_gap_end(root: &Path) -> Result<Option<Lsn>> {
    let file = root.join("gaps");
    let text = match std::fs::read_to_string(&file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.context(format!("read {}", file.display()))?,
    };
    // A line that a crash cut short is of a gap that was found again.
    let ends = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    Ok(ends.rev().find_map(|gap| gap["end"].as_str()?.parse().ok()))
}

/// Fsyncs the spool whenever bytes wait and no fsync is under way.
async fn keep_synced(path: Arc<WalPath>) -> Result<()> {
    let mut bell = path.board.listen();
    loop {
        let waiting = path.board.read(|state| {
            let line = state.lines.get(&state.current)?;
            (state.frontier.spooled() < state.frontier.received()).then(|| line.clone())
        });
        let Some(line) = waiting else {
            // The board outlives this task.
            let _ = bell.changed().await;
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
    }
}

/// Removes from the local disk what every location has.
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
    let until = path.board.read(|state| forgettable(state, line));
    line.spool.forget(until)?;
    let begin = line.spool.begin();
    let gone = path.board.update_quietly(|state| state.shelf.retire(line.number, begin));
    if !gone.is_empty() {
        path.sealed.remove(&gone)?;
    }
    match path.board.read(|state| is_over(state, line)) {
        true => remove_line(path, line),
        false => Ok(()),
    }
}

/// What every location has, and PostgreSQL has been told of. The span before the newest stays: a record may reach
/// from it into the next, and a restart reads it whole.
fn forgettable(state: &State, line: &Line) -> Lsn {
    let locations = 0..state.health.len();
    let stored = locations.map(|l| state.shelf.frontier(l, line.number)).min();
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
fn is_over(state: &State, line: &Line) -> bool {
    let end = line.spool.end();
    line.number != state.current
        && line.is_ended()
        && line.is_sealed()
        && line.branch().is_some()
        && state.shelf.is_done(line.number)
        && (0..state.health.len()).all(|l| state.shelf.frontier(l, line.number) >= end)
}

fn remove_line(path: &WalPath, line: &Arc<Line>) -> Result<()> {
    let gone = path.board.update_quietly(|state| state.shelf.retire(line.number, Lsn::MAX));
    path.sealed.remove(&gone)?;
    let folder = line.spool.folder();
    std::fs::remove_dir_all(&folder)
        .and_then(|()| spool::sync_folder(&path.root))
        .context(format!("remove {}", folder.display()))?;
    path.board.update(|state| state.lines.remove(&line.number));
    Ok(())
}

/// Returns when every location has all that was received.
async fn all_shipped(path: &WalPath) {
    let mut bell = path.board.listen();
    let is_shipped = |state: &State| {
        let done = state.lines.values().all(|line| line.is_sealed());
        done && (0..state.health.len()).all(|l| state.shelf.backlog(l).0 == 0)
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
    let frontier = &state.frontier;
    let locations = context.writers.iter().enumerate().map(|(n, writer)| {
        let (queued_objects, oldest) = state.shelf.backlog(n);
        let begin = line.map_or(Lsn::INVALID, |line| line.spool.begin());
        LocationWal {
            name: writer.location().name().clone(),
            stored: frontier.stored(n),
            behind_bytes: frontier.received().since(frontier.stored(n).max(begin)),
            behind_seconds: oldest.map_or(0, |since: Instant| since.elapsed().as_secs()),
            queued_objects,
            last_error: state.health[n].last_error.clone(),
        }
    });
    WalStatus {
        connected: state.server.connected,
        timeline: line.map(|line| line.timeline()),
        branch: line.and_then(|line| line.branch()),
        received: frontier.received(),
        spooled: frontier.spooled(),
        acknowledged: frontier.acknowledged(),
        server_end: state.server.end,
        server_clock: state.server.clock.map(|clock| clock.timestamp()),
        spool_bytes: state.spool_bytes(),
        slot: state.server.slot.clone(),
        gap_end: state.server.gap_end,
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
fn backoff(failures: u32, (least, most): (Duration, Duration)) -> Duration {
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
