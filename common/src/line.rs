//! Lines: a branch with its ancestors, each cut where the next one left it. Pure.
//!
//! Along one line positions only grow, so an LSN alone says on which branch it is.

use crate::id::Branch;
use crate::lsn::{Lsn, LsnRange};
use crate::segment::Ancestor;
use std::collections::BTreeMap;

/// What is known of one branch's past.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// Oldest first; empty on a first timeline.
    pub ancestors: Vec<Ancestor>,
    /// The stored ranges, disjoint and sorted.
    pub covered: Vec<LsnRange>,
}

/// One branch's part of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineLeg {
    pub branch: Branch,
    /// Where it left its parent; 0/0 on the first.
    pub from: Lsn,
    /// Where the next one left it; [`Lsn::MAX`] on the last.
    pub to: Lsn,
}

/// A branch with its ancestors, oldest first. Ancestors of which nothing is stored are left out, with all before them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub legs: Vec<LineLeg>,
}

impl Line {
    /// The branch at its end.
    pub fn tip(&self) -> Branch {
        self.legs.last().expect("a line has its tip").branch
    }

    pub fn index_of(&self, branch: Branch) -> Option<usize> {
        self.legs.iter().position(|leg| leg.branch == branch)
    }

    /// Where this line leaves `branch`, if it passes through it.
    pub fn leaves(&self, branch: Branch) -> Option<Lsn> {
        self.index_of(branch).map(|index| self.legs[index].to)
    }
}

/// Follows the history of `tip` back.
pub fn line_of(tip: Branch, pasts: &BTreeMap<Branch, Past>) -> Line {
    let ancestors = pasts.get(&tip).map(|past| &past.ancestors[..]).unwrap_or_default();
    let from = |number: usize| match number {
        0 => Lsn::INVALID,
        _ => ancestors[number - 1].switch,
    };
    let mut legs = vec![LineLeg { branch: tip, from: from(ancestors.len()), to: Lsn::MAX }];
    for (number, ancestor) in ancestors.iter().enumerate().rev() {
        let Some(branch) = parent(ancestor, &ancestors[..number], pasts) else { break };
        legs.push(LineLeg { branch, from: from(number), to: ancestor.switch });
    }
    legs.reverse();
    Line { legs }
}

/// The branch of an ancestor's timeline whose own history is the beginning of the child's. Of several the one whose WAL
/// reaches the switch without a hole, from the furthest back.
fn parent(
    ancestor: &Ancestor,
    before: &[Ancestor],
    pasts: &BTreeMap<Branch, Past>,
) -> Option<Branch> {
    let fits = |(branch, past): &(&Branch, &Past)| {
        branch.timeline == ancestor.timeline && past.ancestors == before
    };
    let reached_from = |past: &Past| {
        let switch = ancestor.switch;
        past.covered.iter().find(|r| r.start < switch && switch <= r.end).map(|r| r.start)
    };
    let rank = |past: &Past| reached_from(past).map_or((1, Lsn::MAX), |start| (0, start));
    pasts.iter().filter(fits).min_by_key(|(_, past)| rank(past)).map(|(branch, _)| *branch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::TimelineId;

    fn branch(text: &str) -> Branch {
        text.parse().unwrap()
    }

    fn past(ancestors: &[(u32, u64)], covered: &[(u64, u64)]) -> Past {
        let ancestor = |&(timeline, switch): &(u32, u64)| Ancestor {
            timeline: TimelineId::new(timeline).unwrap(),
            switch: Lsn::new(switch),
        };
        let range = |&(start, end): &(u64, u64)| LsnRange::new(Lsn::new(start), Lsn::new(end));
        Past {
            ancestors: ancestors.iter().map(ancestor).collect(),
            covered: covered.iter().map(range).collect(),
        }
    }

    fn pasts() -> BTreeMap<Branch, Past> {
        BTreeMap::from([
            (branch("00000001-0000000a"), past(&[], &[(0, 500)])),
            (branch("00000002-0000000a"), past(&[(1, 100)], &[(96, 300)])),
            (branch("00000002-0000000b"), past(&[(1, 100)], &[(96, 150)])),
            (branch("00000002-0000000c"), past(&[(1, 200)], &[(192, 900)])),
            (branch("00000003-0000000a"), past(&[(1, 100), (2, 250)], &[(240, 400)])),
            (branch("00000005-0000000a"), past(&[(1, 100), (4, 250)], &[(240, 400)])),
        ])
    }

    fn shown(tip: &str) -> Vec<String> {
        let line = line_of(branch(tip), &pasts());
        line.legs.iter().map(|l| format!("{} {}..{}", l.branch, l.from, l.to)).collect()
    }

    #[test]
    fn parents_agree_with_the_history_and_reach_the_switch() {
        assert_eq!(
            shown("00000003-0000000a"),
            [
                "00000001-0000000a 0/0..0/64",
                "00000002-0000000a 0/64..0/FA",
                "00000003-0000000a 0/FA..FFFFFFFF/FFFFFFFF"
            ]
        );
        assert_eq!(shown("00000002-0000000c")[0], "00000001-0000000a 0/0..0/C8");
        assert_eq!(shown("00000005-0000000a").len(), 1, "nothing of timeline 4 is stored");
    }
}
