//! Standbys: copies of a running server that follow it, and take over.

use super::{Cluster, POLL, SUPERUSER, run};
use crate::scene::Scene;
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

/// Folders whose content no copy may have ("src/backend/backup/basebackup.c").
const EMPTIED: &[&str] = &[
    "pg_wal",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
];
const LEFT_OUT: &[&str] = &["postmaster.pid", "postmaster.opts"];

impl Cluster {
    /// Makes a standby of this running server and starts it: a base backup, a slot of its own here, streaming.
    /// Tablespaces are not copied.
    pub async fn standby(&self, scene: &Scene, name: &str) -> Result<Cluster> {
        let slot = slot_of(name);
        let data = scene.folder(name)?;
        self.back_up(scene, &data, &slot).await?;
        let mut standby = Cluster::of(scene, &self.major, &data)?;
        standby.password.clone_from(&self.password);
        standby.follow(scene, self, &slot)?;
        standby.start().await?;
        Ok(standby)
    }

    /// Makes a slot for a standby, and a base backup of this running server in an empty folder.
    async fn back_up(&self, scene: &Scene, data: &Path, slot: &str) -> Result<()> {
        self.sql(&format!("SELECT pg_create_physical_replication_slot('{slot}', true)")).await?;
        let session = self.connect().await?;
        let (start, stop) = match self.major.number() {
            ..15 => ("pg_start_backup('standby', true, false)", "pg_stop_backup(false, false)"),
            _ => ("pg_backup_start('standby', true)", "pg_backup_stop(false)"),
        };
        session.value(&format!("SELECT {start}")).await?;
        copy_folder(scene, &self.data, data, Path::new(""))?;
        let label = session.value(&format!("SELECT labelfile FROM {stop}")).await?;
        write(scene, &data.join("backup_label"), &label)
    }

    /// Lets the stopped server follow `primary`, through a slot that is there.
    pub fn follow(&self, scene: &Scene, primary: &Cluster, slot: &str) -> Result<()> {
        let mut text = String::new();
        let (host, port) = (primary.socket_dir.display(), primary.port);
        writeln!(
            text,
            "primary_conninfo = 'host={host} port={port} user={SUPERUSER} application_name={slot}'"
        )?;
        writeln!(text, "primary_slot_name = '{slot}'")?;
        write(scene, &self.data.join("postgresql.auto.conf"), &text)?;
        write(scene, &self.data.join("standby.signal"), "")
    }

    /// Makes the stopped server a standby of the one that took over from it, with `pg_rewind`, and starts it.
    pub async fn rewind(&mut self, scene: &Scene, from: &Cluster, name: &str) -> Result<()> {
        let slot = slot_of(name);
        from.sql(&format!("SELECT pg_create_physical_replication_slot('{slot}', true)")).await?;
        from.sql("CHECKPOINT").await?;
        let mut command = self.command("pg_rewind");
        command.arg("--target-pgdata").arg(&self.data).arg("--source-server").arg(from.conninfo());
        run(command, "pg_rewind")?;
        self.follow(scene, from, &slot)?;
        self.start().await
    }

    /// The same without `pg_rewind`: the stopped server loses all that it has, for a copy of the one that took over.
    pub async fn copy_anew(&mut self, scene: &Scene, from: &Cluster, name: &str) -> Result<()> {
        let slot = slot_of(name);
        self.destroy()?;
        let folder = self.data.file_name().context("a data directory has a name")?;
        scene.folder(&folder.to_string_lossy())?;
        from.back_up(scene, &self.data, &slot).await?;
        self.follow(scene, from, &slot)?;
        self.start().await
    }

    /// Cuts a standby off from its primary, and waits until it follows no more.
    pub async fn cut_off(&self, patience: Duration) -> Result<()> {
        self.sql("ALTER SYSTEM SET primary_conninfo = ''").await?;
        self.sql("SELECT pg_reload_conf()").await?;
        let deadline = Instant::now() + patience;
        while self.value("SELECT count(*) FROM pg_stat_wal_receiver").await? != "0" {
            ensure!(Instant::now() < deadline, "the standby still follows");
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Waits until the standby has replayed all that `primary` has written by now; that position.
    pub async fn catch_up(&self, primary: &Cluster, patience: Duration) -> Result<Lsn> {
        let end = primary.flushed().await?;
        let deadline = Instant::now() + patience;
        let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
        while self.value(&replayed).await? != "t" {
            ensure!(Instant::now() < deadline, "the standby has not replayed {end}");
            tokio::time::sleep(POLL).await;
        }
        Ok(end)
    }
}

fn slot_of(name: &str) -> String {
    format!("follows_{}", name.replace(['-', '.'], "_"))
}

fn write(scene: &Scene, path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    scene.give(path)
}

/// Files come and go meanwhile: replay makes up for it.
fn copy_folder(scene: &Scene, from: &Path, to: &Path, below: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from.join(below)).context("read the data directory")? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        let target = to.join(&path);
        if entry.file_type()?.is_dir() {
            std::fs::create_dir(&target)?;
            std::fs::set_permissions(&target, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
            scene.give(&target)?;
            match EMPTIED.iter().any(|emptied| Path::new(emptied) == path) {
                true if path == Path::new("pg_wal") => {
                    std::fs::create_dir(target.join("archive_status"))?;
                    scene.give(&target.join("archive_status"))?;
                }
                true => {}
                false => copy_folder(scene, from, to, &path)?,
            }
        } else if !LEFT_OUT.iter().any(|left_out| Path::new(left_out) == path) {
            match std::fs::copy(from.join(&path), &target) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                copied => {
                    copied.with_context(|| format!("copy {}", path.display()))?;
                    scene.give(&target)?;
                }
            }
        }
    }
    Ok(())
}
