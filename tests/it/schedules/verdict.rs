//! After the last moment: servers and spools are gone, and of the locations those are kept that the policy requires. Each
//! branch is restored from them alone, to its own last acknowledged position or as far as there is anything, and judged.
//!
//! Which are kept follows from what was promised: nothing is missing while one that counted is left. With `all` that is any one of
//! them, with `majority` any two of three or one that counted, with `any` one that counted.

use super::draw::{LOCATIONS, Policy, Schedule};
use super::stage::{Outcome, Reign};
use super::template::{NAMES, locations};
use super::watch::Promise;
use crate::site::restore_and_start;
use anyhow::{Context, Result, ensure};
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange, covered_until};
use backstay_common::name::ObjectName;
use backstay_tests::bucket::Bucket;
use backstay_tests::checks::check_all;
use backstay_tests::ledger::{Target, Transaction};
use backstay_tests::major::Major;
use backstay_tests::programs::{Configuration, Deployment};
use backstay_tests::random::Random;
use backstay_tests::scene::Scene;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::time::Instant;

/// What was found right.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdict {
    pub restores: usize,
    /// Transactions that had to be there, and were.
    pub kept: usize,
    /// Acknowledged ones that were not promised yet, and were not there.
    pub left_out: usize,
}

/// One restore that must succeed.
struct Case<'o> {
    reign: &'o Reign,
    branch: Branch,
    /// The numbers of the locations that are left.
    kept: BTreeSet<usize>,
    to: String,
    /// Each must be met.
    targets: Vec<Target>,
}

impl fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept: Vec<&str> = self.kept.iter().map(|&location| NAMES[location]).collect();
        write!(f, "branch {} to {} from {}", self.branch, self.to, kept.join(" and "))
    }
}

/// Restores every branch, and judges each.
pub async fn reach(
    scene: &Scene,
    schedule: &Schedule,
    major: &Major,
    key: &Path,
    outcome: &Outcome,
) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    for (number, case) in cases(schedule, outcome)?.iter().enumerate() {
        judge_case(scene, major, key, outcome, case, number, &mut verdict)
            .await
            .with_context(|| format!("{case}\npromised: {:?}", outcome.promises))?;
    }
    ensure!(verdict.restores > 0, "nothing was promised, so nothing was judged");
    Ok(verdict)
}

async fn judge_case(
    scene: &Scene,
    major: &Major,
    key: &Path,
    outcome: &Outcome,
    case: &Case<'_>,
    number: usize,
    verdict: &mut Verdict,
) -> Result<()> {
    for (location, bucket) in outcome.buckets.iter().enumerate() {
        bucket.faults().refuse(!case.kept.contains(&location));
    }
    let lost = (0..LOCATIONS).filter(|location| !case.kept.contains(location));
    let configuration = locations(Configuration::default().key(key), &outcome.buckets);
    let configuration = lost.fold(configuration, |left, location| left.without(NAMES[location]));
    let deployment = Deployment::new(scene, &format!("bare{number}"), &configuration).await?;
    let (name, branch) = (format!("r{number}"), case.branch.to_string());
    let more = ["--timeline", branch.as_str()];
    let (mut restored, _) =
        restore_and_start(scene, &deployment, major, &name, &case.to, &more).await?;
    let session = restored.connect().await?;
    for (n, target) in case.targets.iter().enumerate() {
        let report = case.reign.ledger.check(&session, target).await?;
        ensure!(report.present > 0, "nothing was restored");
        if n == 0 {
            verdict.kept += report.present;
            verdict.left_out += report.left_out;
        }
    }
    // Files are looked at once in each schedule: it takes as long as all the rest.
    if number == 0 {
        check_all(&restored).await?;
    }
    verdict.restores += 1;
    restored.destroy()
}

fn cases<'o>(schedule: &Schedule, outcome: &'o Outcome) -> Result<Vec<Case<'o>>> {
    let mut random = schedule.random("losses");
    let mut cases = Vec::new();
    for reign in &outcome.reigns {
        let branches = branches(outcome, reign);
        let furthest = |branch: &&Branch| furthest(&outcome.buckets, **branch).1;
        let Some(main) = branches.iter().max_by_key(furthest).copied() else {
            ensure!(reign.told() <= reign.begin, "{reign:?} has a promise and no branch");
            continue;
        };
        for branch in branches {
            let known = outcome.promises.get(&branch).cloned().unwrap_or_default();
            let told = if branch == main { reign.told() } else { Lsn::INVALID };
            // What the agent was seen to promise may be nothing yet, where the server has been told of more.
            let known = if known.acknowledged > reign.begin { known } else { Promise::default() };
            let (promise, kept) = kept(schedule, &mut random, outcome, branch, known, told);
            let is_main = branch == main;
            let case =
                |to: String, targets| Case { reign, branch, kept: kept.clone(), to, targets };
            if schedule.synchronous && is_main && has_returned(reign) {
                let until = Target::Latest { acknowledged_until: Instant::now() };
                let targets = vec![until, Target::Snapshot { stop: promise }];
                cases.push(case("latest".to_owned(), targets));
            } else if !schedule.synchronous && promise > reign.begin {
                if is_main && random.one_in(3) {
                    cases.push(case("latest".to_owned(), vec![Target::Snapshot { stop: promise }]));
                }
                cases.push(case(format!("lsn:{promise}"), vec![Target::Lsn(promise)]));
            }
        }
    }
    Ok(cases)
}

/// Whether any commit of its own returned.
fn has_returned(reign: &Reign) -> bool {
    let returned = |t: &Transaction| t.acknowledged().is_some_and(|a| a.returned);
    reign.ledger.transactions().iter().any(|t| t.before >= reign.begin && returned(t))
}

/// The branches of a reign: those of which anything was promised, else those that are stored anywhere.
fn branches(outcome: &Outcome, reign: &Reign) -> BTreeSet<Branch> {
    let of_reign = |branch: &Branch| branch.timeline == reign.timeline;
    let promised: BTreeSet<Branch> = outcome.promises.keys().copied().filter(of_reign).collect();
    match promised.is_empty() {
        false => promised,
        true => {
            let stored = outcome.buckets.iter().flat_map(|bucket| stored(bucket).into_keys());
            stored.filter(of_reign).collect()
        }
    }
}

/// What is to be found again, and the locations that are left for it. Of commits that waited, the last were acknowledged
/// after the last look at the agent: which location counted for them is not known.
fn kept(
    schedule: &Schedule,
    random: &mut Random,
    outcome: &Outcome,
    branch: Branch,
    known: Promise,
    told: Lsn,
) -> (Lsn, BTreeSet<usize>) {
    let all: BTreeSet<usize> = (0..LOCATIONS).collect();
    let counted: Vec<usize> = known.counted.iter().copied().collect();
    let most = known.acknowledged.max(told);
    let (first, _) = furthest(&outcome.buckets, branch);
    let may_be_one = !schedule.synchronous && !counted.is_empty();
    match schedule.policy {
        Policy::All => (most, [random.below(LOCATIONS as u64) as usize].into()),
        Policy::Any | Policy::Majority if may_be_one && random.one_in(2) => {
            (known.acknowledged, [*random.pick(&counted)].into())
        }
        Policy::Any => (most, [first].into()),
        Policy::Majority => {
            // The one that has most is missed most.
            let other = random.below(LOCATIONS as u64) as usize;
            let lost = if random.one_in(4) { other } else { first };
            (most, all.into_iter().filter(|location| *location != lost).collect())
        }
    }
}

/// The location that has most of a branch without a hole, and how far.
fn furthest(buckets: &[Bucket; LOCATIONS], branch: Branch) -> (usize, Lsn) {
    let reach = |bucket: &Bucket| {
        let mut ranges = stored(bucket).remove(&branch).unwrap_or_default();
        let begin = ranges.iter().map(|range| range.start).min().unwrap_or_default();
        covered_until(begin, &mut ranges)
    };
    let all = buckets.iter().map(reach).enumerate();
    all.max_by_key(|(_, end)| *end).unwrap_or_default()
}

/// The WAL at a location, by its objects' names.
fn stored(bucket: &Bucket) -> BTreeMap<Branch, Vec<LsnRange>> {
    let mut stored: BTreeMap<Branch, Vec<LsnRange>> = BTreeMap::new();
    for key in bucket.objects().into_keys() {
        let name = key.split_once('/').and_then(|(_, name)| name.parse().ok());
        if let Some(ObjectName::Wal { branch, range, .. }) = name {
            stored.entry(branch).or_default().push(range);
        }
    }
    stored
}
