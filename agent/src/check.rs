//! `check`: finds out beforehand whether everything is as the agent needs it, and says what to do where it is not.
//!
//! Writes nothing but a probe object at each location, and a file in the state directory, which it deletes again.

mod postgres;

use crate::init::{self, while_overloaded};
use crate::synchronous::{self, WEAK};
use backstay_common::cluster::ClusterRecord;
use backstay_common::config::{Acknowledge, Settings};
use backstay_common::id::SystemId;
use backstay_common::location::{Location, Probe};
use backstay_common::name::{ObjectName, folder};
use backstay_common::{Context, Error, Kind, Result};
use jiff::SignedDuration;
use serde::Serialize;
use std::path::Path;

/// Free bytes under the state directory below which `check` warns.
const FREE_BYTES_WARN: u64 = 2 << 30;

/// How far a store's clock may be from ours before it is said.
const CLOCK_WARN: SignedDuration = SignedDuration::from_mins(1);

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
        let finding = match Location::open(location) {
            Ok(location) => check_location(settings, &location, system).await,
            Err(error) => Err(error),
        };
        findings.push(finding.unwrap_or_else(|error| Finding::of(thing, Err(error))));
    }
    let is_waited_for = match system {
        Some(_) => synchronous::is_waited_for(settings).await.unwrap_or(false),
        None => false,
    };
    findings.push(durability(settings, is_waited_for));
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
    let is_there = path.exists();
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
    if !is_there {
        // Whoever runs the agent makes it, and owns it.
        let _ = std::fs::remove_dir(path);
    }
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
) -> Result<Finding> {
    while_overloaded(|| init::check_location(location, settings, system)).await?;
    let record = ClusterRecord::read(&location.require_cluster().await?)?;
    if location.has_single_writer() {
        check_single_writer(settings, location, system.unwrap_or(record.system)).await?;
    }
    let probe = while_overloaded(|| location.probe()).await.context("probe")?;
    Ok(of_probe(location, &probe))
}

/// Where the store cannot keep two agents apart, a second one is refused as soon as it shows.
async fn check_single_writer(
    settings: &Settings,
    location: &Location,
    system: SystemId,
) -> Result<()> {
    let heads = location.list(&folder::heads(system)).await?;
    let agents = heads.into_iter().filter_map(|listed| match listed.name {
        Some(ObjectName::Head { agent, .. }) => Some(agent),
        _ => None,
    });
    match agents.into_iter().find(|agent| *agent != settings.agent) {
        None => Ok(()),
        Some(other) => Err(Error::new(
            Kind::Config,
            format!("it is declared single-writer, and the agent {other} writes there too"),
        )
        .remedy(
            "give each agent a location of its own, or use a store that honours conditional writes",
        )),
    }
}

/// What the store does not do, and what is done instead.
fn of_probe(location: &Location, probe: &Probe) -> Finding {
    let thing = format!("location {}", location.name());
    let seen = format!("{}, PUT in {} ms", location.url(), probe.put_time.as_millis());
    let ahead = probe.clock_ahead;
    let mut lacks = Vec::new();
    if !probe.deletes {
        lacks.push(
            "this identity may not delete: nothing that is no longer needed is ever pruned there"
                .to_string(),
        );
    }
    if probe.keeps_versions {
        lacks.push(
            "it keeps old versions: what prune deletes stays hidden until a lifecycle rule for noncurrent versions removes it"
                .to_string(),
        );
    }
    if !probe.lists_from_key {
        lacks.push("it cannot list from a key: whole folders are listed each time".to_string());
    }
    if probe.checks_uploads == Some(false) {
        lacks
            .push("it does not check uploads against a checksum: only TLS guards them".to_string());
    }
    if location.has_single_writer() && probe.honours_conditions {
        lacks
            .push("it honours conditional writes by now: single-writer can be removed".to_string());
    }
    let seen = [vec![seen], lacks].concat().join("; ");
    if !probe.honours_conditions {
        return Finding::warning(
            thing,
            format!("{seen}; it ignores conditional writes: it is looked at before each of them"),
            "let no other agent write there, whatever happens",
        );
    }
    if ahead.abs() > CLOCK_WARN {
        let side = if ahead.is_positive() { "ahead of" } else { "behind" };
        return Finding::warning(
            thing,
            format!("{seen}; its clock is {} s {side} this host's", ahead.as_secs().abs()),
            "set this host's clock, by NTP or chrony",
        );
    }
    Finding::good(thing, seen)
}

/// Says what the policy tolerates.
fn durability(settings: &Settings, is_waited_for: bool) -> Finding {
    let thing = "durability";
    let required = settings.required_locations();
    let spared = settings.locations.len() - required;
    let policy = settings.durability.acknowledge;
    let interval = humantime::format_duration(settings.durability.flush_interval);
    if settings.locations.len() == 1 {
        return Finding::warning(
            thing,
            "there is one location: when it is lost, so are the backups",
            "add a second [[location]] far away from the first",
        );
    }
    if is_waited_for && policy == Acknowledge::Spool {
        return Finding::warning(
            thing,
            WEAK,
            "set acknowledge to \"any\", \"majority\" or \"all\", or take the agent out of synchronous_standby_names",
        );
    }
    let spare = required - policy.needed(required);
    let waits = match (is_waited_for, spare) {
        (false, 0) => "WAL is held at the server while any is down".to_string(),
        (false, spare) => format!("WAL is held at the server when more than {spare} are down"),
        (true, 0) => "commits wait while any is down".to_string(),
        (true, spare) => format!("commits wait when more than {spare} are down"),
    };
    let mut text = match policy {
        Acknowledge::Spool => format!(
            "acknowledged by the local spool; a lost host loses at most {interval} and one PUT of commits"
        ),
        _ => format!(
            "acknowledged by {} of {required} required locations; {waits}",
            policy.needed(required)
        ),
    };
    if spared > 0 {
        text += &format!("; {spared} best-effort, which nothing waits for");
    }
    Finding::good(thing, text)
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

    fn settings(text: &str) -> Settings {
        let text = format!("cluster = \"a\"\n{text}[keys]\npath = \"/k\"\n");
        Settings::parse(&text, Some("db1".into())).unwrap()
    }

    fn durability_of(roles: &[&str], policy: &str, is_waited_for: bool) -> String {
        let mut text = String::new();
        for (n, role) in roles.iter().enumerate() {
            text += &format!(
                "[[location]]\nname = \"l{n}\"\nurl = \"file:///l{n}\"\nrole = \"{role}\"\n"
            );
        }
        text += &format!("[durability]\nacknowledge = \"{policy}\"\n");
        durability(&settings(&text), is_waited_for).for_people()
    }

    #[test]
    fn it_is_said_what_a_policy_tolerates() {
        let (three, two) = (["required"; 3], ["required", "required", "best-effort"]);
        let says = |text: String, part: &str| assert!(text.contains(part), "{text}");
        says(durability_of(&three, "majority", true), "ok    durability: acknowledged by 2 of 3");
        says(durability_of(&three, "majority", true), "commits wait when more than 1 are down");
        says(durability_of(&two, "all", true), "2 of 2 required locations; commits wait while any");
        says(durability_of(&two, "all", true), "1 best-effort");
        says(durability_of(&two, "any", false), "held at the server when more than 1 are down");
        says(durability_of(&two, "spool", false), "loses at most 5s");
        says(durability_of(&two, "spool", true), "warn  durability: the agent is in synchronous");
        says(durability_of(&["required"], "all", false), "there is one location");
    }

    #[test]
    fn what_a_store_lacks_is_named() {
        let location =
            settings("[[location]]\nname = \"a\"\nurl = \"file:///a\"\n").locations.remove(0);
        let location = Location::open(&location).unwrap();
        let good = Probe {
            deletes: true,
            honours_conditions: true,
            lists_from_key: true,
            checks_uploads: Some(true),
            keeps_versions: false,
            clock_ahead: SignedDuration::from_secs(-5),
            put_time: std::time::Duration::from_millis(7),
            object_bytes_max: 1,
        };
        let said = |probe: Probe| of_probe(&location, &probe).for_people();
        assert_eq!(said(good.clone()), "ok    location a: file:///a, PUT in 7 ms");
        let versions = said(Probe { keeps_versions: true, ..good.clone() });
        assert!(versions.contains("lifecycle rule for noncurrent versions"), "{versions}");
        let forever = said(Probe { deletes: false, ..good.clone() });
        assert!(forever.contains("nothing that is no longer needed is ever pruned"), "{forever}");
        assert!(said(Probe { lists_from_key: false, ..good.clone() }).contains("list from a key"));
        assert!(said(Probe { checks_uploads: Some(false), ..good.clone() }).contains("checksum"));
        let late = said(Probe { clock_ahead: SignedDuration::from_secs(-300), ..good.clone() });
        assert!(late.starts_with("warn") && late.contains("300 s behind this host"), "{late}");
        let deaf = said(Probe { honours_conditions: false, ..good });
        assert!(deaf.starts_with("warn") && deaf.contains("ignores conditional writes"), "{deaf}");
    }
}
