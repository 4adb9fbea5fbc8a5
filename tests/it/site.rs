//! What most tests begin with: a server under the ledger's load, and an agent that backs it up to two folders.

use crate::folder;
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::checks::check_all;
use backstay_tests::ledger::{Ledger, Load, Target};
use backstay_tests::major::Major;
use backstay_tests::postgres::{Cluster, Session};
use backstay_tests::programs::{Agent, Configuration, Deployment, Finished};
use backstay_tests::scene::Scene;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long anything that must happen by itself may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// The names of the two folders.
pub const LOCATIONS: [&str; 2] = ["near", "far"];

/// A server, its ledger, and what backs it up.
#[derive(Debug)]
pub struct Site<'s> {
    pub scene: &'s Scene,
    pub cluster: Cluster,
    pub ledger: Ledger,
    pub configuration: Configuration,
    pub deployment: Deployment,
    pub agent: Agent,
}

/// Enough to write all the time, and not so much that two cores do nothing else.
pub fn load() -> Load {
    Load { clients: 3, pause: Duration::from_millis(8), ..Load::default() }
}

/// This server, backed up to the two folders.
pub fn configuration(scene: &Scene, cluster: &Cluster) -> Result<Configuration> {
    let [near, far] = LOCATIONS.map(|name| scene.path(name));
    Configuration::default().server(cluster).folder("near", &near)?.folder("far", &far)
}

impl<'s> Site<'s> {
    /// A common server, backed up to two folders; the load goes on, and the first snapshot is there.
    pub async fn start(scene: &'s Scene, major: &Major) -> Result<Site<'s>> {
        let cluster = Cluster::build(scene, major).start().await?;
        let configuration = configuration(scene, &cluster)?;
        Site::of(scene, cluster, configuration).await
    }

    /// The same with a server and a configuration of one's own.
    pub async fn of(
        scene: &'s Scene,
        cluster: Cluster,
        configuration: Configuration,
    ) -> Result<Site<'s>> {
        let mut ledger = Ledger::create(&cluster, load(), scene.random()).await?;
        let deployment = Deployment::new(scene, "backup", &configuration).await?;
        ledger.start(&cluster);
        let agent = deployment.init_and_run().await?;
        let mut site = Site { scene, cluster, ledger, configuration, deployment, agent };
        site.first_snapshot().await?;
        // The beginning of a snapshot is told in whole seconds, and no time in that second can be asked for.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(site)
    }

    /// Waits until the snapshot of the first start is committed everywhere.
    pub async fn first_snapshot(&mut self) -> Result<String> {
        let status = self.agent.wait_until("there is a snapshot", PATIENCE, has_snapshot).await?;
        Ok(status["snapshots"]["last"].as_str().context("the snapshot's name")?.to_owned())
    }

    /// Takes a snapshot by hand; its name.
    pub async fn snapshot(&self) -> Result<String> {
        let outcome = self.deployment.agent_command(&["snapshot", "--json"]).await?.success()?;
        Ok(outcome.json()?["id"].as_str().context("the snapshot's name")?.to_owned())
    }

    /// Waits until every location has all WAL that the server has written up to now; its end.
    pub async fn all_stored(&mut self) -> Result<Lsn> {
        all_stored(&mut self.agent, &self.cluster).await
    }

    /// An agent of another server of the cluster, with the site's key and locations.
    pub async fn deploy(&self, name: &str, server: &Cluster) -> Result<Deployment> {
        let configuration = self.configuration.clone().server(server).agent(name);
        Deployment::new(self.scene, name, &configuration.key(self.deployment.key())).await
    }

    /// Waits until the two folders hold the same objects, byte for byte.
    pub async fn locations_equal(&self) -> Result<()> {
        folder::wait_until_equal(&self.location("near"), &self.location("far"), PATIENCE).await
    }

    pub fn location(&self, name: &str) -> PathBuf {
        self.scene.path(name)
    }

    pub fn major(&self) -> &Major {
        self.cluster.major()
    }

    /// `backstay plan --to TARGET --json`.
    pub async fn plan(&self, to: &str) -> Result<Value> {
        self.deployment.backstay(&["plan", "--to", to, "--json"]).await?.success()?.json()
    }

    /// Waits until `backstay ledger` tells of such an event, in these words.
    pub async fn told(&self, event: &str, words: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let told = self.deployment.backstay(&["ledger", "--json"]).await?.success()?.json()?;
            let entries = told["entries"].as_array().context("entries")?;
            let is_it =
                |entry: &&Value| entry["event"] == event && entry.to_string().contains(words);
            if entries.iter().find(is_it).is_some() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "no {event} of {words:?} in the ledger: {told}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Restores beside the original, and starts it with `--start`.
    pub async fn restore_and_start(
        &self,
        name: &str,
        to: &str,
        more: &[&str],
    ) -> Result<(Cluster, Finished)> {
        restore_and_start(self.scene, &self.deployment, self.major(), name, to, more).await
    }

    /// Restores beside the original without `--start`, then starts it as anybody would.
    pub async fn restore_then_start(
        &self,
        name: &str,
        to: &str,
        more: &[&str],
    ) -> Result<(Cluster, Finished)> {
        let dir = self.scene.path(name);
        let finished = restore(&self.deployment, &dir, to, more).await?.success()?;
        let mut restored = Cluster::of(self.scene, self.major(), &dir)?;
        restored.start().await?;
        restored.wait_until_writable(PATIENCE).await?;
        recovery_left_nothing(&dir)?;
        Ok((restored, finished))
    }

    /// The restored server is in the state that the target asks for, and its files are sound.
    pub async fn judge(&self, restored: &Cluster, target: &Target) -> Result<Lsn> {
        judge(&self.ledger, restored, target).await
    }
}

/// The cluster is open: the settings of its recovery are gone, and so are the WAL in the clear and the program.
pub fn recovery_left_nothing(dir: &Path) -> Result<()> {
    let settings = std::fs::read_to_string(dir.join("postgresql.auto.conf"))?;
    ensure!(settings.contains("archive_mode = 'off'"), "the safety block is gone: {settings}");
    for stale in ["recovery_", "restore_command", "archive_cleanup_command", "backstay recovery"] {
        ensure!(!settings.contains(stale), "{stale} is left in postgresql.auto.conf: {settings}");
    }
    for stale in ["wal", "histories", "backstay"] {
        let path = dir.join("backstay-restore").join(stale);
        ensure!(!path.exists(), "{} is left", path.display());
    }
    Ok(())
}

/// The restored server is in the state that the target asks for, and its files are sound. Says where its
/// newest commit begins, at the latest.
pub async fn judge(ledger: &Ledger, restored: &Cluster, target: &Target) -> Result<Lsn> {
    let session: Session = restored.connect().await?;
    let report = ledger.check(&session, target).await?;
    ensure!(report.present > 0, "nothing was restored");
    check_all(restored).await?;
    Ok(report.newest)
}

/// `backstay restore --to TARGET --into DIR MORE`.
pub async fn restore(
    deployment: &Deployment,
    dir: &Path,
    to: &str,
    more: &[&str],
) -> Result<Finished> {
    let dir = dir.display().to_string();
    let args: Vec<&str> =
        ["restore", "--to", to, "--into", &dir].into_iter().chain(more.iter().copied()).collect();
    deployment.backstay(&args).await
}

/// `backstay restore --start`, and the server that then runs.
pub async fn restore_and_start(
    scene: &Scene,
    deployment: &Deployment,
    major: &Major,
    name: &str,
    to: &str,
    more: &[&str],
) -> Result<(Cluster, Finished)> {
    let dir = scene.path(name);
    let port = Cluster::of(scene, major, &dir)?.port().to_string();
    let bin = major.bin().display().to_string();
    let args = ["--start", "--port", &port, "--pg-bin", &bin];
    let args: Vec<&str> = args.into_iter().chain(more.iter().copied()).collect();
    let finished = restore(deployment, &dir, to, &args).await?.success()?;
    let restored = Cluster::attach(scene, major, &dir)?;
    let in_recovery = restored.value("SELECT pg_is_in_recovery()").await?;
    ensure!(in_recovery == "f", "restore --start ended before the server took writes");
    Ok((restored, finished))
}

/// A snapshot is committed, and none is being taken.
pub fn has_snapshot(status: &Value) -> bool {
    status["snapshots"]["last"].is_string() && status["snapshots"]["running"].is_null()
}

/// Waits until every location has all that this server has written up to now; its end.
pub async fn all_stored(agent: &mut Agent, server: &Cluster) -> Result<Lsn> {
    let end = server.flushed().await?;
    let reached = |status: &Value| stored(status).is_ok_and(|s| s.iter().all(|lsn| *lsn >= end));
    agent.wait_until(&format!("{end} is stored everywhere"), PATIENCE, reached).await?;
    Ok(end)
}

/// How far the server has been told that it need not keep its WAL.
pub fn acknowledged(status: &Value) -> Option<Lsn> {
    status["wal"]["acknowledged"].as_str()?.parse().ok()
}

/// How far each location's WAL reaches, in the order of the configuration.
pub fn stored(status: &Value) -> Result<Vec<Lsn>> {
    let locations = status["wal"]["locations"].as_array().context("status has no locations")?;
    let position = |location: &Value| {
        let text = location["stored"].as_str().context("a location without a position")?;
        text.parse().map_err(|_| anyhow::anyhow!("not a position: {text}"))
    };
    locations.iter().map(position).collect()
}
