//! Where one black-box test plays: its folder, its turn, its time limit and its randomness.
//!
//! Always holds: at most [`turns`] scenes play at once, so that servers don't starve each other on a small
//! machine; what a scene made is stopped and removed when it ends; if it fails, the ends of its
//! logs are printed. A test process that is killed leaves its folder: `scripts/test` clears that.

use crate::major::{Major, Majors};
use crate::random::{Random, seed};
use anyhow::{Context, Result, bail};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A scene that takes longer has failed.
const TIME_LIMIT: Duration = Duration::from_secs(900);

/// The same where every case is to run, and some scenes do much more.
const TIME_LIMIT_FULL: Duration = Duration::from_secs(1200);

/// How much of each log is printed when a scene fails.
const LOG_TAIL_LINES: usize = 60;

/// Owner of the servers' files: PostgreSQL refuses to run as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerUser {
    pub uid: u32,
    pub gid: u32,
}

impl ServerUser {
    /// `postgres`, else `backstay-test`, when called as root; nobody in particular otherwise.
    pub fn get() -> Result<Option<ServerUser>> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let users = std::fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
        ["postgres", "backstay-test"]
            .iter()
            .find_map(|name| find_user(&users, name))
            .map(Some)
            .context("root needs a user to run PostgreSQL as: scripts/lib/postgres makes one")
    }
}

fn find_user(users: &str, name: &str) -> Option<ServerUser> {
    let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    Some(ServerUser { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
}

/// One test's own surroundings.
#[derive(Debug)]
pub struct Scene {
    name: String,
    dir: PathBuf,
    user: Option<ServerUser>,
    logs: Mutex<Vec<PathBuf>>,
}

impl Scene {
    /// The scene's folder, short enough for socket paths; everybody may enter it, the server's user owns it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in the folder. Nothing is made.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes a folder that belongs to the server's user alone (a tablespace, a socket folder).
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
        self.give(&path)?;
        Ok(path)
    }

    /// Makes the server's user the owner of one file or folder.
    pub fn give(&self, path: &Path) -> Result<()> {
        if let Some(user) = self.user {
            chown(path, Some(user.uid), Some(user.gid))
                .with_context(|| format!("give {} to the server's user", path.display()))?;
        }
        Ok(())
    }

    /// Whom servers run as; `None`: as whoever runs the test.
    pub fn user(&self) -> Option<ServerUser> {
        self.user
    }

    /// The same numbers for the same seed and test.
    pub fn random(&self) -> Random {
        Random::of(&self.name)
    }

    /// Prints the end of this file if the scene fails.
    pub fn show_on_failure(&self, log: &Path) {
        let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        if !logs.iter().any(|known| known == log) {
            logs.push(log.to_owned());
        }
    }

    fn make(name: &str) -> Result<Scene> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let base =
            std::env::var_os("BACKSTAY_TMP").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = base.join(format!("bst{}-{number}", std::process::id()));
        std::fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755))?;
        let scene =
            Scene { name: name.to_owned(), dir, user: ServerUser::get()?, logs: Mutex::default() };
        scene.give(&scene.dir)?;
        Ok(scene)
    }

    fn print_logs(&self) {
        eprintln!("--- {} failed; seed {}", self.name, seed());
        for log in self.logs.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let text =
                String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let skipped = lines.len().saturating_sub(LOG_TAIL_LINES);
            eprintln!("--- {} (without the first {skipped} lines)", log.display());
            lines[skipped..].iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        if std::env::var_os("BACKSTAY_KEEP").is_some() {
            eprintln!("--- {} kept in {}", self.name, self.dir.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("--- {} stays: {error}", self.dir.display());
        }
    }
}

/// Plays one test. `name` tells its randomness from that of others.
///
/// # Panics
/// If the test fails or takes longer than fifteen minutes.
pub fn play(name: &str, test: impl AsyncFnOnce(&Scene) -> Result<()>) {
    let _turn = Turn::wait();
    let scene = Scene::make(name).expect("a folder for the scene");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime for the scene");
    let limit = if full() { TIME_LIMIT_FULL } else { TIME_LIMIT };
    let outcome = runtime.block_on(async {
        match tokio::time::timeout(limit, test(&scene)).await {
            Ok(outcome) => outcome,
            Err(_) => bail!("took longer than {limit:?}"),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    if let Err(error) = outcome {
        panic!("{name}: {error:#}");
    }
}

/// Plays a test on one major, if it is here. What [`on_each_major!`](crate::on_each_major) makes tests of.
pub fn play_on(name: &str, number: u32, test: impl AsyncFnOnce(&Scene, Major) -> Result<()>) {
    match Majors::get(number) {
        Some(major) => play(name, async |scene: &Scene| test(scene, major).await),
        None => eprintln!("{name}: left out, PostgreSQL {number} is not here"),
    }
}

/// Plays a test on one major that the seed draws; on all with `BACKSTAY_FULL`.
pub fn play_on_drawn(name: &str, test: impl AsyncFn(&Scene, Major) -> Result<()>) {
    let all = Majors::available();
    assert!(!all.is_empty(), "no PostgreSQL is here: run scripts/lib/postgres");
    let drawn = if full() { all.to_vec() } else { vec![Random::of(name).pick(all).clone()] };
    for major in drawn {
        play(&format!("{name}::pg{major}"), async |scene: &Scene| test(scene, major.clone()).await);
    }
}

/// Whether every case is to run, and not a drawn one.
pub fn full() -> bool {
    std::env::var_os("BACKSTAY_FULL").is_some_and(|value| !value.is_empty() && value != "0")
}

/// How many scenes play at once: `BACKSTAY_TURNS`, else two.
pub fn turns() -> usize {
    std::env::var("BACKSTAY_TURNS").ok().and_then(|text| text.parse().ok()).unwrap_or(2).max(1)
}

static PLAYING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

struct Turn;

impl Turn {
    fn wait() -> Turn {
        let playing = PLAYING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut playing = ENDED
            .wait_while(playing, |playing| *playing >= turns())
            .unwrap_or_else(PoisonError::into_inner);
        *playing += 1;
        Turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *PLAYING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ENDED.notify_one();
    }
}

/// Makes a module of tests, one for each major, of `async fn test(&Scene, Major) -> anyhow::Result<()>`.
#[macro_export]
macro_rules! on_each_major {
    ($test:ident) => {
        mod $test {
            $crate::on_each_major!(@ $test pg14 14, pg15 15, pg16 16, pg17 17, pg18 18);
        }
    };
    (@ $test:ident $($name:ident $number:literal),*) => {
        $(#[test]
        fn $name() {
            let name = concat!(stringify!($test), "::", stringify!($name));
            $crate::scene::play_on(name, $number, super::$test);
        })*
    };
}

/// Makes a module with one test of `async fn test(&Scene, Major)`, on a major that the seed draws.
#[macro_export]
macro_rules! on_drawn_major {
    ($test:ident) => {
        mod $test {
            #[test]
            fn drawn() {
                $crate::scene::play_on_drawn(stringify!($test), super::$test);
            }
        }
    };
}
