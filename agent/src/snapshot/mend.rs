//! Which of the pages with a wrong checksum replay mends: those that the backup's own WAL touches.
//!
//! A page that came over the network can't be read again. If it was torn, that is, written while the server read it, then what was
//! written belongs to a change since the backup's start, and a record of the WAL between start and stop names the block. If
//! none does, the page was wrong on the disk. The WAL is read back from a location, and only if there is such a page.
//!
//! Two forks are judged by their relation: free space is not logged, and PostgreSQL zeroes such a page when it is wrong; bits of the
//! visibility map are cleared by records that name only the heap's block.

use super::ship::patiently;
use super::walk::rules::{Fork, RelationFile};
use crate::context::AgentContext;
use backstay_common::id::Branch;
use backstay_common::location::Location;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::name::{ObjectName, folder};
use backstay_common::seal::Header;
use backstay_common::snapshot::manifest::CorruptPage;
use backstay_common::span::WalObject;
use backstay_common::wal::{Decoder, EventKind, PAGE_BYTES, RelationFiles, Touch, WalVersion};
use backstay_common::{Context, Error, Kind, Result, pool};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Tablespaces that every cluster has ("src/include/catalog/pg_tablespace.dat").
const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;
const FORK_MAIN: u8 = 0;
/// How long the WAL of the backup is waited for.
const PATIENCE: Duration = Duration::from_secs(600);
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Pages that wait for a record that touches them.
#[derive(Debug, Default)]
pub struct Mender {
    pages: Vec<Waiting>,
    relations: HashMap<RelationFiles, Vec<usize>>,
    databases: HashMap<(u32, u32), Vec<usize>>,
    heap_blocks_per_map_page: u32,
}

#[derive(Debug)]
struct Waiting {
    page: CorruptPage,
    fork: Fork,
    is_touched: bool,
}

impl Mender {
    pub fn new(pages: Vec<CorruptPage>, page_bytes: u32) -> Mender {
        // Two bits for each heap block, behind the page header.
        let heap_blocks_per_map_page = page_bytes.saturating_sub(24) * 4;
        let mut mender = Mender { heap_blocks_per_map_page, ..Mender::default() };
        for page in pages {
            let at = mender.pages.len();
            let named = files_of(&page.path);
            if let Some((files, _)) = named {
                mender.relations.entry(files).or_default().push(at);
                let database = (files.tablespace, files.database);
                mender.databases.entry(database).or_default().push(at);
            }
            let fork = named.map_or(Fork::Main, |(_, fork)| fork);
            mender.pages.push(Waiting { page, fork, is_touched: false });
        }
        mender
    }

    /// A record of the backup's WAL does this.
    pub fn touch(&mut self, touch: &Touch) {
        let (waiting, touched) = match touch {
            Touch::Block { files, fork, block } => {
                (self.relations.get(files), Some((*fork, *block)))
            }
            Touch::Relation(files) => (self.relations.get(files), None),
            Touch::Database { tablespace, database } => {
                (self.databases.get(&(*tablespace, *database)), None)
            }
        };
        for at in waiting.into_iter().flatten() {
            let page = &mut self.pages[*at];
            page.is_touched |= match touched {
                None => true,
                Some((fork, block)) => page.is_mended(fork, block, self.heap_blocks_per_map_page),
            };
        }
    }

    /// The pages that nothing has touched.
    pub fn untouched(self) -> Vec<CorruptPage> {
        self.pages.into_iter().filter(|page| !page.is_touched).map(|page| page.page).collect()
    }
}

impl Waiting {
    fn is_mended(&self, fork: u8, block: u32, heap_blocks_per_map_page: u32) -> bool {
        let is_same = fork == number(self.fork) && block == self.page.block;
        is_same
            || match self.fork {
                Fork::FreeSpace => true,
                Fork::Visibility => {
                    fork == FORK_MAIN && block / heap_blocks_per_map_page == self.page.block
                }
                Fork::Main | Fork::Init => false,
            }
    }
}

/// As WAL numbers them.
fn number(fork: Fork) -> u8 {
    match fork {
        Fork::Main => FORK_MAIN,
        Fork::FreeSpace => 1,
        Fork::Visibility => 2,
        Fork::Init => 3,
    }
}

/// Which relation's file is at this place of the data directory.
fn files_of(path: &str) -> Option<(RelationFiles, Fork)> {
    let (tablespace, database, name) = match path.split('/').collect::<Vec<_>>()[..] {
        ["global", name] => (GLOBAL_TABLESPACE, 0, name),
        ["base", database, name] => (DEFAULT_TABLESPACE, database.parse().ok()?, name),
        ["pg_tblspc", tablespace, _, database, name] => {
            (tablespace.parse().ok()?, database.parse().ok()?, name)
        }
        _ => return None,
    };
    let file = RelationFile::parse(name)?;
    let relation = file.relation.parse().ok()?;
    Some((RelationFiles { tablespace, database, relation }, file.fork))
}

/// The pages that no record of the WAL `range` on `branch` touches, read back from the first location that has it all.
///
/// Waits until one does. Fails if none does for ten minutes.
pub async fn untouched(
    context: &AgentContext,
    branch: Branch,
    range: LsnRange,
    pages: Vec<CorruptPage>,
    page_bytes: u32,
) -> Result<Vec<CorruptPage>> {
    if pages.is_empty() {
        return Ok(pages);
    }
    let since = Instant::now();
    loop {
        let mut fault = Error::new(Kind::Storage, "there is no location");
        for writer in &context.writers {
            let mender = Mender::new(pages.clone(), page_bytes);
            let pass = Pass { context, location: writer.location(), branch, range };
            match pass.run(mender).await {
                Ok(mender) => return Ok(mender.untouched()),
                Err(error) => fault = error,
            }
        }
        if since.elapsed() > PATIENCE {
            return Err(
                fault.context("read the backup's WAL, to tell torn pages from damaged ones")
            );
        }
        tracing::debug!("WAL {range} cannot be read back yet: {fault}");
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

/// One attempt at one location.
struct Pass<'a> {
    context: &'a AgentContext,
    location: &'a Location,
    branch: Branch,
    range: LsnRange,
}

impl Pass<'_> {
    async fn run(&self, mut mender: Mender) -> Result<Mender> {
        let version = WalVersion::from_major(self.context.major())
            .map_err(|unknown| Error::new(Kind::Postgres, unknown))?;
        let from = self.range.start.align_down(PAGE_BYTES);
        let timeline = self.branch.timeline;
        let (segment, system) = (self.context.segment_size, self.context.system);
        let decoder = Decoder::new(version, segment, system, timeline, from);
        let mut decoder = decoder.watching_touches();
        let listed = self.listed(from).await?;
        while decoder.position() < self.range.end {
            let position = decoder.position();
            let (range, name) = listed
                .iter()
                .filter(|(range, _)| range.contains(position))
                .max_by_key(|(range, _)| range.end)
                .ok_or_else(|| self.missing(position))?;
            let object = self.open(name).await?;
            let part = LsnRange::new(position, range.end);
            let range = self.range;
            (decoder, mender) =
                pool::run(move || feed(decoder, mender, &object, part, range)).await??;
        }
        Ok(mender)
    }

    fn missing(&self, position: Lsn) -> Error {
        let place = self.location.name();
        Error::new(Kind::Storage, format!("location {place} lacks the WAL at {position}"))
    }

    async fn listed(&self, from: Lsn) -> Result<Vec<(LsnRange, ObjectName)>> {
        let (system, branch) = (self.context.system, self.branch);
        let folder = folder::branch(system, branch);
        // What holds the first byte starts at its span's start or later.
        let after = folder::branch_from(system, branch, from.span_start());
        let listed = patiently(|| self.location.list_from(&folder, &after)).await?;
        let range = |name: ObjectName| match name {
            ObjectName::Wal { range, .. } => Some((range, name)),
            _ => None,
        };
        Ok(listed.into_iter().filter_map(|listed| range(listed.name?)).collect())
    }

    async fn open(&self, name: &ObjectName) -> Result<WalObject> {
        let bytes = self.location.get(name).await?;
        let header = Header::check(&bytes, name)?;
        let keyring = self.context.epochs.keyring();
        let epoch = keyring.epoch(self.context.system, header.epoch(), self.location).await?;
        WalObject::open(bytes, name, &epoch)
    }
}

/// Decodes `part` of an object; what records that begin in `range` touch is mended.
fn feed(
    mut decoder: Decoder,
    mut mender: Mender,
    object: &WalObject,
    part: LsnRange,
    range: LsnRange,
) -> Result<(Decoder, Mender)> {
    let wal = object.part(part)?;
    let fed = decoder.feed(&wal, &mut |event| {
        if let EventKind::Touches(touches) = event.kind
            && range.contains(event.start)
        {
            touches.iter().for_each(|touch| mender.touch(touch));
        }
    });
    fed.map_err(Error::from).context(format!("decode the WAL {part}"))?;
    Ok((decoder, mender))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u32 = 8192;

    fn page(path: &str, block: u32) -> CorruptPage {
        CorruptPage { path: path.into(), block }
    }

    fn files(tablespace: u32, database: u32, relation: u32) -> RelationFiles {
        RelationFiles { tablespace, database, relation }
    }

    /// True if the touch mends the page.
    fn mends(touch: Touch, path: &str, block: u32) -> bool {
        let mut mender = Mender::new(vec![page(path, block), page("base/5/99", 1)], PAGE);
        mender.touch(&touch);
        let untouched = mender.untouched();
        assert!(untouched.contains(&page("base/5/99", 1)), "the other one is not touched");
        untouched.len() == 1
    }

    #[test]
    fn a_block_is_mended_by_a_record_that_names_it() {
        let touch = Touch::Block { files: files(1663, 5, 16384), fork: 0, block: 200_000 };
        assert!(mends(touch, "base/5/16384.1", 200_000));
        for (path, block) in [
            ("base/5/16384.1", 200_001),
            ("base/5/16385", 200_000),
            ("base/6/16384", 200_000),
            ("base/5/16384_init", 200_000),
            ("pg_tblspc/16400/PG_15_202209061/5/16384", 200_000),
            ("global/16384", 200_000),
            ("base/5/PG_VERSION", 200_000),
        ] {
            assert!(!mends(touch, path, block), "{path}");
        }
        let touch = Touch::Block { files: files(16400, 5, 16384), fork: 3, block: 0 };
        assert!(mends(touch, "pg_tblspc/16400/PG_15_202209061/5/16384_init", 0));
        let touch = Touch::Block { files: files(1664, 0, 1262), fork: 0, block: 0 };
        assert!(mends(touch, "global/1262", 0));
    }

    #[test]
    fn a_map_page_is_mended_by_what_it_maps() {
        let heap = |block| Touch::Block { files: files(1663, 5, 16384), fork: 0, block };
        assert!(mends(heap(32_671), "base/5/16384_vm", 0));
        assert!(mends(heap(32_672), "base/5/16384_vm", 1));
        assert!(!mends(heap(32_672), "base/5/16384_vm", 0));
        assert!(mends(heap(32_672), "base/5/16384_fsm", 0));
        let own = Touch::Block { files: files(1663, 5, 16384), fork: 2, block: 1 };
        assert!(mends(own, "base/5/16384_vm", 1));
        assert!(!mends(own, "base/5/16384", 1));
    }

    #[test]
    fn files_that_are_made_or_cut_are_mended_whole() {
        assert!(mends(Touch::Relation(files(1663, 5, 16384)), "base/5/16384_vm", 7));
        let copied = Touch::Database { tablespace: 1663, database: 6 };
        assert!(mends(copied, "base/6/16384", 7));
        assert!(!mends(copied, "base/7/16384", 7));
    }
}
