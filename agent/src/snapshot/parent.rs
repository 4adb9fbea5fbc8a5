//! The parent: the newest committed snapshot that is all there, which the new one is compared with and refers to.
//!
//! Any branch's will do, since content decides. What is known of its files comes from the cache in the state directory if that
//! is of this very snapshot, else from the snapshot itself, if there is a key to open it. If neither is to be had, every page is
//! stored again, and the log says so.

use super::cache::{self, Cache, Known};
use super::hash_key;
use super::leftover;
use super::rebuild;
use super::remote::{Remote, Shape};
use super::session::Source;
use super::usage::Usage;
use super::{blocking, local_disk};
use crate::context::AgentContext;
use crate::writer::Writer;
use backstay_common::id::{EpochId, LocationName, ObjectId, SnapshotId};
use backstay_common::location::Location;
use backstay_common::name::{ObjectName, folder};
use backstay_common::segment::TimelineId;
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::snapshot::packs::PackReader;
use backstay_common::snapshot::{BytesRef, CorruptPage, Manifest, ManifestPlain, PackEntry};
use backstay_common::{Context, Error, Kind, Result};
use bytes::Bytes;
use futures::FutureExt;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Packs with less of them in use, in percent, are given up: what is in use is stored again.
const PACK_LIVE_MIN_PERCENT: u64 = 40;
/// Snapshots that are tried, newest first.
const TRIED_MAX: usize = 3;
/// Everything is read at least so often, in seconds: a week.
const ALL_READ_EVERY: i64 = 7 * 24 * 3600;

/// A snapshot to compare with.
#[derive(Debug)]
pub struct Parent {
    pub plain: ManifestPlain,
    /// The locations at which its manifest was found.
    pub places: Vec<LocationName>,
    /// All pages that are damaged in it, where that is known.
    pub corrupt: Option<Vec<CorruptPage>>,
    cache: Arc<Cache>,
    /// Parts of its table that may be referred to, by their hash.
    table: HashMap<[u8; 32], BytesRef>,
    /// None if every file has to be read.
    skipping: Option<local_disk::LocalDisks>,
}

impl Parent {
    pub fn id(&self) -> SnapshotId {
        self.plain.snapshot
    }

    pub fn known(&self, path: &str) -> Result<Option<Known>> {
        self.cache.known(path)
    }

    /// When all files were read for the last time, if some may be left unread now. Seconds since 1970.
    pub fn all_read(&self) -> Option<i64> {
        self.skipping.as_ref().map(|_| self.cache.summary.all_read)
    }

    /// True if what the file system says of a file on that device is to be believed.
    pub fn may_skip(&self, device: u64, path: &Path) -> bool {
        self.skipping.as_ref().is_some_and(|disks| disks.is_local(device, path))
    }

    /// The part of its table that has exactly these bytes.
    pub fn table_part(&self, hash: &[u8; 32]) -> Option<&BytesRef> {
        self.table.get(hash)
    }

    /// True if none of the bytes lie in a pack that is given up.
    pub fn keeps(&self, bytes: &BytesRef) -> bool {
        keeps(&self.cache.worn_packs, bytes)
    }

    /// Adds those of its packs that the new snapshot uses, and their epochs.
    pub fn add_packs(
        &self,
        usage: &mut Usage,
        epochs: &mut Vec<EpochId>,
        packs: &mut Vec<PackEntry>,
    ) -> Result<()> {
        for entry in &self.plain.packs {
            let mut entry = entry.clone();
            if !usage.settle(&mut entry) {
                continue;
            }
            let epoch =
                *self.plain.epochs.get(entry.epoch as usize).ok_or_else(|| {
                    Error::new(Kind::Corrupt, "the parent names a pack of no epoch")
                })?;
            leftover::add_pack(epoch, entry, epochs, packs);
        }
        Ok(())
    }

    /// Puts one together from a manifest's plain section and a cache of it. `now` in seconds since 1970.
    pub fn new(
        plain: ManifestPlain,
        places: Vec<LocationName>,
        cache: Cache,
        server: &Server,
        now: i64,
    ) -> Parent {
        let summary = &cache.summary;
        let is_same_server = summary.timeline == server.timeline.get()
            && Some(server.timeline) == server.wal_timeline.or(Some(server.timeline))
            && summary.judged == server.checksums;
        let is_recent = (0..ALL_READ_EVERY).contains(&(now - summary.all_read));
        let skipping = (is_same_server && is_recent).then(Default::default);
        let kept = summary.table.iter().filter(|part| keeps(&cache.worn_packs, &part.place));
        let table = kept.map(|part| (part.hash, part.place.clone())).collect();
        Parent { plain, places, corrupt: None, cache: Arc::new(cache), table, skipping }
    }
}

fn keeps(worn: &HashSet<ObjectId>, bytes: &BytesRef) -> bool {
    !bytes.pieces.iter().any(|piece| worn.contains(&piece.frame.pack))
}

/// The packs of which too little is in use.
pub fn worn_packs(plain: &ManifestPlain) -> HashSet<ObjectId> {
    // The footer is no less in use for being large: of frames of zeros it is nearly all of the pack.
    let is_worn = |pack: &&PackEntry| {
        let frame_bytes = pack.frame_bytes.unwrap_or(pack.size);
        pack.live_bytes.saturating_mul(100) < frame_bytes.saturating_mul(PACK_LIVE_MIN_PERCENT)
    };
    plain.packs.iter().filter(is_worn).map(PackEntry::id).collect()
}

/// What is said of the server that the new snapshot is of.
#[derive(Clone, Copy, Debug)]
pub struct Server {
    pub page_bytes: u32,
    pub checksums: bool,
    pub timeline: TimelineId,
    /// Of the WAL that is being received, if any is.
    pub wal_timeline: Option<TimelineId>,
}

impl Server {
    pub fn of(source: &Source, wal_timeline: Option<TimelineId>) -> Server {
        let control = &source.control;
        Server {
            page_bytes: control.block_bytes,
            checksums: control.has_checksums(),
            timeline: control.timeline,
            wal_timeline,
        }
    }

    pub fn of_remote(remote: &Remote, wal_timeline: Option<TimelineId>) -> Server {
        let Shape { page_bytes, checksums, .. } = remote.shape;
        Server { page_bytes, checksums, timeline: remote.timeline, wal_timeline }
    }
}

/// Finds the parent. None if there is no snapshot, or none whose pages are known: the log says why.
pub async fn find(context: &AgentContext, server: &Server) -> Option<Arc<Parent>> {
    let listings = context.writers.iter().map(|writer| survey(context, writer).boxed());
    let listings = futures::future::join_all(listings);
    let listings: Vec<Listing> = listings.await.into_iter().flatten().collect();
    let ids: BTreeSet<SnapshotId> = listings.iter().flat_map(|l| l.manifests.clone()).collect();
    for id in ids.iter().rev().take(TRIED_MAX) {
        match open(context, server, &listings, *id).await {
            Ok(parent) => {
                tracing::info!(parent = %id, skipping = parent.skipping.is_some(), "comparing with the newest snapshot");
                return Some(Arc::new(parent));
            }
            Err(error) => {
                tracing::warn!(snapshot = %id, "cannot compare with this snapshot: {error}");
            }
        }
    }
    if !ids.is_empty() {
        tracing::warn!("there is no snapshot to compare with: every page is stored again");
    }
    None
}

/// True if a location still lists the manifest of `parent`; an error for one that listed it before and no longer does.
pub async fn is_still_listed(parent: &Parent, location: &Location) -> Result<bool> {
    let listed = location.list(&folder::snapshots(parent.plain.system)).await?;
    let name =
        ObjectName::Manifest { system: parent.plain.system, snapshot: parent.plain.snapshot };
    let is_there = listed.iter().any(|listed| listed.name.as_ref() == Some(&name));
    if !is_there && parent.places.contains(location.name()) {
        let (id, place) = (parent.id(), location.name());
        let reason =
            format!("snapshot {id}, which this one refers to, is gone from location {place}");
        return Err(Error::new(Kind::Storage, reason)
            .remedy("the next attempt compares with another snapshot"));
    }
    Ok(is_there)
}

/// What one location has.
struct Listing {
    location: Location,
    manifests: BTreeSet<SnapshotId>,
    packs: HashMap<ObjectName, u64>,
}

async fn survey(context: &AgentContext, writer: &Writer) -> Option<Listing> {
    let (location, system) = (writer.location().clone(), context.system);
    let (snapshots, packs) = (folder::snapshots(system), folder::packs(system));
    match futures::try_join!(location.list(&snapshots), location.list(&packs)) {
        Ok((snapshots, packs)) => {
            let manifests = snapshots.into_iter().filter_map(|listed| match listed.name {
                Some(ObjectName::Manifest { snapshot, .. }) => Some(snapshot),
                _ => None,
            });
            let packs = packs.into_iter().filter_map(|listed| Some((listed.name?, listed.size)));
            Some(Listing { manifests: manifests.collect(), packs: packs.collect(), location })
        }
        Err(error) => {
            tracing::debug!(location = %location.name(), "cannot look for snapshots: {error}");
            None
        }
    }
}

async fn open(
    context: &AgentContext,
    server: &Server,
    listings: &[Listing],
    id: SnapshotId,
) -> Result<Parent> {
    let name = ObjectName::Manifest { system: context.system, snapshot: id };
    let mut last = Error::new(Kind::Missing, "no location has it");
    let holders: Vec<&Listing> = listings.iter().filter(|l| l.manifests.contains(&id)).collect();
    for &holder in &holders {
        let found = match whole_at(holder, &name).await {
            Ok(found) => found,
            Err(error) => {
                last = error;
                continue;
            }
        };
        // The one that has it whole comes first.
        let others = listings.iter().filter(|l| l.location.name() != holder.location.name());
        let locations: Vec<Location> =
            std::iter::once(holder).chain(others).map(|l| l.location.clone()).collect();
        let places = holders.iter().map(|holder| holder.location.name().clone()).collect();
        return with_cache(context, server, found, &name, locations, places).await;
    }
    Err(last)
}

/// The manifest, if the location lists every pack that it names.
async fn whole_at(holder: &Listing, name: &ObjectName) -> Result<(Bytes, ManifestPlain)> {
    let bytes = holder.location.get(name).await?;
    let (_, plain) = read_plain(&bytes, name)?;
    let is_missing =
        |pack: &&PackEntry| holder.packs.get(&pack.name(plain.system)) != Some(&pack.size);
    match plain.packs.iter().find(is_missing) {
        None => Ok((bytes, plain)),
        Some(pack) => {
            let (pack, place) = (pack.name(plain.system), holder.location.name());
            Err(Error::new(Kind::Missing, format!("location {place} does not list {pack}")))
        }
    }
}

async fn with_cache(
    context: &AgentContext,
    server: &Server,
    (bytes, plain): (Bytes, ManifestPlain),
    name: &ObjectName,
    locations: Vec<Location>,
    places: Vec<LocationName>,
) -> Result<Parent> {
    let state_dir = &context.settings.state_dir;
    let opened = open_manifest(context, bytes, name, &locations).await;
    let corrupt = opened.as_ref().ok().and_then(Manifest::all_corrupt_pages).map(<[_]>::to_vec);
    let local_key = hash_key::read(state_dir, context.system)?;
    let (opened, hash_key) = match (opened, local_key) {
        (Ok(manifest), _) => {
            let key = manifest.root.hash_key;
            (Ok(manifest), key)
        }
        (Err(error), Some(key)) => {
            tracing::warn!(snapshot = %plain.snapshot, "its root cannot be opened: {error}");
            (Err(error), key)
        }
        (Err(error), None) => return Err(error),
    };
    let wanted = Wanted { plain: &plain, hash_key, page_bytes: server.page_bytes };
    let path = cache::path_of(state_dir, context.system);
    let cache = match wanted.cached(&path).await {
        Some(cache) => cache,
        None => {
            let manifest = opened?;
            tracing::info!(snapshot = %plain.snapshot, "fetching what its pages hash to");
            let reader = PackReader::open(locations, context.epochs.keyring(), &plain).await?;
            rebuild::rebuild(&reader, &manifest, &path).await.context("fetch its page hashes")?;
            wanted.cache_at(&path).await?
        }
    };
    if local_key != Some(hash_key) {
        hash_key::adopt(state_dir, context.system, &hash_key)?;
    }
    let parent = Parent::new(plain, places, cache, server, jiff::Timestamp::now().as_second());
    Ok(Parent { corrupt, ..parent })
}

async fn open_manifest(
    context: &AgentContext,
    bytes: Bytes,
    name: &ObjectName,
    locations: &[Location],
) -> Result<Manifest> {
    let (header, _) = read_plain(&bytes, name)?;
    let keyring = context.epochs.keyring();
    let mut last = Error::new(Kind::Storage, "no location can be read");
    for location in locations {
        match keyring.epoch(context.system, header.epoch(), location).await {
            Ok(epoch) => return Manifest::open(bytes, name, &epoch),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The cache that would fit.
struct Wanted<'a> {
    plain: &'a ManifestPlain,
    hash_key: [u8; 32],
    page_bytes: u32,
}

impl Wanted<'_> {
    /// Also what a crash left between the commit and the renaming, which is made up for.
    async fn cached(&self, path: &Path) -> Option<Cache> {
        for found in [path.to_path_buf(), new_path(path)] {
            match self.cache_at(&found).await {
                Ok(cache) => {
                    let named = found == path || std::fs::rename(&found, path).is_ok();
                    return named.then_some(cache);
                }
                Err(error) if !found.exists() => tracing::debug!("{error}"),
                Err(error) => tracing::warn!("the page-hash cache is not used: {error}"),
            }
        }
        None
    }

    async fn cache_at(&self, path: &Path) -> Result<Cache> {
        let (file, worn) = (path.to_path_buf(), worn_packs(self.plain));
        let cache = blocking(move || Cache::open(&file, worn)).await?;
        let summary = &cache.summary;
        let of = |what: String| {
            Err(Error::new(Kind::Corrupt, format!("{} is of {what}", path.display())))
        };
        match () {
            () if summary.system != self.plain.system => of(format!("system {}", summary.system)),
            () if summary.snapshot != self.plain.snapshot => {
                of(format!("snapshot {}", summary.snapshot))
            }
            () if summary.key != cache::fingerprint(&self.hash_key) => {
                of("another key of page hashes".into())
            }
            () if summary.page_bytes != self.page_bytes => {
                of(format!("pages of {} bytes", summary.page_bytes))
            }
            () => Ok(cache),
        }
    }
}

/// Where the cache of the snapshot that is being taken is written.
pub fn new_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}
