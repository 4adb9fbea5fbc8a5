//! Finding a server that suits: hosts in order, their addresses, with TLS or without.

use super::auth::{self, Login};
use super::conninfo::{Conninfo, Host, Keepalive, Place, SslMode, TargetSession};
use super::fault::{lost, unexpected, unreachable};
use super::tls;
use super::wire::{Socket, Wire};
use super::{CANNOT_CONNECT_NOW, Connection, Mode};
use crate::{Context, Error, Kind, Result};
use bytes::BytesMut;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// A server has some twenty parameters to report.
const PARAMETERS_MAX: usize = 256;

/// Why an attempt came to nothing, as far as that decides what is tried next.
enum Refusal {
    /// Not this address, or not this host: go on.
    Unsuitable(Error),
    /// TLS could not be agreed upon.
    Tls(Error),
    /// The server does not want this user, or not in this way.
    Login(Error),
}

impl Refusal {
    fn error(self) -> Error {
        match self {
            Refusal::Unsuitable(error) | Refusal::Tls(error) | Refusal::Login(error) => error,
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        match error.sqlstate() {
            Some(code) if code.starts_with("28") => Refusal::Login(error),
            _ => Refusal::Unsuitable(error),
        }
    }
}

/// The first host that accepts us and is of the kind asked for. A refused login ends the search, as in libpq.
pub(super) async fn connect(info: &Conninfo, mode: Mode) -> Result<Connection> {
    let rounds: &[TargetSession] = match info.target {
        TargetSession::PreferStandby => &[TargetSession::Standby, TargetSession::Any],
        ref target => std::slice::from_ref(target),
    };
    let mut refusals = Vec::new();
    for target in rounds {
        refusals.clear();
        for host in &info.hosts {
            match connect_host(info, mode, host, *target).await {
                Ok(connection) => return Ok(connection),
                Err(Refusal::Unsuitable(error)) => refusals.push(named(host, error)),
                Err(refusal) => return Err(named(host, refusal.error())),
            }
        }
    }
    Err(summary(refusals))
}

fn named(host: &Host, error: Error) -> Error {
    error.context(format_args!("connect to PostgreSQL at {host}"))
}

fn summary(mut refusals: Vec<Error>) -> Error {
    if refusals.len() == 1 {
        return refusals.remove(0);
    }
    let messages: Vec<&str> = refusals.iter().map(Error::message).collect();
    let mut error = Error::new(Kind::Postgres, messages.join("; "));
    // If that is all that any of them said.
    let mut codes = refusals.iter().filter_map(Error::sqlstate).peekable();
    if codes.peek().is_some() && codes.all(|code| code == CANNOT_CONNECT_NOW) {
        error = error.with_sqlstate(CANNOT_CONNECT_NOW);
    }
    match refusals.iter().find_map(Error::remedy_text) {
        Some(remedy) => error.remedy(remedy),
        None => error,
    }
}

async fn connect_host(
    info: &Conninfo,
    mode: Mode,
    host: &Host,
    target: TargetSession,
) -> Result<Connection, Refusal> {
    let mut last = None;
    for address in in_time(info, addresses(host)).await? {
        match connect_address(info, mode, host, address, target).await {
            Err(Refusal::Unsuitable(error)) => last = Some(error),
            done => return done,
        }
    }
    let nothing = || Error::new(Kind::Postgres, "the name has no address").remedy("correct host=");
    Err(Refusal::Unsuitable(last.unwrap_or_else(nothing)))
}

/// `None` is the Unix socket.
async fn addresses(host: &Host) -> Result<Vec<Option<SocketAddr>>> {
    match &host.place {
        Place::Socket(_) => Ok(vec![None]),
        Place::Network { address: Some(address), .. } => {
            Ok(vec![Some(SocketAddr::new(*address, host.port))])
        }
        Place::Network { name, address: None } => {
            let name = name.as_deref().unwrap_or("localhost");
            let found = tokio::net::lookup_host((name, host.port)).await.map_err(|error| {
                Error::new(Kind::Postgres, format_args!("look up {name}: {error}"))
                    .remedy("correct host=, or give hostaddr= as well")
            })?;
            Ok(found.map(Some).collect())
        }
    }
}

async fn in_time<T>(info: &Conninfo, work: impl Future<Output = Result<T>>) -> Result<T> {
    let Some(limit) = info.connect_timeout else { return work.await };
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(Error::new(Kind::Postgres, format_args!("no answer within {} s", limit.as_secs()))
            .remedy("check that the host is up and reachable, or raise connect_timeout="))
    })
}

/// One address, in the ways that `sslmode` allows, each within the time limit.
async fn connect_address(
    info: &Conninfo,
    mode: Mode,
    host: &Host,
    address: Option<SocketAddr>,
    target: TargetSession,
) -> Result<Connection, Refusal> {
    let attempt = |tls| Attempt { info, mode, host, target, tls }.run(address);
    let Some(_) = address else { return attempt(Tls::Never).await };
    match info.ssl.mode {
        SslMode::Disable => attempt(Tls::Never).await,
        SslMode::Allow => match attempt(Tls::Never).await {
            Err(Refusal::Login(_)) => attempt(Tls::Always).await,
            done => done,
        },
        SslMode::Prefer => match attempt(Tls::IfOffered).await {
            Err(Refusal::Tls(error)) => {
                tracing::debug!(%host, %error, "connecting without TLS");
                attempt(Tls::Never).await
            }
            // The server may have a rule for plain connections only.
            Err(Refusal::Login(error)) => {
                attempt(Tls::Never).await.map_err(|_| Refusal::Login(error))
            }
            done => done,
        },
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => attempt(Tls::Always).await,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tls {
    Never,
    IfOffered,
    Always,
}

struct Attempt<'a> {
    info: &'a Conninfo,
    mode: Mode,
    host: &'a Host,
    target: TargetSession,
    tls: Tls,
}

impl Attempt<'_> {
    async fn run(self, address: Option<SocketAddr>) -> Result<Connection, Refusal> {
        let mut stage = Refusal::Unsuitable as fn(Error) -> Refusal;
        let done = in_time(self.info, async {
            let (socket, end_point, is_encrypted) = match address {
                Some(address) => {
                    let tcp = self.open_tcp(address).await?;
                    match self.tls {
                        Tls::Never => (Box::new(tcp) as Box<dyn Socket>, None, false),
                        _ => {
                            stage = Refusal::Tls;
                            let secured = self.secure(tcp, address).await?;
                            stage = Refusal::Unsuitable;
                            secured
                        }
                    }
                }
                None => (self.open_unix().await?, None, false),
            };
            let connection = self.log_in(Wire::new(socket), end_point, is_encrypted).await?;
            suits(&connection, self.target)?;
            Ok(connection)
        })
        .await;
        done.map_err(|error| match Refusal::from(error) {
            Refusal::Unsuitable(error) => stage(error),
            refusal => refusal,
        })
    }

    async fn open_unix(&self) -> Result<Box<dyn Socket>> {
        let path = self.host.socket_path().expect("only a socket has no address");
        let socket =
            UnixStream::connect(path).await.map_err(|error| unreachable(self.host, &error))?;
        Ok(Box::new(socket))
    }

    async fn open_tcp(&self, address: SocketAddr) -> Result<TcpStream> {
        let socket =
            TcpStream::connect(address).await.map_err(|error| unreachable(self.host, &error))?;
        socket.set_nodelay(true).map_err(lost)?;
        keep_alive(&socket, &self.info.keepalive)
            .map_err(|error| Error::new(Kind::Config, error))
            .context("set keepalives= and tcp_user_timeout=")?;
        Ok(socket)
    }

    /// Asks for TLS. The answer is one byte, read alone: what an intruder put behind it then ends in the
    /// handshake, and not in our buffer.
    async fn secure(
        &self,
        mut tcp: TcpStream,
        address: SocketAddr,
    ) -> Result<(Box<dyn Socket>, Option<Vec<u8>>, bool)> {
        let mut request = BytesMut::new();
        frontend::ssl_request(&mut request);
        tcp.write_all(&request).await.map_err(lost)?;
        match tcp.read_u8().await.map_err(lost)? {
            b'S' => {
                let secured = tls::secure(tcp, &self.info.ssl, self.host, address.ip()).await?;
                Ok((secured.socket, secured.end_point, true))
            }
            b'N' if self.tls == Tls::IfOffered => Ok((Box::new(tcp), None, false)),
            b'N' => Err(Error::new(Kind::Postgres, "the server offers no TLS")
                .remedy("turn on ssl in the server, or use a weaker sslmode")),
            _ => Err(Error::new(
                Kind::Postgres,
                "the answer to the request for TLS is not PostgreSQL's",
            )
            .remedy("correct host= and port=")),
        }
    }

    async fn log_in(
        &self,
        mut wire: Wire,
        end_point: Option<Vec<u8>>,
        is_encrypted: bool,
    ) -> Result<Connection> {
        wire.put(|buf| frontend::startup_message(self.parameters(), buf))?;
        wire.flush().await.map_err(lost)?;
        let dbname = match self.mode {
            Mode::Sql => self.info.dbname.as_str(),
            Mode::Replication => "replication",
        };
        let login = Login { info: self.info, host: self.host, dbname, is_encrypted, end_point };
        login.authenticate(&mut wire).await?;
        wire.trust();
        let parameters = until_ready(&mut wire).await?;
        Ok(Connection::new(wire, parameters, self.mode, self.host.to_string(), is_encrypted))
    }

    fn parameters(&self) -> impl Iterator<Item = (&str, &str)> {
        let info = self.info;
        let optional = [
            ("application_name", info.application_name.as_deref()),
            ("options", info.options.as_deref()),
            ("replication", (self.mode == Mode::Replication).then_some("true")),
            // So that nobody who may create functions can slip one into our queries.
            ("search_path", (self.mode == Mode::Sql).then_some("pg_catalog")),
        ];
        [
            ("user", info.user.as_str()),
            ("database", info.dbname.as_str()),
            ("client_encoding", "UTF8"),
            ("DateStyle", "ISO"),
        ]
        .into_iter()
        .chain(optional.into_iter().filter_map(|(name, value)| Some((name, value?))))
    }
}

/// Takes what the server tells of itself, until it waits for us.
async fn until_ready(wire: &mut Wire) -> Result<HashMap<String, String>> {
    let mut parameters = HashMap::new();
    loop {
        match auth::message(wire).await? {
            Message::ParameterStatus(body) if parameters.len() < PARAMETERS_MAX => {
                let name = body.name().map_err(lost)?.to_string();
                parameters.insert(name, body.value().map_err(lost)?.to_string());
            }
            Message::BackendKeyData(_) => {}
            Message::ReadyForQuery(_) => return Ok(parameters),
            _ => return Err(unexpected("starting the session")),
        }
    }
}

/// Every PostgreSQL from 14 on reports both parameters unasked.
fn suits(connection: &Connection, target: TargetSession) -> Result<()> {
    let is_on = |name: &str| match connection.parameter(name) {
        Some(value) => Ok(value == "on"),
        None => Err(Error::new(Kind::Postgres, format_args!("the server does not report {name}"))
            .remedy("use PostgreSQL 14 or newer, or target_session_attrs=any")),
    };
    let (fits, wanted) = match target {
        TargetSession::Any | TargetSession::PreferStandby => return Ok(()),
        TargetSession::Primary => (!is_on("in_hot_standby")?, "a primary"),
        TargetSession::Standby => (is_on("in_hot_standby")?, "a standby"),
        TargetSession::ReadWrite => {
            (!is_on("in_hot_standby")? && !is_on("default_transaction_read_only")?, "writable")
        }
        TargetSession::ReadOnly => {
            (is_on("in_hot_standby")? || is_on("default_transaction_read_only")?, "read-only")
        }
    };
    match fits {
        true => Ok(()),
        false => Err(Error::new(Kind::Postgres, format_args!("the server is not {wanted}"))
            .remedy("name the hosts of all servers, or change target_session_attrs=")),
    }
}

fn keep_alive(socket: &TcpStream, wanted: &Keepalive) -> std::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(socket, wanted.enabled)?;
    if let Some(idle) = wanted.idle.filter(|_| wanted.enabled) {
        sockopt::set_tcp_keepidle(socket, idle)?;
    }
    if let Some(interval) = wanted.interval.filter(|_| wanted.enabled) {
        sockopt::set_tcp_keepintvl(socket, interval)?;
    }
    if let Some(count) = wanted.count.filter(|_| wanted.enabled) {
        sockopt::set_tcp_keepcnt(socket, count)?;
    }
    if let Some(timeout) = wanted.user_timeout {
        set_user_timeout(socket, timeout)?;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn set_user_timeout(socket: &TcpStream, timeout: Duration) -> std::io::Result<()> {
    let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    Ok(rustix::net::sockopt::set_tcp_user_timeout(socket, millis)?)
}

/// Only Linux has it; libpq passes it over elsewhere, too.
#[cfg(not(target_os = "linux"))]
fn set_user_timeout(_: &TcpStream, _: Duration) -> std::io::Result<()> {
    Ok(())
}
