//! Throw-away PostgreSQL servers.
//!
//! A [`Cluster`] is a data directory with, most of the time, a server on it. It can be made
//! ([`Cluster::build`]), copied cold, taken over from whoever restored it ([`Cluster::of`]), or found running
//! ([`Cluster::attach`]). Always holds: the server runs as the scene's unprivileged user, listens only
//! on loopback and on a Unix socket in the scene's folder, and is dead once the `Cluster` is dropped.

mod create;
mod process;
mod session;
mod standby;

pub use create::Builder;
use process::works_in;
pub use process::{is_alive, kill_tree};
pub(crate) use session::explain;
pub use session::{Address, Session};

use crate::major::Major;
use crate::random::Random;
use crate::scene::Scene;
use anyhow::{Context, Result, bail, ensure};
use backstay_common::lsn::Lsn;
use rustix::process::{Pid, Signal};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a server may take to start (with recovery) or to stop.
const PATIENCE: Duration = Duration::from_secs(180);
/// The kernel gives none of these to clients.
const PORTS: std::ops::Range<u64> = 10_000..32_000;
const POLL: Duration = Duration::from_millis(50);

/// The superuser of every cluster made here.
pub const SUPERUSER: &str = "postgres";

/// One PostgreSQL cluster of a test.
#[derive(Debug)]
pub struct Cluster {
    major: Major,
    data: PathBuf,
    socket_dir: PathBuf,
    port: u16,
    log: PathBuf,
    password: Option<String>,
    user: Option<crate::scene::ServerUser>,
    /// Given on the command line, for a data directory whose files must stay as they are.
    options: Vec<String>,
    server: Option<Server>,
}

#[derive(Debug)]
enum Server {
    Ours(Child),
    Found(Pid),
}

impl Cluster {
    /// Starts to describe a new cluster.
    pub fn build<'a>(scene: &'a Scene, major: &Major) -> Builder<'a> {
        Builder::new(scene, major)
    }

    /// Takes a data directory that something else has made, such as a restore. No file in it is touched,
    /// port and socket folder are given on the command line. It isn't started.
    pub fn of(scene: &Scene, major: &Major, data: &Path) -> Result<Cluster> {
        let name = data.file_name().context("a data directory has a name")?.to_string_lossy();
        let socket_dir = scene.folder(&format!("{name}.s"))?;
        let port = free_port()?;
        let log = scene.path(&format!("{name}.log"));
        scene.show_on_failure(&log);
        let options = vec![
            format!("port={port}"),
            "listen_addresses=127.0.0.1".to_owned(),
            format!("unix_socket_directories={}", socket_dir.display()),
        ];
        let (major, data, user) = (major.clone(), data.to_owned(), scene.user());
        Ok(Cluster {
            major,
            data,
            socket_dir,
            port,
            log,
            password: None,
            user,
            options,
            server: None,
        })
    }

    /// Takes the server that runs on a data directory, whoever started it (`restore --start`).
    pub fn attach(scene: &Scene, major: &Major, data: &Path) -> Result<Cluster> {
        let file = data.join("postmaster.pid");
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let line = |n: usize| text.lines().nth(n).map(str::trim).filter(|line| !line.is_empty());
        let pid = line(0).and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
        let pid = pid.filter(|pid| is_alive(*pid)).context("no server runs there")?;
        let mut cluster = Cluster::of(scene, major, data)?;
        cluster.port =
            line(3).and_then(|port| port.parse().ok()).context("no port in postmaster.pid")?;
        cluster.socket_dir = PathBuf::from(line(4).context("no socket folder in postmaster.pid")?);
        cluster.options[0] = format!("port={}", cluster.port);
        cluster.options[2] = format!("unix_socket_directories={}", cluster.socket_dir.display());
        cluster.server = Some(Server::Found(pid));
        Ok(cluster)
    }

    pub fn major(&self) -> &Major {
        &self.major
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    /// What the server wrote, of all its lives.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// For libpq and Backstay: through the Unix socket, as superuser, without a password.
    pub fn conninfo(&self) -> String {
        format!(
            "host={} port={} user={SUPERUSER} dbname=postgres",
            self.socket_dir.display(),
            self.port
        )
    }

    /// Through loopback TCP as superuser, with the password where one was set; add `sslmode` and so on.
    pub fn conninfo_tcp(&self) -> String {
        let password =
            self.password.as_ref().map(|word| format!(" password={word}")).unwrap_or_default();
        format!("host=127.0.0.1 port={} user={SUPERUSER} dbname=postgres{password}", self.port)
    }

    /// Starts the server and waits until it answers queries (in recovery: once it is consistent).
    pub async fn start(&mut self) -> Result<()> {
        ensure!(!self.is_running(), "{} runs already", self.data.display());
        let log = std::fs::File::options().create(true).append(true).open(&self.log)?;
        let mut command = self.command("postgres");
        command.arg("-D").arg(&self.data).stdout(log.try_clone()?).stderr(log);
        self.options.iter().for_each(|option| {
            command.arg("-c").arg(option);
        });
        self.server = Some(Server::Ours(command.spawn().context("start postgres")?));
        self.wait_for_answer().await
    }

    async fn wait_for_answer(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let error = match self.connect().await {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            ensure!(self.is_running(), "PostgreSQL {} ended at its start: {error:#}", self.major);
            ensure!(
                Instant::now() < deadline,
                "PostgreSQL {} doesn't answer: {error:#}",
                self.major
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until the server has ended recovery and takes writes.
    pub async fn wait_until_writable(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while self.value("SELECT pg_is_in_recovery()").await? != "f" {
            ensure!(Instant::now() < deadline, "still in recovery after {patience:?}");
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Ends recovery now.
    pub async fn promote(&self) -> Result<()> {
        // One that waited inside the server could be cancelled by what is replayed meanwhile.
        let asked = self.value("SELECT pg_promote(false)").await?;
        ensure!(asked == "t", "the server cannot be asked to end recovery");
        self.wait_until_writable(Duration::from_secs(60)).await
    }

    /// Shuts down as `pg_ctl stop -m fast` does: sessions are cut, a checkpoint is written.
    pub async fn stop(&mut self) -> Result<()> {
        self.stop_with(Signal::INT, PATIENCE).await.map(|_| ())
    }

    /// Shuts down with a signal (TERM: smart, INT: fast, QUIT: immediate) and says how long it took.
    pub async fn stop_with(&mut self, signal: Signal, patience: Duration) -> Result<Duration> {
        let pid = self.pid().context("no server runs")?;
        let started = Instant::now();
        rustix::process::kill_process(pid, signal)?;
        while self.is_running() {
            ensure!(started.elapsed() < patience, "the server still runs after {patience:?}");
            tokio::time::sleep(POLL).await;
        }
        self.server = None;
        Ok(started.elapsed())
    }

    pub async fn restart(&mut self) -> Result<()> {
        self.stop().await?;
        self.start().await
    }

    /// Kills the server and all its processes with SIGKILL, at one moment, as a power cut would.
    pub fn kill(&mut self) -> Result<()> {
        let pid = self.pid().context("no server runs")?;
        let outcome = kill_tree(pid, PATIENCE);
        self.free_shared_memory();
        if let Some(Server::Ours(child)) = &mut self.server {
            child.wait()?;
        }
        self.server = None;
        outcome
    }

    /// A server that is killed leaves a segment of System V shared memory to the next on its data directory. Here there may
    /// be none, and a machine has few thousand.
    fn free_shared_memory(&self) {
        let file = std::fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        // "src/include/utils/pidfile.h": the key and the number of the segment.
        let segment = file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
        if let Some(segment) = segment {
            // What is not freed is only left.
            let _ = Command::new("ipcrm").arg("-m").arg(segment).stderr(Stdio::null()).status();
        }
    }

    /// Kills the server if it runs and removes its data directory: the accident.
    pub fn destroy(&mut self) -> Result<()> {
        if self.is_running() {
            self.kill()?;
        }
        std::fs::remove_dir_all(&self.data).context("remove the data directory")
    }

    /// Copies the data directory of a stopped server: the simplest backup that there is.
    /// Tablespaces stay links to the same folders.
    pub fn copy_to(&mut self, scene: &Scene, name: &str) -> Result<Cluster> {
        ensure!(!self.is_running(), "a cold copy wants a stopped server");
        let to = scene.path(name);
        let status = Command::new("cp").arg("-a").arg(&self.data).arg(&to).status()?;
        ensure!(status.success(), "cp failed");
        let mut copy = Cluster::of(scene, &self.major, &to)?;
        copy.password.clone_from(&self.password);
        Ok(copy)
    }

    pub fn is_running(&mut self) -> bool {
        match &mut self.server {
            None => false,
            Some(Server::Ours(child)) => matches!(child.try_wait(), Ok(None)),
            Some(Server::Found(pid)) => is_alive(*pid) && works_in(*pid, &self.data),
        }
    }

    /// The postmaster.
    pub fn pid(&mut self) -> Option<Pid> {
        if !self.is_running() {
            return None;
        }
        match &self.server {
            Some(Server::Ours(child)) => Some(Pid::from_child(child)),
            Some(Server::Found(pid)) => Some(*pid),
            None => None,
        }
    }

    /// A session as superuser in database `postgres`.
    pub async fn connect(&self) -> Result<Session> {
        self.connect_to("postgres").await
    }

    pub async fn connect_to(&self, database: &str) -> Result<Session> {
        self.address().connect(database).await
    }

    /// Where the server listens, for whoever outlives a borrow of this cluster.
    pub fn address(&self) -> Address {
        Address { socket_dir: self.socket_dir.clone(), port: self.port }
    }

    /// Runs statements as superuser in database `postgres`.
    pub async fn sql(&self, statements: &str) -> Result<()> {
        self.connect().await?.batch_execute(statements).await.map_err(explain)
    }

    /// The first column of the first row, as text; an empty string for NULL.
    pub async fn value(&self, query: &str) -> Result<String> {
        self.connect().await?.value(query).await
    }

    /// The end of the WAL that the server has flushed.
    pub async fn flushed(&self) -> Result<Lsn> {
        let end = self.value("SELECT pg_current_wal_flush_lsn()").await?;
        end.parse().ok().with_context(|| format!("{end:?} is no position"))
    }

    /// Prepares a program of this major, run as the server's user.
    pub fn command(&self, program: &str) -> Command {
        as_server_user(Command::new(self.major.program(program)), self.user)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.is_running()
            && let Err(error) = self.kill()
        {
            eprintln!("--- {}: {error:#}", self.data.display());
        }
    }
}

fn as_server_user(mut command: Command, user: Option<crate::scene::ServerUser>) -> Command {
    use std::os::unix::process::CommandExt;
    command.current_dir("/").stdin(Stdio::null()).env("LC_ALL", "C");
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("PG")) {
        command.env_remove(key);
    }
    if let Some(user) = user {
        // Supplementary groups are dropped by the standard library when root changes the uid.
        command.uid(user.uid).gid(user.gid);
    }
    command
}

/// Runs a command to its end; its output is in the error.
fn run(mut command: Command, doing: impl Display) -> Result<()> {
    let output = command.output().with_context(|| doing.to_string())?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{doing}: {}\n{}", output.status, String::from_utf8_lossy(&said));
    }
    Ok(())
}

/// A loopback port that is free now, below the range from which outgoing connections draw.
/// None twice in one process: a port that was given away may be bound only later.
fn free_port() -> Result<u16> {
    static NEXT: OnceLock<AtomicU64> = OnceLock::new();
    let next = NEXT.get_or_init(|| {
        let seed = format!("{}-{:?}", std::process::id(), Instant::now());
        Random::of(&seed).below(PORTS.end - PORTS.start).into()
    });
    for _ in 0..1000 {
        let number = next.fetch_add(1, Ordering::Relaxed) % (PORTS.end - PORTS.start);
        let port = (PORTS.start + number) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no loopback port is free")
}
