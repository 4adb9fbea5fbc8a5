//! `check`: finds out beforehand whether everything is as the agent needs it, and says what to do where it is not.
//!
//! Writes nothing but a probe object at each location, which it deletes again.

mod postgres;

use crate::init;
use backstay_common::config::{Acknowledge, Settings};
use backstay_common::id::SystemId;
use backstay_common::location::Location;
use backstay_common::{Context, Error, Kind, Result};
use serde::Serialize;
use std::path::Path;

/// Free bytes under the state directory below which `check` warns.
const FREE_BYTES_WARN: u64 = 2 << 30;

/// One thing that was looked at.
#[derive(Debug)]
pub struct Finding {
    pub thing: String,
    pub verdict: Verdict,
}

#[derive(Debug)]
pub enum Verdict {
    /// As it should be; the text says what was seen.
    Good(String),
    /// It works, but somebody should know.
    Warning { reason: String, remedy: String },
    /// It does not work.
    Failed(Error),
}

impl Finding {
    fn good(thing: impl Into<String>, seen: impl Into<String>) -> Finding {
        Finding { thing: thing.into(), verdict: Verdict::Good(seen.into()) }
    }

    fn warning(
        thing: impl Into<String>,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        let verdict = Verdict::Warning { reason: reason.into(), remedy: remedy.into() };
        Finding { thing: thing.into(), verdict }
    }

    fn of(thing: impl Into<String>, result: Result<String>) -> Finding {
        let verdict = match result {
            Ok(seen) => Verdict::Good(seen),
            Err(error) => Verdict::Failed(error),
        };
        Finding { thing: thing.into(), verdict }
    }

    /// As lines for a person.
    pub fn for_people(&self) -> String {
        let Finding { thing, verdict } = self;
        match verdict {
            Verdict::Good(seen) => format!("ok    {thing}: {seen}"),
            Verdict::Warning { reason, remedy } => {
                format!("warn  {thing}: {reason}\n      remedy: {remedy}")
            }
            Verdict::Failed(error) => {
                let remedy = error.remedy_text().map(|text| format!("\n      remedy: {text}"));
                format!("FAIL  {thing}: {}{}", error.message(), remedy.unwrap_or_default())
            }
        }
    }

    /// As `--json` prints it.
    pub fn for_programs(&self) -> impl Serialize {
        let (verdict, text, remedy) = match &self.verdict {
            Verdict::Good(seen) => ("ok", seen.clone(), None),
            Verdict::Warning { reason, remedy } => {
                ("warning", reason.clone(), Some(remedy.clone()))
            }
            Verdict::Failed(error) => {
                ("failed", error.message().into(), error.remedy_text().map(str::to_string))
            }
        };
        serde_json::json!({ "thing": self.thing, "verdict": verdict, "text": text, "remedy": remedy })
    }
}

/// Looks at everything. Never fails: what is wrong is in the findings.
pub async fn run(settings: &Settings) -> Vec<Finding> {
    let key = settings.keys.provider().map(|p| format!("{} key {}", p.kind(), p.key_id()));
    let mut findings = vec![Finding::of("key", key), state_dir(&settings.state_dir)];
    let system = postgres::run(settings, &mut findings).await;
    for location in &settings.locations {
        let thing = format!("location {}", location.name);
        let result = match Location::open(location) {
            Ok(location) => check_location(settings, &location, system).await,
            Err(error) => Err(error),
        };
        findings.push(Finding::of(thing, result));
    }
    findings.push(durability(settings));
    findings
}

/// The first failure decides how the program ends.
pub fn exit_code(findings: &[Finding]) -> u8 {
    let failed = findings.iter().find_map(|finding| match &finding.verdict {
        Verdict::Failed(error) => Some(error.kind().exit_code()),
        _ => None,
    });
    failed.unwrap_or(0)
}

fn state_dir(path: &Path) -> Finding {
    let thing = format!("state directory {}", path.display());
    let probe = path.join("check.tmp");
    let written = std::fs::create_dir_all(path)
        .and_then(|()| std::fs::write(&probe, b"probe"))
        .and_then(|()| std::fs::remove_file(&probe));
    if let Err(error) = written {
        let reason = format!("cannot be written: {error}");
        return Finding::of(
            thing,
            Err(Error::new(Kind::Config, reason)
                .remedy("create it, owned by the user that the agent runs as, with mode 0700")),
        );
    }
    let free = rustix::fs::statvfs(path).map(|fs| fs.f_bavail * fs.f_frsize);
    match free {
        Ok(free) if free < FREE_BYTES_WARN => Finding::warning(
            thing,
            format!("only {} MiB are free for the spool", free >> 20),
            "give it room for the WAL of the longest outage of a location that you want to survive",
        ),
        Ok(free) => Finding::good(thing, format!("writable, {} GiB free", free >> 30)),
        Err(error) => Finding::of(thing, Err(Error::new(Kind::Local, error))),
    }
}

async fn check_location(
    settings: &Settings,
    location: &Location,
    system: Option<SystemId>,
) -> Result<String> {
    init::check_location(location, settings, system).await?;
    let probe = location.probe().await.context("probe")?;
    let deletes = if probe.deletes { "" } else { "; may not delete, so superseded pieces stay" };
    Ok(format!("{}, PUT in {} ms{deletes}", location.url(), probe.put_time.as_millis()))
}

/// Says what the policy tolerates.
fn durability(settings: &Settings) -> Finding {
    let thing = "durability";
    let locations = settings.locations.len();
    let policy = settings.durability.acknowledge;
    let interval = humantime::format_duration(settings.durability.flush_interval);
    if locations == 1 {
        return Finding::warning(
            thing,
            "there is one location: when it is lost, so are the backups",
            "add a second [[location]] far away from the first",
        );
    }
    let spare = locations - policy.needed(locations);
    let text = match policy {
        Acknowledge::Spool => format!(
            "acknowledged by the local spool; a lost host loses at most {interval} and one PUT of commits"
        ),
        _ => format!(
            "acknowledged by {} of {locations} locations; commits wait when more than {spare} are down",
            policy.needed(locations)
        ),
    };
    match policy {
        Acknowledge::Majority if spare == 0 => Finding::warning(
            thing,
            format!("{text}: a majority of {locations} is all of them"),
            "write acknowledge = \"all\" to say so, \"any\" to let one be down, or add a third location",
        ),
        _ => Finding::good(thing, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_decides() {
        let failed = |kind| Finding::of("x", Err(Error::new(kind, "broken").remedy("mend it")));
        let findings = [Finding::good("a", "fine"), failed(Kind::Postgres), failed(Kind::Storage)];
        assert_eq!(exit_code(&findings), 6);
        assert_eq!(exit_code(&findings[..1]), 0);
        assert!(findings[1].for_people().contains("remedy: mend it"));
    }
}
