//! Which branch a line's WAL is stored under.
//!
//! A writer joins an existing branch only if its history, switch point and first record agree with the branch's
//! origin, else it opens another. The answer is kept in the spool: the origin's sealed bytes, fsynced, then the name of
//! the line's folder. So every location gets the same origin, byte for byte, however late, and a restart asks nobody.

use super::WalPath;
use super::line::Line;
use backstay_common::id::{Branch, BranchId};
use backstay_common::location::Location;
use backstay_common::lsn::{Lsn, LsnRange, SPAN_BYTES, covered_until};
use backstay_common::name::{ObjectName, folder};
use backstay_common::origin::{Beginnings, Origin};
use backstay_common::seal::Header;
use backstay_common::{Context, Result};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// How long all locations are waited for; then those that answered must do.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);
/// WAL this far before the end of what a location has is taken to be complete.
const LOOK_BACK: u64 = 64 * SPAN_BYTES;

/// A branch that a location has and that the line may join.
#[derive(Clone, Debug)]
pub struct Joinable {
    pub branch: Branch,
    /// The origin's sealed bytes.
    origin: Bytes,
    /// How far the location has it.
    pub frontier: Lsn,
    /// Whether the location is.
    pub is_required: bool,
}

/// Finds or makes the line's branch, unless it has one. Waits as long as no location answers.
pub async fn settle(path: &Arc<WalPath>, line: &Arc<Line>) -> Result<()> {
    if line.branch().is_some() {
        return Ok(());
    }
    let found = loop {
        let answers = ask_all(path, &line.beginnings).await;
        if !answers.is_empty() || path.context.writers.is_empty() {
            break answers.into_iter().flatten().min_by_key(|found| found.branch);
        }
        tokio::time::sleep(RETRY).await;
    };
    let (branch, origin) = match found {
        Some(found) => (found.branch, found.origin),
        None => open_another(path, &line.beginnings).await?,
    };
    let (sealed, line) = (path.sealed.clone(), line.clone());
    super::blocking(move || {
        sealed.keep_origin(branch, &origin)?;
        line.settle(branch)
    })
    .await?;
    tracing::info!(%branch, "branch chosen");
    path.board.ring();
    Ok(())
}

async fn open_another(path: &WalPath, beginnings: &Beginnings) -> Result<(Branch, Bytes)> {
    let branch = Branch { timeline: beginnings.timeline, id: BranchId::random() };
    let epoch = path.context.epochs.current().await?;
    let sealed = Origin::new(beginnings)?.seal(&epoch, path.context.system, branch);
    Ok((branch, sealed.bytes))
}

/// The branches that each location has and that agree; locations that do not answer are left out.
pub async fn ask_all(path: &WalPath, beginnings: &Beginnings) -> Vec<Vec<Joinable>> {
    let asked = path.context.writers.iter().map(|writer| async move {
        let answer = tokio::time::timeout(PATIENCE, ask(path, writer.location(), beginnings)).await;
        match answer {
            Ok(Ok(found)) => Some(found),
            Ok(Err(error)) => {
                tracing::warn!(%error, "a location cannot say which branches it has");
                None
            }
            Err(_) => None,
        }
    });
    futures::future::join_all(asked).await.into_iter().flatten().collect()
}

async fn ask(
    path: &WalPath,
    location: &Location,
    beginnings: &Beginnings,
) -> Result<Vec<Joinable>> {
    location.require_cluster().await?;
    let listed = location.list(&folder::wal(path.context.system)).await?;
    let names: Vec<ObjectName> = listed.into_iter().filter_map(|object| object.name).collect();
    let mut found = Vec::new();
    for name in &names {
        let ObjectName::Origin { branch, .. } = name else { continue };
        if branch.timeline != beginnings.timeline {
            continue;
        }
        let origin = location.get(name).await?;
        if agrees(path, location, name, &origin, beginnings).await? {
            let frontier = frontier(&names, *branch);
            let is_required = location.is_required();
            found.push(Joinable { branch: *branch, origin, frontier, is_required });
        }
    }
    Ok(found)
}

async fn agrees(
    path: &WalPath,
    location: &Location,
    name: &ObjectName,
    bytes: &Bytes,
    beginnings: &Beginnings,
) -> Result<bool> {
    let header = Header::check(bytes, name)?;
    let keyring = path.context.epochs.keyring();
    let epoch = keyring.epoch(path.context.system, header.epoch(), location).await?;
    Origin::open(bytes.clone(), name, &epoch)?
        .agrees(beginnings)
        .context(format!("compare with {name}"))
}

/// How far the newest WAL of a branch goes without a hole; 0/0 if there is none.
fn frontier(names: &[ObjectName], of: Branch) -> Lsn {
    let ranges = names.iter().filter_map(|name| match name {
        ObjectName::Wal { branch, range, .. } if *branch == of => Some(*range),
        _ => None,
    });
    let ranges: Vec<LsnRange> = ranges.collect();
    let Some(end) = ranges.iter().map(|range| range.end).max() else { return Lsn::INVALID };
    let from = Lsn::new(end.get().saturating_sub(LOOK_BACK));
    let mut newest: Vec<LsnRange> = ranges.into_iter().filter(|range| range.end > from).collect();
    let begin = newest.iter().map(|range| range.start).min().unwrap_or(end);
    covered_until(begin, &mut newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::id::{ObjectId, SystemId};

    #[test]
    fn a_frontier_ends_at_a_new_hole_but_not_at_an_old_one() {
        let branch: Branch = "00000001-01020304".parse().unwrap();
        let span = |n: u64| ObjectName::Wal {
            system: SystemId::new(7),
            branch,
            range: LsnRange::new(Lsn::new(n * SPAN_BYTES), Lsn::new((n + 1) * SPAN_BYTES)),
            id: ObjectId::random(),
        };
        assert_eq!(frontier(&[], branch), Lsn::INVALID);
        let names = [span(1), span(100), span(101), span(103)];
        assert_eq!(frontier(&names, branch), Lsn::new(102 * SPAN_BYTES));
        assert_eq!(frontier(&names[..3], branch), Lsn::new(102 * SPAN_BYTES));
        assert_eq!(frontier(&names, "00000001-01020305".parse().unwrap()), Lsn::INVALID);
    }
}
