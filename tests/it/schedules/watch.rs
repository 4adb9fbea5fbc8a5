//! What the agents acknowledged, seen from outside while it happens: by their own status, and by what the servers were told.
//!
//! Both are sampled, so what is noted here is at most what was really acknowledged: a promise that must be kept.

use super::draw::LOCATIONS;
use anyhow::{Context, Result};
use backstay_common::id::Branch;
use backstay_common::lsn::Lsn;
use backstay_tests::postgres::{Address, Session};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

const EVERY: Duration = Duration::from_millis(40);
/// A hung server or agent is asked again after this.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How far the server was told by agents, not by standbys.
const TOLD: &str = "SELECT max(r.flush_lsn) FROM pg_stat_replication r
     JOIN pg_replication_slots s ON s.active_pid = r.pid WHERE s.slot_name ~ '^backstay_'";

/// What is promised of one branch.
#[derive(Clone, Debug, Default)]
pub struct Promise {
    pub acknowledged: Lsn,
    /// The numbers of the locations that had it by then, says the agent.
    pub counted: BTreeSet<usize>,
}

/// Samples until it is dropped.
#[derive(Debug)]
pub struct Watch {
    promises: Arc<Mutex<BTreeMap<Branch, Promise>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Of the agents with these state directories, dead or alive.
    pub fn start(state_dirs: Vec<PathBuf>) -> Watch {
        let promises = Arc::<Mutex<BTreeMap<Branch, Promise>>>::default();
        let watch = |dir: PathBuf| {
            let promises = promises.clone();
            tokio::spawn(async move {
                loop {
                    let asked = tokio::time::timeout(ANSWER_WITHIN, status(&dir)).await;
                    if let Ok(Ok(status)) = asked
                        && let Some((branch, promise)) = promise(&status)
                    {
                        note(&mut lock(&promises), branch, promise);
                    }
                    tokio::time::sleep(EVERY).await;
                }
            })
        };
        let tasks = state_dirs.into_iter().map(watch).collect();
        Watch { promises, tasks }
    }

    /// All that was promised until now.
    pub fn promises(&self) -> BTreeMap<Branch, Promise> {
        lock(&self.promises).clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note(promises: &mut BTreeMap<Branch, Promise>, branch: Branch, new: Promise) {
    let known = promises.entry(branch).or_default();
    match new.acknowledged.cmp(&known.acknowledged) {
        std::cmp::Ordering::Less => {}
        std::cmp::Ordering::Equal => known.counted.extend(new.counted),
        std::cmp::Ordering::Greater => *known = new,
    }
}

/// Asks a running agent through its socket, as `status` does.
async fn status(state_dir: &Path) -> Result<Value> {
    let mut stream = UnixStream::connect(state_dir.join("agent.sock")).await?;
    stream.write_all(b"{\"verb\":\"status\"}\n").await?;
    let line = BufReader::new(stream).lines().next_line().await?.context("no answer")?;
    Ok(serde_json::from_str::<Value>(&line)?["status"].take())
}

fn promise(status: &Value) -> Option<(Branch, Promise)> {
    let wal = &status["wal"];
    let position = |value: &Value| value.as_str()?.parse::<Lsn>().ok();
    let branch = wal["branch"].as_str()?.parse().ok()?;
    let acknowledged = position(&wal["acknowledged"]).filter(|lsn| lsn.is_valid())?;
    let locations = wal["locations"].as_array()?;
    let has = |n: &usize| {
        locations.get(*n).and_then(|l| position(&l["stored"])).is_some_and(|s| s >= acknowledged)
    };
    Some((branch, Promise { acknowledged, counted: (0..LOCATIONS).filter(has).collect() }))
}

/// How far one server was told that its WAL is safe. Sampled while it reigns, and until this is dropped.
#[derive(Debug, Default)]
pub struct Told {
    position: Arc<Mutex<Lsn>>,
    task: Option<JoinHandle<()>>,
}

impl Told {
    /// From now on, until [`Told::pause`].
    pub fn watch(&mut self, server: Address) {
        self.pause();
        let shared = self.position.clone();
        self.task = Some(tokio::spawn(async move {
            let mut session = None;
            loop {
                let asked = tokio::time::timeout(ANSWER_WITHIN, told(&server, &mut session)).await;
                match asked {
                    Ok(Ok(told)) => {
                        let mut most = lock(&shared);
                        *most = told.max(*most);
                    }
                    _ => session = None,
                }
                tokio::time::sleep(EVERY).await;
            }
        }));
    }

    /// Whoever answers there next is another.
    pub fn pause(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    /// The most that it was told so far; 0/0 for nothing.
    pub fn position(&self) -> Lsn {
        *lock(&self.position)
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.pause();
    }
}

async fn told(server: &Address, session: &mut Option<Session>) -> Result<Lsn> {
    let session = match session {
        Some(session) => session,
        None => session.insert(server.connect("postgres").await?),
    };
    Ok(session.value(TOLD).await?.parse().unwrap_or_default())
}
