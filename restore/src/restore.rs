//! A restore, from the plan to the open cluster.
//!
//! ```text
//! plan ─► refusals        directory, layout, room, port, binaries: nothing is touched before all have passed
//!         claim           directory.rs     ours, locked, marked as unfinished
//!         fetch + write   fetch.rs, materialize.rs
//!         settings        settings_files.rs
//!         WAL ─┬─ replay  wal_spool.rs, server.rs, replay.rs
//!              └─ open    stop, sync, start as configured
//! ```
//!
//! A crash anywhere leaves a directory that is marked as unfinished, and the same command goes on from there.

use crate::access::Access;
use crate::binaries::Binaries;
use crate::directory::{self, Claim, Found, Mark};
use crate::fetch::{Packs, read_manifest};
use crate::layout::{Layout, Mapping};
use crate::materialize::{Materialize, sync_file_systems};
use crate::owner::{Owner, is_root};
use crate::pin::Held;
use crate::plan::Plan;
use crate::progress::Progress;
use crate::replay::{self, Reached};
use crate::report::Report;
use crate::server::{Place, Preload, ReplayServer, check_port, start_command, start_normally};
use crate::settings_files::{self as settings, AtTarget, SettingsFiles};
use crate::wal_source::WalSource;
use crate::wal_source::local::LocalWal;
use crate::wal_spool::{Frozen, ReadWal, SavedAccess, Spool, segment_size};
use backstay_common::catalog::Catalog;
use backstay_common::location::Location;
use backstay_common::snapshot::Manifest;
use backstay_common::{Context, Error, Kind, Result, control};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// What is asked for besides the target.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Absolute.
    pub dir: PathBuf,
    pub start: bool,
    pub force: bool,
    /// Restore over the cluster's own directory.
    pub delta: bool,
    pub owner: Option<String>,
    pub port: Option<u16>,
    pub pg_bin: Option<PathBuf>,
    pub tablespaces: Vec<Mapping>,
    /// No progress is shown.
    pub quiet: bool,
    /// How `wal-fetch` reaches the locations later.
    pub saved: SavedAccess,
}

/// Everything that is decided before anything is touched.
struct Ready<'a> {
    plan: &'a Plan,
    request: &'a Request,
    manifest: Manifest,
    locations: Vec<Location>,
    layout: Layout,
    found: Found,
    owner: Owner,
    binaries: Option<Binaries>,
}

/// Restores. `begun` is when the command was given. Dropping it stops a server that it has started; the directory then stays
/// marked as unfinished.
pub async fn restore(
    access: &Access,
    catalog: Arc<Catalog>,
    plan: &Plan,
    request: &Request,
    begun: Instant,
) -> Result<Report> {
    let ready = prepare(access, plan, request).await?;
    let mut report = Report::new(plan, request.dir.clone());
    report.phase("plan", begun.elapsed().as_secs_f64());
    // Before anything is fetched; a restore that fails leaves it, and may be taken up while it holds.
    let held = Held::take(access, &catalog, plan, &request.dir).await?;
    report.notes.extend(held.notes.iter().cloned());
    let claim = ready.claim()?;
    report.moved_to = claim.moved_to.clone();
    ready.materialize(access, &claim, &mut report).await?;
    let spool = ready.write_settings(&claim, &mut report)?;
    if request.start
        && let Err(error) = check_configured_port(ready.files())
    {
        // It may be free by then.
        tracing::warn!(
            "the restore goes on, but its server will not start as it is configured: {error}"
        );
    }
    let source = wal_source(access, catalog, plan)?;
    let read = reader(&source);
    match request.start {
        true => ready.recover(&claim, &spool, &*read, &mut report).await?,
        false => ready.leave_ready(&claim, &spool, &*read, &mut report).await?,
    }
    let opened = match request.start {
        true => ready.open(&mut report).await,
        false => Ok(()),
    };
    // All is here, whether the server has started or not.
    held.give_back().await;
    opened?;
    report.total_seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

async fn prepare<'a>(access: &Access, plan: &'a Plan, request: &'a Request) -> Result<Ready<'a>> {
    check_directory_name(&request.dir)?;
    let found = match directory::inspect(&request.dir, &plan.cluster, plan.system)? {
        Found::Occupied if request.delta => directory::recognise(&request.dir, plan.system)?,
        Found::Unfinished(mark) if mark.delta && request.force => Found::Occupied,
        Found::Unfinished(mark) if mark.delta && !request.delta => {
            return Err(unfinished_delta(&request.dir));
        }
        found => found,
    };
    directory::check(&request.dir, &found, request.force)?;
    check_wal_from(plan, request, &found)?;
    // A directory that is kept keeps its owner; a new one is its parent's.
    let beside = match &found {
        Found::SameCluster(_) => request.dir.join("global"),
        _ => request.dir.clone(),
    };
    let owner = Owner::choose(request.owner.as_deref(), &beside)?;
    let major = plan.server_version / 10_000;
    let binaries = Binaries::find(major, request.pg_bin.as_deref());
    let binaries = match request.start || request.pg_bin.is_some() {
        true => Some(binaries?),
        false => binaries.ok(),
    };
    if request.start {
        refuse_root(owner)?;
        request.port.map_or(Ok(()), |port| check_port(port, None))?;
    }
    let locations = in_order(access, plan);
    let manifest = read_manifest(&locations, &access.keyring, plan.system, plan.snapshot).await?;
    let layout =
        Layout::new(request.dir.clone(), &manifest.root.tablespaces, &request.tablespaces)?;
    if let Found::SameCluster(outside) = &found {
        layout.check_moves(outside, &request.tablespaces)?;
    }
    directory::check_outside(layout.outside(), &found)?;
    let is_new = !matches!(found, Found::Unfinished(_) | Found::SameCluster(_));
    if is_new && request.tablespaces.is_empty() {
        // WAL lies in the spool and, once replayed, in pg_wal.
        directory::check_room(&request.dir, plan.database_bytes + 2 * plan.wal_bytes + (64 << 20))?;
    }
    Ok(Ready { plan, request, manifest, locations, layout, found, owner, binaries })
}

/// The port that the server will listen on, unless somebody listens there.
fn check_configured_port(files: SettingsFiles<'_>) -> Result<u16> {
    let port = files.port()?;
    check_port(port, files.socket_directory()?.as_deref()).map(|()| port)
}

/// It was somebody's cluster, and goes on being changed only if that is asked for again.
fn unfinished_delta(dir: &Path) -> Error {
    let reason = format!("--into {}: a restore over this cluster was interrupted", dir.display());
    Error::new(Kind::Config, reason)
        .remedy("give the same command again, with --delta, or --force to move the directory aside")
}

/// What is restored over has no `pg_wal` any more when its WAL is wanted.
fn check_wal_from(plan: &Plan, request: &Request, found: &Found) -> Result<()> {
    let is_delta = match found {
        Found::Unfinished(mark) => mark.delta,
        found => matches!(found, Found::SameCluster(_)),
    };
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let own = [real(&request.dir), real(&request.dir.join("pg_wal"))];
    match &plan.wal_from {
        Some(from) if is_delta && own.iter().any(|own| real(from).starts_with(own)) => {
            let reason =
                format!("--wal-from {} is in the directory that is restored over", from.display());
            Err(Error::new(Kind::Config, reason)
                .remedy("copy that folder to another place first, and give the copy"))
        }
        _ => Ok(()),
    }
}

/// The name becomes part of a command line and of a configuration file.
fn check_directory_name(dir: &Path) -> Result<()> {
    let is_plain = dir.to_str().is_some_and(|name| !name.chars().any(char::is_control));
    match is_plain && dir.is_absolute() && dir.file_name().is_some() {
        true => Ok(()),
        false => {
            Err(Error::new(Kind::Config, format!("--into {dir:?} cannot be a target directory"))
                .remedy("give a directory whose path is plain text, and not /"))
        }
    }
}

fn refuse_root(owner: Owner) -> Result<()> {
    match owner.uid {
        0 => Err(Error::new(Kind::Config, "PostgreSQL does not run as root, to whom the target's parent directory belongs")
            .remedy("give --owner postgres, or restore below a directory of the user that PostgreSQL runs as")),
        _ => Ok(()),
    }
}

/// The plan's order, of those that answer now.
fn in_order(access: &Access, plan: &Plan) -> Vec<Location> {
    let named = |name| access.locations.iter().find(|location| location.name() == name).cloned();
    plan.locations.iter().filter_map(named).collect()
}

/// Reads the plan's WAL, from the locations and what the damaged server still has.
pub fn wal_source(access: &Access, catalog: Arc<Catalog>, plan: &Plan) -> Result<WalSource> {
    let local = match (&plan.wal_from, plan.legs.last()) {
        (Some(folder), Some(leg)) => Some(LocalWal::new(folder, leg.branch, segment_size(plan)?)),
        _ => None,
    };
    Ok(WalSource::new(access.clone(), catalog, local))
}

/// The source as the spool wants it.
pub fn reader(source: &WalSource) -> Box<ReadWal<'_>> {
    Box::new(move |branch, range| Box::pin(source.read(branch, range)))
}

impl Ready<'_> {
    fn claim(&self) -> Result<Claim> {
        let mark = Mark {
            cluster: self.plan.cluster.clone(),
            system: self.plan.system,
            snapshot: self.plan.snapshot,
            target: self.plan.target.clone(),
            outside: self.layout.outside().cloned().collect(),
            delta: match &self.found {
                Found::Unfinished(mark) => mark.delta,
                found => matches!(found, Found::SameCluster(_)),
            },
        };
        directory::claim(
            &self.request.dir,
            self.found.clone(),
            self.request.force,
            self.owner,
            &mark,
        )
    }

    async fn materialize(&self, access: &Access, claim: &Claim, report: &mut Report) -> Result<()> {
        let begun = Instant::now();
        let packs = Packs::open(&self.locations, &access.keyring, &self.manifest.plain).await?;
        let total = self.manifest.plain.database_bytes;
        let work = Materialize {
            packs: &packs,
            manifest: &self.manifest,
            layout: &self.layout,
            owner: self.owner,
            existing: claim.existing,
            progress: Arc::new(Progress::new("snapshot", total, self.request.quiet)),
        };
        let done = work.run().await?;
        (report.files, report.written_bytes, report.kept_bytes) =
            (done.files, done.written_bytes, done.kept_bytes);
        report.removed_files = done.removed_files;
        report.read_from = packs.read_from();
        report.phase("fetch and write", begun.elapsed().as_secs_f64());
        Ok(())
    }

    fn files(&self) -> SettingsFiles<'_> {
        SettingsFiles { dir: &self.request.dir, owner: self.owner }
    }

    fn write_settings(&self, claim: &Claim, report: &mut Report) -> Result<Spool> {
        let frozen = Frozen { plan: self.plan.clone(), access: self.request.saved.clone() };
        let spool = Spool::create(&claim.ours(), self.owner, &frozen)?;
        report.notes.extend(self.plan.notes.iter().cloned());
        report.notes.extend(self.files().place_config(&self.manifest.root, claim.existing)?);
        let control = control::read(&self.request.dir.join("global/pg_control"))?;
        let minimums = settings::minimums(&control, &self.plan.minimums);
        let recovery = self.recovery_lines(claim);
        let major = self.manifest.plain.major();
        let safety = settings::safety_lines(&minimums, major, self.request.port);
        report.cleared = self.files().prepare_recovery(&recovery, &safety)?;
        let corrupt = self.manifest.root.corrupt_pages.len();
        if corrupt > 0 {
            let first = &self.manifest.root.corrupt_pages[0];
            report.notes.push(format!(
                "{corrupt} pages were damaged at the source already, the first in {} block {}",
                first.path, first.block
            ));
        }
        Ok(spool)
    }

    fn recovery_lines(&self, claim: &Claim) -> Vec<String> {
        let at_target = if self.request.start { AtTarget::Pause } else { AtTarget::Promote };
        settings::recovery_lines(self.plan, &claim.ours(), at_target)
    }

    fn place(&self) -> Result<Place> {
        let binaries = self.binaries.clone();
        Ok(Place {
            binaries: binaries.ok_or_else(|| Error::new(Kind::Bug, "no PostgreSQL was found"))?,
            dir: self.request.dir.clone(),
            owner: self.owner,
            superuser: self.manifest.root.superuser.clone(),
            database_bytes: self.plan.database_bytes,
        })
    }

    /// Without `--start`: all WAL in the clear, and the one line that does the rest.
    async fn leave_ready(
        &self,
        claim: &Claim,
        spool: &Spool,
        read: &ReadWal<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let begun = Instant::now();
        let progress = Progress::new("WAL", self.plan.wal_bytes, self.request.quiet);
        spool.fill(self.plan, read, &progress).await?;
        sync_file_systems(&self.layout)?;
        claim.complete()?;
        report.phase("WAL", begun.elapsed().as_secs_f64());
        let command = start_command(self.binaries.as_ref(), &self.request.dir, self.owner);
        report.next.push(format!("start it, and it recovers to the target and opens: {command}"));
        if self.binaries.is_none() {
            report.notes.push(format!(
                "PostgreSQL {} is not on this host; it is needed to start the cluster",
                self.manifest.plain.major()
            ));
        }
        report.notes.extend(start_note(self.owner));
        report.next.push(AGENT_AGAIN.into());
        Ok(())
    }

    /// With `--start`: replayed while the WAL still comes, promoted, and stopped: complete, and as durable as it will be.
    async fn recover(
        &self,
        claim: &Claim,
        spool: &Spool,
        read: &ReadWal<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let place = self.place()?;
        let begun = Instant::now();
        let (server, reached) = match self.replay(&place, spool, read, Preload::Nothing).await {
            Err(error) if needs_libraries(spool) => {
                tracing::warn!(
                    error = error.message(),
                    "again, with the libraries that it preloads"
                );
                self.replay(&place, spool, read, Preload::AsConfigured).await?
            }
            result => result?,
        };
        report.phase("WAL and replay", begun.elapsed().as_secs_f64());
        let stopping = Instant::now();
        server.stop().await.context("stop the server after replay")?;
        sync_file_systems(&self.layout)?;
        self.files().finish_recovery(&self.recovery_lines(claim))?;
        spool.clear()?;
        claim.complete()?;
        report.reached = Some(reached);
        report.phase("stop and sync", stopping.elapsed().as_secs_f64());
        Ok(())
    }

    /// Starts what is complete as it is configured.
    async fn open(&self, report: &mut Report) -> Result<()> {
        let place = self.place()?;
        let opening = Instant::now();
        let port = check_configured_port(self.files()).map_err(|error| {
            let start = start_command(Some(&place.binaries), &place.dir, place.owner);
            let remedy = format!(
                "set another port in {}/postgresql.auto.conf, then: {start}",
                place.dir.display()
            );
            Error::new(error.kind(), error.message())
                .context("the cluster is restored and complete, but not started")
                .remedy(remedy)
        })?;
        start_normally(&place).await?;
        report.phase("open", opening.elapsed().as_secs_f64());
        report.notes.push(format!("the server runs and answers on port {port}"));
        report.next.push(AGENT_AGAIN.into());
        Ok(())
    }

    async fn replay(
        &self,
        place: &Place,
        spool: &Spool,
        read: &ReadWal<'_>,
        preload: Preload,
    ) -> Result<(ReplayServer, Reached)> {
        let mut server = ReplayServer::start(place, preload)?;
        let progress = Progress::new("replay", self.plan.wal_bytes, self.request.quiet);
        let hidden = Progress::new("WAL", self.plan.wal_bytes, true);
        let start = self.plan.legs.first().map_or(self.plan.end, |leg| leg.start);
        let fill = spool.fill(self.plan, read, &hidden);
        let watch = replay::run(&mut server, start, &progress);
        // Replay may be over before the last bytes of the plan are fetched; then nobody needs them.
        let reached = {
            futures::pin_mut!(fill, watch);
            match futures::future::select(fill, watch).await {
                futures::future::Either::Left((filled, watch)) => {
                    filled?;
                    watch.await
                }
                futures::future::Either::Right((reached, _)) => reached,
            }
        }?;
        Ok((server, reached))
    }
}

fn needs_libraries(spool: &Spool) -> bool {
    let log = std::fs::read_to_string(spool.folder().join("recovery.log"));
    log.is_ok_and(|log| log.contains("resource manager with ID"))
}

const AGENT_AGAIN: &str = "so that backups go on: point [postgres] of the agent's config at this cluster, run \
    `backstay-agent check`, and start the agent; it makes a slot, follows the new timeline and takes a snapshot";

/// Warns root, who can restore but not start.
fn start_note(owner: Owner) -> Option<String> {
    (is_root() && owner.uid == 0)
        .then(|| "the files belong to root, as whom PostgreSQL does not run: chown them to its user first".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strange_targets_are_refused() {
        for bad in ["/", "relative", "/a\nb"] {
            assert!(check_directory_name(Path::new(bad)).is_err(), "{bad:?}");
        }
        assert!(check_directory_name(Path::new("/srv/data")).is_ok());
    }
}
