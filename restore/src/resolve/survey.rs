//! What has been read for a plan: manifests, origins, footers, heads, and decoded WAL where nothing less will do.

use super::extend::Extension;
use super::footers::Footers;
use super::line::{Line, Past};
use super::reach::{Reach, Stretch};
use crate::access::Access;
use crate::wal_source::{WalSource, pieces};
use backstay_common::catalog::Catalog;
use backstay_common::gap::Gap;
use backstay_common::head::Head;
use backstay_common::id::{Branch, SnapshotId};
use backstay_common::lease::{self, Lease};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::ObjectName;
use backstay_common::origin::Origin;
use backstay_common::pgtime::PgTime;
use backstay_common::segment::{SegmentSize, TimelineId};
use backstay_common::snapshot::{Manifest, ManifestPlain};
use backstay_common::span::SpanMeta;
use backstay_common::wal::{Decoder, Event, WalVersion};
use backstay_common::{Error, Kind, Result};
use futures::{StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::OnceCell;

/// Small objects that are read at once.
const READS_AT_ONCE: usize = 16;
/// Footers that are read at once: two small requests each.
pub const FOOTERS_AT_ONCE: usize = 32;
/// Of each agent only so many heads are looked at: the newest says the most.
const HEADS_READ_MAX: usize = 16;
/// How many footers tell how recent a branch is.
const RECENT_FOOTERS: usize = 8;

/// Everything that a plan is decided from.
#[derive(Debug)]
pub struct Survey {
    pub source: WalSource,
    pub snapshots: BTreeMap<SnapshotId, ManifestPlain>,
    pub pasts: BTreeMap<Branch, Past>,
    pub histories: BTreeMap<Branch, (TimelineId, String)>,
    /// What agents have recorded of WAL that nobody has, in the order of branches and positions.
    pub gaps: Vec<Gap>,
    /// Snapshots and branches that could not be read, in words.
    pub notes: Vec<String>,
    pub(super) extension: Option<Extension>,
    footers: Footers,
    heads: OnceCell<Vec<Head>>,
    retry: AtomicBool,
}

/// The records between two positions, decoded.
#[derive(Debug)]
pub struct Decoded {
    pub events: Vec<Event>,
    /// The last complete record's start,
    pub last_record: Option<Lsn>,
    /// and its end.
    pub record_end: Lsn,
}

impl Survey {
    /// Reads all manifests and origins. One that no location has whole is noted, not fatal; a key that does not fit is.
    pub async fn load(access: &Access, catalog: Arc<Catalog>) -> Result<Survey> {
        let source = WalSource::new(access.clone(), catalog.clone(), None);
        let mut survey = Survey {
            source,
            snapshots: BTreeMap::new(),
            pasts: BTreeMap::new(),
            histories: BTreeMap::new(),
            gaps: Vec::new(),
            notes: Vec::new(),
            extension: None,
            footers: Footers::default(),
            heads: OnceCell::new(),
            retry: AtomicBool::new(false),
        };
        survey.load_snapshots(access, &catalog).await?;
        survey.load_branches(access, &catalog).await?;
        survey.load_gaps(access, &catalog).await?;
        Ok(survey)
    }

    async fn load_snapshots(&mut self, access: &Access, catalog: &Catalog) -> Result<()> {
        let complete = catalog.snapshots.iter().filter(|(_, entry)| !entry.manifest.is_empty());
        let reads = complete.map(|(&snapshot, entry)| async move {
            let name = ObjectName::Manifest { system: catalog.system, snapshot };
            (snapshot, access.read(&name, entry.manifest, Manifest::open).await)
        });
        let read: Vec<_> = futures::stream::iter(reads).buffered(READS_AT_ONCE).collect().await;
        let leases = leases(access, catalog).await;
        for (snapshot, manifest) in read {
            match manifest {
                Ok(m) if lease::is_superseded(snapshot, m.plain.generation, &leases) => {
                    self.notes.push(format!(
                        "snapshot {snapshot} is left out: its agent began it when another had taken over"
                    ));
                }
                Ok(manifest) => drop(self.snapshots.insert(snapshot, manifest.plain)),
                Err(error) => self.note_or_fail(format!("snapshot {snapshot}"), error)?,
            }
        }
        Ok(())
    }

    async fn load_branches(&mut self, access: &Access, catalog: &Catalog) -> Result<()> {
        let reads = catalog.branches.iter().map(|(&branch, entry)| async move {
            let name = ObjectName::Origin { system: catalog.system, branch };
            (branch, access.read(&name, entry.origin, Origin::open).await)
        });
        let read: Vec<_> = futures::stream::iter(reads).buffered(READS_AT_ONCE).collect().await;
        for (branch, origin) in read {
            match origin.and_then(|origin| Ok((origin.ancestors()?, origin))) {
                Ok((ancestors, origin)) => {
                    let covered = catalog.branches[&branch].covered();
                    self.pasts.insert(branch, Past { ancestors, covered });
                    if let Some(history) = origin.history() {
                        let content = String::from_utf8_lossy(history).into_owned();
                        self.histories.insert(branch, (branch.timeline, content));
                    }
                }
                Err(error) => self.note_or_fail(format!("branch {branch}"), error)?,
            }
        }
        Ok(())
    }

    async fn load_gaps(&mut self, access: &Access, catalog: &Catalog) -> Result<()> {
        let system = catalog.system;
        let reads = catalog.gaps.iter().map(|(&(branch, range, id), &places)| async move {
            let name = ObjectName::Gap { system, branch, range, id };
            (name.clone(), access.read(&name, places, Gap::open).await)
        });
        let read: Vec<_> = futures::stream::iter(reads).buffered(READS_AT_ONCE).collect().await;
        for (name, gap) in read {
            match gap {
                Ok(gap) => self.gaps.push(gap),
                Err(error) => self.note_or_fail(format!("record {name}"), error)?,
            }
        }
        Ok(())
    }

    /// What is recorded of gaps on the line's branches.
    pub fn gaps_on<'a>(&'a self, line: &'a Line) -> impl Iterator<Item = &'a Gap> {
        self.gaps.iter().filter(|gap| line.leaves(gap.branch).is_some_and(|to| gap.start < to))
    }

    fn note_or_fail(&mut self, what: String, error: Error) -> Result<()> {
        match error.kind() {
            Kind::Key | Kind::Bug | Kind::Config => Err(error),
            _ => {
                self.notes.push(format!("{what} is left out: {}", error.message()));
                Ok(())
            }
        }
    }

    /// True, once, if an object turned out to be good nowhere but others cover its place: then the same question
    /// gets another answer.
    pub fn take_retry(&self) -> bool {
        self.retry.swap(false, Ordering::Relaxed)
    }

    pub fn wants_retry(&self) -> bool {
        self.retry.load(Ordering::Relaxed)
    }

    /// What a snapshot reaches on a line, if it is on it.
    pub fn reach(&self, line: &Line, snapshot: &ManifestPlain) -> Option<Reach> {
        let extra = self.extension.as_ref().map(|extension| (extension.branch, extension.range));
        super::reach::reach(line, snapshot, &|branch| self.source.usable(branch), extra)
    }

    /// The snapshots that lie on a line, newest first.
    pub fn on_line(
        &self,
        line: &Line,
        only: Option<SnapshotId>,
    ) -> Vec<(SnapshotId, &ManifestPlain)> {
        let fits = |(id, plain): &(SnapshotId, &ManifestPlain)| {
            only.is_none_or(|only| only == *id)
                && line.leaves(plain.branch).is_some_and(|to| plain.stop <= to)
        };
        let all = self.snapshots.iter().map(|(&id, plain)| (id, plain));
        let mut on_line: Vec<_> = all.filter(fits).collect();
        on_line.sort_by_key(|(_, plain)| std::cmp::Reverse((plain.stop, plain.start)));
        on_line
    }

    /// The footer of each stretch.
    pub async fn footers(&self, stretches: &[Stretch]) -> Result<Vec<Arc<SpanMeta>>> {
        self.footers.ask_indexes(&self.source, stretches).await;
        let reads = stretches.iter().map(|stretch| self.footer(stretch));
        futures::stream::iter(reads).buffered(FOOTERS_AT_ONCE).try_collect().await
    }

    async fn footer(&self, stretch: &Stretch) -> Result<Arc<SpanMeta>> {
        let Some(entry) = stretch.object else {
            let extension = self.extension.as_ref();
            let meta = extension.map(|extension| extension.meta.clone());
            return meta.ok_or_else(|| Error::new(Kind::Bug, "a stretch is stored nowhere"));
        };
        if let Some(meta) = self.footers.get(entry.id) {
            return Ok(meta);
        }
        let name = self.source.name(stretch.branch, &entry);
        let read = self.source.access().read_meta(&name, entry.size, entry.places).await;
        match read.and_then(|meta| SpanMeta::read(&meta)) {
            Ok(meta) => Ok(self.footers.keep(entry.id, meta)),
            Err(error) => {
                let spoilt = matches!(error.kind(), Kind::Corrupt | Kind::Missing);
                if spoilt && self.source.pass_over(stretch.branch, &entry, &error) {
                    self.retry.store(true, Ordering::Relaxed);
                }
                Err(error)
            }
        }
    }

    /// Decodes `range` of a branch; it begins at a record's or a page's start. A break in the records is an error.
    pub async fn decode(
        &self,
        branch: Branch,
        range: LsnRange,
        meta: &SpanMeta,
    ) -> Result<Decoded> {
        let mut decoder = self.decoder(branch, range.start, meta)?;
        let mut events = Vec::new();
        for piece in pieces(range) {
            let wal = self.source.read(branch, piece).await?;
            let fed = decoder.feed(&wal, &mut |event| events.push(event));
            fed.map_err(|e| Error::from(e).context(format!("decode branch {branch}")))?;
        }
        let (last_record, record_end) = (decoder.last_record(), decoder.record_end());
        Ok(Decoded { events, last_record, record_end })
    }

    pub(super) fn decoder(&self, branch: Branch, start: Lsn, meta: &SpanMeta) -> Result<Decoder> {
        let version = WalVersion::from_major(meta.major)
            .map_err(|e| Error::new(Kind::Config, e).remedy("use a newer version of Backstay"))?;
        let size = SegmentSize::new(meta.segment_bytes).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("{} is no WAL segment size", meta.segment_bytes))
        })?;
        let system = self.source.catalog().system;
        Ok(Decoder::new(version, size, system, branch.timeline, start))
    }

    /// The newest heads. One that cannot be read is passed over, for it only widens what is covered.
    pub async fn heads(&self) -> &[Head] {
        self.heads.get_or_init(|| self.read_heads()).await
    }

    async fn read_heads(&self) -> Vec<Head> {
        let (access, catalog) = (self.source.access(), self.source.catalog());
        let newest = catalog.heads.iter().flat_map(|(agent, heads)| {
            let newest = heads.iter().rev().take(HEADS_READ_MAX);
            newest.map(move |(&seq, &places)| (agent.clone(), seq, places))
        });
        let reads = newest.map(|(agent, seq, places)| async move {
            let name = ObjectName::Head { system: catalog.system, agent, seq };
            access.read(&name, places, Head::open).await.ok()
        });
        futures::stream::iter(reads)
            .buffered(READS_AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await
    }

    /// The latest moment by which the server's clock proves that `reach` holds all that had happened.
    pub async fn clock(&self, reach: &Reach) -> Result<Option<PgTime>> {
        let footers = self.footers(&reach.stretches).await?;
        let footers = footers.iter().filter_map(|meta| meta.clock);
        Ok(footers.chain(self.head_clocks(reach).await).max())
    }

    async fn head_clocks(&self, reach: &Reach) -> Vec<PgTime> {
        let held = |head: &&Head| head.branch == reach.tip() && head.covered <= reach.end;
        self.heads().await.iter().filter(held).map(|head| head.clock).collect()
    }

    /// When something last happened on the line's own branch, as far as it is stored.
    pub async fn recency(&self, line: &Line, reach: &Reach) -> Result<Option<PgTime>> {
        let own: Vec<Stretch> =
            reach.stretches.iter().filter(|s| s.branch == line.tip()).copied().collect();
        let footers = self.footers(&own[own.len().saturating_sub(RECENT_FOOTERS)..]).await?;
        let told =
            footers.iter().flat_map(|meta| [meta.summary.greatest_time.map(PgTime), meta.clock]);
        let heads = match reach.tip() == line.tip() {
            true => self.head_clocks(reach).await,
            false => Vec::new(),
        };
        Ok(told.flatten().chain(heads).max())
    }

    /// True if WAL before `end` is nowhere but in the damaged server's `pg_wal`.
    pub fn uses_extension(&self, reach: &Reach, end: Lsn) -> bool {
        reach.stretches.iter().any(|stretch| stretch.object.is_none() && stretch.range.start < end)
    }
}

/// Every lease at every place: agents that saw different locations may have made one generation twice. One that cannot be
/// read supersedes nothing.
async fn leases(access: &Access, catalog: &Catalog) -> Vec<Lease> {
    let read = |generation, index: usize| async move {
        let name = ObjectName::Lease { system: catalog.system, generation };
        let bytes = access.locations.get(index)?.get(&name).await.ok()?;
        Lease::read(&bytes, &name).ok()
    };
    let reads = catalog
        .leases
        .iter()
        .flat_map(|(&generation, places)| places.iter().map(move |index| read(generation, index)));
    let read: Vec<_> = futures::stream::iter(reads).buffered(READS_AT_ONCE).collect().await;
    read.into_iter().flatten().collect()
}
