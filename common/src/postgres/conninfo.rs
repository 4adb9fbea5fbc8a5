//! Where a server is and how to reach it: libpq's connection strings, environment and defaults.
//!
//! [`Conninfo::parse`] takes `key=value` strings and `postgres://` URIs. What they leave out comes from the
//! `PG*` environment variables, then from libpq's defaults. A keyword that would weaken or change the
//! connection if it were ignored is refused by name. Passwords are never shown, in errors neither.

mod passfile;
#[cfg(test)]
mod tests;
mod text;

use crate::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use zeroize::Zeroizing;

/// Where Debian and most distributions put the server's socket.
pub const DEFAULT_SOCKET_DIRECTORY: &str = "/var/run/postgresql";
const DEFAULT_PORT: u16 = 5432;
/// libpq waits forever; an agent that must notice a dead host does not.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Every keyword that is understood, and the environment variable that stands in for it.
const KEYWORDS: &[(&str, Option<&str>)] = &[
    ("host", Some("PGHOST")),
    ("hostaddr", Some("PGHOSTADDR")),
    ("port", Some("PGPORT")),
    ("dbname", Some("PGDATABASE")),
    ("user", Some("PGUSER")),
    ("password", Some("PGPASSWORD")),
    ("passfile", Some("PGPASSFILE")),
    ("connect_timeout", Some("PGCONNECT_TIMEOUT")),
    ("application_name", Some("PGAPPNAME")),
    ("fallback_application_name", None),
    ("options", Some("PGOPTIONS")),
    ("sslmode", Some("PGSSLMODE")),
    ("sslrootcert", Some("PGSSLROOTCERT")),
    ("sslcert", Some("PGSSLCERT")),
    ("sslkey", Some("PGSSLKEY")),
    ("channel_binding", Some("PGCHANNELBINDING")),
    ("target_session_attrs", Some("PGTARGETSESSIONATTRS")),
    ("keepalives", None),
    ("keepalives_idle", None),
    ("keepalives_interval", None),
    ("keepalives_count", None),
    ("tcp_user_timeout", None),
];

/// libpq's other keywords: known, so that the refusal can say so.
const UNSUPPORTED: &[&str] = &[
    "service",
    "servicefile",
    "sslnegotiation",
    "sslcompression",
    "sslpassword",
    "sslcertmode",
    "sslcrl",
    "sslcrldir",
    "sslsni",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "requirepeer",
    "require_auth",
    "krbsrvname",
    "gsslib",
    "gssencmode",
    "gssdelegation",
    "client_encoding",
    "replication",
    "load_balance_hosts",
    "scram_client_key",
    "scram_server_key",
    "oauth_issuer",
    "oauth_client_id",
    "oauth_client_secret",
    "oauth_scope",
    "min_protocol_version",
    "max_protocol_version",
    "sslkeylogfile",
    "requiressl",
];

/// How to reach a server. Made by [`Conninfo::parse`]; always has at least one host.
#[derive(Clone, Debug)]
pub struct Conninfo {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    pub(super) dbname: String,
    pub(super) password: Option<Password>,
    pub(super) passfile: Option<PathBuf>,
    /// For each address in turn; `None` waits forever.
    pub(super) connect_timeout: Option<Duration>,
    pub(super) application_name: Option<String>,
    pub(super) options: Option<String>,
    pub(super) ssl: Ssl,
    pub(super) channel_binding: ChannelBindingPolicy,
    pub(super) target: TargetSession,
    pub(super) keepalive: Keepalive,
}

/// One place where a server may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    pub place: Place,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The directory that holds the socket.
    Socket(PathBuf),
    /// A name or address, and `hostaddr`, which is then connected to without looking up the name.
    Network { name: Option<String>, address: Option<IpAddr> },
}

impl Host {
    /// The socket's path, for a Unix socket.
    pub fn socket_path(&self) -> Option<PathBuf> {
        match &self.place {
            Place::Socket(directory) => Some(directory.join(format!(".s.PGSQL.{}", self.port))),
            Place::Network { .. } => None,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Socket(directory) => {
                write!(f, "{}/.s.PGSQL.{}", directory.display(), self.port)
            }
            Place::Network { name: Some(name), .. } => write!(f, "{name}:{}", self.port),
            Place::Network { address: Some(IpAddr::V6(v6)), .. } => {
                write!(f, "[{v6}]:{}", self.port)
            }
            Place::Network { address: Some(v4), .. } => write!(f, "{v4}:{}", self.port),
            Place::Network { .. } => write!(f, "localhost:{}", self.port),
        }
    }
}

/// A password: wiped when dropped, never shown.
#[derive(Clone)]
pub(super) struct Password(Zeroizing<String>);

impl Password {
    pub fn reveal(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Files and policy of TLS.
#[derive(Clone, Debug)]
pub(super) struct Ssl {
    pub mode: SslMode,
    pub roots: Option<Roots>,
    /// The client's certificate chain and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Roots {
    /// `sslrootcert=system`: what the operating system trusts.
    System,
    File(PathBuf),
}

/// What `sslmode` asks for. TLS is never used on a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// Plain; TLS only if the server turns a plain connection away. Protects from nobody.
    Allow,
    /// TLS where the server offers it, else plain. The default, as in libpq; protects from listeners at best.
    Prefer,
    /// TLS; the certificate is checked only if there are root certificates, then as `VerifyCa`.
    Require,
    /// TLS with a certificate that a trusted root has signed.
    VerifyCa,
    /// As `VerifyCa`, and the certificate must name the host.
    VerifyFull,
}

/// What `channel_binding` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChannelBindingPolicy {
    Disable,
    Prefer,
    Require,
}

/// What `target_session_attrs` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetSession {
    Any,
    /// Transactions can write: no standby, and not read-only by default.
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    /// A standby if any host is one, else any server.
    PreferStandby,
}

/// TCP keepalive; `None` leaves the operating system's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keepalive {
    pub enabled: bool,
    pub idle: Option<Duration>,
    pub interval: Option<Duration>,
    pub count: Option<u32>,
    pub user_timeout: Option<Duration>,
}

/// A keyword whose value is one of a few words.
trait Word: Copy + 'static {
    const WORDS: &'static [(&'static str, Self)];
}

impl Word for SslMode {
    const WORDS: &'static [(&'static str, SslMode)] = &[
        ("disable", SslMode::Disable),
        ("allow", SslMode::Allow),
        ("prefer", SslMode::Prefer),
        ("require", SslMode::Require),
        ("verify-ca", SslMode::VerifyCa),
        ("verify-full", SslMode::VerifyFull),
    ];
}

impl Word for ChannelBindingPolicy {
    const WORDS: &'static [(&'static str, ChannelBindingPolicy)] = &[
        ("disable", ChannelBindingPolicy::Disable),
        ("prefer", ChannelBindingPolicy::Prefer),
        ("require", ChannelBindingPolicy::Require),
    ];
}

impl Word for TargetSession {
    const WORDS: &'static [(&'static str, TargetSession)] = &[
        ("any", TargetSession::Any),
        ("read-write", TargetSession::ReadWrite),
        ("read-only", TargetSession::ReadOnly),
        ("primary", TargetSession::Primary),
        ("standby", TargetSession::Standby),
        ("prefer-standby", TargetSession::PreferStandby),
    ];
}

/// What a connection string may borrow from its surroundings.
#[expect(missing_debug_implementations, reason = "variables may hold a password")]
pub struct Environment<'a> {
    /// Looks up an environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// The operating system's name for the user who runs this.
    pub os_user: Option<String>,
    /// Holds `.pgpass` and `.postgresql/`.
    pub home: Option<PathBuf>,
}

impl Environment<'_> {
    /// This process' own.
    pub fn of_process() -> Environment<'static> {
        let account = passfile::account();
        let home = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let (os_user, account_home) = account.unzip();
        Environment {
            variable: &|name| std::env::var(name).ok(),
            os_user: os_user.or_else(|| std::env::var("USER").ok()),
            home: home.or(account_home),
        }
    }
}

impl Conninfo {
    /// Reads a connection string, with this process' environment.
    pub fn parse(text: &str) -> Result<Conninfo> {
        Conninfo::parse_in(text, &Environment::of_process())
    }

    /// Reads a connection string, with the environment given.
    pub fn parse_in(text: &str, environment: &Environment<'_>) -> Result<Conninfo> {
        let given = text::parse(text)?;
        Settings::complete(given, environment)?.resolve(environment)
    }

    /// The name to show in `pg_stat_activity`, unless the string or the environment has one.
    pub fn with_default_application_name(mut self, name: &str) -> Conninfo {
        self.application_name.get_or_insert_with(|| name.to_string());
        self
    }

    /// Adds a server that must be of this kind, whatever the string says.
    pub fn with_target(mut self, target: TargetSession) -> Conninfo {
        self.target = target;
        self
    }

    /// With several hosts and no `target_session_attrs`: the primary among them.
    pub fn preferring_the_primary(mut self) -> Conninfo {
        if self.hosts.len() > 1 && self.target == TargetSession::Any {
            self.target = TargetSession::Primary;
        }
        self
    }

    pub fn user(&self) -> &str {
        &self.user
    }

    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    pub fn application_name(&self) -> Option<&str> {
        self.application_name.as_deref()
    }

    pub fn ssl_mode(&self) -> SslMode {
        self.ssl.mode
    }

    /// The password for one of the hosts: the one given, else the passfile's, which is read again each time.
    pub(super) fn password_for(&self, host: &Host, dbname: &str) -> Result<Option<Password>> {
        match (&self.password, &self.passfile) {
            (Some(password), _) => Ok(Some(password.clone())),
            (None, Some(path)) => passfile::find(path, host, dbname, &self.user),
            (None, None) => Ok(None),
        }
    }
}

impl fmt::Display for Conninfo {
    /// The hosts, as a person would name them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, host) in self.hosts.iter().enumerate() {
            write!(f, "{}{host}", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl FromStr for Conninfo {
    type Err = Error;

    fn from_str(text: &str) -> Result<Conninfo> {
        Conninfo::parse(text)
    }
}

fn refuse(reason: impl fmt::Display) -> Error {
    Error::new(Kind::Config, format_args!("connection string: {reason}"))
}

/// The canonical spelling of a keyword, or why it cannot be used.
fn keyword(name: &str) -> Result<&'static str> {
    if let Some((known, _)) = KEYWORDS.iter().find(|(known, _)| *known == name) {
        return Ok(known);
    }
    if UNSUPPORTED.contains(&name) {
        return Err(refuse(format_args!("keyword {name:?} is not supported"))
            .remedy("leave it out of the connection string"));
    }
    let known: Vec<&str> = KEYWORDS.iter().map(|(known, _)| *known).collect();
    Err(refuse(format_args!("unknown keyword {name:?}")).remedy(format_args!(
        "use one of {}; put a value with spaces in single quotes",
        known.join(", ")
    )))
}

type Values = BTreeMap<&'static str, Zeroizing<String>>;

/// The values of keywords; an empty one counts as not given, as in libpq.
struct Settings(Values);

impl Settings {
    fn complete(mut values: Values, environment: &Environment<'_>) -> Result<Settings> {
        if (environment.variable)("PGSERVICE").is_some_and(|service| !service.is_empty()) {
            return Err(refuse(
                "the environment sets PGSERVICE, and service files are not supported",
            )
            .remedy("unset PGSERVICE and put its settings into the connection string"));
        }
        for (keyword, variable) in KEYWORDS {
            let from_environment = || variable.and_then(|name| (environment.variable)(name));
            if !values.contains_key(keyword)
                && let Some(value) = from_environment()
            {
                values.insert(keyword, Zeroizing::new(value));
            }
        }
        values.retain(|_, value| !value.is_empty());
        Ok(Settings(values))
    }

    fn get(&self, keyword: &str) -> Option<&str> {
        self.0.get(keyword).map(|value| value.as_str())
    }

    fn text(&self, keyword: &str) -> Option<String> {
        self.get(keyword).map(str::to_string)
    }

    fn word<T: Word>(&self, keyword: &str) -> Result<Option<T>> {
        let Some(value) = self.get(keyword) else { return Ok(None) };
        if let Some((_, word)) = T::WORDS.iter().find(|(word, _)| *word == value) {
            return Ok(Some(*word));
        }
        let words: Vec<&str> = T::WORDS.iter().map(|(word, _)| *word).collect();
        Err(refuse(format_args!("{keyword} has the unknown value {value:?}"))
            .remedy(format_args!("use one of {}", words.join(", "))))
    }

    fn number(&self, keyword: &str) -> Result<Option<i32>> {
        let Some(value) = self.get(keyword) else { return Ok(None) };
        value.trim().parse().map(Some).map_err(|_| {
            refuse(format_args!("{keyword} has the value {value:?}, which is not a whole number"))
        })
    }

    /// A number of seconds or so, where zero and less mean "not set".
    fn positive(&self, keyword: &str) -> Result<Option<u32>> {
        Ok(self.number(keyword)?.filter(|n| *n > 0).map(|n| n as u32))
    }

    fn seconds(&self, keyword: &str) -> Result<Option<Duration>> {
        Ok(self.positive(keyword)?.map(|n| Duration::from_secs(n.into())))
    }

    fn resolve(self, environment: &Environment<'_>) -> Result<Conninfo> {
        let user = self.text("user").or_else(|| environment.os_user.clone()).ok_or_else(|| {
            refuse("names no user, and the operating system has no name for this one")
                .remedy("add user=NAME")
        })?;
        let home = environment.home.as_deref();
        Ok(Conninfo {
            hosts: self.hosts()?,
            dbname: self.text("dbname").unwrap_or_else(|| user.clone()),
            user,
            password: self.get("password").map(|p| Password(Zeroizing::new(p.to_string()))),
            passfile: self
                .get("passfile")
                .map(PathBuf::from)
                .or_else(|| home.map(|home| home.join(".pgpass"))),
            connect_timeout: self.connect_timeout()?,
            application_name: self
                .text("application_name")
                .or_else(|| self.text("fallback_application_name")),
            options: self.text("options"),
            ssl: self.ssl(environment)?,
            channel_binding: self.word("channel_binding")?.unwrap_or(ChannelBindingPolicy::Prefer),
            target: self.word("target_session_attrs")?.unwrap_or(TargetSession::Any),
            keepalive: Keepalive {
                enabled: self.number("keepalives")? != Some(0),
                idle: self.seconds("keepalives_idle")?,
                interval: self.seconds("keepalives_interval")?,
                count: self.positive("keepalives_count")?,
                user_timeout: self
                    .positive("tcp_user_timeout")?
                    .map(|millis| Duration::from_millis(millis.into())),
            },
        })
    }

    /// Zero and less wait forever; one second is made two, as in libpq.
    fn connect_timeout(&self) -> Result<Option<Duration>> {
        Ok(match self.number("connect_timeout")? {
            None => Some(DEFAULT_CONNECT_TIMEOUT),
            Some(..=0) => None,
            Some(seconds) => Some(Duration::from_secs(seconds.max(2) as u64)),
        })
    }

    fn hosts(&self) -> Result<Vec<Host>> {
        let list = |keyword| self.get(keyword).map(|v| v.split(',').map(str::trim).collect());
        let names: Option<Vec<&str>> = list("host");
        let addresses: Option<Vec<&str>> = list("hostaddr");
        let ports: Vec<&str> = list("port").unwrap_or_else(|| vec![""]);
        let count = addresses.as_ref().or(names.as_ref()).map_or(1, Vec::len);
        if let (Some(names), Some(addresses)) = (&names, &addresses)
            && names.len() != addresses.len()
        {
            return Err(refuse(format_args!(
                "has {} host names for {} hostaddr values",
                names.len(),
                addresses.len()
            )));
        }
        if ports.len() != 1 && ports.len() != count {
            return Err(refuse(format_args!("has {} ports for {count} hosts", ports.len()))
                .remedy("give one port for all hosts, or one for each"));
        }
        (0..count)
            .map(|n| {
                let name = names.as_ref().map_or("", |names| names[n]);
                let address = addresses.as_ref().map_or("", |addresses| addresses[n]);
                let port = if ports.len() == 1 { ports[0] } else { ports[n] };
                Ok(Host { place: place(name, address)?, port: parse_port(port)? })
            })
            .collect()
    }

    fn ssl(&self, environment: &Environment<'_>) -> Result<Ssl> {
        let default_file = |name: &str| {
            let path = environment.home.as_ref()?.join(".postgresql").join(name);
            path.exists().then_some(path)
        };
        let mode = self.word("sslmode")?;
        let roots = match self.get("sslrootcert") {
            Some("system") => Some(Roots::System),
            Some(path) => Some(Roots::File(path.into())),
            None => default_file("root.crt").map(Roots::File),
        };
        if roots == Some(Roots::System) && mode.is_some_and(|mode| mode != SslMode::VerifyFull) {
            return Err(refuse(
                "sslrootcert=system with a weak sslmode would trust any host's certificate",
            )
            .remedy("use sslmode=verify-full, or the PEM file of your own root certificate"));
        }
        let default_mode = match roots {
            Some(Roots::System) => SslMode::VerifyFull,
            _ => SslMode::Prefer,
        };
        let file =
            |keyword, name| self.get(keyword).map(PathBuf::from).or_else(|| default_file(name));
        let identity = match (file("sslcert", "postgresql.crt"), file("sslkey", "postgresql.key")) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (Some(certificate), None) => {
                return Err(refuse(format_args!(
                    "has the sslcert {} and no sslkey",
                    certificate.display()
                ))
                .remedy("add sslkey=FILE"));
            }
            (None, _) => None,
        };
        Ok(Ssl { mode: mode.unwrap_or(default_mode), roots, identity })
    }
}

fn place(name: &str, address: &str) -> Result<Place> {
    if !address.is_empty() {
        let address = address.parse().map_err(|_| {
            refuse(format_args!("hostaddr {address:?} is not an IP address"))
                .remedy("put a name into host= instead")
        })?;
        let name = (!name.is_empty()).then(|| name.to_string());
        return Ok(Place::Network { name, address: Some(address) });
    }
    match name.chars().next() {
        None => Ok(Place::Socket(DEFAULT_SOCKET_DIRECTORY.into())),
        Some('/') => Ok(Place::Socket(name.into())),
        Some('@') => Err(refuse(format_args!("host {name:?}: abstract sockets are not supported"))),
        Some(_) => Ok(Place::Network { name: Some(name.to_string()), address: None }),
    }
}

fn parse_port(text: &str) -> Result<u16> {
    match text.parse() {
        _ if text.is_empty() => Ok(DEFAULT_PORT),
        Ok(port) if port > 0 => Ok(port),
        _ => Err(refuse(format_args!("port {text:?} is not a number from 1 to 65535"))),
    }
}
