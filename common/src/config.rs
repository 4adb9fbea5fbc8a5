//! The one TOML file that both programs read.
//!
//! All faults are reported at once, each with its line, the reason and the remedy; a key that nobody knows is a
//! fault. Settings are data: stores, connections and clocks are made from them elsewhere.

mod reader;

use crate::id::{AgentName, ClusterName, LocationName};
use crate::location::{Location, LocationSettings, Secret};
use crate::{Error, Kind, Result};
use reader::Reader;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything that the config file says, with defaults filled in.
#[derive(Clone, Debug)]
pub struct Settings {
    pub cluster: ClusterName,
    /// Spool, caches, control socket.
    pub state_dir: PathBuf,
    pub agent: AgentName,
    pub postgres: PostgresSettings,
    pub locations: Vec<LocationSettings>,
    pub durability: DurabilitySettings,
    pub spool: SpoolSettings,
    pub snapshot: SnapshotSettings,
    pub retention: RetentionSettings,
    pub keys: KeySettings,
}

#[derive(Clone, Debug)]
pub struct PostgresSettings {
    /// libpq's keywords or a URI.
    pub conninfo: String,
    pub data_dir: Option<PathBuf>,
    /// The replication slot.
    pub slot: String,
}

#[derive(Clone, Debug)]
pub struct DurabilitySettings {
    pub acknowledge: Acknowledge,
    /// The greatest age of WAL that has been sent to no location.
    pub flush_interval: Duration,
    pub on_spool_full: OnSpoolFull,
}

/// What gives when the spool has no room for more WAL, because locations are away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSpoolFull {
    /// Receiving stops, and the slot holds WAL at the server: its disk may fill.
    Hold,
    /// The oldest WAL is given up, and what no location has of it is recorded as a gap.
    Release,
}

/// What must hold before PostgreSQL is told that WAL is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Acknowledge {
    /// It is fsynced in the local spool.
    Spool,
    /// One location has it.
    Any,
    /// More than half of the locations have it.
    Majority,
    /// Every location has it.
    All,
}

impl Acknowledge {
    /// How many of `locations` must hold a byte before it may be acknowledged.
    pub fn needed(self, locations: usize) -> usize {
        match self {
            Acknowledge::Spool => 0,
            Acknowledge::Any => 1,
            Acknowledge::Majority => locations / 2 + 1,
            Acknowledge::All => locations,
        }
    }
}

#[derive(Clone, Debug)]
pub struct SpoolSettings {
    /// When the spool holds this many bytes the agent stops receiving, and the slot holds WAL at the server.
    pub bytes_max: u64,
}

#[derive(Clone, Debug)]
pub struct SnapshotSettings {
    /// Five cron fields: minute, hour, day of month, month, day of week.
    pub schedule: String,
    pub time_zone: jiff::tz::TimeZone,
    /// Scheduled snapshots ask for an immediate checkpoint, not a spread one.
    pub fast_checkpoint: bool,
    /// zstd level, 1 to 19.
    pub compression_level: i32,
}

#[derive(Clone, Debug)]
pub struct RetentionSettings {
    /// How far back recovery must reach.
    pub window: Duration,
}

/// Who holds the key-encryption key.
#[derive(Clone, Debug)]
pub enum KeySettings {
    File { path: PathBuf },
}

impl KeySettings {
    pub fn provider(&self) -> Result<std::sync::Arc<dyn crate::keys::KeyProvider>> {
        match self {
            KeySettings::File { path } => {
                Ok(std::sync::Arc::new(crate::keys::file::FileProvider::read(path)?))
            }
        }
    }
}

impl Settings {
    /// Reads a config file. Every fault is [`Kind::Config`].
    pub fn read(path: &Path) -> Result<Settings> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Error::new(Kind::Config, format!("config file {}: {e}", path.display()))
                .remedy("give the path of the TOML file with --config")
        })?;
        Settings::parse(&text, hostname()).map_err(|faults| {
            let list: String = faults.iter().map(|fault| format!("\n  {fault}")).collect();
            Error::new(Kind::Config, format!("config file {}:{list}", path.display()))
        })
    }

    /// Reads the text of a config file; the error is every fault, in the order of lines.
    pub fn parse(text: &str, hostname: Option<String>) -> Result<Settings, Vec<String>> {
        let mut top = Reader::parse(text)?;
        let cluster = top.required::<ClusterName>("cluster", "cluster = \"orders\"");
        let state_dir = top.path("state-dir").unwrap_or_else(|| "/var/lib/backstay".into());
        let agent = agent_name(&mut top, hostname);
        let settings = Settings {
            postgres: postgres(top.table("postgres"), agent.as_ref()),
            locations: locations(&mut top),
            durability: durability(top.table("durability")),
            spool: spool(top.table("spool")),
            snapshot: snapshot(top.table("snapshot")),
            retention: retention(top.table("retention")),
            keys: keys(top.table("keys")),
            cluster: cluster.unwrap_or_else(|| "unknown".parse().expect("a plain name")),
            agent: agent.unwrap_or_else(|| "unknown".parse().expect("a plain name")),
            state_dir,
        };
        top.finish().map(|()| settings)
    }
}

fn hostname() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_string())
}

fn agent_name(top: &mut Reader<'_>, hostname: Option<String>) -> Option<AgentName> {
    if let Some(name) = top.parsed::<AgentName>("agent", "give it a name such as \"db1\"") {
        return Some(name);
    }
    let name = hostname.and_then(|name| name.parse().ok());
    if name.is_none() {
        top.fault("agent", "the host's name cannot be used as the agent's", "add: agent = \"db1\"");
    }
    name
}

fn postgres(mut t: Reader<'_>, agent: Option<&AgentName>) -> PostgresSettings {
    let conninfo = t.string("conninfo").unwrap_or_default();
    if let Err(error) = crate::postgres::Conninfo::parse(&conninfo) {
        t.fault(
            "conninfo",
            error.message(),
            "write libpq keywords: \"host=/var/run/postgresql user=backstay\"",
        );
    }
    let slot = t.string("slot").or_else(|| agent.map(AgentName::slot)).unwrap_or_default();
    let slot_is_fine = (1..=63).contains(&slot.len())
        && slot.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if !slot_is_fine && agent.is_some() {
        t.fault("slot", "not a name for a replication slot", "use a-z, 0-9 and _, at most 63");
    }
    PostgresSettings { conninfo, data_dir: t.path("data-dir"), slot }
}

fn locations(top: &mut Reader<'_>) -> Vec<LocationSettings> {
    let tables =
        top.tables("location", "[[location]]\nname = \"frankfurt\"\nurl = \"s3://bucket/prefix\"");
    let mut locations: Vec<LocationSettings> = Vec::new();
    for mut t in tables {
        let name = t.required::<LocationName>("name", "name = \"frankfurt\"");
        let url = t.required::<String>("url", "url = \"s3://bucket/prefix\"");
        let settings = LocationSettings {
            endpoint: t.string("endpoint"),
            region: t.string("region"),
            access_key_id: t.string("access-key-id"),
            secret_access_key: t.string("secret-access-key").map(Secret::new),
            session_token: t.string("session-token").map(Secret::new),
            ca_file: t.path("ca-file"),
            allow_http: t.boolean("allow-http").unwrap_or(false),
            ..match (name, url) {
                (Some(name), Some(url)) => LocationSettings::new(name, url),
                _ => continue,
            }
        };
        if locations.iter().any(|other| other.name == settings.name) {
            t.fault(
                "name",
                "another location has this name",
                "give each location a name of its own",
            );
        }
        if locations
            .iter()
            .any(|other| other.url == settings.url && other.endpoint == settings.endpoint)
        {
            t.fault("url", "another location has this URL", "two copies in one place are one copy");
        }
        if let Err(error) = Location::open(&settings) {
            t.fault("url", error.message(), error.remedy_text().unwrap_or("correct the URL"));
        }
        locations.push(settings);
    }
    locations
}

fn durability(mut t: Reader<'_>) -> DurabilitySettings {
    let words = [
        ("spool", Acknowledge::Spool),
        ("any", Acknowledge::Any),
        ("majority", Acknowledge::Majority),
        ("all", Acknowledge::All),
    ];
    let acknowledge = t.word("acknowledge", &words).unwrap_or(Acknowledge::Spool);
    let flush_interval = t.duration("flush-interval").unwrap_or(Duration::from_secs(5));
    if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&flush_interval) {
        t.fault("flush-interval", "out of range", "choose from \"100ms\" to \"1h\"");
    }
    let words = [("hold", OnSpoolFull::Hold), ("release", OnSpoolFull::Release)];
    let on_spool_full = t.word("on-spool-full", &words).unwrap_or(OnSpoolFull::Hold);
    if on_spool_full == OnSpoolFull::Release && acknowledge != Acknowledge::Spool {
        t.fault(
            "on-spool-full",
            "\"release\" would acknowledge WAL that no location has",
            "write \"hold\", or acknowledge = \"spool\"",
        );
    }
    DurabilitySettings { acknowledge, flush_interval, on_spool_full }
}

fn spool(mut t: Reader<'_>) -> SpoolSettings {
    const LEAST: u64 = 256 << 20;
    let bytes_max = t.bytes("max-size").unwrap_or(16 << 30);
    if bytes_max < LEAST {
        t.fault("max-size", "too small to ship from", "give at least \"256MiB\"");
    }
    SpoolSettings { bytes_max }
}

fn snapshot(mut t: Reader<'_>) -> SnapshotSettings {
    let schedule = t.string("schedule").unwrap_or_else(|| "0 2 * * *".into());
    let fields = schedule.split_whitespace().count();
    if fields != 5 {
        let reason = format!("{fields} fields instead of five");
        t.fault("schedule", &reason, "write minute hour day month weekday: \"0 2 * * *\"");
    }
    let time_zone = match t.string("time-zone") {
        None => jiff::tz::TimeZone::UTC,
        Some(name) => jiff::tz::TimeZone::get(&name).unwrap_or_else(|e| {
            t.fault("time-zone", &e.to_string(), "use a name such as \"Europe/Berlin\"");
            jiff::tz::TimeZone::UTC
        }),
    };
    let words = [("spread", false), ("fast", true)];
    let fast_checkpoint = t.word("checkpoint", &words).unwrap_or(false);
    let compression_level = t.integer("compression-level", 1..=19).unwrap_or(3) as i32;
    SnapshotSettings { schedule, time_zone, fast_checkpoint, compression_level }
}

fn retention(mut t: Reader<'_>) -> RetentionSettings {
    let window = t.duration("window").unwrap_or(Duration::from_secs(7 * 86_400));
    if window < Duration::from_secs(3600) {
        t.fault("window", "shorter than an hour", "give a duration such as \"7d\" or \"30d\"");
    }
    RetentionSettings { window }
}

fn keys(mut t: Reader<'_>) -> KeySettings {
    t.word("provider", &[("file", ())]);
    let path = t.required::<String>("path", "path = \"/etc/backstay/orders.key\"");
    KeySettings::File { path: path.unwrap_or_default().into() }
}

#[cfg(test)]
mod tests;
