//! Seals the cuts of one line and puts them on the shelf. First it finds the line's branch.
//!
//! Two lanes, so that no commit waits for a span to be compressed: pieces, one at a time, and beside them what is patient,
//! [`PATIENT_MAX`] at a time. It goes on while the pipeline receives, and reads the bytes back from the spool, so that cuts
//! that wait cost no memory.

use super::WalPath;
use super::branch;
use super::cut::Cut;
use super::line::Line;
use super::shelf::Item;
use super::spool::is_no_space;
use backstay_common::name::ObjectName;
use backstay_common::seal::Packer;
use backstay_common::span::{SpanMeta, seal_wal};
use backstay_common::{Context, Error, Kind, Result, pool};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// As many spans are compressed side by side: memory for each is its WAL and its sealed bytes, at most 32 MiB.
const PATIENT_MAX: usize = 2;
/// Less than this is sealed on a thread of its own: it is done before the pool, busy with a snapshot, would begin.
const SMALL_BYTES: u64 = 1 << 20;
const RETRY: Duration = Duration::from_secs(1);
/// zstd's level for WAL: it must keep up with the server on a fraction of a core.
const LEVEL: i32 = 1;

/// Runs until the line has ended and all of it is on the shelf. Safe to drop: what is not on the shelf is cut anew.
pub async fn run(path: Arc<WalPath>, line: Arc<Line>) -> Result<()> {
    branch::settle(&path, &line).await?;
    tokio::try_join!(lane(&path, &line, false, 1), lane(&path, &line, true, PATIENT_MAX)).map(drop)
}

async fn lane(path: &Arc<WalPath>, line: &Arc<Line>, is_patient: bool, most: usize) -> Result<()> {
    let mut bell = path.board.listen();
    let mut sealing = FuturesUnordered::new();
    loop {
        let is_ended = line.is_ended();
        while sealing.len() < most
            && let Some(cut) = line.pop_cut(is_patient)
        {
            sealing.push(seal_until_done(path, line, cut));
        }
        if sealing.is_empty() && is_ended {
            return Ok(());
        }
        tokio::select! {
            Some(done) = sealing.next() => done?,
            _ = bell.changed(), if sealing.len() < most => {}
        }
    }
}

async fn seal_until_done(path: &Arc<WalPath>, line: &Arc<Line>, cut: Cut) -> Result<()> {
    let alarms = &path.context.alarms;
    loop {
        match seal(path, line, cut.clone()).await {
            Ok(item) => {
                alarms.clear("wal-unsealed", "");
                path.board.update(|state| {
                    state.shelf.add(item);
                    line.cut_is_sealed(&cut);
                });
                return Ok(());
            }
            // Without a key, or room on the disk, WAL waits in the spool.
            Err(error) if matches!(error.kind(), Kind::Key | Kind::Storage | Kind::Missing) => {
                alarms.raise("wal-unsealed", "", format!("WAL cannot be sealed: {error}"));
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn seal(path: &Arc<WalPath>, line: &Arc<Line>, cut: Cut) -> Result<Item> {
    let context = path.context.clone();
    let branch = line.branch().ok_or_else(|| Error::new(Kind::Bug, "a line without a branch"))?;
    let epoch = context.epochs.current().await?;
    let (spool, sealed, number) = (line.clone(), path.sealed.clone(), line.number);
    let is_small = cut.range.len() <= SMALL_BYTES;
    let work = move || {
        let wal = spool.spool.read(cut.range)?;
        let meta = SpanMeta {
            summary: cut.summary,
            clock: cut.clock,
            major: context.major(),
            segment_bytes: context.segment_size.bytes() as u32,
        };
        let mut packer = Packer::new(LEVEL)?;
        let object = seal_wal(&epoch, context.system, branch, cut.range, &wal, &meta, &mut packer)?;
        let ObjectName::Wal { id, .. } = object.name else {
            return Err(Error::new(Kind::Bug, "WAL was sealed under another name"));
        };
        let item = Item {
            line: number,
            system: context.system,
            branch,
            range: cut.range,
            id,
            size: object.bytes.len() as u64,
            epoch: epoch.id(),
            since: Instant::now(),
        };
        match sealed.keep(&item, &object.bytes) {
            Err(error) if is_no_space(&error) => Err(Error::new(Kind::Storage, error)),
            kept => kept.map(|()| item).context("keep a sealed object in the spool"),
        }
    };
    match is_small {
        true => super::blocking(work).await,
        false => pool::run(work).await?,
    }
}
