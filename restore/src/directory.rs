//! The target directory: may it be used, and what is done to what is in it.
//!
//! What always holds: nothing that is there is deleted, unless an unfinished restore of the same cluster left it or the
//! operator has asked to restore over this very cluster (`--delta`); a running cluster's directory is never touched. While a restore runs, `backstay-restore/incomplete` says so, and a lock on
//! `backstay-restore/lock` is held; the mark is the first thing written and the last removed.

use crate::layout::TABLESPACES;
use crate::materialize::Existing;
use crate::owner::Owner;
use crate::running::{answers_at, running_server};
use backstay_common::id::{ClusterName, SnapshotId, SystemId};
use backstay_common::{Context, Error, Kind, Result, control};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a restore keeps for itself in the target directory.
pub const OURS: &str = "backstay-restore";
const MARK: &str = "incomplete";
const LOCK: &str = "lock";

/// Whose unfinished restore this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub cluster: ClusterName,
    pub system: SystemId,
    pub snapshot: SnapshotId,
    pub target: String,
    /// Tablespace directories outside the target directory.
    pub outside: Vec<PathBuf>,
    /// True if it goes over a cluster, of which only PostgreSQL's own files may be changed and removed.
    #[serde(default)]
    pub delta: bool,
}

/// What is at the place where a restore shall go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    EmptyDirectory,
    /// An unfinished restore of the same cluster.
    Unfinished(Mark),
    /// The cluster itself, to be restored over; and where its tablespaces are that lie outside.
    SameCluster(BTreeMap<u32, PathBuf>),
    Occupied,
}

/// Looks, and refuses what may never be used: a file, a running cluster, the place of a running restore.
pub fn inspect(dir: &Path, cluster: &ClusterName, system: SystemId) -> Result<Found> {
    let doing = || format!("look at {}", dir.display());
    let refused =
        |reason: &str| Error::new(Kind::Config, format!("--into {}: {reason}", dir.display()));
    match std::fs::metadata(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error).context(doing()),
        Ok(found) if !found.is_dir() => {
            return Err(refused("it is not a directory")
                .remedy("give a directory that is empty or does not exist"));
        }
        Ok(_) => {}
    }
    if std::fs::read_dir(dir).context(doing())?.next().is_none() {
        return Ok(Found::EmptyDirectory);
    }
    let is_orphan = orphan(dir).is_some() && !is_locked(dir);
    if let Some(pid) = running_server(dir).filter(|_| !is_orphan) {
        return Err(refused(&format!("a PostgreSQL server (process {pid}) runs in it"))
            .remedy("stop that server first, or restore into another directory"));
    }
    if let Some(place) = answers_at(dir).filter(|_| running_server(dir).is_none()) {
        let reason = format!(
            "it has a postmaster.pid whose process is not to be seen from here, and a server answers at {place}"
        );
        return Err(refused(&reason).remedy(format!(
            "stop the server of this directory, wherever it runs; if it is another that answers, remove {}/postmaster.pid",
            dir.display()
        )));
    }
    let text = std::fs::read(dir.join(OURS).join(MARK));
    let mark = text.ok().and_then(|text| serde_json::from_slice::<Mark>(&text).ok());
    match mark {
        Some(mark) if is_locked(dir) => {
            let reason = format!("a restore of {} into it is running", mark.cluster.as_str());
            Err(refused(&reason).remedy("wait for it, or restore into another directory"))
        }
        Some(mark) if mark.cluster == *cluster && mark.system == system => {
            Ok(Found::Unfinished(mark))
        }
        _ => Ok(Found::Occupied),
    }
}

/// For `--delta`: what is there must be the data directory of this very cluster, and one that can be restored over.
pub fn recognise(dir: &Path, system: SystemId) -> Result<Found> {
    let refused = |reason: String| {
        Error::new(Kind::Config, format!("--into {} with --delta: {reason}", dir.display()))
    };
    let another = "give the data directory of this cluster, or restore without --delta into another directory";
    let control = control::read(&dir.join("global/pg_control")).map_err(|error| {
        refused(format!("it is no data directory of PostgreSQL: {}", error.message()))
            .remedy(another)
    })?;
    if control.system != system {
        let reason = format!(
            "it is the data directory of another cluster, with the system identifier {} and not {system}",
            control.system
        );
        return Err(refused(reason).remedy(another));
    }
    for entry in std::fs::read_dir(dir).context(format!("read {}", dir.display()))?.flatten() {
        let name = entry.file_name();
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let is_data = DATA_FOLDERS.iter().any(|folder| *folder == name);
        if is_link && is_data {
            let reason = format!("{} is a symbolic link", name.display());
            return Err(refused(reason)
                .remedy("put the folder itself in its place, or restore into another directory"));
        }
    }
    Ok(Found::SameCluster(tablespaces_outside(dir)?))
}

/// What holds data of its own; of `pg_wal` alone a restore accepts a link to another disk.
const DATA_FOLDERS: [&str; 9] = [
    "base",
    "global",
    "pg_commit_ts",
    "pg_logical",
    "pg_multixact",
    "pg_replslot",
    "pg_tblspc",
    "pg_twophase",
    "pg_xact",
];

/// The tablespaces of a data directory that do not lie below it, by OID.
fn tablespaces_outside(dir: &Path) -> Result<BTreeMap<u32, PathBuf>> {
    let mut outside = BTreeMap::new();
    let folder = dir.join("pg_tblspc");
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(outside),
        entries => entries.context(format!("read {}", folder.display()))?,
    };
    for entry in entries.flatten() {
        let oid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let place = std::fs::read_link(entry.path());
        if let (Some(oid), Ok(place)) = (oid, place)
            && !place.starts_with(dir)
        {
            outside.insert(oid, place);
        }
    }
    Ok(outside)
}

/// How the private sockets of a replaying server's folder begin.
pub const PRIVATE_SOCKETS: &str = "/tmp/backstay-";
/// How long a server that a killed restore left behind may take to stop.
const ORPHAN_TIME_MAX: Duration = Duration::from_secs(120);

/// The private server of a restore, if one runs here: nobody else can reach it.
fn orphan(dir: &Path) -> Option<i32> {
    let text = std::fs::read_to_string(dir.join("postmaster.pid")).ok()?;
    let is_private = text.lines().nth(4).is_some_and(|line| line.starts_with(PRIVATE_SOCKETS));
    running_server(dir).filter(|_| is_private && dir.join(OURS).join(MARK).exists())
}

/// Stops the private server that a killed restore left behind.
fn stop_orphan(dir: &Path) -> Result<()> {
    let Some(pid) = orphan(dir) else { return Ok(()) };
    tracing::warn!(pid, "stopping the server that an interrupted restore left behind");
    let process = Pid::from_raw(pid).ok_or_else(|| Error::new(Kind::Bug, "process 0"))?;
    let doing = || format!("stop process {pid}, the server of an interrupted restore");
    rustix::process::kill_process(process, Signal::INT)
        .map_err(std::io::Error::from)
        .context(doing())?;
    let begun = Instant::now();
    while running_server(dir).is_some() {
        if begun.elapsed() > ORPHAN_TIME_MAX {
            return Err(Error::new(Kind::Local, "it does not stop").context(doing()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn is_locked(dir: &Path) -> bool {
    let Ok(lock) = File::open(dir.join(OURS).join(LOCK)) else { return false };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
}

/// True while the restore that fills the spool `ours` runs.
pub fn is_being_restored(ours: &Path) -> bool {
    ours.parent().is_some_and(is_locked)
}

/// The target directory, ours until this is dropped.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
    /// Whose files are in it.
    pub existing: Existing,
    /// Where the directory that was there has gone.
    pub moved_to: Option<PathBuf>,
    _lock: File,
}

/// Refuses what [`claim`] would refuse, before anything is touched.
pub fn check(dir: &Path, found: &Found, force: bool) -> Result<()> {
    if *found == Found::Occupied && !force {
        let text = format!("--into {}: the directory is not empty", dir.display());
        return Err(Error::new(Kind::Config, text).remedy(
            "choose another directory, or give --force to move this one aside (nothing is deleted), or --delta to restore over it \
             if it is this cluster's own",
        ));
    }
    Ok(())
}

/// Tablespace directories outside must be empty, or left by the restore that is taken up again, or those of the cluster
/// that is restored over.
pub fn check_outside<'a>(places: impl Iterator<Item = &'a PathBuf>, found: &Found) -> Result<()> {
    let left: Vec<&PathBuf> = match found {
        Found::Unfinished(mark) => mark.outside.iter().collect(),
        Found::SameCluster(outside) => outside.values().collect(),
        _ => Vec::new(),
    };
    for place in places.filter(|place| !left.contains(place)) {
        let empty = match std::fs::read_dir(place) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        };
        if !empty {
            let text =
                format!("tablespace directory {} is not an empty directory", place.display());
            return Err(Error::new(Kind::Config, text)
                .remedy("map the tablespace to an empty or new directory"));
        }
    }
    Ok(())
}

/// Makes the directory ours: made, moved aside or taken up again, locked and marked.
pub fn claim(dir: &Path, found: Found, force: bool, owner: Owner, mark: &Mark) -> Result<Claim> {
    check(dir, &found, force)?;
    if matches!(found, Found::Unfinished(_)) {
        stop_orphan(dir)?;
    }
    let existing = match found {
        Found::Unfinished(Mark { delta: false, .. }) => Existing::Unfinished,
        Found::Unfinished(_) | Found::SameCluster(_) => Existing::Cluster,
        _ => Existing::Nothing,
    };
    let moved_to = match found {
        Found::Occupied => Some(move_aside(dir)?),
        _ => None,
    };
    make_directory(dir, owner)?;
    let ours = dir.join(OURS);
    make_directory(&ours, owner)?;
    let doing = || format!("lock {}", ours.display());
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(ours.join(LOCK))
        .context(doing())?;
    owner.take(&ours.join(LOCK))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Error::new(Kind::Config, format!("another restore into {} is running", dir.display()))
            .remedy("wait for it, or restore into another directory")
    })?;
    let text = serde_json::to_vec_pretty(mark).map_err(|e| Error::new(Kind::Bug, e))?;
    write_durably(&ours.join(MARK), &text, owner)?;
    // The mark itself is found only if the folder is.
    sync_directory(dir)?;
    Ok(Claim { dir: dir.into(), existing, moved_to, _lock: lock })
}

impl Claim {
    /// Our own folder in the target directory.
    pub fn ours(&self) -> PathBuf {
        self.dir.join(OURS)
    }

    /// Takes the mark away, durably: the restore is complete.
    pub fn complete(&self) -> Result<()> {
        let mark = self.ours().join(MARK);
        std::fs::remove_file(&mark).context(format!("remove {}", mark.display()))?;
        sync_directory(&self.ours())
    }
}

/// A directory that only its owner may enter. One that is there is kept, and its mode corrected.
pub fn make_directory(path: &Path, owner: Owner) -> Result<()> {
    let doing = || format!("make directory {}", path.display());
    let is_new = !path.is_dir();
    if let Some(parent) = path.parent().filter(|parent| is_new && !parent.is_dir()) {
        std::fs::create_dir_all(parent).context(doing())?;
    }
    if is_new {
        std::fs::DirBuilder::new().mode(0o700).create(path).context(doing())?;
    }
    owner.take(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).context(doing())
}

/// Renames the directory, and points the links to its own tablespaces at their new place, so that what is started there
/// never writes into the restored cluster.
fn move_aside(dir: &Path) -> Result<PathBuf> {
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let name = dir
        .file_name()
        .ok_or_else(|| Error::new(Kind::Config, format!("--into {} has no name", dir.display())))?;
    let aside = dir.with_file_name(format!("{}.before-{now}", name.to_string_lossy()));
    let doing = || format!("move {} aside to {}", dir.display(), aside.display());
    if aside.exists() {
        return Err(Error::new(Kind::Local, "that name is taken").context(doing()));
    }
    std::fs::rename(dir, &aside).map_err(|error| {
        Error::new(Kind::Local, error)
            .context(doing())
            .remedy("if it is a mount point, restore into a new directory below it")
    })?;
    for oid in std::fs::read_dir(aside.join("pg_tblspc")).into_iter().flatten().flatten() {
        let link = oid.path();
        if let Ok(Ok(rest)) = std::fs::read_link(&link)
            .map(|to| to.strip_prefix(dir.join(TABLESPACES)).map(Path::to_path_buf))
        {
            std::fs::remove_file(&link).context(doing())?;
            std::os::unix::fs::symlink(aside.join(TABLESPACES).join(rest), &link)
                .context(doing())?;
        }
    }
    Ok(aside)
}

/// Refuses if the file system of `dir` has less room than `needed` bytes.
pub fn check_room(dir: &Path, needed: u64) -> Result<()> {
    let place = dir.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(place)
        .map_err(std::io::Error::from)
        .context(format!("ask for the room at {}", place.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < needed {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let text = format!(
            "{} has {:.2} GiB free; the restore needs {:.2} GiB",
            place.display(),
            gib(free),
            gib(needed)
        );
        return Err(Error::new(Kind::Local, text)
            .remedy("free some room, or give a directory on a larger disk"));
    }
    Ok(())
}

/// Writes a small file whole or not at all.
pub fn write_durably(path: &Path, content: &[u8], owner: Owner) -> Result<()> {
    let doing = || format!("write {}", path.display());
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, content).context(doing())?;
    owner.take(&temporary)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600)).context(doing())?;
    File::open(&temporary).and_then(|file| file.sync_all()).context(doing())?;
    std::fs::rename(&temporary, path).context(doing())?;
    path.parent().map_or(Ok(()), sync_directory)
}

pub fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).context(format!("sync {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(cluster: &str) -> Mark {
        Mark {
            cluster: cluster.parse().unwrap(),
            system: SystemId::new(7),
            snapshot: "20261122T020000Z-1f2e3d4c".parse().unwrap(),
            target: "latest".into(),
            outside: Vec::new(),
            delta: false,
        }
    }

    fn look(dir: &Path) -> Result<Found> {
        inspect(dir, &mark("orders").cluster, SystemId::new(7))
    }

    #[test]
    fn absent_and_empty_directories_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let owner = Owner::of_process();
        for dir in [folder.path().join("deep/new"), folder.path().join("empty")] {
            if dir.ends_with("empty") {
                std::fs::create_dir(&dir).unwrap();
            }
            let found = look(&dir).unwrap();
            let claim = claim(&dir, found, false, owner, &mark("orders")).unwrap();
            assert!(claim.existing == Existing::Nothing && claim.moved_to.is_none());
            assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
            assert!(
                look(&dir).unwrap_err().to_string().contains("is running"),
                "locked while claimed"
            );
        }
    }

    #[test]
    fn an_occupied_directory_is_refused_or_moved_aside_whole() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        let inside = dir.join(TABLESPACES).join("16385");
        std::fs::create_dir_all(&inside).unwrap();
        std::fs::create_dir(dir.join("pg_tblspc")).unwrap();
        std::os::unix::fs::symlink(&inside, dir.join("pg_tblspc/16385")).unwrap();
        std::fs::write(dir.join("precious"), b"x").unwrap();
        let owner = Owner::of_process();
        let refused = claim(&dir, look(&dir).unwrap(), false, owner, &mark("orders")).unwrap_err();
        assert!(refused.kind() == Kind::Config && refused.to_string().contains("--force"));
        let claim = claim(&dir, look(&dir).unwrap(), true, owner, &mark("orders")).unwrap();
        let aside = claim.moved_to.clone().unwrap();
        assert_eq!(std::fs::read(aside.join("precious")).unwrap(), b"x");
        assert!(std::fs::read_link(aside.join("pg_tblspc/16385")).unwrap().starts_with(&aside));
        assert!(!dir.join("precious").exists());
    }

    #[test]
    fn an_unfinished_restore_is_taken_up_only_for_its_cluster() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        let first =
            claim(&dir, look(&dir).unwrap(), false, Owner::of_process(), &mark("orders")).unwrap();
        std::fs::write(dir.join("PG_VERSION"), b"15\n").unwrap();
        drop(first);
        assert_eq!(look(&dir).unwrap(), Found::Unfinished(mark("orders")));
        assert_eq!(
            inspect(&dir, &mark("other").cluster, SystemId::new(7)).unwrap(),
            Found::Occupied
        );
        let again =
            claim(&dir, look(&dir).unwrap(), false, Owner::of_process(), &mark("orders")).unwrap();
        assert_eq!(again.existing, Existing::Unfinished);
        again.complete().unwrap();
        drop(again);
        assert_eq!(look(&dir).unwrap(), Found::Occupied, "complete: never overwritten");
    }

    #[test]
    fn a_running_cluster_is_refused_even_with_force() {
        let folder = tempfile::tempdir().unwrap();
        let mut sleeper = std::process::Command::new("/bin/sh");
        std::os::unix::process::CommandExt::arg0(&mut sleeper, "postgres");
        let script = "echo postgres > /proc/self/comm; read line";
        let mut child =
            sleeper.args(["-c", script]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid_file = folder.path().join("postmaster.pid");
        std::fs::write(&pid_file, format!("{}\n/data\n", child.id())).unwrap();
        let renamed = || {
            std::fs::read_to_string(format!("/proc/{}/comm", child.id()))
                .unwrap()
                .starts_with("postgres")
        };
        while !renamed() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(look(folder.path()).unwrap_err().to_string().contains("stop that server"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(
            look(folder.path()).unwrap(),
            Found::Occupied,
            "a stale pid file holds nothing up"
        );
    }

    #[test]
    fn a_server_that_cannot_be_seen_is_refused_where_it_answers() {
        let folder = tempfile::tempdir().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let text = format!("{}\n/data\n1\n{port}\n\n127.0.0.1\n", 1 << 30);
        std::fs::write(folder.path().join("postmaster.pid"), text).unwrap();
        let refused = look(folder.path()).unwrap_err();
        assert!(refused.to_string().contains(&format!("answers at 127.0.0.1:{port}")), "{refused}");
        assert!(refused.remedy_text().unwrap().contains("/postmaster.pid"));
        drop(listener);
        assert_eq!(look(folder.path()).unwrap(), Found::Occupied, "left by a crash");
    }

    #[test]
    fn room_is_checked() {
        assert!(check_room(Path::new("/tmp/not/yet/there"), 1).is_ok());
        assert_eq!(check_room(Path::new("/tmp"), u64::MAX).unwrap_err().kind(), Kind::Local);
    }

    #[test]
    fn outside_tablespaces_must_be_empty_or_left_by_us() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().to_path_buf();
        assert!(check_outside([&place].into_iter(), &Found::Nothing).is_ok());
        std::fs::write(place.join("x"), b"x").unwrap();
        assert!(check_outside([&place].into_iter(), &Found::Nothing).is_err());
        let left = Mark { outside: vec![place.clone()], ..mark("orders") };
        assert!(check_outside([&place].into_iter(), &Found::Unfinished(left)).is_ok());
    }
}
