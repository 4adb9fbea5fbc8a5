//! The moment asked for, as it is typed after `--to`.

use backstay_common::lsn::Lsn;
use backstay_common::{Error, Kind, Result};
use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Span, SpanRelativeTo, Timestamp, ToSpan, Zoned};
use std::fmt;

/// What to restore to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// All WAL there is.
    Latest,
    /// Everything that ends at or before this position.
    Lsn(Lsn),
    /// Up to and with the end of this transaction.
    Xid(u32),
    /// Up to and with the restore point of this name (`pg_create_restore_point`).
    Name(String),
    /// The end of the snapshot whose id begins so.
    Snapshot(String),
    /// Before the first transaction that ended later.
    Time(Timestamp),
}

const FORMS: &str = "give latest, a time such as '2026-11-22 14:03:00Z' or '10m ago', lsn:16/B374D848, \
    xid:1234, name:LABEL or snapshot:ID";

impl Target {
    /// Reads what a person typed. `tz` is the zone of times that name none; `now` is what "ago" counts from. Every fault
    /// is [`Kind::Config`].
    pub fn parse(text: &str, tz: Option<&TimeZone>, now: Timestamp) -> Result<Target> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("latest") {
            return Ok(Target::Latest);
        }
        match text.split_once(':') {
            Some(("lsn", lsn)) => {
                lsn.parse().map(Target::Lsn).map_err(|e| bad(text, e).remedy(FORMS))
            }
            Some(("xid", xid)) => xid_of(text, xid),
            Some(("name", "")) | Some(("snapshot", "")) => {
                Err(bad(text, "nothing follows the colon"))
            }
            Some(("name", name)) => Ok(Target::Name(name.to_string())),
            Some(("snapshot", id)) => Ok(Target::Snapshot(id.to_string())),
            _ => time(text, tz, now).map(Target::Time),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Latest => f.write_str("latest"),
            Target::Lsn(lsn) => write!(f, "lsn:{lsn}"),
            Target::Xid(xid) => write!(f, "xid:{xid}"),
            Target::Name(name) => write!(f, "name:{name}"),
            Target::Snapshot(id) => write!(f, "snapshot:{id}"),
            Target::Time(time) => write!(f, "{time}"),
        }
    }
}

fn bad(text: &str, reason: impl fmt::Display) -> Error {
    Error::new(Kind::Config, format!("target {text:?}: {reason}"))
}

/// Records carry the lower 32 bits of what `pg_current_xact_id` shows.
fn xid_of(text: &str, digits: &str) -> Result<Target> {
    let number: u64 = digits.parse().map_err(|e| bad(text, e).remedy(FORMS))?;
    match number as u32 {
        0..=2 => Err(bad(text, "no transaction has this id").remedy("ids begin at 3")),
        xid => Ok(Target::Xid(xid)),
    }
}

fn time(text: &str, tz: Option<&TimeZone>, now: Timestamp) -> Result<Timestamp> {
    if let Some(ago) = text.strip_suffix("ago") {
        return before_now(text, ago.trim(), now);
    }
    if text.contains('[') && has_offset(text) {
        let zoned = text.parse::<Zoned>().map_err(|e| bad(text, e).remedy(FORMS))?;
        return Ok(zoned.timestamp());
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let (local, zone) = split_zone(text);
    let zone = match zone {
        Some(name) if name.starts_with(['+', '-']) || name.eq_ignore_ascii_case("z") => {
            return format!("{local}{name}").parse().map_err(|e| bad(text, e).remedy(FORMS));
        }
        Some(name) => Some(TimeZone::get(name).map_err(|e| {
            bad(text, e)
                .remedy("name a zone such as Europe/Berlin, or give an offset such as +01:00")
        })?),
        None => tz.cloned(),
    };
    let local = civil(text, local, zone.as_ref(), now)?;
    let zone = zone.ok_or_else(|| {
        bad(text, "it names no time zone, and the same words mean other moments elsewhere")
            .remedy(format!("write '{text}Z' or '{text}+01:00', or add --tz Europe/Berlin"))
    })?;
    zone.to_ambiguous_timestamp(local).unambiguous().map_err(|_| {
        bad(text, "the clocks were changed then: this local time occurs twice, or not at all")
            .remedy("give the offset, such as +01:00, instead of the zone's name")
    })
}

/// True for `...+01:00[Europe/Berlin]`.
fn has_offset(text: &str) -> bool {
    let time = text.split('[').next().unwrap_or_default();
    time.ends_with(['Z', 'z']) || time.get(11..).is_some_and(|t| t.contains(['+', '-']))
}

/// Takes a zone off the end: `... Europe/Berlin`, `...[Europe/Berlin]`, `... +01`.
fn split_zone(text: &str) -> (&str, Option<&str>) {
    if let Some((local, zone)) = text.strip_suffix(']').and_then(|t| t.rsplit_once('[')) {
        return (local.trim(), Some(zone));
    }
    match text.rsplit_once(' ') {
        Some((local, last)) if !last.starts_with(|c: char| c.is_ascii_digit()) => {
            (local.trim(), Some(last))
        }
        _ => (text, None),
    }
}

fn civil(text: &str, local: &str, zone: Option<&TimeZone>, now: Timestamp) -> Result<DateTime> {
    let time = |text: &str| text.trim().parse::<Time>().ok();
    let word = |word: &str| local.strip_prefix(word).and_then(time);
    let days_back = [("today", 0), ("yesterday", 1)];
    if let Some((back, time)) = days_back.iter().find_map(|(w, back)| Some((*back, word(w)?))) {
        let zone = zone.cloned().unwrap_or(TimeZone::UTC);
        let date = now.to_zoned(zone).date();
        let date = date.checked_sub(back.days()).map_err(|e| bad(text, e))?;
        return Ok(date.to_datetime(time));
    }
    if local.len() <= 10 && local.parse::<Date>().is_ok() {
        return Err(bad(text, "a date alone is no moment")
            .remedy(format!("give the time of day too: '{local} 14:03:00Z'")));
    }
    if !local.contains('-') && time(local).is_some() {
        return Err(
            bad(text, "a time of day alone is no moment").remedy("give the date too, or 'today'")
        );
    }
    local.parse().map_err(|e| bad(text, e).remedy(FORMS))
}

fn before_now(text: &str, span: &str, now: Timestamp) -> Result<Timestamp> {
    let moment = || {
        let span: Span = span.parse()?;
        let back = span.to_duration(SpanRelativeTo::days_are_24_hours())?;
        now.checked_sub(back)
    };
    moment().map_err(|e: jiff::Error| {
        bad(text, e).remedy("write it as '10m ago', '2 hours ago' or '1d 6h ago'")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-11-22T14:03:00Z";

    fn parse_in(text: &str, tz: Option<&str>) -> Result<Target> {
        let tz = tz.map(|name| TimeZone::get(name).unwrap());
        Target::parse(text, tz.as_ref(), NOW.parse().unwrap())
    }

    fn moment(text: &str, tz: Option<&str>) -> String {
        match parse_in(text, tz).unwrap_or_else(|e| panic!("{text}: {e}")) {
            Target::Time(time) => time.to_string(),
            other => panic!("{text} is {other:?}"),
        }
    }

    #[test]
    fn moments_in_the_usual_forms() {
        for text in [
            "2026-11-22T13:00:00Z",
            "2026-11-22 13:00:00Z",
            "2026-11-22 13:00:00 Z",
            "2026-11-22 13:00Z",
            "2026-11-22 14:00:00+01",
            "2026-11-22 14:00:00+01:00",
            "2026-11-22 14:00:00 +01",
            "2026-11-22 14:00:00 Europe/Berlin",
            "2026-11-22 14:00 Europe/Berlin",
            "2026-11-22T14:00[Europe/Berlin]",
            "2026-11-22T14:00:00+01:00[Europe/Berlin]",
            "2026-11-22 13:00:00 UTC",
            "1h 3m ago",
            "63 minutes ago",
            "today 13:00 UTC",
        ] {
            assert_eq!(moment(text, None), "2026-11-22T13:00:00Z", "{text}");
        }
        assert_eq!(
            moment("2026-11-22 14:00:00.123", Some("Europe/Berlin")),
            "2026-11-22T13:00:00.123Z"
        );
        assert_eq!(moment("yesterday 14:00", Some("Europe/Berlin")), "2026-11-21T13:00:00Z");
        assert_eq!(moment("2 days ago", None), "2026-11-20T14:03:00Z");
    }

    #[test]
    fn other_targets() {
        assert_eq!(parse_in("latest", None).unwrap(), Target::Latest);
        assert_eq!(
            parse_in("lsn:16/B374D848", None).unwrap(),
            Target::Lsn(Lsn::new(0x16_b374_d848))
        );
        assert_eq!(parse_in("xid:4294967300", None).unwrap(), Target::Xid(4));
        assert_eq!(
            parse_in("name:before: release", None).unwrap(),
            Target::Name("before: release".into())
        );
        assert_eq!(parse_in("snapshot:2026", None).unwrap(), Target::Snapshot("2026".into()));
    }

    #[test]
    fn what_is_no_moment_is_refused_with_what_to_write() {
        for (text, hint) in [
            ("2026-11-22 14:03:00", "--tz"),
            ("2026-11-22", "time of day"),
            ("2026-11-22 Europe/Berlin", "time of day"),
            ("14:03", "date"),
            ("2026-10-25 02:30:00 Europe/Berlin", "offset"),
            ("2026-03-29 02:30:00 Europe/Berlin", "offset"),
            ("2026-11-22 14:03:00 Europe/Atlantis", "Europe/Berlin"),
            ("2026-11-22T14:00:00+05:00[Europe/Berlin]", ""),
            ("tomorrow", ""),
            ("3 months ago", "10m ago"),
            ("lsn:12", "lsn:16/B374D848"),
            ("xid:many", "xid:1234"),
            ("xid:0", "3"),
            ("name:", ""),
            ("", ""),
        ] {
            let error = parse_in(text, None).unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{text}");
            assert!(error.to_string().contains(hint), "{text}: {error}");
        }
    }
}
