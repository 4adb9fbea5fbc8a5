//! The one TOML file that both programs read.
//!
//! All faults are reported at once, each with its line, the reason and the remedy; a key that nobody knows is a
//! fault. Settings are data: stores, connections and clocks are made from them elsewhere.

mod reader;

use crate::id::{AgentName, ClusterName, LocationName};
use crate::location::{Encryption, Location, LocationSettings, Role, Secret, TlsMin};
use crate::{Error, Kind, Result};
use reader::Reader;
use std::path::{Path, PathBuf};
use std::time::Duration;
use zeroize::Zeroizing;

/// Everything that the config file says, with defaults filled in.
#[derive(Clone, Debug)]
pub struct Settings {
    pub cluster: ClusterName,
    /// Spool, caches, control socket.
    pub state_dir: PathBuf,
    pub agent: AgentName,
    pub postgres: PostgresSettings,
    /// At least one of them required. Their order is that in which they are preferred for reading.
    pub locations: Vec<LocationSettings>,
    pub durability: DurabilitySettings,
    pub spool: SpoolSettings,
    pub index: IndexSettings,
    pub snapshot: SnapshotSettings,
    pub retention: RetentionSettings,
    pub keys: KeySettings,
}

#[derive(Clone, Debug)]
pub struct PostgresSettings {
    /// libpq's keywords or a URI.
    pub conninfo: Secret,
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
    /// One required location has it.
    Any,
    /// More than half of the required locations have it.
    Majority,
    /// Every required location has it.
    All,
}

impl Acknowledge {
    /// How many of so many required `locations` must hold a byte before it may be acknowledged.
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
pub struct IndexSettings {
    /// Spans in the smallest block that gets an index: a power of two.
    pub spans: u64,
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
    /// The most that is read of the database, from its files or over the network, in bytes a second. None: as fast as it goes.
    pub max_rate: Option<u64>,
    /// Of the threads that read files, in snapshots for which nobody waits.
    pub priority: Priority,
}

/// How a thread stands beside the rest of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// As the agent was started.
    Normal,
    /// Behind all others, and never starved.
    Low,
    /// Only when nobody else wants the disk.
    Idle,
}

#[derive(Clone, Debug)]
pub struct RetentionSettings {
    /// How far back recovery must reach.
    pub window: Duration,
    /// So many of the newest snapshots stay in any case.
    pub keep_last: usize,
    /// One snapshot stays for each of so many weeks,
    pub weekly: usize,
    /// and months, with only the WAL that makes it consistent.
    pub monthly: usize,
    /// How long what is condemned waits for its deletion; less than a day is for trying things out.
    pub grace: Duration,
}

/// The grace period that a restore beside prune relies on.
pub const GRACE: Duration = Duration::from_secs(86_400);

impl RetentionSettings {
    /// As the judgement wants them.
    pub fn rules(&self) -> crate::retention::Rules {
        let (keep_last, weekly, monthly) = (self.keep_last, self.weekly, self.monthly);
        crate::retention::Rules {
            keep_last,
            weekly,
            monthly,
            ..crate::retention::Rules::window(self.window)
        }
    }
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
    /// How many locations count for acknowledgement.
    pub fn required_locations(&self) -> usize {
        self.locations.iter().filter(|location| location.is_required()).count()
    }

    /// Reads a config file. Every fault is [`Kind::Config`].
    pub fn read(path: &Path) -> Result<Settings> {
        // It may hold passwords.
        let text = std::fs::read_to_string(path).map(Zeroizing::new).map_err(|e| {
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
        let locations = locations(&mut top);
        let settings = Settings {
            postgres: postgres(top.table("postgres"), agent.as_ref()),
            durability: durability(top.table("durability"), &locations),
            locations,
            spool: spool(top.table("spool")),
            index: index(top.table("index")),
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
    PostgresSettings { conninfo: Secret::new(conninfo), data_dir: t.path("data-dir"), slot }
}

fn locations(top: &mut Reader<'_>) -> Vec<LocationSettings> {
    let tables =
        top.tables("location", "[[location]]\nname = \"frankfurt\"\nurl = \"s3://bucket/prefix\"");
    let mut locations: Vec<LocationSettings> = Vec::new();
    for mut t in tables {
        let name = t.required::<LocationName>("name", "name = \"frankfurt\"");
        let url = t.required::<String>("url", "url = \"s3://bucket/prefix\"");
        let told = location(&mut t);
        let (Some(name), Some(url)) = (name, url) else { continue };
        let settings = LocationSettings { name, url, ..told };
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
        if let Some((key, kinds)) = settings.misplaced() {
            t.fault(key, &format!("it is for {kinds} locations"), "remove it, or correct the url");
        } else if let Err(error) = Location::open(&settings) {
            t.fault("url", error.message(), error.remedy_text().unwrap_or("correct the URL"));
        }
        locations.push(settings);
    }
    if !locations.is_empty() && !locations.iter().any(LocationSettings::is_required) {
        top.fault(
            "location",
            "every location is best-effort, so that none counts",
            "remove role from at least one",
        );
    }
    locations
}

/// Everything but name and URL, which the caller has.
fn location(t: &mut Reader<'_>) -> LocationSettings {
    let nowhere = LocationSettings::new("unknown".parse().expect("a plain name"), "");
    let roles = [("required", Role::Required), ("best-effort", Role::BestEffort)];
    let versions = [("1.2", TlsMin::Tls12), ("1.3", TlsMin::Tls13)];
    LocationSettings {
        role: t.word("role", &roles).unwrap_or(Role::Required),
        single_writer: t.boolean("single-writer").unwrap_or(false),
        endpoint: t.string("endpoint"),
        region: t.string("region"),
        access_key_id: t.string("access-key-id"),
        secret_access_key: t.string("secret-access-key").map(Secret::new),
        session_token: t.string("session-token").map(Secret::new),
        profile: t.string("profile"),
        encryption: encryption(t),
        credentials_file: t.path("credentials-file"),
        account: t.string("account"),
        account_key: t.string("account-key").map(Secret::new),
        sas_token: t.string("sas-token").map(Secret::new),
        storage_class: t.string("storage-class"),
        ca_file: t.path("ca-file"),
        tls_min: t.word("tls-min", &versions).unwrap_or(TlsMin::Tls12),
        proxy: t.string("proxy").map(Secret::new),
        allow_http: t.boolean("allow-http").unwrap_or(false),
        path_style: t.boolean("path-style"),
        ..nowhere
    }
}

fn encryption(t: &mut Reader<'_>) -> Option<Encryption> {
    let words = [("sse-s3", false), ("sse-kms", true)];
    let by_kms = t.word("encryption", &words);
    let key = t.string("kms-key-id");
    if key.is_some() && by_kms != Some(true) {
        t.fault("kms-key-id", "there is no KMS without it", "add: encryption = \"sse-kms\"");
    }
    by_kms.map(|by_kms| if by_kms { Encryption::Kms(key) } else { Encryption::Store })
}

fn durability(mut t: Reader<'_>, locations: &[LocationSettings]) -> DurabilitySettings {
    let words = [
        ("spool", Acknowledge::Spool),
        ("any", Acknowledge::Any),
        ("majority", Acknowledge::Majority),
        ("all", Acknowledge::All),
    ];
    let acknowledge = t.word("acknowledge", &words).unwrap_or(Acknowledge::Spool);
    let required = locations.iter().filter(|location| location.is_required()).count();
    if acknowledge == Acknowledge::Majority && required == 2 {
        t.fault(
            "acknowledge",
            "a majority of two required locations is both of them: commits wait when one is down",
            "write \"all\" if that is meant, \"any\" if one may be down, or add a third location",
        );
    }
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

fn index(mut t: Reader<'_>) -> IndexSettings {
    const MOST: u64 = 4096;
    let spans = t.integer("spans", 1..=MOST as i64).unwrap_or(128) as u64;
    if !spans.is_power_of_two() {
        t.fault("spans", "not a power of two", "choose 128, or another power of two up to 4096");
        return IndexSettings { spans: 128 };
    }
    IndexSettings { spans }
}

fn snapshot(mut t: Reader<'_>) -> SnapshotSettings {
    /// What PostgreSQL can hold a base backup to.
    const RATES: std::ops::RangeInclusive<u64> = 32 << 10..=1 << 30;
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
    let max_rate = t.bytes("max-rate");
    if max_rate.is_some_and(|rate| !RATES.contains(&rate)) {
        t.fault("max-rate", "out of range", "choose from \"32KiB\" to \"1GiB\", for each second");
    }
    let words = [("normal", Priority::Normal), ("low", Priority::Low), ("idle", Priority::Idle)];
    let priority = t.word("priority", &words).unwrap_or(Priority::Low);
    SnapshotSettings { schedule, time_zone, fast_checkpoint, compression_level, max_rate, priority }
}

fn retention(mut t: Reader<'_>) -> RetentionSettings {
    const HOUR: Duration = Duration::from_secs(3600);
    let grace = t.duration("grace").unwrap_or(GRACE);
    let window = t.duration("window").unwrap_or(Duration::from_secs(7 * 86_400));
    if window < HOUR && grace >= GRACE {
        t.fault("window", "shorter than an hour", "give a duration such as \"7d\" or \"30d\"");
    }
    if window > Duration::from_secs(100 * 366 * 86_400) {
        t.fault("window", "longer than a century", "give a duration such as \"7d\" or \"30d\"");
    }
    if grace > 30 * GRACE {
        t.fault("grace", "longer than 30 days", "leave it out: a day is right");
    }
    let keep_last = t.integer("keep-last", 1..=100_000).unwrap_or(1) as usize;
    let mut keep = t.table("keep");
    let weekly = keep.integer("weekly", 0..=10_000).unwrap_or(0) as usize;
    let monthly = keep.integer("monthly", 0..=10_000).unwrap_or(0) as usize;
    RetentionSettings { window, keep_last, weekly, monthly, grace }
}

fn keys(mut t: Reader<'_>) -> KeySettings {
    t.word("provider", &[("file", ())]);
    let path = t.required::<String>("path", "path = \"/etc/backstay/orders.key\"");
    KeySettings::File { path: path.unwrap_or_default().into() }
}

#[cfg(test)]
mod tests;
