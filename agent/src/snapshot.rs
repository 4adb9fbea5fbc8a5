//! Snapshots: the data directory as it is between backup start and stop, packed, sealed, stored and committed.
//!
//! ```text
//! session   backup start ──────────────────────────────────────────────► backup stop
//!              │                                                            │
//! walk ─► cut ─► read (two threads a core: checksums, hashes)               │ pg_control, label
//!                  │                                                        │
//! parent's hashes ─► diff (what changed: zstd)                              │
//!                  │                                                        ▼
//! parent's maps ─► assemble (maps, table) ─► pack ─► ship ─► commit at each location
//! ```
//!
//! Without file access, `remote ─► tar ─► arrive ─► cut/arriving` take the place of session, walk and cut, and the rest is the same.
//!
//! | file | what it does |
//! |---|---|
//! | `session`, `label` | the connection that holds the backup; what PostgreSQL says of it |
//! | `walk`, `walk/rules` | what is in the data directory, and what of it belongs into a snapshot |
//! | `config_files` | configuration that lives elsewhere |
//! | `remote`, `tar`, `arrive` | a base backup over the network: received, taken apart, sorted |
//! | `server_manifest`, `mend` | whether all of it came whole; which pages with a wrong checksum replay mends |
//! | `parent`, `cache`, `rebuild` | the snapshot to compare with, and what is known of its files |
//! | `cut`, `read`, `readers` | files into jobs, jobs into pages and their hashes, by several threads |
//! | `diff` | pages that changed into frames |
//! | `assemble`, `overlay`, `loose` | files, maps and the table, new over old, while frames arrive out of order |
//! | `usage` | which frames of which packs the snapshot uses |
//! | `pack`, `ship` | frames into packs, packs to all locations |
//! | `commit` | the manifest, last, where all that it needs is listed |
//! | `damage` | pages that are damaged in the database |
//! | `leftover` | what a snapshot that was interrupted has stored, for the next one |
//! | `pace`, `priority` | how fast files are read, and after whom |
//! | `progress`, `outcome`, `hash_key` | how far it is, and what came of it; the key of page hashes |
//!
//! A snapshot is complete whatever it stores: its maps name a frame for every page, its own or an older snapshot's. What it stores
//! is the pages whose content differs from the parent's, and those that must not stay where they are, because a restore would
//! read too much beside them or because their packs are hardly in use.
//!
//! What always holds: nothing is committed unless everything succeeded; a location has a manifest only if it has what the
//! manifest needs. Memory is about 250 MiB (100 MiB more without file access) whatever the size of the database: four sealed packs, one being sealed, one being
//! filled, and what the readers hold. A crash leaves a `begin`, packs that no manifest names, and a
//! journal of them: the next snapshot uses those whose pages are still the same, and prune finds the rest.

mod arrive;
mod assemble;
mod cache;
mod commit;
mod config_files;
mod cut;
mod damage;
mod diff;
#[cfg(test)]
pub(crate) mod fixture;
mod hash_key;
mod label;
mod leftover;
mod local_disk;
mod loose;
mod mend;
mod outcome;
mod overlay;
mod pace;
mod pack;
mod parent;
mod priority;
mod progress;
mod read;
mod readers;
mod rebuild;
mod remote;
mod server_manifest;
mod session;
mod ship;
mod tar;
#[cfg(test)]
mod tests;
mod usage;
mod walk;

pub use outcome::{Phase, Reason, SnapshotOutcome, SnapshotProgress, SnapshotRequest};

use crate::context::AgentContext;
use crate::keeper::PENDING;
use crate::wal::WalStatus;
use assemble::{Assembled, Assembler};
use backstay_common::config::Priority;
use backstay_common::control::ControlFile;
use backstay_common::id::{SnapshotId, random_bytes};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::seal::FRAME_BYTES_MAX;
use backstay_common::snapshot::{Begin, Manifest, ManifestPlain, Root, Tablespace};
use backstay_common::{Error, Kind, Result};
use cache::{CacheWriter, Summary};
use commit::Commit;
use cut::arriving::{self, ArrivingCutter};
use label::BackupLabel;
use leftover::{Journal, Leftover};
use pace::Pace;
use pack::Packs;
use parent::{Parent, Server};
use progress::Meter;
use read::Reading;
use readers::Pool;
use remote::{Received, Remote};
use session::{Session, Source, Watch};
use ship::{Fleet, Parcel};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;
use walk::{Tree, What};

/// So that one computes while the other waits for the disk.
const READERS_PER_CORE: usize = 2;
/// Each holds some 6 MiB.
const READERS_MAX: usize = 16;
/// Jobs that wait for a reader.
const JOBS_MAX: usize = 16;

/// Pages in one part of a file: 1 MiB of it, and at most one frame.
pub fn part_pages(page_bytes: u32) -> u32 {
    FRAME_BYTES_MAX as u32 / page_bytes
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
            read_bytes = outcome.read_bytes,
            changed_bytes = outcome.changed_bytes,
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

/// What the snapshot is taken of.
enum Origin {
    Files(Session, Source),
    Network(Remote),
}

/// What it is put onto.
struct Onto<'a> {
    fleet: &'a Arc<Fleet>,
    parent: &'a Option<Arc<Parent>>,
    cache: &'a Arc<CacheWriter>,
    journal: &'a Arc<Journal>,
    leftover: &'a Arc<Leftover>,
}

impl Onto<'_> {
    fn parent_id(&self) -> Option<SnapshotId> {
        self.parent.as_ref().map(|parent| parent.id())
    }
}

/// What there is when the backup has ended and every pack is sealed.
struct Finished {
    superuser: String,
    /// None if its files cannot be reached.
    files: Option<Source>,
    reading: Arc<Reading>,
    label: BackupLabel,
    /// As it was copied.
    control: ControlFile,
    tablespaces: Vec<Tablespace>,
    parent: Option<SnapshotId>,
    assembled: Assembled,
}

impl Taking<'_> {
    async fn run(&self) -> Result<SnapshotOutcome> {
        let origin = self.open().await?;
        let timeline = self.wal.borrow().timeline;
        let server = match &origin {
            Origin::Files(_, source) => Server::of(source, timeline),
            Origin::Network(remote) => Server::of_remote(remote, timeline),
        };
        let parent = parent::find(self.context, &server).await;
        let (journal, leftover) = self.take_up(server.page_bytes).await?;
        let begin = self.begin(parent.as_ref().map(|parent| parent.id())).await?;
        let fleet = Arc::new(Fleet::new(&self.context.writers, begin));
        let path = cache::path_of(&self.context.settings.state_dir, self.context.system);
        let cache = Arc::new(CacheWriter::create(parent::new_path(&path)));
        let (journal, leftover) = (&journal, &leftover);
        let onto = Onto { fleet: &fleet, parent: &parent, cache: &cache, journal, leftover };
        let finished = match origin {
            Origin::Files(session, source) => self.read(session, source, onto).await?,
            Origin::Network(remote) => self.receive(remote, onto).await?,
        };
        self.meter.enter(Phase::Committing);
        let has_cache = self.finish_cache(&cache, &parent, &finished).await?;
        let mut manifest = self.manifest(finished).await?;
        if !leftover.abandoned.is_empty() {
            manifest.plain.abandoned = Some(leftover.abandoned.clone());
        }
        manifest.plain.new_corrupt_pages = parent
            .as_ref()
            .and_then(|parent| damage::new_pages(&manifest, parent.corrupt.as_deref()));
        let outcome = self.commit(&fleet, &manifest, &parent).await?;
        journal.remove();
        if leftover.used_bytes() > 0 {
            let bytes = leftover.used_bytes();
            tracing::info!(bytes, "not stored again, since an interrupted snapshot had stored it");
        }
        if has_cache && let Err(error) = cache.publish(&path) {
            tracing::warn!(
                "the page-hash cache has no name, the next snapshot fetches the hashes instead: {error}"
            );
        }
        damage::report(&self.context.alarms, self.id, &manifest.root);
        self.meter.enter(Phase::Done);
        Ok(outcome)
    }

    /// Begins the journal of this snapshot, and takes up what those that were interrupted have stored.
    async fn take_up(&self, page_bytes: u32) -> Result<(Arc<Journal>, Arc<Leftover>)> {
        let (state_dir, system) = (self.context.settings.state_dir.clone(), self.context.system);
        let key = cache::fingerprint(&hash_key::read_or_make(&state_dir, system)?);
        let listed = match Journal::is_left(&state_dir, system) {
            true => leftover::listed(&self.context.writers, system).await,
            false => leftover::Listed::default(),
        };
        let begun = leftover::Begun { snapshot: self.id, system, key, page_bytes };
        let now = jiff::Timestamp::now();
        let taken = blocking(move || Ok(Journal::take_up(&state_dir, &begun, &listed, now)));
        let (journal, leftover) = taken.await?;
        if !leftover.abandoned.is_empty() {
            let (snapshots, packs) = (leftover.abandoned.len(), leftover.packs());
            tracing::info!(snapshots, packs, "taking up what an interrupted snapshot has stored");
        }
        Ok((Arc::new(journal), Arc::new(leftover)))
    }

    /// The threads that read, for files on disk.
    fn pool(
        &self,
        onto: &Onto<'_>,
        reading: &Arc<Reading>,
        readers: usize,
        jobs_max: usize,
    ) -> Pool {
        let settings = &self.context.settings.snapshot;
        let is_awaited = matches!(self.request.reason, Reason::Asked | Reason::FirstStart);
        Pool {
            reading: reading.clone(),
            parent: onto.parent.clone(),
            leftover: onto.leftover.clone(),
            cache: onto.cache.clone(),
            meter: self.meter.clone(),
            pace: Arc::new(Pace::new(settings.max_rate)),
            priority: if is_awaited { Priority::Normal } else { settings.priority },
            readers,
            jobs_max,
        }
    }

    /// Also proves that there is a key to seal under.
    async fn begin(&self, parent: Option<SnapshotId>) -> Result<Parcel> {
        let agent = self.context.settings.agent.clone();
        let generation = self.request.generation;
        let begin = Begin { snapshot: self.id, agent, parent, generation };
        let epoch = self.context.epochs.current().await?;
        let sealed = begin.seal(&epoch, self.context.system);
        Ok(Parcel::new(sealed.name, epoch.id(), sealed.bytes, None))
    }

    async fn open(&self) -> Result<Origin> {
        match self.context.settings.postgres.data_dir {
            Some(_) => {
                let (session, source) = Session::open(self.context).await?;
                Ok(Origin::Files(session, source))
            }
            None => Ok(Origin::Network(Remote::open(self.context, self.foreign()).await?)),
        }
    }

    /// From backup start to backup stop, and until every pack is sealed.
    async fn read(&self, mut session: Session, source: Source, onto: Onto<'_>) -> Result<Finished> {
        let tree = self.tree(&source);
        let (start, ()) = tokio::try_join!(
            session.start(self.id, self.request.fast_checkpoint),
            self.count(tree.clone()),
        )?;
        self.meter.enter(Phase::Reading);
        let control = &source.control;
        let (page_bytes, segment_pages) = (control.block_bytes, control.relation_segment_blocks);
        let reading = self.reading(page_bytes, segment_pages, control.has_checksums(), start)?;
        let mut assembler = self.assembler(&onto, &reading);
        let readers = (READERS_PER_CORE * cores()).min(READERS_MAX);
        let (messages, cutter) = self.pool(&onto, &reading, readers, JOBS_MAX).start_on(&tree)?;
        let needed = start.align_down(control.segment_size.bytes());
        let mut watch = Watch { session: &mut session, wal: &self.wal, needed };
        watch.during(assembler.take_all(messages)).await?;
        // Without its last files a snapshot would look whole.
        cutter.await.map_err(panicked)?;
        let (control, mode, bytes) = blocking(move || read_control(&tree.data_dir)).await?;
        assembler.add_control(walk::CONTROL_PATH, mode, bytes).await?;
        let data_dir = source.data_dir.clone();
        let tablespaces = blocking(move || walk::tablespaces(&data_dir)).await?;
        let label = session.stop().await?;
        let assembled = assembler.finish().await?;
        let (superuser, parent) = (source.superuser.clone(), onto.parent_id());
        let files = Some(source);
        Ok(Finished { superuser, files, reading, label, control, tablespaces, parent, assembled })
    }

    /// The same over the network.
    async fn receive(&self, remote: Remote, onto: Onto<'_>) -> Result<Finished> {
        let shape = remote.shape.clone();
        let max_rate = self.context.settings.snapshot.max_rate;
        let backup = remote.start(self.id, self.request.fast_checkpoint, max_rate).await?;
        self.meter.enter(Phase::Reading);
        self.meter.expect(0, backup.bytes());
        let (page_bytes, segment_pages) = (shape.page_bytes, shape.segment_pages);
        let reading =
            self.reading(page_bytes, segment_pages, shape.checksums, backup.start_lsn())?;
        let mut assembler = self.assembler(&onto, &reading);
        let (readers, jobs) = (cores().min(arriving::READERS_MAX), arriving::JOBS_MAX);
        let (links, messages) = self.pool(&onto, &reading, readers, jobs).start()?;
        let receiving = backup.receive(self.context, ArrivingCutter::new(links));
        let (received, ()) = tokio::try_join!(receiving, assembler.take_all(messages))?;
        let Received { label, control, control_bytes, control_mode, tablespaces } = received;
        shape.check(&control)?;
        assembler.add_control(walk::CONTROL_PATH, control_mode, control_bytes).await?;
        let assembled = assembler.finish().await?;
        let (superuser, parent, files) = (shape.superuser, onto.parent_id(), None);
        Ok(Finished { superuser, files, reading, label, control, tablespaces, parent, assembled })
    }

    fn reading(
        &self,
        page_bytes: u32,
        segment_pages: u32,
        checksums: bool,
        start: Lsn,
    ) -> Result<Arc<Reading>> {
        let settings = &self.context.settings;
        let hash_key = hash_key::read_or_make(&settings.state_dir, self.context.system)?;
        let level = settings.snapshot.compression_level;
        Ok(Arc::new(Reading { page_bytes, segment_pages, checksums, start, hash_key, level }))
    }

    fn assembler(&self, onto: &Onto<'_>, reading: &Arc<Reading>) -> Assembler {
        let packs = Packs::new(
            self.context.system,
            self.context.epochs.clone(),
            onto.fleet.clone(),
            self.meter.clone(),
            onto.journal.clone(),
        );
        let (parent, leftover) = (onto.parent.clone(), onto.leftover.clone());
        let (cache, meter) = (onto.cache.clone(), self.meter.clone());
        Assembler::new(packs, parent, leftover, cache, reading.clone(), meter)
    }

    /// Folders that are not the database's, wherever they lie.
    fn foreign(&self) -> Vec<PathBuf> {
        let settings = &self.context.settings;
        let folders = settings.locations.iter().filter_map(|l| l.url.strip_prefix("file://"));
        folders.map(PathBuf::from).chain([settings.state_dir.clone()]).collect()
    }

    fn tree(&self, source: &Source) -> Tree {
        Tree {
            data_dir: source.data_dir.clone(),
            major: self.context.major(),
            catalog_version: source.control.catalog_version,
            foreign: self.foreign(),
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

    /// Ends the cache, which is current once the snapshot is committed. False if there is none.
    async fn finish_cache(
        &self,
        cache: &Arc<CacheWriter>,
        parent: &Option<Arc<Parent>>,
        finished: &Finished,
    ) -> Result<bool> {
        let reading = &finished.reading;
        let all_read = parent.as_ref().and_then(|parent| parent.all_read());
        let summary = Summary {
            snapshot: self.id,
            system: self.context.system,
            key: cache::fingerprint(&reading.hash_key),
            page_bytes: reading.page_bytes,
            judged: reading.checksums,
            timeline: finished.label.timeline.get(),
            all_read: all_read.unwrap_or(self.id.began().as_second()),
            table: finished.assembled.shared.clone(),
        };
        let cache = cache.clone();
        blocking(move || Ok(cache.finish(&summary))).await
    }

    async fn manifest(&self, finished: Finished) -> Result<Manifest> {
        let Finished { superuser, files, reading, label, control, tablespaces, parent, assembled } =
            finished;
        let Assembled { mut doubts, .. } = assembled;
        let stop = label.stop.max(control.min_recovery_point);
        let settings = &self.context.settings;
        let branch = commit::branch_of(&self.wal, label.timeline).await?;
        let config_files = match files {
            Some(source) => {
                doubts.judge(stop);
                blocking(move || config_files::read(&source)).await?
            }
            None => {
                let (backup, named) = (LsnRange::new(label.start, stop), doubts.take_named());
                let (context, page_bytes) = (self.context, reading.page_bytes);
                let left = mend::untouched(context, branch, backup, named, page_bytes).await?;
                doubts.add_damaged(left);
                Vec::new()
            }
        };
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
            stored_bytes: assembled.stored_bytes,
            epochs: assembled.epochs,
            packs: assembled.packs,
            database_bytes: assembled.bytes,
            files: assembled.files,
            parent,
            corrupt_pages: doubts.corrupt_count,
            abandoned: None,
            new_corrupt_pages: None,
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
            superuser,
            checksums: reading.checksums,
            corrupt_pages: doubts.corrupt,
            written_by: concat!("backstay-agent ", env!("CARGO_PKG_VERSION")).to_string(),
        };
        Ok(Manifest { plain, root })
    }

    async fn commit(
        &self,
        fleet: &Fleet,
        manifest: &Manifest,
        parent: &Option<Arc<Parent>>,
    ) -> Result<SnapshotOutcome> {
        let epoch = self.context.epochs.current().await?;
        let sealed = manifest.seal(&epoch)?;
        let parcel = Parcel::new(sealed.name, epoch.id(), sealed.bytes, None);
        let (context, plain) = (&**self.context, &manifest.plain);
        let parent = parent.as_deref();
        let commit = Commit { fleet, wal: &self.wal, plain, parent, manifest: &parcel };
        let (mut committed, mut pending) = (Vec::new(), Vec::new());
        for (location, done) in commit.everywhere().await {
            match done {
                Ok(()) => {
                    context.alarms.clear(PENDING, location.as_str());
                    committed.push(location);
                }
                Err(error) => {
                    let reason =
                        format!("snapshot {} is not committed there: {}", self.id, error.message());
                    context.alarms.raise(PENDING, location.as_str(), &reason);
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
            parent: plain.parent,
            start: plain.start,
            stop: plain.stop,
            committed,
            pending,
            database_bytes: plain.database_bytes,
            read_bytes: self.meter.read_bytes(),
            changed_bytes: self.meter.changed_bytes(),
            stored_bytes: plain.stored_bytes,
            seconds: self.started.elapsed().as_secs_f64(),
            corrupt_pages: plain.corrupt_pages,
        })
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
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
    tokio::task::spawn_blocking(work).await.map_err(panicked)?
}

fn panicked(error: tokio::task::JoinError) -> Error {
    Error::new(Kind::Bug, format!("a thread of the snapshot panicked: {error}"))
}
