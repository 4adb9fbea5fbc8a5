//! The two programs under test, run as a user would run them.
//!
//! A [`Deployment`] is what an operator sets up for one cluster: a TOML file, a state directory, a key. From it
//! commands of both programs are run ([`Deployment::backstay`], [`Deployment::agent_command`]), and the
//! long-running [`Agent`] is started. Programs are those of this build, unless `BACKSTAY_AGENT_BIN` and
//! `BACKSTAY_BIN` name others.

mod agent;
mod deployment;

pub use agent::Agent;
pub use deployment::{Configuration, Deployment};

use anyhow::{Context, Result, ensure};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// A command that takes longer has failed.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// What a command ended with.
#[derive(Clone, Debug)]
pub struct Finished {
    pub command: String,
    /// `None` if a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// An error, with all the command said, unless it ended with this code.
    pub fn expect(self, code: i32) -> Result<Finished> {
        ensure!(
            self.code == Some(code),
            "{}: ended with {:?} and not {code}\n{}{}",
            self.command,
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// An error unless it ended with code 0.
    pub fn success(self) -> Result<Finished> {
        self.expect(0)
    }

    /// An error unless it said all of these, on stdout or stderr.
    pub fn says(self, words: &[&str]) -> Result<Finished> {
        for word in words {
            ensure!(
                self.stdout.contains(word) || self.stderr.contains(word),
                "{}: doesn't say {word:?}\n{}{}",
                self.command,
                self.stdout,
                self.stderr
            );
        }
        Ok(self)
    }

    /// Its output as JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("{}: not JSON: {}", self.command, self.stdout))
    }
}

/// Where the agent's program is.
pub fn agent_program() -> PathBuf {
    program("BACKSTAY_AGENT_BIN", "backstay-agent")
}

/// Where the command line's program is.
pub fn backstay_program() -> PathBuf {
    program("BACKSTAY_BIN", "backstay")
}

/// From the environment, else beside the test's own program (`target/debug/deps/it-...`).
fn program(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return PathBuf::from(path);
    }
    let own = std::env::current_exe().unwrap_or_default();
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| {
            panic!("{name} isn't built: cargo build -p backstay-agent -p backstay --bins")
        })
}

/// Runs a program to its end, without `PG*` variables, and kills it if the future is dropped.
pub async fn run(
    program: &Path,
    args: &[impl AsRef<OsStr>],
    env: &[(&str, &str)],
) -> Result<Finished> {
    let mut command = tokio::process::Command::new(program);
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("PG")) {
        command.env_remove(key);
    }
    command.envs(env.iter().copied());
    let words = args.iter().map(|arg| arg.as_ref().to_string_lossy().into_owned());
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let told = [name].into_iter().chain(words).collect::<Vec<_>>().join(" ");
    let output = tokio::time::timeout(COMMAND_LIMIT, command.output())
        .await
        .with_context(|| format!("{told}: still running after {COMMAND_LIMIT:?}"))?
        .with_context(|| told.clone())?;
    Ok(Finished {
        command: told,
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
