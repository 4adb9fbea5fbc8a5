//! The command line: what may be typed, and what it is turned into.

use crate::access::{Access, UrlOptions};
use crate::layout::Mapping;
use crate::plan::PlanRequest;
use crate::resolve::line::BranchChoice;
use crate::restore::Request;
use crate::target::Target;
use crate::wal_spool::SavedAccess;
use backstay_common::config::Settings;
use backstay_common::id::SystemId;
use backstay_common::{Context, Error, Kind, Result};
use clap::{Args, Parser, Subcommand};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::path::{Path, PathBuf};

const CONFIG: &str = "/etc/backstay/backstay.toml";

/// List, plan and restore PostgreSQL backups.
#[derive(Debug, Parser)]
#[command(name = "backstay", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Where the backups are, and what opens them.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// The agent's config file [default: /etc/backstay/backstay.toml, unless --from is given]
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "from")]
    pub config: Option<PathBuf>,
    /// A location's URL instead of a config file; may be given several times
    #[arg(long, global = true, value_name = "URL")]
    pub from: Vec<String>,
    /// The key that the backups were made with, for --from
    #[arg(long, global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Another S3 server than Amazon's, for --from
    #[arg(long, global = true, value_name = "URL")]
    pub endpoint: Option<String>,
    #[arg(long, global = true, value_name = "NAME")]
    pub region: Option<String>,
    /// Let the endpoint be without TLS
    #[arg(long, global = true)]
    pub allow_http: bool,
    /// PEM certificates to trust besides the system's, for --from
    #[arg(long, global = true, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// The system identifier, where the cluster has had several: of before or after pg_upgrade [default: as the target wants it]
    #[arg(long, global = true, value_name = "SYSTEM")]
    pub system: Option<SystemId>,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more; twice: say much more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show the snapshots, and which moments can be restored
    List,
    /// Say what a restore would do, and touch nothing
    Plan(PlanArgs),
    /// Restore a cluster to a moment
    Restore(RestoreArgs),
    /// PostgreSQL's restore_command: give it one WAL file
    WalFetch(WalFetchArgs),
    /// PostgreSQL's recovery_end_command: take away what only recovery needed
    #[command(hide = true)]
    RecoveryEnd(RecoveryEndArgs),
    /// Show what happened: gaps, and what was copied or replaced between locations
    Ledger,
    /// Make keys
    #[command(subcommand)]
    Keys(KeysVerb),
}

/// The moment, and what restricts the way to it.
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    /// latest, a time ('2026-11-22 14:03:00Z', '10m ago'), lsn:16/B374D848, xid:1234, name:LABEL or snapshot:ID
    #[arg(long, value_name = "TARGET")]
    pub to: String,
    /// The zone of a time that names none: 'Europe/Berlin'
    #[arg(long, value_name = "ZONE")]
    pub tz: Option<String>,
    /// Follow this timeline or branch, where several hold the moment
    #[arg(long, value_name = "TIMELINE")]
    pub timeline: Option<BranchChoice>,
    /// Begin from this snapshot
    #[arg(long, value_name = "ID")]
    pub snapshot: Option<String>,
    /// The damaged server's pg_wal: replay also what only it still has
    #[arg(long, value_name = "DIR")]
    pub wal_from: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    pub plan: PlanArgs,
    /// The directory to restore into: new or empty, or with --delta the cluster's own
    #[arg(long, value_name = "DIR")]
    pub into: PathBuf,
    /// Restore over the stopped cluster's own directory: fetch only pages that differ, remove PostgreSQL files that are too many
    #[arg(long, conflicts_with = "force")]
    pub delta: bool,
    /// Start PostgreSQL, replay, promote and open
    #[arg(long)]
    pub start: bool,
    /// Move a directory that is not empty aside (nothing is deleted)
    #[arg(long)]
    pub force: bool,
    /// Who gets the files, when run as root [default: the owner of the directory above]
    #[arg(long, value_name = "USER[:GROUP]")]
    pub owner: Option<String>,
    /// The port of the restored server [default: the source's]
    #[arg(long, value_name = "N")]
    pub port: Option<u16>,
    /// The folder of PostgreSQL's programs
    #[arg(long, value_name = "DIR")]
    pub pg_bin: Option<PathBuf>,
    /// Put a tablespace (OID or old path) elsewhere than below the target directory
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace: Vec<Mapping>,
}

#[derive(Clone, Debug, Args)]
pub struct WalFetchArgs {
    /// The backstay-restore folder of the restored directory
    #[arg(long, value_name = "DIR", default_value = crate::directory::OURS)]
    pub plan: PathBuf,
    /// The file that PostgreSQL wants (%f)
    pub file: String,
    /// Where it wants it (%p)
    pub to: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub struct RecoveryEndArgs {
    /// The backstay-restore folder of the restored directory
    #[arg(long, value_name = "DIR", default_value = crate::directory::OURS)]
    pub plan: PathBuf,
}

#[derive(Clone, Debug, Subcommand)]
pub enum KeysVerb {
    /// Make a key for a new cluster
    Generate {
        /// A file that does not exist yet
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

impl Global {
    /// The locations and the key.
    pub async fn access(&self) -> Result<Access> {
        self.saved()?.open().await
    }

    /// The same as plain data, with absolute paths.
    pub fn saved(&self) -> Result<SavedAccess> {
        let absolute = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
        let config = match self.from.is_empty() {
            true => Some(absolute(&self.config)?.unwrap_or_else(|| CONFIG.into())),
            false => None,
        };
        if config.is_some() && (self.key_file.is_some() || self.endpoint.is_some()) {
            return Err(Error::new(Kind::Config, "--key-file and --endpoint go with --from")
                .remedy("give --from URL, or write them into the config file"));
        }
        if config.is_none() && self.key_file.is_none() {
            return Err(Error::new(Kind::Config, "--from needs --key-file")
                .remedy("give the key that the backups were made with: --key-file FILE"));
        }
        Ok(SavedAccess {
            config,
            from: self.from.clone(),
            key_file: absolute(&self.key_file)?,
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            allow_http: self.allow_http,
            ca_file: absolute(&self.ca_file)?,
        })
    }
}

impl SavedAccess {
    /// Reaches the locations.
    pub async fn open(&self) -> Result<Access> {
        if let Some(config) = &self.config {
            return Access::from_settings(&Settings::read(config)?).await;
        }
        let options = UrlOptions {
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            allow_http: self.allow_http,
            ca_file: self.ca_file.clone(),
        };
        let key_file = self.key_file.as_deref().unwrap_or(Path::new(""));
        Access::from_urls(&self.from, key_file, &options).await
    }
}

impl PlanArgs {
    pub fn request(&self) -> Result<PlanRequest> {
        let zone = |name: &String| {
            TimeZone::get(name).map_err(|e| {
                Error::new(Kind::Config, format!("--tz {name}: {e}"))
                    .remedy("give a zone such as 'Europe/Berlin' or UTC")
            })
        };
        let tz = self.tz.as_ref().map(zone).transpose()?;
        let now = Timestamp::now();
        Ok(PlanRequest {
            target: Target::parse(&self.to, tz.as_ref(), now)?,
            timeline: self.timeline,
            snapshot: self.snapshot.clone(),
            wal_from: self.wal_from.as_deref().map(absolute).transpose()?,
            now,
        })
    }
}

impl RestoreArgs {
    pub fn request(&self, global: &Global) -> Result<Request> {
        Ok(Request {
            dir: resolved(&self.into)?,
            start: self.start,
            force: self.force,
            delta: self.delta,
            owner: self.owner.clone(),
            port: self.port,
            pg_bin: self.pg_bin.as_deref().map(absolute).transpose()?,
            tablespaces: self.tablespace.clone(),
            quiet: global.json,
            saved: global.saved()?,
        })
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(format!("find {}", path.display()))
}

/// Absolute, without `..` and links where it exists: the directory itself if it is there, else the nearest above it.
fn resolved(path: &Path) -> Result<PathBuf> {
    let path = absolute(path)?;
    for above in path.ancestors() {
        if let Ok(real) = above.canonicalize() {
            let rest = path.strip_prefix(above).unwrap_or(Path::new(""));
            return Ok(if rest.as_os_str().is_empty() { real } else { real.join(rest) });
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn global(arguments: &[&str]) -> Result<SavedAccess> {
        let line = ["backstay"].iter().chain(arguments).chain(&["list"]).copied();
        Cli::try_parse_from(line).unwrap().global.saved()
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn access_is_a_config_or_urls_with_a_key() {
        assert_eq!(global(&[]).unwrap().config, Some(CONFIG.into()));
        let relative = global(&["--config", "x.toml"]).unwrap().config.unwrap();
        assert!(relative.is_absolute(), "PostgreSQL runs wal-fetch elsewhere");
        let bare =
            global(&["--from", "file:///a", "--from", "file:///b", "--key-file", "/k"]).unwrap();
        assert_eq!((bare.config, bare.from.len()), (None, 2));
        assert!(global(&["--from", "file:///a"]).unwrap_err().to_string().contains("--key-file"));
        assert!(global(&["--key-file", "/k"]).unwrap_err().to_string().contains("--from"));
    }

    #[test]
    fn a_new_directory_below_a_link_is_resolved() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, folder.path().join("link")).unwrap();
        assert_eq!(resolved(&folder.path().join("link/new")).unwrap(), real.join("new"));
        assert_eq!(resolved(&folder.path().join("link")).unwrap(), real);
    }
}
