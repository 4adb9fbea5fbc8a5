//! Lines: a branch with its ancestors, each cut where the next one left it. Pure.
//!
//! Along one line positions only grow, so an LSN alone says on which branch it is.

use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::segment::{Ancestor, TimelineId};
use backstay_common::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

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

/// What `--timeline` says: a number, or one branch by its full name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BranchChoice {
    Timeline(TimelineId),
    Branch(Branch),
}

impl FromStr for BranchChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<BranchChoice, String> {
        let branch = text.parse().map(BranchChoice::Branch).ok();
        branch.or_else(|| text.parse().map(BranchChoice::Timeline).ok()).ok_or_else(|| {
            format!(
                "{text:?} is neither a timeline such as 2 nor a branch such as 00000002-3fa9c1d2"
            )
        })
    }
}

impl fmt::Display for BranchChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BranchChoice::Timeline(timeline) => timeline.fmt(f),
            BranchChoice::Branch(branch) => branch.fmt(f),
        }
    }
}

/// The branches whose lines are to be searched, newest timeline first.
pub fn tips(pasts: &BTreeMap<Branch, Past>, choice: Option<BranchChoice>) -> Result<Vec<Branch>> {
    let chosen = |branch: &&Branch| match choice {
        None => true,
        Some(BranchChoice::Timeline(timeline)) => branch.timeline == timeline,
        Some(BranchChoice::Branch(one)) => **branch == one,
    };
    let tips: Vec<Branch> = pasts.keys().rev().filter(chosen).copied().collect();
    let list = |branches: &[Branch]| {
        branches.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    match (choice, &tips[..]) {
        (Some(choice), []) => {
            let all: Vec<Branch> = pasts.keys().copied().collect();
            Err(Error::new(Kind::Target, format!("no location that answers has timeline {choice}"))
                .remedy(format!("choose one of the branches {}", list(&all))))
        }
        (Some(BranchChoice::Timeline(timeline)), [_, _, ..]) => Err(Error::new(
            Kind::Target,
            format!("two histories became timeline {timeline}: the branches {}", list(&tips)),
        )
        .remedy(format!("choose one by its full name: --timeline {}", tips[0]))),
        _ => Ok(tips),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn a_timeline_of_two_branches_wants_the_full_name() {
        let choose = |text: &str| tips(&pasts(), Some(text.parse().unwrap()));
        assert_eq!(choose("3").unwrap(), [branch("00000003-0000000a")]);
        let error = choose("2").unwrap_err();
        assert_eq!(error.kind(), Kind::Target);
        assert!(error.to_string().contains("--timeline 00000002-0000000c"), "{error}");
        assert_eq!(choose("00000002-0000000b").unwrap(), [branch("00000002-0000000b")]);
        assert_eq!(choose("9").unwrap_err().kind(), Kind::Target);
        assert_eq!(tips(&pasts(), None).unwrap()[0], branch("00000005-0000000a"));
        assert!("x".parse::<BranchChoice>().is_err());
    }
}
