//! Indexes the WAL that is stored: `walindex/`, by which a restore reads the footers of many spans at once.
//!
//! Whenever all required locations have another block of a branch, the footers of its objects are read and become one index, and small
//! indexes become larger ones ([`backstay_common::walindex::blocks`]). At the start, and when the server has come to
//! another branch, what is lacking of all branches is made up for. Whoever holds the lease does it. Nothing is remembered but how far each branch was
//! found complete: listings say what is to be done, so a kill at any moment leaves nothing wrong, and two agents that both
//! do this leave an index too many, which the next pass deletes.
//!
//! It is a cache. Whatever fails here is tried again later and is no alarm; a location that was away gets a copy by sync.

use crate::context::AgentContext;
use crate::lease::Leasing;
use crate::wal::WalStatus;
use backstay_common::catalog::{Places, WalEntry};
use backstay_common::id::{Branch, ObjectId};
use backstay_common::location::{Listed, Location, Role};
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::{ObjectName, folder};
use backstay_common::seal::Header;
use backstay_common::span::SpanMeta;
use backstay_common::walindex::blocks::{Blocks, Work, superseded};
use backstay_common::walindex::{IndexEntry, WalIndex};
use backstay_common::{Error, Kind, Result, footer, pool};
use futures::StreamExt;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often the frontier is looked at. It costs no request.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long after a failure the next attempt is made.
const RETRY_AFTER: Duration = Duration::from_secs(300);
/// Footers that are read at once: two small requests each.
const FOOTERS_AT_ONCE: usize = 8;

/// What is stored under one range and id, and where.
type Stored = BTreeMap<(LsnRange, ObjectId), (u64, Places)>;

struct Indexer {
    context: Arc<AgentContext>,
    leasing: Leasing,
    blocks: Blocks,
    /// Of each branch, the position before which everything is indexed.
    done: BTreeMap<Branch, Lsn>,
}

/// Runs until the agent stops. Safe to drop.
pub async fn run(
    context: Arc<AgentContext>,
    leasing: Leasing,
    wal: watch::Receiver<WalStatus>,
) -> Result<()> {
    let blocks = Blocks::new(context.settings.index.spans);
    let stop = context.stop.clone();
    let mut indexer = Indexer { context, leasing, blocks, done: BTreeMap::new() };
    let mut pause = LOOK_EVERY;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
        let Some((branch, stored)) = stored_everywhere(&wal) else { continue };
        let looked = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            looked = indexer.look(branch, stored) => looked,
        };
        pause = match looked {
            Ok(()) => LOOK_EVERY,
            Err(error) => {
                tracing::debug!(%error, "WAL is not indexed for now");
                RETRY_AFTER
            }
        };
    }
}

/// The branch that is streamed, and how far every required location has it.
fn stored_everywhere(wal: &watch::Receiver<WalStatus>) -> Option<(Branch, Lsn)> {
    let wal = wal.borrow();
    let required = wal.locations.iter().filter(|location| location.role == Role::Required);
    let least = required.map(|location| location.stored).min()?;
    (least > Lsn::INVALID).then_some((wal.branch?, least))
}

impl Indexer {
    async fn look(&mut self, branch: Branch, stored: Lsn) -> Result<()> {
        let to = self.blocks.last_end(stored);
        match self.done.get(&branch) {
            Some(done) if to <= *done => return Ok(()),
            _ if !self.leasing.is_free().await? => {
                return Err(Error::new(Kind::Fenced, "another agent holds the lease"));
            }
            Some(_) => {}
            None => self.make_up_for_others(branch).await?,
        }
        self.index(branch, to).await?;
        self.done.insert(branch, to);
        Ok(())
    }

    /// All branches but the one that is streamed.
    async fn make_up_for_others(&mut self, current: Branch) -> Result<()> {
        let root = folder::wal(self.context.system);
        let root = &root;
        let folders = self.ask_any(|location| async move { location.folders(root).await }).await?;
        for folder in folders {
            let branch = folder.trim_end_matches('/').rsplit('/').next().map(str::parse::<Branch>);
            let Some(Ok(branch)) = branch else { continue };
            if branch == current || self.done.contains_key(&branch) {
                continue;
            }
            let folder = &folder;
            let last =
                self.ask_any(|location| async move { last_end(&location, folder).await }).await?;
            let to = self.blocks.last_end(last);
            self.index(branch, to).await?;
            self.done.insert(branch, to);
        }
        Ok(())
    }

    /// Makes what is lacking of one branch before `to`, and deletes what is superfluous.
    async fn index(&self, branch: Branch, to: Lsn) -> Result<()> {
        let root = folder::branch(self.context.system, branch);
        let root = &root;
        let first = self.ask_any(|location| async move {
            let (page, _) = location.list_page(root).await?;
            Ok(page.iter().filter_map(|listed| wal_range(&listed.name)).map(|r| r.start).min())
        });
        let Some(from) = first.await? else { return Ok(()) };
        let listed = self.listed(&folder::walindex(self.context.system, branch), None).await?;
        let mut indexes = entries(listed);
        let ranges: Vec<LsnRange> = indexes.iter().map(|index| index.range).collect();
        for work in self.blocks.work(&ranges, LsnRange::new(from, to.max(from))) {
            let (block, entries) = match work {
                Work::Read(block) => (block, self.read(branch, block).await?),
                Work::Merge(block) => (block, self.merge(branch, block, &indexes).await?),
            };
            if !entries.is_empty() {
                indexes.extend(self.store(branch, WalIndex::new(block, entries)).await?);
            }
        }
        self.delete_superseded(branch, &indexes).await;
        Ok(())
    }

    /// The footers of all objects in a block; of those that a longer one covers nobody asks.
    async fn read(&self, branch: Branch, block: LsnRange) -> Result<Vec<IndexEntry>> {
        let system = self.context.system;
        let borders = (
            folder::branch_from(system, branch, block.start),
            folder::branch_from(system, branch, block.end),
        );
        let listed = self.listed(&folder::branch(system, branch), Some(borders)).await?;
        let mut objects = entries(listed);
        let gone = superseded(&objects);
        objects.retain(|object| !gone.contains(object));
        let reads: Vec<_> = objects.into_iter().map(|object| self.footer(branch, object)).collect();
        let read: Vec<Result<IndexEntry>> =
            futures::stream::iter(reads).buffered(FOOTERS_AT_ONCE).collect().await;
        let mut entries = Vec::with_capacity(read.len());
        for entry in read {
            match entry {
                Ok(entry) => entries.push(entry),
                // Left out: whoever needs it finds out what is wrong with it.
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Missing) => {
                    tracing::debug!(%error, "not indexed");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    async fn footer(&self, branch: Branch, object: WalEntry) -> Result<IndexEntry> {
        let WalEntry { range, id, size, places } = object;
        let name = ObjectName::Wal { system: self.context.system, branch, range, id };
        let (named, keyring) = (&name, self.context.epochs.keyring());
        let meta = self.ask_places(places, named, |location| async move {
            let fetched = footer::fetch(&location, named, size).await?;
            let epoch = keyring.epoch(self.context.system, fetched.epoch(), &location).await?;
            SpanMeta::read(&fetched.meta(&epoch)?)
        });
        Ok(IndexEntry::new(range, id, size, meta.await?))
    }

    /// What smaller indexes say of a block. One that cannot be read is left out.
    async fn merge(
        &self,
        branch: Branch,
        block: LsnRange,
        indexes: &[WalEntry],
    ) -> Result<Vec<IndexEntry>> {
        let inside: Vec<WalEntry> =
            indexes.iter().filter(|index| block.covers(&index.range)).copied().collect();
        let gone = superseded(&inside);
        let mut entries = Vec::new();
        for index in inside.iter().filter(|index| !gone.contains(index)) {
            let WalEntry { range, id, .. } = *index;
            let name = ObjectName::WalIndex { system: self.context.system, branch, range, id };
            let (named, keyring) = (&name, self.context.epochs.keyring());
            let opened = self.ask_places(index.places, named, |location| async move {
                let bytes = location.get(named).await?;
                let header = Header::check(&bytes, named)?;
                let epoch = keyring.epoch(self.context.system, header.epoch(), &location).await?;
                let name = named.clone();
                pool::run(move || WalIndex::open(bytes, &name, &epoch)).await?
            });
            match opened.await {
                Ok(index) => entries.extend(index.into_entries()),
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Missing) => {
                    tracing::debug!(%error, "left out of a larger index");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    /// Seals an index once, and stores it wherever that works.
    async fn store(&self, branch: Branch, index: WalIndex) -> Result<Option<WalEntry>> {
        let (epoch, system) = (self.context.epochs.current().await?, self.context.system);
        let (block, sealing) = (index.block, epoch.clone());
        let sealed = pool::run(move || index.seal(&sealing, system, branch)).await??;
        let Some(sealed) = sealed else { return Ok(None) };
        let mut puts = Vec::new();
        for writer in &self.context.writers {
            puts.push(writer.put(&sealed.name, epoch.id(), sealed.bytes.clone()));
        }
        let mut places = Places::default();
        let mut last_error = None;
        for (number, put) in futures::future::join_all(puts).await.into_iter().enumerate() {
            match put {
                Ok(_) => places = places.with(number),
                Err(error) => last_error = Some(error),
            }
        }
        match (places.is_empty(), last_error, sealed.name.id()) {
            (true, Some(error), _) => Err(error),
            (_, _, Some(id)) => {
                tracing::debug!(%branch, %block, "indexed");
                Ok(Some(WalEntry { range: block, id, size: sealed.bytes.len() as u64, places }))
            }
            _ => Ok(None),
        }
    }

    /// At each location what a larger index there has replaced. An identity that may not delete leaves it to prune.
    async fn delete_superseded(&self, branch: Branch, indexes: &[WalEntry]) {
        for (number, writer) in self.context.writers.iter().enumerate() {
            let here: Vec<WalEntry> =
                indexes.iter().filter(|index| index.places.contains(number)).copied().collect();
            let name = |index: &WalEntry| {
                let (range, id) = (index.range, index.id);
                ObjectName::WalIndex { system: self.context.system, branch, range, id }
            };
            let gone: Vec<ObjectName> = superseded(&here).iter().map(name).collect();
            if let Err(error) = writer.location().delete(&gone).await {
                tracing::debug!(%error, "superseded indexes are left");
            }
        }
    }

    /// The union of what the locations that answer list below `folder`, between `borders`.
    async fn listed(&self, folder: &str, borders: Option<(String, String)>) -> Result<Stored> {
        let mut lists = Vec::new();
        for writer in &self.context.writers {
            lists.push(list(writer.location(), folder, borders.as_ref()));
        }
        let mut stored = Stored::new();
        let mut last_error = None;
        let lists = futures::future::join_all(lists).await;
        let answered = lists.iter().any(Result::is_ok);
        for (number, list) in lists.into_iter().enumerate() {
            match list {
                Err(error) => last_error = Some(error),
                Ok(list) => {
                    for object in list {
                        let (Some(ObjectName::Wal { range, id, .. })
                        | Some(ObjectName::WalIndex { range, id, .. })) = object.name
                        else {
                            continue;
                        };
                        let at =
                            stored.entry((range, id)).or_insert((object.size, Places::default()));
                        at.1 = at.1.with(number);
                    }
                }
            }
        }
        match last_error.filter(|_| !answered) {
            Some(error) => Err(error),
            None => Ok(stored),
        }
    }

    /// The answer of the first location that gives one.
    async fn ask_any<T, F>(&self, ask: impl Fn(Location) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let all = Places::all(self.context.writers.len());
        self.ask_places(all, &ObjectName::Cluster, ask).await
    }

    /// The answer of the first of `places` that gives a good one.
    async fn ask_places<T, F>(
        &self,
        places: Places,
        name: &ObjectName,
        ask: impl Fn(Location) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut last_error = Error::new(Kind::Missing, format!("object {name} is nowhere"));
        for place in places.iter() {
            let Some(writer) = self.context.writers.get(place) else { continue };
            match ask(writer.location().clone()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => last_error = error,
            }
        }
        Err(last_error)
    }
}

async fn list(
    location: &Location,
    folder: &str,
    borders: Option<&(String, String)>,
) -> Result<Vec<Listed>> {
    match borders {
        None => location.list(folder).await,
        Some((after, until)) => location.list_between(folder, after, Some(until)).await,
    }
}

fn entries(stored: Stored) -> Vec<WalEntry> {
    let entry = |((range, id), (size, places))| WalEntry { range, id, size, places };
    stored.into_iter().map(entry).collect()
}

fn wal_range(name: &Option<ObjectName>) -> Option<LsnRange> {
    match name {
        Some(ObjectName::Wal { range, .. }) => Some(*range),
        _ => None,
    }
}

/// Where the WAL in a branch's folder ends.
async fn last_end(location: &Location, branch: &str) -> Result<Lsn> {
    let Some(last) = location.folders(branch).await?.pop() else { return Ok(Lsn::INVALID) };
    let listed = location.list(&last).await?;
    let ends = listed.iter().filter_map(|object| wal_range(&object.name)).map(|range| range.end);
    Ok(ends.max().unwrap_or(Lsn::INVALID))
}
