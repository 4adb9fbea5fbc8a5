//! When snapshots are due: five cron fields, read in one time zone.
//!
//! Fields are minute, hour, day of month, month, day of week (0 to 7, both ends Sunday, or names). As in every cron,
//! a day that is restricted in both ways suits if it suits in either. What a change of clocks leaves out is
//! due at the first moment after the gap; what it repeats is due once, the first time.

use backstay_common::config::SnapshotSettings;
use backstay_common::{Error, Kind, Result};
use chrono::{DateTime, Datelike, NaiveDate, Timelike, Utc};
use jiff::civil;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp};
use std::str::FromStr;

/// A rule that says when the next snapshot is due.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// A moment is due if any of them says so: two where both kinds of day are restricted.
    rules: Vec<cron::Schedule>,
    zone: TimeZone,
}

impl Schedule {
    /// The config's. One that is never due is a fault, too.
    pub fn of(settings: &SnapshotSettings) -> Result<Schedule> {
        let text = &settings.schedule;
        let schedule = Schedule::parse(text, settings.time_zone.clone())?;
        match schedule.next_after(Timestamp::now()) {
            Some(_) => Ok(schedule),
            None => Err(fault(text, "it is never due")),
        }
    }

    /// Reads five cron fields. Every fault is [`Kind::Config`].
    pub fn parse(text: &str, zone: TimeZone) -> Result<Schedule> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        let &[minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(fault(text, format_args!("{} fields instead of five", fields.len())));
        };
        let weekdays = weekdays(weekday).map_err(|reason| fault(text, reason))?;
        let days = match (is_any(day), is_any(weekday)) {
            (false, false) => vec![(day, "*"), ("*", weekdays.as_str())],
            _ => vec![(day, weekdays.as_str())],
        };
        let rules = days.into_iter().map(|(day, weekday)| {
            cron::Schedule::from_str(&format!("0 {minute} {hour} {day} {month} {weekday}"))
                .map_err(|reason| fault(text, reason))
        });
        Ok(Schedule { rules: rules.collect::<Result<_>>()?, zone })
    }

    /// The first due moment later than `after`; none if there is no other, as for the 30th of February.
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        let local = after.to_zoned(self.zone.clone()).datetime();
        // The crate's clock is given the local time as if it were UTC: changes of clocks are dealt with here.
        let from = to_chrono(local)?;
        let firsts = self.rules.iter().filter_map(|rule| {
            rule.after(&from)
                .filter_map(|due| self.moment(to_civil(due)?))
                .find(|moment| *moment > after)
        });
        firsts.min()
    }

    /// True if a run was due after `last_run` and not later than `now`, or if there never was a run.
    pub fn missed(&self, last_run: Option<Timestamp>, now: Timestamp) -> bool {
        match last_run {
            None => true,
            Some(last) => self.next_after(last).is_some_and(|due| due <= now),
        }
    }

    /// When a clock in this zone first shows `local`, or has just jumped over it.
    fn moment(&self, local: civil::DateTime) -> Option<Timestamp> {
        match self.zone.to_ambiguous_timestamp(local).offset() {
            AmbiguousOffset::Unambiguous { offset } => offset.to_timestamp(local).ok(),
            AmbiguousOffset::Fold { before, .. } => before.to_timestamp(local).ok(),
            AmbiguousOffset::Gap { before, .. } => {
                let beyond = before.to_timestamp(local).ok()? + SignedDuration::from_secs(1);
                Some(self.zone.preceding(beyond).next()?.timestamp())
            }
        }
    }
}

fn fault(text: &str, reason: impl std::fmt::Display) -> Error {
    Error::new(Kind::Config, format!("snapshot schedule {text:?}: {reason}"))
        .remedy("write minute hour day month weekday: \"0 2 * * *\"")
}

/// True for a field that does not restrict the day.
fn is_any(field: &str) -> bool {
    field.starts_with('*') || field.starts_with('?')
}

const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// A day-of-week field as the `cron` crate has it: a list of days from 1, Sunday, to 7.
fn weekdays(field: &str) -> Result<String, String> {
    if matches!(field, "*" | "?") {
        return Ok("*".into());
    }
    let mut wanted = [false; 7];
    for part in field.split(',') {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, step.parse().ok().filter(|step| (1..=7).contains(step))),
            None => (part, Some(1)),
        };
        let step: usize = step.ok_or_else(|| format!("{part:?} has no step from 1 to 7"))?;
        let (first, last) = match range.split_once('-') {
            _ if range == "*" => (0, 6),
            Some((first, last)) => (weekday(first)?, weekday(last)?),
            // As in cron: a step after a single day runs to the end of the week.
            None if part.contains('/') => (weekday(range)?, 6),
            None => (weekday(range)?, weekday(range)?),
        };
        // fri-sun, and sun as the end of a range: the week goes round.
        let last = if last < first { last + 7 } else { last };
        (first..=last).step_by(step).for_each(|day| wanted[day % 7] = true);
    }
    let days = (0..7).filter(|&day| wanted[day]).map(|day| (day + 1).to_string());
    Ok(days.collect::<Vec<_>>().join(","))
}

/// 0 to 7, where 0 and 7 are Sunday, or a name.
fn weekday(text: &str) -> Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    let named = || {
        let short = lower.get(..3)?;
        let full = ["sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"];
        (lower.len() == 3 || full.contains(&lower.as_str()))
            .then(|| WEEKDAYS.iter().position(|day| *day == short))?
    };
    match text.parse() {
        Ok(day @ 0..=7usize) => Ok(day),
        _ => named().ok_or_else(|| format!("{text:?} is no day of the week")),
    }
}

fn to_chrono(local: civil::DateTime) -> Option<DateTime<Utc>> {
    let date = NaiveDate::from_ymd_opt(
        local.year().into(),
        local.month().try_into().ok()?,
        local.day().try_into().ok()?,
    )?;
    let (hour, minute, second) = (local.hour(), local.minute(), local.second());
    let clock = |value: i8| u32::try_from(value).ok();
    Some(date.and_hms_opt(clock(hour)?, clock(minute)?, clock(second)?)?.and_utc())
}

fn to_civil(time: DateTime<Utc>) -> Option<civil::DateTime> {
    civil::DateTime::new(
        time.year().try_into().ok()?,
        time.month().try_into().ok()?,
        time.day().try_into().ok()?,
        time.hour().try_into().ok()?,
        time.minute().try_into().ok()?,
        time.second().try_into().ok()?,
        0,
    )
    .ok()
}

#[cfg(test)]
mod tests;
