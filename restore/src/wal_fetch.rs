//! `restore_command`: gives PostgreSQL the WAL of a frozen plan.
//!
//! What always holds: it answers 1, "not found", only for what lies beyond the frozen plan, and 126, at which recovery stops,
//! for everything else that keeps it from answering: an error, an unknown name, a panic. PostgreSQL takes 1 for the
//! end of WAL and opens the cluster there, so a fault must never look like it.

use crate::directory::is_being_restored;
use crate::plan::Plan;
use crate::wal_spool::{Frozen, Segment, Spool, segment_size, segments_of};
use backstay_common::segment::{SegmentSize, TimelineId};
use backstay_common::{Context, Error, Kind, Result};
use std::path::Path;
use std::time::Duration;

/// "Not found": the end of WAL.
pub const NOT_FOUND: u8 = 1;
/// Recovery must stop: PostgreSQL treats what is above 125 as fatal.
pub const REFUSED: u8 = 126;

const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// What PostgreSQL asked for, in the plan's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A history file that the plan has.
    History(TimelineId),
    Segment(Segment),
    /// Beyond the frozen plan: the one thing that is "not found".
    Beyond,
    /// No name that recovery asks for.
    Unknown,
}

/// Finds the place of a file's name in the plan.
pub fn find(plan: &Plan, size: SegmentSize, name: &str) -> Asked {
    if let Some(timeline) = history_timeline(name) {
        return match plan.histories.iter().any(|history| history.timeline == timeline) {
            true => Asked::History(timeline),
            false => Asked::Beyond,
        };
    }
    let Some((timeline, number)) = size.parse_file_name(name) else { return Asked::Unknown };
    let legs = plan.legs.iter().enumerate().filter(|(_, leg)| leg.timeline() == timeline);
    let mut holds = legs.filter(|(_, leg)| segments_of(leg, size).contains(&number.get()));
    match holds.next() {
        Some((leg, _)) => Asked::Segment(Segment { leg, number }),
        None => Asked::Beyond,
    }
}

fn history_timeline(name: &str) -> Option<TimelineId> {
    let digits = name.strip_suffix(".history").filter(|digits| digits.len() == 8)?;
    let number = u32::from_str_radix(digits, 16).ok()?;
    TimelineId::new(number).filter(|timeline| timeline.history_file() == name)
}

/// Fetches one segment into the spool, when no running restore does.
pub type FetchAlone<'a> = dyn Fn(&Spool, &Frozen, SegmentSize, Segment) -> Result<()> + 'a;

/// Answers one call of `restore_command`; the error is what goes to PostgreSQL's log. Blocks while a running restore
/// still fetches the segment.
pub fn answer(ours: &Path, name: &str, to: &Path, alone: &FetchAlone<'_>) -> Result<u8> {
    let (spool, frozen) = Spool::open(ours)?;
    let size = segment_size(&frozen.plan)?;
    match find(&frozen.plan, size, name) {
        Asked::Beyond => Ok(NOT_FOUND),
        Asked::History(_) => give(&spool.history(name), to, None),
        Asked::Segment(segment) => {
            wait_for(&spool, &frozen, size, segment, name, alone)?;
            give(&spool.segment(name), to, Some(size.bytes()))
        }
        Asked::Unknown => {
            Err(Error::new(Kind::Bug, format!("{name:?} is no file that recovery asks for")))
        }
    }
}

fn wait_for(
    spool: &Spool,
    frozen: &Frozen,
    size: SegmentSize,
    segment: Segment,
    name: &str,
    alone: &FetchAlone<'_>,
) -> Result<()> {
    loop {
        if spool.segment(name).exists() {
            return Ok(());
        }
        if !is_being_restored(spool.folder()) {
            // The restore may have put it there and ended between the two looks.
            if spool.segment(name).exists() {
                return Ok(());
            }
            return alone(spool, frozen, size, segment).context(format!(
                "WAL segment {name} is not in {} and no restore is running",
                spool.folder().display()
            ));
        }
        std::thread::sleep(LOOK_AGAIN_AFTER);
    }
}

/// A copy, and not a link: PostgreSQL writes over old segments when it needs new ones.
fn give(from: &Path, to: &Path, size: Option<u64>) -> Result<u8> {
    let doing = || format!("copy {} to {}", from.display(), to.display());
    let copied = std::fs::copy(from, to).context(doing())?;
    match size.is_none_or(|size| size == copied) {
        true => Ok(0),
        false => Err(Error::new(Kind::Corrupt, format!("it has {copied} bytes")).context(doing())),
    }
}

#[cfg(test)]
mod tests;
