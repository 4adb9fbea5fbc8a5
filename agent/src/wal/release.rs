//! Makes room in a full spool by giving up its oldest WAL, where the operator chose `on-spool-full = "release"`.
//!
//! What always holds: what no location has is recorded as a gap, durably, before it goes; what is not sealed yet, and the last
//! file of the current line, never go. A location that lacks what another one has is filled by copying: it is listed anew.
//! A crash leaves a gap on record whose WAL is still here, which does no harm: it is shipped after all.

use super::WalPath;
use super::board::State;
use super::line::Line;
use crate::durable::sync_folder;
use backstay_common::gap::Cause;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::{Context, Result};
use std::sync::Arc;

/// Gives up the oldest file of the spool; false if none may go. Nothing at or after `uncut` goes from the current line.
/// Blocks.
pub fn release_oldest(path: &WalPath, uncut: Lsn) -> Result<bool> {
    let lines: Vec<(Arc<Line>, bool)> = path.board.read(|state| {
        let current = state.current;
        state.lines.values().map(|line| (line.clone(), line.number == current)).collect()
    });
    for (line, is_current) in lines {
        let end =
            if is_current { line.spool.second().min(Some(uncut)) } else { line.spool.second() };
        let sealed = line.unsealed_from().unwrap_or(Lsn::MAX);
        if let Some(end) = end.filter(|end| *end > line.spool.begin() && *end <= sealed) {
            give_up(path, &line, end)?;
            return Ok(true);
        }
    }
    Ok(false)
}

fn give_up(path: &WalPath, line: &Line, until: Lsn) -> Result<()> {
    let (begin, furthest) = path.board.read(|state| (line.spool.begin(), furthest(state, line)));
    let gap = LsnRange::new(furthest.max(begin).min(until), until);
    if !gap.is_empty() {
        let reason = format!("the spool was full, and no location has the WAL of {gap}");
        path.record_gap_of(line.number, line.branch(), gap, Cause::Released, reason)?;
    }
    line.spool.sync()?;
    let gone = path.board.update(|state| state.shelf.give_up(line.number, until));
    path.sealed.remove(&gone)?;
    line.spool.forget(until)?;
    // One that was listed meanwhile was listed from the old beginning.
    path.board.update(|state| state.shelf.list_again(line.number, until));
    sync_folder(&path.root).context(format!("fsync {}", path.root.display()))?;
    tracing::warn!(%until, gap = %gap, "the oldest WAL in the spool was given up");
    Ok(())
}

/// How far the location that has most of `line` has it.
fn furthest(state: &State, line: &Line) -> Lsn {
    let locations = 0..state.health.len();
    locations.map(|l| state.shelf.reach(l, line.number)).max().unwrap_or(Lsn::INVALID)
}
