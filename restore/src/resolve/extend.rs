//! `--wal-from DIR`: WAL that only the damaged server's `pg_wal` still has.
//!
//! The decoder follows the records from the last stored one on into the local files, and stops at the first that is not
//! right: behind the valid WAL there is old WAL of recycled segments. That the files are of the same history is
//! shown by the stored WAL's end being in them, byte for byte.

use super::survey::Survey;
use crate::wal_source::WalSource;
use crate::wal_source::local::LocalWal;
use backstay_common::catalog::WalEntry;
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::segment::SegmentSize;
use backstay_common::span::SpanMeta;
use backstay_common::wal::{Decoder, PAGE_BYTES, Summary};
use backstay_common::{Error, Kind, Result, pool};
use std::path::Path;
use std::sync::Arc;

/// Local WAL is read in runs of this many bytes.
const READ_BYTES: u64 = 1 << 20;

/// The valid WAL behind what is stored of one branch.
#[derive(Clone, Debug)]
pub struct Extension {
    pub branch: Branch,
    pub range: LsnRange,
    pub meta: Arc<SpanMeta>,
}

/// Lets `survey` use the files in `folder`, where they continue what is stored. Says in words what was found.
pub async fn extend(survey: &mut Survey, folder: &Path) -> Result<String> {
    let branches: Vec<Branch> = survey.pasts.keys().rev().copied().collect();
    for branch in branches {
        let Some(extension) = of_branch(survey, branch, folder).await? else { continue };
        let said = format!(
            "{} has the WAL {} of branch {branch} besides",
            folder.display(),
            extension.range
        );
        let size = SegmentSize::new(extension.meta.segment_bytes).expect("the decoder took it");
        let local = LocalWal::new(folder, branch, size);
        let source = &survey.source;
        survey.source =
            WalSource::new(source.access().clone(), source.catalog().clone(), Some(local));
        survey.extension = Some(extension);
        return Ok(said);
    }
    Ok(format!("{} has no WAL that continues what is stored", folder.display()))
}

async fn of_branch(survey: &Survey, branch: Branch, folder: &Path) -> Result<Option<Extension>> {
    let Some((entry, meta)) = newest(survey, branch).await? else { return Ok(None) };
    let Some(size) = SegmentSize::new(meta.segment_bytes) else { return Ok(None) };
    let stored = LsnRange::new(entry.range.start, entry.range.end);
    let from = meta.summary.last_record.unwrap_or(stored.start.align_up(PAGE_BYTES));
    if from >= stored.end {
        return Ok(None);
    }
    let known = survey.source.read(branch, LsnRange::new(from, stored.end)).await?;
    let local = LocalWal::new(folder, branch, size);
    let mut decoder = survey.decoder(branch, from, &meta)?;
    let end = stored.end;
    let followed =
        pool::run(move || follow(&local, &mut decoder, &known, LsnRange::new(from, end)));
    let Some((end, summary)) = followed.await?? else { return Ok(None) };
    let meta = SpanMeta { summary, clock: None, ..meta };
    Ok(Some(Extension { branch, range: LsnRange::new(stored.end, end), meta: Arc::new(meta) }))
}

/// The stored object that reaches furthest, and its footer.
async fn newest(survey: &Survey, branch: Branch) -> Result<Option<(WalEntry, SpanMeta)>> {
    loop {
        let stored = survey.source.usable(branch).into_iter();
        let Some(entry) = stored.max_by_key(|entry| entry.range.end) else { return Ok(None) };
        let name = survey.source.name(branch, &entry);
        let read = survey.source.access().read_meta(&name, entry.size, entry.places).await;
        match read {
            Ok(meta) => return Ok(Some((entry, SpanMeta::read(&meta)?))),
            Err(error) if error.kind() != Kind::Missing => return Err(error),
            Err(error) if !survey.source.pass_over(branch, &entry, &error).await => {
                return Err(error);
            }
            Err(_) => {}
        }
    }
}

/// Goes from the stored WAL `known` of `tail` on through the local files. `None` if they do not begin with it, or have nothing more.
fn follow(
    local: &LocalWal,
    decoder: &mut Decoder,
    known: &[u8],
    tail: LsnRange,
) -> Result<Option<(Lsn, Summary)>> {
    if local.read(tail)?.is_none_or(|found| found != known) {
        // A segment that ends just where the stored WAL does may have been removed since: then the records alone must tell.
        let at_boundary = tail.end == local.segment_size.start_of(tail.end);
        if !at_boundary || local.read(tail)?.is_some() {
            return Ok(None);
        }
    }
    let mut summary = Summary::default();
    decoder
        .feed(known, &mut |_| {})
        .map_err(|e| Error::from(e).context("the end of the stored WAL"))?;
    decoder.take_first_record();
    let mut at = tail.end;
    let next = |at: Lsn| LsnRange::new(at, at.add(READ_BYTES).align_down(READ_BYTES));
    while let Some(bytes) = local.read(next(at))? {
        if decoder.feed(&bytes, &mut |event| summary.note(&event)).is_err() {
            break;
        }
        at = next(at).end;
    }
    let summary = summary.finish(decoder);
    let end = summary.last_record_end.unwrap_or(tail.end);
    Ok((end > tail.end).then_some((end, summary)))
}
