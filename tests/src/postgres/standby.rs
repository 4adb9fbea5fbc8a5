//! Standbys of a running server.

use super::{Cluster, SUPERUSER, run};
use crate::scene::Scene;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

/// How long a standby may take to replay what its primary has.
const PATIENCE: Duration = Duration::from_secs(60);

impl Cluster {
    /// Makes a hot standby of this running server, with `pg_basebackup` and a slot of its own, and starts it.
    pub async fn standby(&self, scene: &Scene, name: &str) -> Result<Cluster> {
        let data = scene.path(name);
        let mut command = self.command("pg_basebackup");
        command
            .args([
                "--checkpoint=fast",
                "--wal-method=stream",
                "--no-sync",
                "--write-recovery-conf",
            ])
            .args(["--create-slot", &format!("--slot={name}"), "--username", SUPERUSER])
            .arg("--host")
            .arg(self.socket_dir())
            .args(["--port", &self.port().to_string(), "--pgdata"])
            .arg(&data);
        run(command, format!("pg_basebackup of PostgreSQL {}", self.major()))?;
        let mut standby = Cluster::of(scene, self.major(), &data)?;
        standby.start().await?;
        ensure!(standby.value("SELECT pg_is_in_recovery()").await? == "t", "it is no standby");
        Ok(standby)
    }

    /// Waits until this standby has replayed all WAL that `primary` has written up to now.
    pub async fn wait_until_replayed(&self, primary: &Cluster) -> Result<()> {
        let end = primary.value("SELECT pg_current_wal_flush_lsn()").await?;
        let deadline = Instant::now() + PATIENCE;
        let query = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
        while self.value(&query).await? != "t" {
            ensure!(Instant::now() < deadline, "the standby has not replayed {end}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}
