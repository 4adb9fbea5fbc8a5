//! From a target to an exact WAL position, a branch and a snapshot.
//!
//! ```text
//! catalog ─► survey.rs   manifests, origins, footers, heads; decodes what must be decoded, and no more
//!              │
//!            line.rs     each branch with its ancestors, cut at the switches        (pure)
//!            reach.rs    what stored WAL a snapshot can be replayed through          (pure)
//!              │
//!            search.rs   the target on one line: which snapshot, which record
//!            choose.rs   among lines: the newest, unless another is as good          (pure)
//!            extend.rs   the damaged server's own `pg_wal`
//!            refuse.rs   what cannot be, why, and the nearest that can
//! ```
//!
//! What always holds: the record at which an answer stops is complete, before [`Answer::end`], and at or after the end of
//! its snapshot; every byte between is in the listing of a location that answers.

pub mod choose;
mod extend;
mod footers;
pub mod line;
pub mod reach;
mod refuse;
mod search;
pub mod survey;

use crate::plan::StopPoint;
use crate::target::Target;
use backstay_common::id::{Branch, SnapshotId};
use backstay_common::lsn::Lsn;
use backstay_common::pgtime::PgTime;
use backstay_common::{Error, Kind, Result};
use choose::Candidate;
use line::{BranchChoice, Line};
use reach::Reach;
use survey::Survey;

pub use extend::extend;
pub use refuse::with_unreachable;

/// Where a restore stops, and from which snapshot it gets there.
#[derive(Clone, Debug)]
pub struct Answer {
    pub snapshot: SnapshotId,
    pub stop: StopPoint,
    /// On which branch it stops.
    pub branch: Branch,
    /// The last restored byte's end on that branch's line.
    pub position: Lsn,
    /// No WAL after this is needed.
    pub end: Lsn,
    pub last_transaction: Option<PgTime>,
    pub first_lost: Option<PgTime>,
    pub reach: Reach,
    /// What a person should know of the choice.
    pub notes: Vec<String>,
}

/// What restricts the choice.
#[derive(Clone, Debug, Default)]
pub struct Restriction {
    pub branch: Option<BranchChoice>,
    pub snapshot: Option<SnapshotId>,
}

/// Resolves `target` on every line that may hold it, and takes the one that a person would.
pub async fn resolve(survey: &Survey, target: &Target, only: &Restriction) -> Result<Answer> {
    if survey.snapshots.is_empty() {
        return Err(refuse::no_snapshot(survey));
    }
    if let Target::Snapshot(_) = target {
        return search::snapshot(survey, only).await;
    }
    let lines = lines(survey, only.branch)?;
    let mut candidates = Vec::new();
    let mut refusals: Vec<(Branch, Error)> = Vec::new();
    for line in lines {
        match search::on_line(survey, &line, target, only).await {
            Ok(answer) => {
                let recency = survey.recency(&line, &answer.reach).await?;
                candidates.push(Candidate { line, answer, recency });
            }
            // Another try will find the other objects that cover the same place.
            Err(error) if survey.wants_retry() => return Err(error),
            Err(error) => refusals.push((line.tip(), error)),
        }
    }
    decide(target, candidates, refusals)
}

fn decide(
    target: &Target,
    candidates: Vec<Candidate>,
    mut refusals: Vec<(Branch, Error)>,
) -> Result<Answer> {
    if candidates.is_empty() {
        let first = (!refusals.is_empty()).then(|| refusals.remove(0).1);
        return Err(first.unwrap_or_else(|| Error::new(Kind::Target, "no branch has any WAL")));
    }
    let mut answer = choose::choose(target, candidates)?;
    for (branch, error) in refusals.iter().filter(|(_, error)| error.kind() != Kind::Target) {
        let newer = branch.timeline > answer.branch.timeline;
        if newer {
            let at = refusals.iter().position(|(b, _)| b == branch).expect("it is among them");
            return Err(refusals.swap_remove(at).1.remedy(format!(
                "bring back what is missing, or choose another line with --timeline {}",
                answer.branch.timeline
            )));
        }
        answer.notes.push(format!("branch {branch} could not be searched: {}", error.message()));
    }
    Ok(answer)
}

/// The lines to search, newest timeline first.
fn lines(survey: &Survey, choice: Option<BranchChoice>) -> Result<Vec<Line>> {
    let tips = line::tips(&survey.pasts, choice)?;
    Ok(tips.into_iter().map(|tip| line::line_of(tip, &survey.pasts)).collect())
}
