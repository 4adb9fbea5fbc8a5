//! The restored cluster's server: privately while it replays, then as everybody knows it.
//!
//! While it replays, it listens on one socket in a folder that only its owner can enter, and runs without fsync. That is safe
//! because nothing of it is promised yet: a crash before the end leaves a restore that is marked as unfinished; at the end
//! the server stops, the file systems are synced, and only then is it started as the operator configured it.

use crate::binaries::Binaries;
use crate::directory::{OURS, PRIVATE_SOCKETS, make_directory};
use crate::owner::{Owner, is_root};
use crate::running::running_server;
use backstay_common::postgres::{Connection, Conninfo, Environment, Mode};
use backstay_common::{Context, Error, Kind, Result};
use rustix::process::{Pid, Signal};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Lines of a server's log that an error shows.
const LOG_LINES: usize = 12;
/// How long an orderly shutdown may take; it writes all that replay has changed.
const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(3600);
const SETPRIV: &str = "/usr/bin/setpriv";

/// What a server is run from and as.
#[derive(Clone, Debug)]
pub struct Place {
    pub binaries: Binaries,
    pub dir: PathBuf,
    pub owner: Owner,
    /// The name of a superuser.
    pub superuser: String,
    /// Bytes of the database: no more memory than that is asked for.
    pub database_bytes: u64,
}

impl Place {
    /// A command that runs as the owner, with the owner's groups.
    fn command(&self, program: &str) -> Command {
        let program = self.binaries.program(program);
        let mut command = match is_root() && Path::new(SETPRIV).exists() {
            true => {
                let mut command = Command::new(SETPRIV);
                command.arg(format!("--reuid={}", self.owner.uid));
                command.arg(format!("--regid={}", self.owner.gid));
                command.arg("--init-groups").arg(program);
                command
            }
            false => {
                let mut command = Command::new(program);
                if is_root() {
                    command.uid(self.owner.uid).gid(self.owner.gid);
                }
                command
            }
        };
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        command.current_dir(&self.dir).stdin(Stdio::null());
        command
    }

    fn ours(&self, name: &str) -> PathBuf {
        self.dir.join(OURS).join(name)
    }
}

/// Whether the libraries that the cluster preloads are loaded during replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preload {
    /// Background workers of theirs would begin to act as soon as the cluster is open.
    Nothing,
    /// WAL that only a library understands needs it.
    AsConfigured,
}

/// A server that replays. Dropping it asks it to stop at once.
#[derive(Debug)]
pub struct ReplayServer {
    child: Child,
    sockets: PathBuf,
    log: PathBuf,
    superuser: String,
    is_stopped: bool,
}

impl ReplayServer {
    pub fn start(place: &Place, preload: Preload) -> Result<ReplayServer> {
        let sockets = short_folder(place.owner)?;
        let (hba, ident) = (place.ours("replay_hba.conf"), place.ours("replay_ident.conf"));
        crate::directory::write_durably(&hba, b"local all all trust\n", place.owner)?;
        crate::directory::write_durably(&ident, b"", place.owner)?;
        let log = place.ours("recovery.log");
        let output = File::create(&log).context(format!("write {}", log.display()))?;
        place.owner.take(&log)?;
        let mut command = place.command("postgres");
        command.arg("-D").arg(&place.dir);
        for (name, value) in options(place, preload, &sockets, &hba, &ident) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let errors = output.try_clone().context("open the log again")?;
        // A group of its own: Ctrl-C reaches us, and we stop it in order.
        command.stdout(output).stderr(errors).process_group(0);
        let child = command
            .spawn()
            .context(format!("start {}", place.binaries.program("postgres").display()))?;
        Ok(ReplayServer {
            child,
            sockets,
            log,
            superuser: place.superuser.clone(),
            is_stopped: false,
        })
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait().context("watch the server")?;
        self.is_stopped |= status.is_some();
        Ok(status)
    }

    /// A session as superuser; fails while the server does not accept any.
    pub async fn connect(&self) -> Result<Connection> {
        let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
        let environment = Environment { variable: &|_| None, os_user: None, home: None };
        let mut last = Error::new(Kind::Bug, "no database was tried");
        for database in ["postgres", "template1"] {
            let text = format!(
                "host={} port={PRIVATE_PORT} user={} dbname={database} sslmode=disable connect_timeout=5",
                quoted(&self.sockets.to_string_lossy()),
                quoted(&self.superuser),
            );
            let info = Conninfo::parse_in(&text, &environment)?;
            match Connection::connect(&info, Mode::Sql).await {
                Ok(connection) => return Ok(connection),
                Err(error) if error.sqlstate() == Some("3D000") => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// What the log says, for whoever must act on it.
    pub fn failure(&self, what: &str) -> Error {
        let last = end_of_log(&self.log);
        Error::new(Kind::Postgres, format!("{what}; its log ends:\n    {last}")).remedy(format!(
            "mend what the log names ({}) and give the same command again",
            self.log.display()
        ))
    }

    pub fn log_contains(&self, text: &str) -> bool {
        std::fs::read_to_string(&self.log).is_ok_and(|log| log.contains(text))
    }

    /// Stops it in order, all pages written.
    pub async fn stop(mut self) -> Result<()> {
        let begun = Instant::now();
        self.interrupt();
        loop {
            match self.exited()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    return Err(
                        self.failure(&format!("the server did not stop in order ({status})"))
                    );
                }
                None if begun.elapsed() > SHUTDOWN_TIME_MAX => {
                    return Err(self.failure("the server does not stop"));
                }
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Fast shutdown.
    fn interrupt(&self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It may have ended by itself just now.
            let _ = rustix::process::kill_process(pid, Signal::INT);
        }
    }
}

impl Drop for ReplayServer {
    fn drop(&mut self) {
        if !self.is_stopped && matches!(self.child.try_wait(), Ok(None)) {
            self.interrupt();
            for _ in 0..500 {
                if !matches!(self.child.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        // Left behind, an empty folder in /tmp harms nobody.
        let _ = std::fs::remove_dir_all(&self.sockets);
    }
}

/// The number in the private socket's name.
const PRIVATE_PORT: u16 = 5432;

fn options(
    place: &Place,
    preload: Preload,
    sockets: &Path,
    hba: &Path,
    ident: &Path,
) -> Vec<(&'static str, String)> {
    let path = |path: &Path| path.display().to_string();
    let mut options: Vec<(&str, String)> = vec![
        ("listen_addresses", String::new()),
        ("port", PRIVATE_PORT.to_string()),
        ("unix_socket_directories", format!("\"{}\"", path(sockets))),
        ("unix_socket_permissions", "0700".into()),
        ("unix_socket_group", String::new()),
        ("hba_file", path(hba)),
        ("ident_file", path(ident)),
        ("ssl", "off".into()),
        ("hot_standby", "on".into()),
        ("fsync", "off".into()),
        ("synchronous_commit", "local".into()),
        (
            "shared_buffers",
            format!("{}MB", shared_buffers_mib(memory_bytes(), place.database_bytes)),
        ),
        ("huge_pages", "off".into()),
        ("checkpoint_timeout", "1d".into()),
        ("max_wal_size", "16GB".into()),
        ("maintenance_io_concurrency", "256".into()),
        ("autovacuum", "off".into()),
        ("session_preload_libraries", String::new()),
        ("local_preload_libraries", String::new()),
        ("jit", "off".into()),
        ("logging_collector", "off".into()),
        ("log_destination", "stderr".into()),
        ("log_line_prefix", "%m [%p] ".into()),
        ("log_min_messages", "warning".into()),
        ("lc_messages", "C".into()),
        ("external_pid_file", String::new()),
    ];
    if preload == Preload::Nothing {
        options.push(("shared_preload_libraries", String::new()));
    }
    if place.binaries.major >= 15 {
        options.push(("recovery_prefetch", "try".into()));
        options.push(("wal_decode_buffer_size", "8MB".into()));
    }
    if place.binaries.major >= 17 {
        options.push(("summarize_wal", "off".into()));
    }
    options
}

/// A quarter of the memory, no more than the database, and from 128 MiB to 8 GiB.
fn shared_buffers_mib(memory_bytes: u64, database_bytes: u64) -> u64 {
    ((memory_bytes / 4).min(database_bytes) >> 20).clamp(128, 8 << 10)
}

fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    kib.map_or(1 << 30, |kib| kib << 10)
}

/// The path of a socket may have about 100 characters, so it cannot be below the target directory.
fn short_folder(owner: Owner) -> Result<PathBuf> {
    let random: [u8; 4] = backstay_common::id::random_bytes();
    let name = format!("{PRIVATE_SOCKETS}{:08x}", u32::from_le_bytes(random));
    let path = PathBuf::from(name);
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
        .create(&path)
        .context(format!("make {}", path.display()))?;
    make_directory(&path, owner)?;
    Ok(path)
}

/// Starts the server as it is configured, and waits until it answers.
pub async fn start_normally(place: &Place) -> Result<()> {
    let log = place.ours("server.log");
    File::create(&log).context(format!("write {}", log.display()))?;
    place.owner.take(&log)?;
    let mut command = place.command("pg_ctl");
    command.arg("-D").arg(&place.dir).arg("-l").arg(&log).args(["-w", "-t", "600", "start"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let status = tokio::process::Command::from(command).status().await.context("run pg_ctl")?;
    let text = std::fs::read_to_string(place.dir.join("postmaster.pid")).unwrap_or_default();
    let is_ready = text.lines().nth(7).is_some_and(|line| line.trim() == "ready");
    if status.success() && is_ready && running_server(&place.dir).is_some() {
        return Ok(());
    }
    let last = end_of_log(&log);
    let said = format!(
        "the cluster is restored and complete, but its server does not start; its log ends:\n    {last}"
    );
    Err(Error::new(Kind::Postgres, said).remedy(format!(
        "mend what the log names (settings are in {}), then start it: {}",
        place.dir.display(),
        start_command(Some(&place.binaries), &place.dir, place.owner)
    )))
}

/// The last lines of a log, without the refusals of our own attempts to connect.
fn end_of_log(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let is_knock = |line: &str| {
        line.contains("FATAL:  the database system is")
            || line.contains("DETAIL:  Consistent recovery state has not")
    };
    let lines: Vec<&str> = text.lines().filter(|line| !is_knock(line)).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n    ")
}

/// What a person types to start the cluster.
pub fn start_command(binaries: Option<&Binaries>, dir: &Path, owner: Owner) -> String {
    let program = binaries.map_or("pg_ctl".into(), |b| b.program("pg_ctl").display().to_string());
    let start = format!(
        "{program} -D {} -w start",
        crate::settings_files::quote_shell(&dir.to_string_lossy())
    );
    match owner == Owner::of_process() {
        true => start,
        false => format!("runuser -u {} -- {start}", owner.user_name()),
    }
}

/// Refuses a port that somebody listens on.
pub fn check_port(port: u16, socket_directory: Option<&str>) -> Result<()> {
    let in_use = |error: &std::io::Error| error.kind() == std::io::ErrorKind::AddrInUse;
    let tcp = std::net::TcpListener::bind(("127.0.0.1", port)).err().is_some_and(|e| in_use(&e));
    let folders = [socket_directory.unwrap_or("/var/run/postgresql"), "/tmp"];
    let socket = |folder: &&str| {
        std::os::unix::net::UnixStream::connect(format!("{folder}/.s.PGSQL.{port}")).is_ok()
    };
    match tcp || folders.iter().any(socket) {
        false => Ok(()),
        true => Err(Error::new(
            Kind::Config,
            format!("port {port} is taken by another server on this host"),
        )
        .remedy(
            "give another with --port, stop the server that has it, or restore without --start",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_fits_the_host_and_the_database() {
        assert_eq!(shared_buffers_mib(64 << 30, 4 << 30), 4 << 10);
        assert_eq!(shared_buffers_mib(64 << 30, 100 << 30), 8 << 10);
        assert_eq!(shared_buffers_mib(2 << 30, 100 << 30), 512);
        assert_eq!(shared_buffers_mib(256 << 20, 1), 128);
        assert!(memory_bytes() > 64 << 20);
    }

    #[test]
    fn a_taken_port_is_refused() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(check_port(port, None).unwrap_err().to_string().contains("--port"));
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().to_str().unwrap();
        let _socket =
            std::os::unix::net::UnixListener::bind(folder.path().join(".s.PGSQL.54999")).unwrap();
        assert!(check_port(54_999, Some(name)).is_err());
    }

    #[test]
    fn the_start_command_can_be_pasted() {
        let command = start_command(None, Path::new("/srv/my data"), Owner::of_process());
        assert_eq!(command, "pg_ctl -D '/srv/my data' -w start");
    }
}
