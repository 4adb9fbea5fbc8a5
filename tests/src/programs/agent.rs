//! The agent, running.

use super::{Deployment, agent_program};
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long an agent may take until its socket answers.
const PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(100);
/// `status` ends with this while nobody answers.
const NO_AGENT: i32 = 9;
/// `status` ends with this if it answered, with alarms.
const ALARMS: i32 = 10;

/// `backstay-agent run` as a child of the test; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    deployment: Deployment,
    child: Child,
}

impl Agent {
    /// Starts it and waits until it answers. `init` must have been run.
    pub async fn start(deployment: &Deployment) -> Result<Agent> {
        let mut agent = Agent::spawn(deployment)?;
        agent.wait_until_it_answers().await?;
        Ok(agent)
    }

    /// Starts it without waiting, as for one that is expected to end by itself.
    pub fn spawn(deployment: &Deployment) -> Result<Agent> {
        let path = deployment.log_path();
        let log = std::fs::File::options().create(true).append(true).open(&path)?;
        let mut command = Command::new(agent_program());
        command.arg("--config").arg(deployment.config()).arg("run").stdin(Stdio::null());
        for (key, _) in
            std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("PG"))
        {
            command.env_remove(key);
        }
        command.envs(deployment.envs()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("start backstay-agent run")?;
        std::fs::write(deployment.pid_path(), child.id().to_string())?;
        Ok(Agent { deployment: deployment.clone(), child })
    }

    async fn wait_until_it_answers(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let finished = self.deployment.agent_command(&["status", "--json"]).await?;
            match finished.code {
                Some(0 | ALARMS) => return Ok(()),
                Some(NO_AGENT) => {}
                _ => return finished.success().map(|_| ()),
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the agent ended at its start: {status}\n{}", self.log());
            }
            ensure!(Instant::now() < deadline, "no answer from the agent after {PATIENCE:?}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// `status --json`.
    pub async fn status(&self) -> Result<Value> {
        let finished = self.deployment.agent_command(&["status", "--json"]).await?;
        match finished.code {
            Some(ALARMS) => finished.json(),
            _ => finished.success()?.json(),
        }
    }

    /// Asks for the status until it is as wanted, and returns that.
    pub async fn wait_until(
        &mut self,
        what: &str,
        patience: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + patience;
        loop {
            ensure!(self.is_running(), "the agent ended while waiting until {what}");
            let status = self.status().await?;
            if wanted(&status) {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "not within {patience:?}: {what}; status: {status}");
            tokio::time::sleep(POLL).await;
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, then its exit status.
    pub async fn terminate(&mut self, patience: Duration) -> Result<ExitStatus> {
        kill_process(self.pid(), Signal::TERM)?;
        self.wait(patience).await
    }

    /// SIGSTOP: a hung agent, whose connections stay open.
    pub fn freeze(&self) -> Result<()> {
        Ok(kill_process(self.pid(), Signal::STOP)?)
    }

    /// SIGCONT.
    pub fn thaw(&self) -> Result<()> {
        Ok(kill_process(self.pid(), Signal::CONT)?)
    }

    /// Waits until it ends by itself.
    pub async fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "the agent still runs after {patience:?}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Starts it again after it has ended, and waits until it answers.
    pub async fn restart(&mut self) -> Result<()> {
        ensure!(!self.is_running(), "the agent still runs");
        *self = Agent::start(&self.deployment).await?;
        Ok(())
    }

    /// The most memory that it has had in use so far, in bytes.
    pub fn memory_peak_bytes(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }

    /// All that it wrote, in all its lives.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.deployment.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.kill();
        }
        let _ = std::fs::remove_file(self.deployment.pid_path());
    }
}
