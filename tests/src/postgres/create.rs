//! Describing and making a new cluster.

use super::{Cluster, SUPERUSER, as_server_user, free_port, run};
use crate::certificate::Issued;
use crate::major::Major;
use crate::scene::Scene;
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// A cluster that is yet to be made. By default: data checksums, 16 MiB segments, no fsync, everybody
/// trusted, commit timestamps on.
#[derive(Debug)]
pub struct Builder<'a> {
    scene: &'a Scene,
    major: Major,
    name: String,
    checksums: bool,
    segment_mib: u32,
    durable: bool,
    settings: Vec<(String, String)>,
    hba: Vec<String>,
    tls: Option<Issued>,
    password: Option<String>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(scene: &'a Scene, major: &Major) -> Builder<'a> {
        Builder {
            scene,
            major: major.clone(),
            name: "main".to_owned(),
            checksums: true,
            segment_mib: 16,
            durable: false,
            settings: Vec::new(),
            hba: Vec::new(),
            tls: None,
            password: None,
        }
    }

    /// The name of its folder in the scene: a short one, and one for each cluster ("main" unless said).
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    pub fn checksums(mut self, on: bool) -> Self {
        self.checksums = on;
        self
    }

    /// WAL segment size in MiB: a power of two from 1 to 1024.
    pub fn segment_mib(mut self, mib: u32) -> Self {
        self.segment_mib = mib;
        self
    }

    /// With fsync, as in production. Killed processes lose nothing without it; killed machines do.
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// One setting in postgresql.conf; the last of a name counts.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A line of pg_hba.conf, before the usual ones.
    pub fn hba(mut self, line: &str) -> Self {
        self.hba.push(line.to_owned());
        self
    }

    /// TCP only under TLS, with this certificate.
    pub fn tls(mut self, issued: &Issued) -> Self {
        self.tls = Some(issued.clone());
        self
    }

    /// TCP only with a SCRAM-SHA-256 password; this one is the superuser's (letters and digits).
    pub fn scram(mut self, password: &str) -> Self {
        self.password = Some(password.to_owned());
        self
    }

    /// Makes it and starts it.
    pub async fn start(self) -> Result<Cluster> {
        let password = self.password.clone();
        let mut cluster = self.make()?;
        cluster.start().await?;
        if let Some(password) = password {
            cluster.sql(&format!("ALTER ROLE {SUPERUSER} PASSWORD '{password}'")).await?;
        }
        Ok(cluster)
    }

    /// Makes it and leaves it stopped. A password is set only by [`Builder::start`].
    pub fn make(self) -> Result<Cluster> {
        let data = self.scene.path(&self.name);
        let socket_dir = self.scene.folder(&format!("{}.s", self.name))?;
        let log = self.scene.path(&format!("{}.log", self.name));
        self.scene.show_on_failure(&log);
        self.initdb(&data)?;
        let port = free_port()?;
        append(&data.join("postgresql.conf"), &self.configuration(&socket_dir, port))?;
        std::fs::write(data.join("pg_hba.conf"), self.access())?;
        self.write_certificate(&data)?;
        Ok(Cluster {
            user: self.scene.user(),
            major: self.major,
            password: self.password,
            options: Vec::new(),
            server: None,
            data,
            socket_dir,
            port,
            log,
        })
    }

    fn initdb(&self, data: &Path) -> Result<()> {
        let mut command =
            as_server_user(Command::new(self.major.program("initdb")), self.scene.user());
        command
            .args(["--no-sync", "--no-locale", "--encoding=UTF8", "--auth=trust"])
            .arg(format!("--username={SUPERUSER}"))
            .arg(format!("--wal-segsize={}", self.segment_mib))
            .arg("--pgdata")
            .arg(data);
        // 18 has them on unless told; the others off.
        match (self.checksums, self.major.number()) {
            (true, _) => command.arg("--data-checksums"),
            (false, 18..) => command.arg("--no-data-checksums"),
            (false, _) => &mut command,
        };
        run(command, format!("initdb of PostgreSQL {}", self.major))
    }

    fn configuration(&self, socket_dir: &Path, port: u16) -> String {
        let mut settings: Vec<(&str, String)> = vec![
            ("listen_addresses", "127.0.0.1".to_owned()),
            ("port", port.to_string()),
            ("unix_socket_directories", socket_dir.display().to_string()),
            ("fsync", if self.durable { "on" } else { "off" }.to_owned()),
            ("shared_buffers", "16MB".to_owned()),
            ("max_connections", "40".to_owned()),
            ("track_commit_timestamp", "on".to_owned()),
            // It comes up to a minute after the start, wherever a scene then is. Who wants it turns it on.
            ("autovacuum", "off".to_owned()),
            ("log_line_prefix", "%m [%p] %b ".to_owned()),
            ("password_encryption", "scram-sha-256".to_owned()),
            // A segment of 64 MiB or more needs room for two.
            ("min_wal_size", format!("{}MB", (self.segment_mib * 2).max(80))),
            ("max_wal_size", format!("{}MB", (self.segment_mib * 4).max(1024))),
        ];
        if self.tls.is_some() {
            settings.push(("ssl", "on".to_owned()));
        }
        let given = self.settings.iter().map(|(name, value)| (name.as_str(), value.clone()));
        let mut text = String::new();
        for (name, value) in settings.into_iter().chain(given) {
            let _ = writeln!(text, "{name} = '{}'", value.replace('\'', "''"));
        }
        text
    }

    fn access(&self) -> String {
        let kind = if self.tls.is_some() { "hostssl" } else { "host" };
        let method = if self.password.is_some() { "scram-sha-256" } else { "trust" };
        let mut lines = self.hba.clone();
        lines.push("local all,replication all trust".to_owned());
        lines.push(format!("{kind} all,replication all 127.0.0.1/32 {method}"));
        lines.join("\n") + "\n"
    }

    fn write_certificate(&self, data: &Path) -> Result<()> {
        let Some(issued) = &self.tls else { return Ok(()) };
        for (name, pem) in [("server.crt", &issued.certificate), ("server.key", &issued.key)] {
            let path = data.join(name);
            std::fs::write(&path, pem).with_context(|| format!("write {}", path.display()))?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            self.scene.give(&path)?;
        }
        Ok(())
    }
}

fn append(path: &Path, text: &str) -> Result<()> {
    let old = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    std::fs::write(path, old + text).with_context(|| format!("write {}", path.display()))
}
