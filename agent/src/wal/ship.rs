//! Ships what is on the shelf to one location. Each location has such a task, and none waits for another.
//!
//! First the location is listed, then it gets what it lacks: up to [`PUTS_MAX`] objects at a time, each tried until it
//! is there. Great ones share [`SENDING_BYTES_MAX`]; small ones, which commits may wait for, need not wait for them. Wraps
//! go before an object, and a branch's origin before its WAL. Superseded pieces are deleted beside all that. A crash leaves
//! objects that are whole or not there; the next listing tells which.

use super::WalPath;
use super::fill;
use super::line::Line;
use super::shelf::Item;
use crate::sync::superseded;
use backstay_common::head::Head;
use backstay_common::id::{Branch, LocationName, ObjectId};
use backstay_common::lsn::LsnRange;
use backstay_common::name::{ObjectName, folder};
use backstay_common::{Error, Kind, Result};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// So that a commit every 5 ms can wait for a store that takes 160 ms.
const PUTS_MAX: usize = 32;
/// No further object is read into memory while so many bytes are on their way,
const SENDING_BYTES_MAX: u64 = 24 << 20;
/// unless it is as small as this.
const SMALL_BYTES: u64 = 256 << 10;
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(15));
/// An idle server's head is stored so often.
const HEAD_EVERY: Duration = Duration::from_secs(300);
const TICK: Duration = Duration::from_secs(1);
/// How long after a deletion that failed the next one is tried.
const DELETE_AGAIN_AFTER: Duration = Duration::from_secs(15);
/// As many are deleted at once.
const DELETE_BATCH: usize = 1000;
/// Of the objects that somebody else stored where a line goes on, so many are opened before they are believed.
const OPENED_MAX: usize = 64;
/// More superseded pieces than this are left to sync, or to prune.
const SUPERFLUOUS_MAX: usize = 10_000;

/// Tasks of their own: they go on while a listing is awaited, which may wait for what one of them holds. With each object that
/// is stored come the pieces that the location may forget for it.
type Sending = JoinSet<(Arc<Item>, Result<Vec<ObjectName>>)>;
/// At most one at a time.
type Deleting = JoinSet<(Vec<ObjectName>, Result<()>)>;
/// At most one at a time.
type Heading = JoinSet<Result<()>>;

struct Shipper {
    path: Arc<WalPath>,
    /// The location's number.
    location: usize,
    sending_bytes: u64,
    origins: HashSet<Branch>,
    /// The location has shown that it is what it should be, since the last failure.
    is_known: bool,
    failures: u32,
    retry_at: Option<Instant>,
    /// When something was last stored: WAL or a head.
    last_stored: Instant,
    head_seq: u64,
    superfluous: Vec<ObjectName>,
    /// Nothing is deleted before.
    delete_at: Instant,
}

/// Runs until `halt`. Safe to drop.
pub async fn run(path: Arc<WalPath>, location: usize, halt: CancellationToken) -> Result<()> {
    let shipper = Shipper {
        path,
        location,
        sending_bytes: 0,
        origins: HashSet::new(),
        is_known: false,
        failures: 0,
        retry_at: None,
        last_stored: Instant::now(),
        head_seq: 0,
        superfluous: Vec::new(),
        delete_at: Instant::now(),
    };
    tokio::select! {
        () = halt.cancelled() => Ok(()),
        result = shipper.ship() => result,
    }
}

impl Shipper {
    async fn ship(mut self) -> Result<()> {
        let mut bell = self.path.board.listen();
        let mut tick = tokio::time::interval(TICK);
        let mut sending = Sending::new();
        let (mut deleting, mut heading) = (Deleting::new(), Heading::new());
        loop {
            if self.retry_at.is_none_or(|at| at <= Instant::now()) {
                if let Err(error) = self.prepare().await {
                    self.failed(error);
                } else {
                    self.start(&mut sending);
                }
            }
            tokio::select! {
                Some(sent) = sending.join_next() => {
                    let (item, result) = done(sent);
                    self.settle(&item, result);
                }
                Some(gone) = deleting.join_next() => {
                    let (names, result) = done(gone);
                    self.deleted(names, result);
                }
                Some(stored) = heading.join_next() => match done(stored) {
                    Ok(()) => self.last_stored = Instant::now(),
                    Err(error) => self.failed(error),
                },
                _ = bell.changed() => {}
                _ = tick.tick() => {
                    self.delete_superfluous(&mut deleting);
                    if sending.is_empty() {
                        self.store_head(&mut heading);
                    }
                }
            }
        }
    }

    /// Lists what is not known yet, and stores the origins.
    async fn prepare(&mut self) -> Result<()> {
        if !self.is_known {
            self.path.context.writers[self.location].location().require_cluster().await?;
            self.is_known = true;
        }
        let location = self.location;
        let lines: Vec<Arc<Line>> = self.path.board.read(|state| {
            let is_listed =
                |line: &Line| state.shelf.is_listed(location, line.number, line.spool.begin());
            state.lines.values().filter(|line| !is_listed(line)).cloned().collect()
        });
        for line in lines {
            if let Some(branch) = line.branch() {
                self.list(&line, branch).await?;
            }
        }
        Ok(())
    }

    async fn list(&mut self, line: &Arc<Line>, branch: Branch) -> Result<()> {
        self.ensure_origin(branch).await?;
        let location = self.path.context.writers[self.location].location();
        let system = self.path.context.system;
        let begin = line.spool.begin();
        let after = folder::branch_from(system, branch, begin.span_start());
        let listed = location.list_from(&folder::branch(system, branch), &after).await?;
        let found: Vec<(LsnRange, ObjectId)> = listed
            .into_iter()
            .filter_map(|object| match object.name {
                Some(ObjectName::Wal { range, id, .. }) => Some((range, id)),
                _ => None,
            })
            .collect();
        let found = self.believed(line, found).await?;
        self.path.board.update(|s| s.shelf.listed(self.location, line.number, begin, &found));
        self.succeeded();
        fill::spawn(&self.path, self.location, line, (branch, begin));
        Ok(())
    }

    /// Without the objects that are not what their names say: the frontier would believe them. What is on the shelf is ours
    /// by its id; the rest is opened, the newest if there are many.
    async fn believed(
        &self,
        line: &Line,
        mut found: Vec<(LsnRange, ObjectId)>,
    ) -> Result<Vec<(LsnRange, ObjectId)>> {
        let context = &self.path.context;
        let location = context.writers[self.location].location();
        let (system, Some(branch)) = (context.system, line.branch()) else { return Ok(found) };
        let ours = self.path.board.read(|state| state.shelf.ids(line.number));
        let foreign = found.iter().filter(|(_, id)| !ours.contains(id)).rev().take(OPENED_MAX);
        let foreign: Vec<(LsnRange, ObjectId)> = foreign.copied().collect();
        for (range, id) in foreign {
            let name = ObjectName::Wal { system, branch, range, id };
            let Err(error) = superseded::prove(context, location, &name).await else { continue };
            match error.kind() {
                Kind::Corrupt => {
                    context.damage.note(&context.alarms, location.name(), &name, &error)
                }
                // A piece that its span has replaced meanwhile.
                Kind::Missing => {}
                // Without the key its trailer must do.
                Kind::Key => continue,
                _ => return Err(error),
            }
            found.retain(|one| *one != (range, id));
        }
        Ok(found)
    }

    /// Stores a branch's origin, with the wraps of its epoch before it.
    async fn ensure_origin(&mut self, branch: Branch) -> Result<()> {
        if self.origins.contains(&branch) {
            return Ok(());
        }
        let sealed = self.path.sealed.clone();
        let bytes = super::blocking(move || sealed.origin(branch)).await?;
        let name = ObjectName::Origin { system: self.path.context.system, branch };
        fill::store(&self.path, self.location, &name, bytes).await?;
        self.origins.insert(branch);
        Ok(())
    }

    fn start(&mut self, sending: &mut Sending) {
        while sending.len() < PUTS_MAX {
            let is_full = self.sending_bytes >= SENDING_BYTES_MAX;
            let most = if is_full { SMALL_BYTES } else { u64::MAX };
            let location = self.location;
            let next = self.path.board.update_quietly(|state| state.shelf.next(location, most));
            let Some(item) = next else { return };
            self.sending_bytes += item.size;
            tracing::trace!(location, range = %item.range, "put");
            sending.spawn(send(self.path.clone(), location, item));
        }
    }

    /// What follows from it for this task. What is stored counts already; what failed is sent again when this task says so.
    fn settle(&mut self, item: &Item, result: Result<Vec<ObjectName>>) {
        self.sending_bytes -= item.size;
        let location = self.location;
        match result {
            Ok(gone) => {
                self.superfluous.extend(gone);
                let strays = &self.path.context.strays;
                self.superfluous.extend(strays.covered(&self.place(), &item.name()));
                self.last_stored = Instant::now();
                self.succeeded();
            }
            Err(error) => {
                let gone = self.path.board.update(|state| state.shelf.failed(location, item));
                self.superfluous.extend(gone);
                self.failed(error);
            }
        }
    }

    fn place(&self) -> LocationName {
        self.path.context.writers[self.location].location().name().clone()
    }

    fn subject(&self) -> String {
        self.place().to_string()
    }

    fn succeeded(&mut self) {
        if self.failures > 0 {
            self.path.context.alarms.clear("location-down", &self.subject());
            let location = self.location;
            self.path.board.update(|state| state.health[location] = Default::default());
        }
        self.failures = 0;
        self.retry_at = None;
    }

    fn failed(&mut self, error: Error) {
        self.failures += 1;
        self.is_known = false;
        self.retry_at = Some(Instant::now() + super::backoff(self.failures, BACKOFF));
        if self.failures > 1 {
            self.path.context.alarms.raise("location-down", &self.subject(), &error);
        }
        let (location, failures) = (self.location, self.failures);
        tracing::debug!(%error, failures, "shipping failed");
        self.path.board.update_quietly(|state| {
            state.health[location].failures = failures;
            state.health[location].last_error = Some(error.message().to_string());
        });
    }

    /// Begins to delete pieces whose span is there, whatever is being sent: on a busy server something always is.
    fn delete_superfluous(&mut self, deleting: &mut Deleting) {
        let waits = self.failures > 0 || self.delete_at > Instant::now();
        if waits || !deleting.is_empty() || self.superfluous.is_empty() {
            return;
        }
        let count = self.superfluous.len().min(DELETE_BATCH);
        let names: Vec<ObjectName> = self.superfluous.drain(..count).collect();
        let location = self.path.context.writers[self.location].location().clone();
        deleting.spawn(async move {
            let result = location.delete(&names).await;
            (names, result)
        });
    }

    /// What is left is found again by sync; an identity that may not delete leaves it to prune.
    fn deleted(&mut self, names: Vec<ObjectName>, result: Result<()>) {
        if let Err(error) = result {
            tracing::debug!(%error, "superseded pieces are left for now");
            self.superfluous.extend(names);
            self.delete_at = Instant::now() + DELETE_AGAIN_AFTER;
        }
        self.superfluous.truncate(SUPERFLUOUS_MAX);
    }

    /// Begins to store the head of an idle server, if it is time.
    fn store_head(&mut self, heading: &mut Heading) {
        let waits = self.failures > 0 || self.last_stored.elapsed() < HEAD_EVERY;
        if waits || !heading.is_empty() {
            return;
        }
        let known = self.path.board.read(|state| {
            let branch = state.lines.get(&state.current)?.branch()?;
            let (end, clock) = state.server.quiet?;
            let covered = state.frontier.stored(self.location);
            (state.server.connected && end <= covered).then_some(Head { branch, covered, clock })
        });
        if let Some(head) = known {
            self.head_seq = (self.head_seq + 1).max(jiff::Timestamp::now().as_second() as u64);
            heading.spawn(put_head(self.path.clone(), self.location, head, self.head_seq));
        }
    }
}

/// A panic goes on in the task that waited; nothing here is ever cancelled but with it.
fn done<T>(joined: std::result::Result<T, JoinError>) -> T {
    joined.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// What is stored counts at once, whatever the shipper is waiting for.
async fn send(
    path: Arc<WalPath>,
    location: usize,
    item: Arc<Item>,
) -> (Arc<Item>, Result<Vec<ObjectName>>) {
    let result = put(&path, location, &item).await.map(|()| {
        tracing::trace!(location, range = %item.range, "stored");
        path.board.update(|state| state.shelf.sent(location, &item))
    });
    (item, result)
}

async fn put(path: &WalPath, location: usize, item: &Arc<Item>) -> Result<()> {
    let (sealed, what) = (path.sealed.clone(), item.clone());
    let bytes = super::blocking(move || sealed.read(&what)).await?;
    if bytes.len() as u64 != item.size {
        let reason = format!("{} in the spool has another size than it had", item.name());
        return Err(Error::new(Kind::Corrupt, reason).remedy("look at the spool's disk"));
    }
    path.context.writers[location].put(&item.name(), item.epoch, bytes).await.map(drop)
}

async fn put_head(path: Arc<WalPath>, location: usize, head: Head, seq: u64) -> Result<()> {
    let context = &path.context;
    let epoch = context.epochs.current().await?;
    let agent = context.settings.agent.clone();
    let sealed = head.seal(&epoch, context.system, agent, seq);
    context.writers[location].put(&sealed.name, epoch.id(), sealed.bytes).await.map(drop)
}
