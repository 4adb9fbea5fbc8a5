//! The lines that a restore may follow, and how one of them is chosen.

use backstay_common::id::Branch;
pub use backstay_common::line::{Line, LineLeg, Past, line_of};
use backstay_common::segment::TimelineId;
use backstay_common::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

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

    /// Only the names count here.
    fn pasts() -> BTreeMap<Branch, Past> {
        let names =
            ["1-0000000a", "2-0000000a", "2-0000000b", "2-0000000c", "3-0000000a", "5-0000000a"];
        let past = |name: &&str| {
            (branch(&format!("0000000{name}")), Past { ancestors: Vec::new(), covered: Vec::new() })
        };
        names.iter().map(past).collect()
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
