//! Which line, when several hold the target. Pure.
//!
//! The newest timeline is taken, as PostgreSQL does, unless another history has the same number or something newer in it:
//! then nobody but a person can know which of the two servers was the real one.

use super::Answer;
use super::line::Line;
use crate::target::Target;
use backstay_common::pgtime::PgTime;
use backstay_common::{Error, Kind, Result};

/// What one line answers.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub line: Line,
    pub answer: Answer,
    /// When something last happened on the line's own branch.
    pub recency: Option<PgTime>,
}

/// Chooses among `candidates`, which are in the order of preference and at least one.
pub fn choose(target: &Target, candidates: Vec<Candidate>) -> Result<Answer> {
    let mut candidates = candidates.into_iter();
    let mut preferred = candidates.next().expect("there is a candidate");
    for other in candidates {
        if is_same(&preferred, &other) {
            continue;
        }
        let same_number = other.line.tip().timeline == preferred.line.tip().timeline;
        if same_number || other.recency > preferred.recency {
            return Err(ambiguous(target, &preferred, &other));
        }
        let (branch, taken) = (other.line.tip(), preferred.line.tip());
        preferred.answer.notes.push(format!(
            "branch {branch} has WAL of its own for this target too; {taken} is newer and is taken \
             (--timeline {branch} takes the other)"
        ));
    }
    Ok(preferred.answer)
}

/// True if the moment lies where both lines are one.
fn is_same(preferred: &Candidate, other: &Candidate) -> bool {
    let equal = (preferred.answer.branch, preferred.answer.stop)
        == (other.answer.branch, other.answer.stop);
    let leaves = preferred.line.leaves(other.answer.branch);
    let is_on_preferred = leaves.is_some_and(|to| other.answer.position <= to);
    equal || (is_on_preferred && other.line.tip() == other.answer.branch)
}

fn ambiguous(target: &Target, one: &Candidate, other: &Candidate) -> Error {
    let show = |candidate: &Candidate| {
        let (branch, position) = (candidate.line.tip(), candidate.answer.position);
        let recency = candidate
            .recency
            .map_or("nothing dated".into(), |time| format!("last sign of life {time}"));
        format!(
            "\n  branch {branch}: would end at {position} on {}, {recency}",
            candidate.answer.branch
        )
    };
    let reason = format!(
        "two histories of the cluster hold the target {target}, and they differ:{}{}",
        show(one),
        show(other)
    );
    let choice = |candidate: &Candidate| match one.line.tip().timeline == other.line.tip().timeline
    {
        true => candidate.line.tip().to_string(),
        false => candidate.line.tip().timeline.to_string(),
    };
    Error::new(Kind::Target, reason).remedy(format!(
        "choose one: --timeline {} or --timeline {}",
        choice(one),
        choice(other)
    ))
}
