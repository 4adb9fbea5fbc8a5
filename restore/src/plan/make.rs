//! Making a plan.

use super::{History, HotStandbyMinimums, Leg, Plan};
use crate::access::Access;
use crate::resolve::line::{BranchChoice, line_of};
use crate::resolve::survey::Survey;
use crate::resolve::{self, Answer, Restriction};
use crate::target::Target;
use backstay_common::catalog::Catalog;
use backstay_common::id::{SnapshotId, SystemId};
use backstay_common::lsn::LsnRange;
use backstay_common::snapshot::ManifestPlain;
use backstay_common::wal::Minima;
use backstay_common::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Bytes of the database that are fetched, opened and written in a second.
const RESTORE_BYTES_PER_SECOND: u64 = 200_000_000;
/// Bytes of WAL that PostgreSQL replays in a second.
const REPLAY_BYTES_PER_SECOND: u64 = 100_000_000;
/// Starting and promoting.
const OPEN_SECONDS: u64 = 3;
/// Objects that turn out to be damaged everywhere, while others cover their place, before the plan is given up.
const PASSED_OVER_MAX: usize = 100;

/// What is asked of a plan.
#[derive(Clone, Debug)]
pub struct PlanRequest {
    pub target: Target,
    /// `--timeline`.
    pub timeline: Option<BranchChoice>,
    /// `--snapshot`: the beginning of an id.
    pub snapshot: Option<String>,
    /// `--wal-from`: the damaged server's `pg_wal`.
    pub wal_from: Option<PathBuf>,
    pub now: jiff::Timestamp,
}

impl PlanRequest {
    pub fn new(target: Target, now: jiff::Timestamp) -> PlanRequest {
        PlanRequest { target, timeline: None, snapshot: None, wal_from: None, now }
    }
}

/// Lists the locations and plans. A target that cannot be reached is [`Kind::Target`], with the nearest that can.
/// Changes nothing anywhere; safe to drop.
pub async fn make(access: &Access, request: &PlanRequest) -> Result<Plan> {
    let catalog = Catalog::load(&access.locations, access.system).await?;
    make_with(access, Arc::new(catalog), request).await
}

/// Plans for one of the cluster's systems: `system`, or else the newest, or else the newest that has the time or the snapshot that
/// is asked for. What was refused of the newest is what is told if none has it.
pub async fn choose(
    access: &Access,
    system: Option<SystemId>,
    request: &PlanRequest,
) -> Result<(Access, Arc<Catalog>, Plan)> {
    let is_dated = matches!(request.target, Target::Time(_) | Target::Snapshot(_))
        || request.snapshot.is_some();
    let candidates = match system {
        Some(system) => vec![system],
        None if is_dated => access.systems.clone(),
        None => vec![access.system],
    };
    let mut refused = None;
    for &system in &candidates {
        let access = access.of(system)?;
        let catalog = Arc::new(Catalog::load(&access.locations, system).await?);
        match make_with(&access, catalog.clone(), request).await {
            Ok(plan) => return Ok((access, catalog, plan)),
            Err(error) if error.kind() == Kind::Target => drop(refused.get_or_insert(error)),
            Err(error) => return Err(error),
        }
    }
    let error = refused.expect("there is a system, and it refused");
    let others: Vec<String> = access
        .systems
        .iter()
        .filter(|s| !candidates.contains(s))
        .map(ToString::to_string)
        .collect();
    if others.is_empty() {
        return Err(error);
    }
    let also =
        format!("or name another system of this cluster with --system {}", others.join(", "));
    let remedy = error.remedy_text().map_or(also.clone(), |remedy| format!("{remedy}; {also}"));
    Err(error.remedy(remedy))
}

/// Plans from listings that are at hand.
pub async fn make_with(
    access: &Access,
    catalog: Arc<Catalog>,
    request: &PlanRequest,
) -> Result<Plan> {
    let unreachable = [&access.unreachable[..], &catalog.unreachable[..]].concat();
    let refuse = |error| resolve::with_unreachable(error, &unreachable);
    refuse_future(request)?;
    let mut survey = Survey::load(access, catalog).await?;
    let mut notes = survey.notes.clone();
    if let Some(folder) = &request.wal_from {
        notes.push(resolve::extend(&mut survey, folder).await?);
    }
    let only = Restriction {
        branch: request.timeline,
        snapshot: snapshot_of(&survey, request).map_err(refuse)?,
    };
    let answer = retrying(&survey, &request.target, &only).await.map_err(refuse)?;
    notes.extend(answer.notes.iter().cloned());
    let line = line_of(answer.branch, &survey.pasts);
    notes.extend(survey.gaps_on(&line).map(|gap| format!("cannot be recovered: {gap}")));
    let plain = survey.snapshots[&answer.snapshot].clone();
    let legs = legs(&answer);
    let needed: u64 = plain.packs.iter().map(|pack| pack.live_bytes).sum();
    let wal_bytes = legs.iter().map(|leg| leg.range().len()).sum();
    let is_local = survey.uses_extension(&answer.reach, answer.end);
    Ok(Plan {
        cluster: access.cluster.clone(),
        system: access.system,
        target: request.target.to_string(),
        snapshot: answer.snapshot,
        server_version: plain.server_version,
        segment_bytes: plain.segment_bytes,
        stop: answer.stop,
        end: answer.end,
        last_transaction: answer.last_transaction,
        first_lost: answer.first_lost,
        histories: histories(&survey, &answer),
        minimums: minimums(&survey, &answer).await?,
        locations: access.location_names(),
        unreachable,
        database_bytes: plain.database_bytes,
        snapshot_bytes: needed,
        wal_bytes,
        estimate_seconds: estimate(&plain, wal_bytes),
        wal_from: request.wal_from.clone().filter(|_| is_local),
        notes,
        legs,
    })
}

fn refuse_future(request: &PlanRequest) -> Result<()> {
    match request.target {
        Target::Time(time) if time > request.now => Err(Error::new(
            Kind::Target,
            format!("the target {time} is in the future: it is {} now", request.now),
        )
        .remedy("--to latest restores all that is stored")),
        _ => Ok(()),
    }
}

/// An object that turns out to be good nowhere, but whose place others cover, changes the question: it is asked again.
async fn retrying(survey: &Survey, target: &Target, only: &Restriction) -> Result<Answer> {
    for _ in 0..PASSED_OVER_MAX {
        match resolve::resolve(survey, target, only).await {
            Err(_) if survey.take_retry() => {}
            result => return result,
        }
    }
    Err(Error::new(Kind::Corrupt, "more than 100 objects are damaged at every location")
        .remedy("bring back a location that has them whole"))
}

/// The snapshot that the target or `--snapshot` names by the beginning of its id.
fn snapshot_of(survey: &Survey, request: &PlanRequest) -> Result<Option<SnapshotId>> {
    let prefix = match (&request.target, &request.snapshot) {
        (Target::Snapshot(prefix), _) => prefix,
        (_, Some(prefix)) => prefix,
        _ => return Ok(None),
    };
    let all = survey.snapshots.keys().copied();
    let fits: Vec<SnapshotId> = all.filter(|id| id.to_string().starts_with(prefix)).collect();
    let list = |ids: &mut dyn Iterator<Item = &SnapshotId>| {
        ids.map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    let damaged = survey.notes.iter().find(|note| note.starts_with(&format!("snapshot {prefix}")));
    match fits[..] {
        [one] => Ok(Some(one)),
        [] if let Some(note) = damaged => Err(Error::new(Kind::Corrupt, note)
            .remedy(format!("choose one of {}", list(&mut survey.snapshots.keys())))),
        [] => Err(Error::new(
            Kind::Target,
            format!(
                "no complete snapshot's id begins with {prefix:?} at any location that answers"
            ),
        )
        .remedy(format!("choose one of {}", list(&mut survey.snapshots.keys())))),
        _ => Err(Error::new(Kind::Target, format!("{prefix:?} begins several snapshots' ids"))
            .remedy(format!("give more of one of {}", list(&mut fits.iter())))),
    }
}

/// The branches up to the one on which the answer stops; each but the last goes on to its switch.
fn legs(answer: &Answer) -> Vec<Leg> {
    let until = answer.reach.legs.iter().position(|(branch, _)| *branch == answer.branch);
    let passed = &answer.reach.legs[..=until.unwrap_or(answer.reach.legs.len() - 1)];
    let leg = |(branch, range): &(_, LsnRange)| Leg {
        branch: *branch,
        start: range.start,
        end: range.end,
    };
    let mut legs: Vec<Leg> = passed.iter().map(leg).collect();
    if let Some(last) = legs.last_mut() {
        last.end = answer.end;
    }
    legs
}

/// Of two branches of one timeline, the one that the restore passes through names it.
fn histories(survey: &Survey, answer: &Answer) -> Vec<History> {
    let is_passed = |branch| answer.reach.legs.iter().any(|(passed, _)| *passed == branch);
    let mut by_timeline = BTreeMap::new();
    for (branch, (timeline, content)) in &survey.histories {
        let history = History { timeline: *timeline, content: content.clone() };
        match is_passed(*branch) {
            true => drop(by_timeline.insert(*timeline, history)),
            false => drop(by_timeline.entry(*timeline).or_insert(history)),
        }
    }
    by_timeline.into_values().collect()
}

async fn minimums(survey: &Survey, answer: &Answer) -> Result<HotStandbyMinimums> {
    let replayed = answer.reach.stretches.iter().filter(|s| s.range.start < answer.end);
    let replayed: Vec<_> = replayed.copied().collect();
    let footers = survey.footers(&replayed).await?;
    let changes = footers.iter().filter_map(|meta| meta.summary.parameter_change);
    let most = changes.fold(Minima::default(), Minima::max);
    Ok(HotStandbyMinimums {
        max_connections: most.max_connections,
        max_worker_processes: most.max_worker_processes,
        max_wal_senders: most.max_wal_senders,
        max_prepared_transactions: most.max_prepared_xacts,
        max_locks_per_transaction: most.max_locks_per_xact,
    })
}

fn estimate(plain: &ManifestPlain, wal_bytes: u64) -> u64 {
    plain.database_bytes.div_ceil(RESTORE_BYTES_PER_SECOND)
        + wal_bytes.div_ceil(REPLAY_BYTES_PER_SECOND)
        + OPEN_SECONDS
}

#[cfg(test)]
mod tests;
