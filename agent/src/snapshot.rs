//! Snapshots: the data directory as it is between backup start and stop, packed, sealed, stored and committed.
//!
//! ```text
//! session   backup start ──────────────────────────────────────────────► backup stop
//!              │                                                            │
//! walk ─► cut ─► read (one thread a core: checksums, hashes, zstd)          │ pg_control, label
//!                  │                                                        ▼
//!               assemble (loose: maps, table) ─► pack ─► ship ─► commit at each location
//! ```
//!
//! | file | what it does |
//! |---|---|
//! | `session`, `label` | the connection that holds the backup; what PostgreSQL says of it |
//! | `walk`, `walk/rules` | what is in the data directory, and what of it belongs into a snapshot |
//! | `config_files` | configuration that lives elsewhere |
//! | `cut`, `read` | files into jobs, jobs into frames |
//! | `assemble`, `loose` | files, maps and the table, in order, while frames arrive out of order |
//! | `pack`, `ship` | frames into packs, packs to all locations |
//! | `commit` | the manifest, last, where all that it needs is listed |
//! | `progress`, `hash_key` | how far it is; the key of page hashes |
//!
//! What always holds: nothing is committed unless everything succeeded; a location has a manifest only if it has what the
//! manifest needs. Memory is about 250 MiB whatever the size of the database: four sealed packs, one being sealed, one being
//! filled, and what the readers hold. A crash leaves a `begin` and packs that no manifest names, for prune to find.

mod assemble;
mod commit;
mod config_files;
mod cut;
#[cfg(test)]
mod fixture;
mod hash_key;
mod label;
mod loose;
mod pack;
mod progress;
mod read;
mod session;
mod ship;
mod walk;

use crate::context::AgentContext;
use crate::wal::WalStatus;
use assemble::{Assembled, Assembler};
use backstay_common::control::ControlFile;
use backstay_common::id::{LocationName, SnapshotId, random_bytes};
use backstay_common::lsn::Lsn;
use backstay_common::snapshot::{Begin, Manifest, ManifestPlain, Root, Tablespace};
use backstay_common::{Error, Kind, Result};
use commit::Commit;
use cut::Cutter;
use label::BackupLabel;
use pack::Packs;
use progress::Meter;
use read::{Reader, Reading};
use serde::{Deserialize, Serialize};
use session::{Session, Source};
use ship::{Fleet, Parcel};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use walk::{Tree, What};

/// Frames that wait for the assembler, of at most 1 MiB each.
const MESSAGES_MAX: usize = 16;
/// Jobs that wait for a reader.
const JOBS_MAX: usize = 16;
/// How often the backup session is looked after while files are read.
const SESSION_CHECKED_EVERY: Duration = Duration::from_secs(15);
/// More alarms than this about damaged files help nobody.
const ALARMS_MAX: usize = 100;

/// What is asked of a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotRequest {
    /// An immediate checkpoint; else PostgreSQL spreads it over minutes.
    pub fast_checkpoint: bool,
    pub reason: Reason,
    /// Of the lease that is held.
    pub generation: u64,
}

/// Why a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    FirstStart,
    Scheduled,
    /// One was due while the agent was down.
    CaughtUp,
    /// The server is on another timeline than the newest snapshot: after a restore or a promotion.
    NewTimeline,
    /// WAL is missing, and only a snapshot makes moments after the gap reachable.
    AfterGap,
    Asked,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting for PostgreSQL's checkpoint.
    #[default]
    Starting,
    Reading,
    /// Waiting for packs and WAL to be at the locations.
    Committing,
    Done,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Starting => "starting",
            Phase::Reading => "reading",
            Phase::Committing => "committing",
            Phase::Done => "done",
        })
    }
}

/// How far a snapshot has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// None before the first.
    pub id: Option<SnapshotId>,
    pub phase: Phase,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub files_done: u64,
    pub files_total: u64,
    /// Bytes of the packs so far, counted once whatever the number of locations.
    pub stored_bytes: u64,
    pub started: Option<jiff::Timestamp>,
}

/// A snapshot that is committed at one location at least.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotOutcome {
    pub id: SnapshotId,
    /// Where replay begins.
    pub start: Lsn,
    /// From here on it is consistent.
    pub stop: Lsn,
    pub committed: Vec<LocationName>,
    /// Where it is not committed, and why.
    pub pending: Vec<(LocationName, String)>,
    pub database_bytes: u64,
    pub stored_bytes: u64,
    pub seconds: f64,
    pub corrupt_pages: u64,
}

impl fmt::Display for SnapshotOutcome {
    /// Several lines, for a person.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let committed: Vec<&str> = self.committed.iter().map(LocationName::as_str).collect();
        writeln!(f, "snapshot {} taken in {:.1} s", self.id, self.seconds)?;
        writeln!(f, "  start {}, consistent from {}", self.start, self.stop)?;
        let (database, stored) = (mib(self.database_bytes), mib(self.stored_bytes));
        writeln!(f, "  {database:.1} MiB read, {stored:.1} MiB stored")?;
        write!(f, "  committed at {}", committed.join(", "))?;
        for (location, reason) in &self.pending {
            write!(f, "\n  NOT committed at {location}: {reason}")?;
        }
        match self.corrupt_pages {
            0 => Ok(()),
            pages => write!(f, "\n  {pages} pages fail their checksum at the source"),
        }
    }
}

/// Takes a snapshot. Safe to drop: the backup ends with its session, and nothing is committed that is not complete.
///
/// Fails with [`Kind::Storage`] if no location could be committed to, [`Kind::Cancelled`] when the agent stops.
pub async fn take(
    context: &Arc<AgentContext>,
    wal: watch::Receiver<WalStatus>,
    request: SnapshotRequest,
    progress: watch::Sender<SnapshotProgress>,
) -> Result<SnapshotOutcome> {
    let id = SnapshotId::new(jiff::Timestamp::now(), random_bytes());
    let meter = Arc::new(Meter::new(id, progress));
    tracing::info!(snapshot = %id, reason = ?request.reason, "snapshot begins");
    let taking =
        Taking { context, wal, request, id, meter: meter.clone(), started: Instant::now() };
    let outcome = tokio::select! {
        outcome = taking.run() => outcome,
        () = meter.keep_telling() => unreachable!("it tells for ever"),
        () = context.stop.cancelled() => Err(Error::new(Kind::Cancelled, "the agent is stopping")),
    };
    match &outcome {
        Ok(outcome) => tracing::info!(
            snapshot = %id,
            database_bytes = outcome.database_bytes,
            stored_bytes = outcome.stored_bytes,
            pending = outcome.pending.len(),
            "snapshot done in {:.1} s", outcome.seconds
        ),
        Err(error) => tracing::error!(snapshot = %id, "snapshot failed: {error}"),
    }
    outcome.map_err(|error| error.context(format_args!("snapshot {id}")))
}

/// One snapshot being taken.
struct Taking<'a> {
    context: &'a Arc<AgentContext>,
    wal: watch::Receiver<WalStatus>,
    request: SnapshotRequest,
    id: SnapshotId,
    meter: Arc<Meter>,
    started: Instant,
}

/// What there is when the backup has ended and every pack is sealed.
struct Finished {
    source: Source,
    reading: Arc<Reading>,
    label: BackupLabel,
    /// As it was copied.
    control: ControlFile,
    tablespaces: Vec<Tablespace>,
    assembled: Assembled,
}

impl Taking<'_> {
    async fn run(&self) -> Result<SnapshotOutcome> {
        let (session, source) = Session::open(self.context).await?;
        let fleet = Arc::new(Fleet::new(&self.context.writers, self.begin().await?));
        let finished = self.read(session, source, &fleet).await?;
        self.meter.enter(Phase::Committing);
        let manifest = self.manifest(finished).await?;
        let outcome = self.commit(&fleet, &manifest).await?;
        self.report_damage(&manifest.root);
        self.meter.enter(Phase::Done);
        Ok(outcome)
    }

    /// Also proves that there is a key to seal under.
    async fn begin(&self) -> Result<Parcel> {
        let agent = self.context.settings.agent.clone();
        let generation = self.request.generation;
        let begin = Begin { snapshot: self.id, agent, parent: None, generation };
        let epoch = self.context.epochs.current().await?;
        let sealed = begin.seal(&epoch, self.context.system);
        Ok(Parcel::new(sealed.name, epoch.id(), sealed.bytes, None))
    }

    /// From backup start to backup stop, and until every pack is sealed.
    async fn read(
        &self,
        mut session: Session,
        source: Source,
        fleet: &Arc<Fleet>,
    ) -> Result<Finished> {
        let tree = self.tree(&source);
        let (start, ()) = tokio::try_join!(
            session.start(self.id, self.request.fast_checkpoint),
            self.count(tree.clone()),
        )?;
        self.meter.enter(Phase::Reading);
        let settings = &self.context.settings;
        let reading = Arc::new(Reading {
            page_bytes: source.control.block_bytes,
            segment_pages: source.control.relation_segment_blocks,
            checksums: source.control.has_checksums(),
            start,
            hash_key: hash_key::read_or_make(&settings.state_dir, self.context.system)?,
            level: settings.snapshot.compression_level,
        });
        let packs = Packs::new(
            self.context.system,
            self.context.epochs.clone(),
            fleet.clone(),
            self.meter.clone(),
        );
        let mut assembler = Assembler::new(packs, reading.clone(), self.meter.clone());
        let messages = start_threads(&tree, &reading, &self.meter)?;
        watched(&mut session, assembler.take_all(messages)).await?;
        let (control, mode, bytes) = blocking(move || read_control(&tree.data_dir)).await?;
        assembler.add_control(walk::CONTROL_PATH, mode, bytes).await?;
        let data_dir = source.data_dir.clone();
        let tablespaces = blocking(move || walk::tablespaces(&data_dir)).await?;
        let label = session.stop().await?;
        let assembled = assembler.finish().await?;
        Ok(Finished { source, reading, label, control, tablespaces, assembled })
    }

    fn tree(&self, source: &Source) -> Tree {
        let settings = &self.context.settings;
        let folders = settings.locations.iter().filter_map(|l| l.url.strip_prefix("file://"));
        let foreign = folders.map(PathBuf::from).chain([settings.state_dir.clone()]).collect();
        Tree {
            data_dir: source.data_dir.clone(),
            major: self.context.major(),
            catalog_version: source.control.catalog_version,
            foreign,
        }
    }

    /// How much there is to do, for whoever watches.
    async fn count(&self, tree: Tree) -> Result<()> {
        let meter = self.meter.clone();
        let count = move || {
            // pg_control, which the walk leaves for last.
            let (mut files, mut bytes) = (1, 8192);
            walk::walk(&tree, &mut |found| {
                files += 1;
                if let What::File { size, .. } = found.what {
                    bytes += size;
                }
                Ok(())
            })?;
            meter.expect(files, bytes);
            Ok(())
        };
        blocking(count).await
    }

    async fn manifest(&self, finished: Finished) -> Result<Manifest> {
        let Finished { source, reading, label, control, tablespaces, mut assembled } = finished;
        let stop = label.stop.max(control.min_recovery_point);
        assembled.doubts.judge(stop);
        let settings = &self.context.settings;
        let files = source.clone();
        let config_files = blocking(move || config_files::read(&files)).await?;
        let branch = commit::branch_of(&self.wal, label.timeline).await?;
        let plain = ManifestPlain {
            snapshot: self.id,
            system: self.context.system,
            branch,
            start: label.start,
            stop,
            segment_bytes: control.segment_size.bytes() as u32,
            generation: self.request.generation,
            began: self.id.began().as_second(),
            finished: jiff::Timestamp::now().as_second(),
            server_version: self.context.server_version,
            stored_bytes: assembled.sealing.packs.iter().map(|pack| pack.size).sum(),
            epochs: assembled.sealing.epochs,
            packs: assembled.sealing.packs,
            database_bytes: assembled.bytes,
            files: assembled.files,
            parent: None,
            corrupt_pages: assembled.doubts.corrupt_count,
        };
        let root = Root {
            cluster: settings.cluster.clone(),
            agent: settings.agent.clone(),
            hash_key: reading.hash_key,
            page_bytes: reading.page_bytes,
            table: assembled.table,
            backup_label: label.text,
            tablespaces,
            config_files,
            superuser: source.superuser,
            checksums: reading.checksums,
            corrupt_pages: assembled.doubts.corrupt,
            written_by: concat!("backstay-agent ", env!("CARGO_PKG_VERSION")).to_string(),
        };
        Ok(Manifest { plain, root })
    }

    async fn commit(&self, fleet: &Fleet, manifest: &Manifest) -> Result<SnapshotOutcome> {
        let epoch = self.context.epochs.current().await?;
        let sealed = manifest.seal(&epoch)?;
        let parcel = Parcel::new(sealed.name, epoch.id(), sealed.bytes, None);
        let (context, plain) = (&**self.context, &manifest.plain);
        let commit = Commit { fleet, wal: &self.wal, plain, manifest: &parcel };
        let (mut committed, mut pending) = (Vec::new(), Vec::new());
        for (location, done) in commit.everywhere().await {
            match done {
                Ok(()) => {
                    context.alarms.clear("snapshot-pending", location.as_str());
                    committed.push(location);
                }
                Err(error) => {
                    let reason =
                        format!("snapshot {} is not committed there: {}", self.id, error.message());
                    context.alarms.raise("snapshot-pending", location.as_str(), &reason);
                    pending.push((location, error.message().to_string()));
                }
            }
        }
        if committed.is_empty() {
            let reasons = pending.iter().map(|(location, reason)| format!("{location}: {reason}"));
            let reasons = reasons.collect::<Vec<_>>().join("; ");
            return Err(Error::new(Kind::Storage, format!("committed at no location: {reasons}"))
                .remedy("bring a location back; the next attempt begins anew"));
        }
        Ok(SnapshotOutcome {
            id: self.id,
            start: plain.start,
            stop: plain.stop,
            committed,
            pending,
            database_bytes: plain.database_bytes,
            stored_bytes: plain.stored_bytes,
            seconds: self.started.elapsed().as_secs_f64(),
            corrupt_pages: plain.corrupt_pages,
        })
    }

    /// Alarms for files with damaged pages, and the end of those for files that are whole again.
    fn report_damage(&self, root: &Root) {
        let alarms = &self.context.alarms;
        let damaged = |path: &str| root.corrupt_pages.iter().any(|page| page.path == path);
        for alarm in alarms.list() {
            if alarm.name == "page-corrupt" && !damaged(&alarm.subject) {
                alarms.clear("page-corrupt", &alarm.subject);
            }
        }
        let mut told = 0;
        for pages in root.corrupt_pages.chunk_by(|a, b| a.path == b.path).take(ALARMS_MAX) {
            let (first, blocks) = (&pages[0], pages.len());
            told += blocks;
            let reason = format!(
                "{}: block {} fails its checksum ({blocks} such in the file); snapshot {} has it as it is",
                first.path, first.block, self.id
            );
            alarms.raise("page-corrupt", &first.path, reason);
        }
        if told < root.corrupt_pages.len() {
            tracing::error!(
                "{} more damaged pages are named in the manifest",
                root.corrupt_pages.len() - told
            );
        }
    }
}

/// Starts the cutter and the readers. They end by themselves when the receiver is dropped.
fn start_threads(
    tree: &Tree,
    reading: &Arc<Reading>,
    meter: &Arc<Meter>,
) -> Result<mpsc::Receiver<assemble::Message>> {
    let (send, messages) = mpsc::channel(MESSAGES_MAX);
    let (give, jobs) = std::sync::mpsc::sync_channel(JOBS_MAX);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = Arc::new(Mutex::new(jobs));
    for _ in 0..cores {
        let reader = Reader::new(reading.clone(), meter.clone())?;
        let (jobs, send) = (jobs.clone(), send.clone());
        tokio::task::spawn_blocking(move || reader.work(&jobs, &send));
    }
    let cutter = Cutter::new(give, send, reading.page_bytes);
    let tree = tree.clone();
    tokio::task::spawn_blocking(move || cutter.cut(&tree));
    Ok(messages)
}

/// Does `work`, and fails as soon as the backup session is lost.
async fn watched<T>(session: &mut Session, work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(SESSION_CHECKED_EVERY) => session.check().await?,
        }
    }
}

fn read_control(data_dir: &std::path::Path) -> Result<(ControlFile, u32, Vec<u8>)> {
    use std::os::unix::fs::PermissionsExt;
    let (control, bytes) = read::control(data_dir)?;
    let path = data_dir.join(walk::CONTROL_PATH);
    let found = std::fs::metadata(&path).map_err(|e| walk::unreadable(&path, e))?;
    Ok((control, found.permissions().mode() & 0o7777, bytes))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| {
        Err(Error::new(Kind::Bug, format!("a thread of the snapshot panicked: {e}")))
    })
}
