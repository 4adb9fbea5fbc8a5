//! What an operator sets up: a configuration file, a state directory, a key.

use super::{Agent, Finished, agent_program, backstay_program, run};
use crate::postgres::Cluster;
use crate::scene::Scene;
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The words of a configuration file, as DESIGN.md has them. Everything is settable; what isn't set stays
/// out of the file, except what [`Configuration::new`] says.
#[derive(Clone, Debug)]
pub struct Configuration {
    cluster: String,
    agent: Option<String>,
    conninfo: Option<String>,
    data_dir: Option<PathBuf>,
    locations: Vec<(String, String, String)>,
    durability: Vec<(String, String)>,
    snapshot: Vec<(String, String)>,
    window: Option<String>,
    key: Option<PathBuf>,
    extra: String,
}

impl Default for Configuration {
    fn default() -> Self {
        Configuration::new("orders")
    }
}

impl Configuration {
    /// A cluster of that name, `flush-interval = "1s"`, hardly any schedule, no server, no location.
    pub fn new(cluster: &str) -> Configuration {
        Configuration {
            cluster: cluster.to_owned(),
            agent: None,
            conninfo: None,
            data_dir: None,
            locations: Vec::new(),
            durability: vec![("flush-interval".to_owned(), "1s".to_owned())],
            // Once a year: no scene minds the hour at which it is played.
            snapshot: vec![("schedule".to_owned(), "0 3 1 1 *".to_owned())],
            window: None,
            key: None,
            extra: String::new(),
        }
    }

    /// This server, through its Unix socket, with its data directory.
    pub fn server(self, cluster: &Cluster) -> Self {
        let (conninfo, data) = (cluster.conninfo(), cluster.data().to_owned());
        self.conninfo(&conninfo).data_dir(Some(&data))
    }

    /// What the agent is called, and its slot after it; else the host's name.
    pub fn agent(mut self, name: &str) -> Self {
        self.agent = Some(name.to_owned());
        self
    }

    pub fn conninfo(mut self, conninfo: &str) -> Self {
        self.conninfo = Some(conninfo.to_owned());
        self
    }

    /// `None`: snapshots go over the replication protocol.
    pub fn data_dir(mut self, dir: Option<&Path>) -> Self {
        self.data_dir = dir.map(Path::to_owned);
        self
    }

    pub fn location(self, name: &str, url: &str) -> Self {
        self.location_with(name, url, "")
    }

    /// A location with more lines of TOML of its own: `endpoint = "http://127.0.0.1:9000"`.
    pub fn location_with(mut self, name: &str, url: &str, lines: &str) -> Self {
        self.locations.push((name.to_owned(), url.to_owned(), lines.to_owned()));
        self
    }

    /// A location in a folder, which is made.
    pub fn folder(self, name: &str, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(self.location(name, &format!("file://{}", dir.display())))
    }

    /// Drops a location from the file.
    pub fn without(mut self, location: &str) -> Self {
        self.locations.retain(|(name, ..)| name != location);
        self
    }

    /// `spool`, `any`, `majority` or `all`.
    pub fn acknowledge(self, policy: &str) -> Self {
        self.durability("acknowledge", policy)
    }

    /// "1s", "5s".
    pub fn flush_interval(self, interval: &str) -> Self {
        self.durability("flush-interval", interval)
    }

    /// A text setting in `[durability]`.
    pub fn durability(mut self, name: &str, value: &str) -> Self {
        set(&mut self.durability, name, value);
        self
    }

    /// A text setting in `[snapshot]`, such as `schedule`.
    pub fn snapshot(mut self, name: &str, value: &str) -> Self {
        set(&mut self.snapshot, name, value);
        self
    }

    /// `[retention] window`.
    pub fn window(mut self, window: &str) -> Self {
        self.window = Some(window.to_owned());
        self
    }

    /// A key file that is there already; without one, [`Deployment::new`] generates one.
    pub fn key(mut self, path: &Path) -> Self {
        self.key = Some(path.to_owned());
        self
    }

    /// TOML at the end of the file, with table headers of its own.
    pub fn extra(mut self, toml: &str) -> Self {
        self.extra.push_str(toml);
        self.extra.push('\n');
        self
    }

    /// The file's text.
    pub fn toml(&self, state_dir: &Path, key: &Path) -> String {
        let mut text = String::new();
        line(&mut text, "cluster", &self.cluster);
        line(&mut text, "state-dir", &state_dir.display().to_string());
        if let Some(agent) = &self.agent {
            line(&mut text, "agent", agent);
        }
        if let Some(conninfo) = &self.conninfo {
            text.push_str("\n[postgres]\n");
            line(&mut text, "conninfo", conninfo);
            if let Some(dir) = &self.data_dir {
                line(&mut text, "data-dir", &dir.display().to_string());
            }
        }
        for (name, url, lines) in &self.locations {
            text.push_str("\n[[location]]\n");
            line(&mut text, "name", name);
            line(&mut text, "url", url);
            text.push_str(lines);
            text.push('\n');
        }
        table(&mut text, "durability", &self.durability);
        table(&mut text, "snapshot", &self.snapshot);
        if let Some(window) = &self.window {
            table(&mut text, "retention", &[("window".to_owned(), window.clone())]);
        }
        let key = ("path".to_owned(), key.display().to_string());
        table(&mut text, "keys", &[("provider".to_owned(), "file".to_owned()), key]);
        text + "\n" + &self.extra
    }
}

fn set(settings: &mut Vec<(String, String)>, name: &str, value: &str) {
    settings.retain(|(known, _)| known != name);
    settings.push((name.to_owned(), value.to_owned()));
}

fn table(text: &mut String, name: &str, settings: &[(String, String)]) {
    if !settings.is_empty() {
        let _ = write!(text, "\n[{name}]\n");
        settings.iter().for_each(|(name, value)| line(text, name, value));
    }
}

fn line(text: &mut String, name: &str, value: &str) {
    // JSON's escapes are TOML's too.
    let _ = writeln!(text, "{name} = {}", serde_json::Value::from(value));
}

/// A configuration on disk, and how to run the programs with it.
#[derive(Clone, Debug)]
pub struct Deployment {
    name: String,
    dir: PathBuf,
    key: PathBuf,
    config: PathBuf,
    env: Vec<(String, String)>,
}

impl Deployment {
    /// Writes the configuration to a folder of that name in the scene, and generates the key if there is none.
    pub async fn new(
        scene: &Scene,
        name: &str,
        configuration: &Configuration,
    ) -> Result<Deployment> {
        let dir = scene.path(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let deployment = Deployment {
            name: name.to_owned(),
            key: configuration.key.clone().unwrap_or_else(|| dir.join("backstay.key")),
            config: dir.join("backstay.toml"),
            env: Vec::new(),
            dir,
        };
        deployment.configure(configuration)?;
        if !deployment.key.exists() {
            deployment.generate_key().await?;
        }
        scene.show_on_failure(&deployment.log_path());
        Ok(deployment)
    }

    async fn generate_key(&self) -> Result<()> {
        let args = ["keys", "generate", "--out", &self.key.display().to_string()];
        run(&backstay_program(), &args, &[]).await?.success().map(|_| ())
    }

    /// Writes the file anew; a running agent isn't told.
    pub fn configure(&self, configuration: &Configuration) -> Result<()> {
        let text = configuration.toml(&self.state_dir(), &self.key);
        std::fs::write(&self.config, text).context("write the configuration")
    }

    /// Sets a variable for every program run from here on (`AWS_ACCESS_KEY_ID`).
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn config(&self) -> &Path {
        &self.config
    }

    pub fn key(&self) -> &Path {
        &self.key
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Where the agent's output goes, of all its lives.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    /// Where the running agent's process id is, for whoever clears up after an interrupted run.
    pub(super) fn pid_path(&self) -> PathBuf {
        self.dir.join("running.agent.pid")
    }

    pub(super) fn envs(&self) -> Vec<(&str, &str)> {
        self.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    /// `backstay --config F ARGS`.
    pub async fn backstay(&self, args: &[&str]) -> Result<Finished> {
        run(&backstay_program(), &self.with_config(args), &self.envs()).await
    }

    /// `backstay-agent --config F ARGS`, for all but `run`.
    pub async fn agent_command(&self, args: &[&str]) -> Result<Finished> {
        run(&agent_program(), &self.with_config(args), &self.envs()).await
    }

    /// `init`, then `run`, until it answers.
    pub async fn init_and_run(&self) -> Result<Agent> {
        self.agent_command(&["init"]).await?.success()?;
        Agent::start(self).await
    }

    fn with_config(&self, args: &[&str]) -> Vec<String> {
        let config = self.config.display().to_string();
        let words = ["--config".to_owned(), config].into_iter();
        words.chain(args.iter().map(|arg| (*arg).to_owned())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_what_was_set_and_nothing_else() {
        let text = Configuration::new("shop")
            .conninfo("host=/tmp user='a \"b\"'")
            .location_with("one", "s3://b/p", "region = \"x\"")
            .location("two", "file:///two")
            .without("two")
            .flush_interval("5s")
            .acknowledge("all")
            .toml(Path::new("/s"), Path::new("/k"));
        assert_eq!(
            text,
            "cluster = \"shop\"\nstate-dir = \"/s\"\n\n[postgres]\n\
             conninfo = \"host=/tmp user='a \\\"b\\\"'\"\n\n[[location]]\nname = \"one\"\n\
             url = \"s3://b/p\"\nregion = \"x\"\n\n[durability]\nflush-interval = \"5s\"\n\
             acknowledge = \"all\"\n\n[snapshot]\nschedule = \"0 3 1 1 *\"\n\n[keys]\nprovider = \"file\"\npath = \"/k\"\n\n"
        );
    }
}
