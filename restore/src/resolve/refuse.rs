//! What cannot be reached: why, and the nearest moments that can.

use super::line::Line;
use super::reach::{Gap, Reach};
use super::survey::Survey;
use crate::target::Target;
use backstay_common::id::{LocationName, SnapshotId};
use backstay_common::lsn::Lsn;
use backstay_common::pgtime::PgTime;
use backstay_common::snapshot::ManifestPlain;
use backstay_common::{Error, Kind, Result};
use jiff::Timestamp;

/// What was found out while a line was searched.
#[derive(Debug)]
pub struct Tried<'a> {
    target: &'a Target,
    line: &'a Line,
    /// The oldest snapshot that could be used.
    earliest: Option<(SnapshotId, Lsn, Timestamp)>,
    /// How far the WAL goes, what its clock says, and the newest transaction.
    covered: Option<(Lsn, Option<PgTime>, Option<PgTime>)>,
    gap: Option<Gap>,
    /// Snapshots whose own WAL is not all there.
    incomplete: Vec<SnapshotId>,
}

impl<'a> Tried<'a> {
    pub fn new(target: &'a Target, line: &'a Line) -> Tried<'a> {
        Tried { target, line, earliest: None, covered: None, gap: None, incomplete: Vec::new() }
    }

    /// A snapshot was looked at; they come newest first.
    pub fn seen(&mut self, id: SnapshotId, plain: &ManifestPlain) {
        let finished =
            Timestamp::from_second(plain.finished.max(plain.began + 1)).unwrap_or(id.began());
        self.earliest = Some((id, plain.stop, finished));
    }

    /// The WAL does not reach the snapshot's end.
    pub fn incomplete(&mut self, id: SnapshotId, plain: &ManifestPlain, reach: Option<&Reach>) {
        if self.earliest.is_some_and(|(earliest, ..)| earliest == id) {
            self.earliest = None;
        }
        self.incomplete.push(id);
        let missing = |reach: &Reach| Gap {
            branch: reach.tip(),
            range: backstay_common::lsn::LsnRange::new(reach.end, plain.stop),
        };
        self.gap = self.gap.or(reach.map(|reach| reach.gap.unwrap_or(missing(reach))));
    }

    /// How far the newest usable snapshot reaches.
    pub async fn covered(&mut self, survey: &Survey, reach: &Reach) -> Result<()> {
        if self.covered.is_none_or(|(end, ..)| end < reach.end) {
            let footers = survey.footers(&reach.stretches).await?;
            let newest = footers.iter().filter_map(|meta| meta.summary.greatest_time).max();
            let clock = survey.clock(reach).await?;
            self.covered = Some((reach.end, clock, newest.map(PgTime)));
            self.gap = reach.gap.or(self.gap);
        }
        Ok(())
    }

    fn refuse(&self, reason: impl std::fmt::Display) -> Error {
        let (target, tip) = (self.target, self.line.tip());
        Error::new(
            Kind::Target,
            format!("the target {target} cannot be reached on branch {tip}: {reason}"),
        )
    }

    /// Behind all that is stored.
    pub fn too_late(&self, survey: &Survey) -> Error {
        let reason = match self.covered {
            Some((end, clock, newest)) => {
                let clock = clock.map_or(String::new(), |c| format!(", the server's clock to {c}"));
                let newest = newest.map_or("no transaction was found".to_string(), |t| {
                    format!("the newest transaction found ended {t}")
                });
                format!("it is later than what is stored: WAL reaches {end}{clock}, {newest}")
            }
            None => "no WAL that could be replayed is stored".into(),
        };
        self.with_gap(reason, survey, "--to latest restores all that is stored")
    }

    /// Before the end of the first snapshot.
    pub fn too_early(&self, survey: &Survey) -> Error {
        let Some((id, stop, finished)) = self.earliest else { return self.unreachable(survey) };
        let reason = format!(
            "it is before the end of the earliest snapshot that can be used, {id}: {stop}, finished {finished}"
        );
        let offer = format!(
            "the earliest moment is --to snapshot:{id}, or --to lsn:{stop}, or from {finished} on"
        );
        self.with_gap(reason, survey, &offer)
    }

    /// No such record.
    pub fn not_found(&self, survey: &Survey) -> Error {
        if self.earliest.is_none() {
            return self.unreachable(survey);
        }
        let reach = match (self.earliest, self.covered) {
            (Some((_, from, _)), Some((to, ..))) => format!("from {from} to {to}"),
            _ => "that is stored".to_string(),
        };
        let reason = format!("no such record is in the WAL {reach}");
        self.with_gap(reason, survey, "`backstay list` shows what can be restored")
    }

    /// No snapshot can be used at all.
    pub fn unreachable(&self, survey: &Survey) -> Error {
        let reason = match &self.incomplete[..] {
            [] => "no snapshot lies on it".to_string(),
            some => {
                let list: Vec<String> = some.iter().map(ToString::to_string).collect();
                format!("the WAL that the snapshot {} needs is not all there", list.join(", "))
            }
        };
        self.with_gap(
            reason,
            survey,
            "bring back a location that has it; `backstay list` shows what can be restored",
        )
    }

    /// The two answers that a clock set back leaves.
    pub fn clock_step(&self, ours: (SnapshotId, Lsn), other: (SnapshotId, Lsn)) -> Error {
        let show = |(id, lsn): (SnapshotId, Lsn)| {
            format!("\n  from snapshot {id}: the state before the record at {lsn}")
        };
        self.refuse(format!(
            "the server's clock was set back, and the time occurs more than once:{}{}",
            show(other),
            show(ours)
        ))
        .remedy(format!(
            "choose one: --snapshot {} or --snapshot {}, or give a position as lsn:",
            other.0, ours.0
        ))
    }

    fn with_gap(&self, reason: String, survey: &Survey, offer: &str) -> Error {
        let Some(gap) = self.gap else { return self.refuse(reason).remedy(offer) };
        let after = survey.snapshots.iter().filter(|(_, plain)| {
            let reaches = |reach: Reach| reach.end >= plain.stop;
            plain.start >= gap.range.end && survey.reach(self.line, plain).is_some_and(reaches)
        });
        let after = after.map(|(id, _)| *id).min().map_or(String::new(), |id| {
            format!("; after it the next moment is --to snapshot:{id}")
        });
        let before = self
            .covered
            .map_or(String::new(), |(end, ..)| format!("; before it all is there up to lsn:{end}"));
        let overlaps = |recorded: &&backstay_common::gap::Gap| {
            recorded.branch == gap.branch
                && recorded.start < gap.range.end
                && recorded.end > gap.range.start
        };
        let recorded: String = survey
            .gaps
            .iter()
            .filter(overlaps)
            .map(|recorded| format!("\n  recorded: {recorded}"))
            .collect();
        self.refuse(format!(
            "{reason}. No location that answers has the WAL {} of branch {}{recorded}",
            gap.range, gap.branch
        ))
        .remedy(format!("{offer}{before}{after}"))
    }
}

/// What `latest` cannot restore though it is stored.
pub fn more_beyond(gap: &Gap) -> String {
    format!(
        "there is WAL after {}, but no location that answers has the WAL {} of branch {} before it",
        gap.range.end, gap.range, gap.branch
    )
}

/// There is nothing to restore from, or all that there is is damaged.
pub fn no_snapshot(survey: &Survey) -> Error {
    let notes: String = survey.notes.iter().map(|note| format!("\n  {note}")).collect();
    let is_damaged = survey.notes.iter().any(|note| note.starts_with("snapshot "));
    let kind = if is_damaged { Kind::Corrupt } else { Kind::Target };
    Error::new(kind, format!("no location that answers has a complete snapshot{notes}"))
        .remedy("take one with `backstay-agent snapshot`, or bring back the location that has one")
}

/// A refusal names the locations that might have known more.
pub fn with_unreachable(error: Error, unreachable: &[(LocationName, String)]) -> Error {
    if error.kind() != Kind::Target || unreachable.is_empty() {
        return error;
    }
    let list: String = unreachable.iter().map(|(name, why)| format!("\n  {name}: {why}")).collect();
    let said =
        format!("{}\nlocations that could not be asked, and may have more:{list}", error.message());
    let with = Error::new(error.kind(), said);
    match error.remedy_text() {
        Some(remedy) => with.remedy(remedy),
        None => with,
    }
}
