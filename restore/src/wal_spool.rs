//! The WAL of a restore, in the clear and ahead of replay: `backstay-restore/` in the target directory.
//!
//! ```text
//! plan.json    the frozen plan, and how to reach the locations (no secret)
//! histories/   a .history file for each timeline known
//! wal/         segments, each written whole and then renamed to its place
//! backstay     a copy of this program, for restore_command and recovery_end_command
//! lock         held while the restore runs
//! ```
//!
//! What always holds: a file in `wal/` is a whole segment, and holds exactly the plan's bytes, then zeros. A crash
//! leaves `.tmp` files, which nobody reads. A host that goes down may leave segments that are not whole: a restore
//! syncs the file system before it calls itself complete, and one that is not complete clears the folder when it is
//! taken up again; what `wal-fetch` fetches later is synced one by one.

use crate::directory::{make_directory, sync_directory, write_durably};
use crate::owner::Owner;
use crate::plan::{Leg, Plan};
use crate::progress::Progress;
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::segment::{SegmentNumber, SegmentSize};
use backstay_common::{Context, Error, Kind, Result, pool};
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of WAL that are held in memory at once; one segment is always allowed.
const IN_FLIGHT_BYTES: u64 = 64 << 20;

/// Reads WAL of one branch.
pub type ReadWal<'a> =
    dyn Fn(Branch, LsnRange) -> BoxFuture<'a, Result<Vec<u8>>> + Send + Sync + 'a;

/// What `wal-fetch` needs to know besides the plan, to fetch by itself. It holds no secret: keys are files, credentials
/// come from the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedAccess {
    pub config: Option<PathBuf>,
    pub from: Vec<String>,
    pub key_file: Option<PathBuf>,
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub allow_http: bool,
    pub ca_file: Option<PathBuf>,
}

/// What `plan.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Frozen {
    pub plan: Plan,
    pub access: SavedAccess,
}

/// One segment that replay may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index into [`Plan::legs`].
    pub leg: usize,
    pub number: SegmentNumber,
}

/// The cluster's segment size.
pub fn segment_size(plan: &Plan) -> Result<SegmentSize> {
    SegmentSize::new(plan.segment_bytes).ok_or_else(|| {
        Error::new(
            Kind::Corrupt,
            format!("the plan has WAL segments of {} bytes", plan.segment_bytes),
        )
    })
}

/// The segments of one leg, first to last; none if it is empty.
pub fn segments_of(leg: &Leg, size: SegmentSize) -> std::ops::RangeInclusive<u64> {
    let last = Lsn::new(leg.end.get().saturating_sub(1));
    match leg.start < leg.end {
        true => size.number(leg.start).get()..=size.number(last).get(),
        #[allow(clippy::reversed_empty_ranges)]
        false => 1..=0,
    }
}

/// All segments in the order in which replay asks for them.
pub fn segments(plan: &Plan, size: SegmentSize) -> Vec<Segment> {
    let mut segments = Vec::new();
    for (leg, each) in plan.legs.iter().enumerate() {
        let first = segments_of(each, size);
        let start =
            |number: &u64| Segment { leg, number: size.number(Lsn::new(number * size.bytes())) };
        segments.extend(first.map(|number| start(&number)));
    }
    segments
}

/// Where the bytes of a segment come from, in order: before a leg's own start they are its ancestors', as in the copy that
/// PostgreSQL makes when it switches. Ends at the leg's end; what is left of the segment is zeros.
pub fn sources(plan: &Plan, size: SegmentSize, segment: Segment) -> Vec<(Branch, LsnRange)> {
    let start = size.start(segment.number);
    let end = start.add(size.bytes()).min(plan.legs[segment.leg].end);
    let mut at = start;
    let mut parts = Vec::new();
    for (index, leg) in plan.legs.iter().enumerate().take(segment.leg + 1) {
        let is_own = index == segment.leg;
        let next_start = plan.legs.get(index + 1).map_or(end, |next| next.start);
        let to = if is_own { end } else { leg.end.min(next_start).min(end) };
        // The first leg also answers for what lies before it in its first segment.
        let is_reached = index == 0 || leg.start <= at;
        if is_reached && at < to {
            parts.push((leg.branch, LsnRange::new(at, to)));
            at = to;
        }
    }
    if at < end {
        parts.push((plan.legs[segment.leg].branch, LsnRange::new(at, end)));
    }
    parts
}

/// The folder of a restore's WAL.
#[derive(Clone, Debug)]
pub struct Spool {
    ours: PathBuf,
    owner: Owner,
    /// True if nobody syncs the file system afterwards.
    syncs: bool,
}

impl Spool {
    /// Writes what `wal-fetch` needs: plan, histories, and a copy of this program. WAL of an earlier attempt goes: its plan may
    /// have ended elsewhere, and its last segment is zeros from there on.
    pub fn create(ours: &Path, owner: Owner, frozen: &Frozen) -> Result<Spool> {
        for folder in ["wal", "histories"] {
            let path = ours.join(folder);
            if path.exists() {
                std::fs::remove_dir_all(&path).context(format!("clear {}", path.display()))?;
            }
            make_directory(&ours.join(folder), owner)?;
        }
        for history in &frozen.plan.histories {
            let path = ours.join("histories").join(history.timeline.history_file());
            write_durably(&path, history.content.as_bytes(), owner)?;
        }
        let text = serde_json::to_vec_pretty(frozen).map_err(|e| Error::new(Kind::Bug, e))?;
        write_durably(&ours.join("plan.json"), &text, owner)?;
        copy_program(&ours.join("backstay"), owner)?;
        Ok(Spool { ours: ours.into(), owner, syncs: false })
    }

    /// The spool of a restore, as `wal-fetch` finds it.
    pub fn open(ours: &Path) -> Result<(Spool, Frozen)> {
        let path = ours.join("plan.json");
        let text = std::fs::read(&path).context(format!("read {}", path.display()))?;
        let frozen = serde_json::from_slice(&text)
            .map_err(|e| Error::new(Kind::Corrupt, format!("{}: {e}", path.display())))?;
        let owner = Owner::of_process();
        Ok((Spool { ours: ours.into(), owner, syncs: true }, frozen))
    }

    pub fn history(&self, name: &str) -> PathBuf {
        self.ours.join("histories").join(name)
    }

    pub fn segment(&self, name: &str) -> PathBuf {
        self.ours.join("wal").join(name)
    }

    pub fn owner(&self) -> Owner {
        self.owner
    }

    pub fn folder(&self) -> &Path {
        &self.ours
    }

    /// Fetches every segment of the plan that is not there yet, several at once, in the order of replay.
    pub async fn fill(&self, plan: &Plan, read: &ReadWal<'_>, progress: &Progress) -> Result<()> {
        let size = segment_size(plan)?;
        let at_once = (IN_FLIGHT_BYTES / size.bytes()).clamp(1, 8) as usize;
        stream::iter(segments(plan, size))
            .map(|segment| async move {
                self.fetch(plan, size, segment, read).await?;
                progress.advance(
                    sources(plan, size, segment).iter().map(|(_, range)| range.len()).sum(),
                );
                Ok(())
            })
            .buffered(at_once)
            .try_collect::<()>()
            .await
    }

    /// Fetches one segment, unless it is there.
    pub async fn fetch(
        &self,
        plan: &Plan,
        size: SegmentSize,
        segment: Segment,
        read: &ReadWal<'_>,
    ) -> Result<()> {
        let name = size.file_name(plan.legs[segment.leg].timeline(), segment.number);
        let path = self.segment(&name);
        if path.exists() {
            return Ok(());
        }
        let mut wal = Vec::with_capacity(size.bytes() as usize);
        for (branch, range) in sources(plan, size, segment) {
            let bytes = read(branch, range).await.context(format!("WAL segment {name}"))?;
            if bytes.len() as u64 != range.len() {
                let text = format!("WAL segment {name}: {} bytes for {range}", bytes.len());
                return Err(Error::new(Kind::Bug, text));
            }
            wal.extend_from_slice(&bytes);
        }
        let spool = self.clone();
        pool::run_on_disk(move || spool.write(&path, &wal, size)).await?
    }

    /// What is left of the segment reads as zeros.
    fn write(&self, path: &Path, wal: &[u8], size: SegmentSize) -> Result<()> {
        let doing = || format!("write {}", path.display());
        // What was begun for a replay that failed may be writing the same segment still.
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&temporary).context(doing())?;
        file.write_all_at(wal, 0).and_then(|()| file.set_len(size.bytes())).context(doing())?;
        self.owner.take(&temporary)?;
        if self.syncs {
            file.sync_all().context(doing())?;
        }
        std::fs::rename(&temporary, path).context(doing())?;
        match (self.syncs, path.parent()) {
            (true, Some(folder)) => sync_directory(folder),
            _ => Ok(()),
        }
    }

    /// Removes the WAL and the program: recovery is over. The plan and the logs stay.
    pub fn clear(&self) -> Result<()> {
        let doing = || format!("clear {}", self.ours.display());
        for folder in ["wal", "histories"] {
            unless_gone(std::fs::remove_dir_all(self.ours.join(folder))).context(doing())?;
        }
        unless_gone(std::fs::remove_file(self.ours.join("backstay"))).context(doing())
    }
}

/// An attempt that was cut short may have removed it.
fn unless_gone(removed: std::io::Result<()>) -> std::io::Result<()> {
    removed.or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}

/// A copy, so that recovery needs nothing from elsewhere, and an upgrade of the program does not pull it away.
fn copy_program(to: &Path, owner: Owner) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let doing = || format!("copy this program to {}", to.display());
    let program = std::env::current_exe().context(doing())?;
    let temporary = to.with_extension("tmp");
    std::fs::copy(program, &temporary).context(doing())?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o700)).context(doing())?;
    owner.take(&temporary)?;
    std::fs::rename(&temporary, to).context(doing())
}

#[cfg(test)]
mod tests;
