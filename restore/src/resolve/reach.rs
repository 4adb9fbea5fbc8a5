//! Through which stored WAL a snapshot can be replayed along a line, and where that ends. Pure.

use super::line::Line;
use backstay_common::catalog::{WalEntry, cover};
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::snapshot::ManifestPlain;

/// A run of WAL that comes from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub branch: Branch,
    /// The bytes.
    pub range: LsnRange,
    /// Where they are stored; `None` for the damaged server's own `pg_wal`.
    pub object: Option<WalEntry>,
    /// Records that begin here belong to the line: after the snapshot's start or the switch to this branch, before the switch
    /// to the next.
    pub counts: LsnRange,
}

impl Stretch {
    /// False if all records that end in it begin before those that count.
    pub fn is_needed(&self) -> bool {
        self.range.end > self.counts.start
    }
}

/// WAL that no location has, though it is needed to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub branch: Branch,
    pub range: LsnRange,
}

/// What one snapshot reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Each branch with the WAL of it that is there, from the start of a segment on.
    pub legs: Vec<(Branch, LsnRange)>,
    pub stretches: Vec<Stretch>,
    /// The WAL ends here.
    pub end: Lsn,
    /// There is more WAL, but after this.
    pub gap: Option<Gap>,
}

impl Reach {
    /// The branch on which it ends.
    pub fn tip(&self) -> Branch {
        self.legs.last().expect("a reach begins on a branch").0
    }

    /// The branch that holds the record which begins at `start`.
    pub fn branch_at(&self, start: Lsn) -> Branch {
        let holds = |stretch: &&Stretch| stretch.counts.contains(start);
        self.stretches.iter().find(holds).map_or(self.tip(), |stretch| stretch.branch)
    }
}

/// WAL besides what is stored: a branch, and the range in which it continues what is stored.
pub type Extra = Option<(Branch, LsnRange)>;

/// Follows `line` from `snapshot` on. `None` if the snapshot is not on the line, or ends after the line left its branch.
pub fn reach(
    line: &Line,
    snapshot: &ManifestPlain,
    entries: &dyn Fn(Branch) -> Vec<WalEntry>,
    extra: Extra,
) -> Option<Reach> {
    let first = line.index_of(snapshot.branch)?;
    if snapshot.stop > line.legs[first].to || snapshot.start < line.legs[first].from {
        return None;
    }
    let segment = u64::from(snapshot.segment_bytes);
    let mut reach =
        Reach { legs: Vec::new(), stretches: Vec::new(), end: snapshot.start, gap: None };
    for (number, leg) in line.legs.iter().enumerate().skip(first) {
        let from = if number == first { snapshot.start } else { leg.from };
        let start = from.align_down(segment);
        let stored = entries(leg.branch);
        let counts = LsnRange::new(from, leg.to);
        let wanted = LsnRange::new(start, leg.to);
        let end = follow(&mut reach.stretches, leg.branch, &stored, wanted, counts, extra);
        if end > from || number == first {
            reach.legs.push((leg.branch, LsnRange::new(start, end.min(leg.to))));
            reach.end = reach.end.max(end.min(leg.to));
        }
        if end < leg.to {
            let next = cover::next_start(&stored, end);
            let more = next.or((leg.to != Lsn::MAX).then_some(leg.to));
            reach.gap = more
                .map(|to| Gap { branch: leg.branch, range: LsnRange::new(end, to.min(leg.to)) });
            break;
        }
    }
    Some(reach)
}

/// Adds the stretches of one branch that cover `wanted` from its start on; returns where they end.
fn follow(
    stretches: &mut Vec<Stretch>,
    branch: Branch,
    stored: &[WalEntry],
    wanted: LsnRange,
    counts: LsnRange,
    extra: Extra,
) -> Lsn {
    let mut end = wanted.start;
    for entry in cover::covering(stored, wanted) {
        stretches.push(Stretch { branch, range: entry.range, object: Some(entry), counts });
        end = entry.range.end;
    }
    if let Some((of, range)) = extra
        && of == branch
        && range.start <= end
        && end < range.end.min(wanted.end)
    {
        stretches.push(Stretch {
            branch,
            range: LsnRange::new(end, range.end),
            object: None,
            counts,
        });
        end = range.end;
    }
    end
}
