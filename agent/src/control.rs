//! The control socket: how `status`, `snapshot`, `prune`, `sync` and the verbs for pins talk to the running agent.
//!
//! `<state-dir>/agent.sock`, a Unix socket that only the agent's user may open. A client writes one request as a line of
//! JSON; the agent answers with lines of JSON, of which the last is `status`, `outcome`, `pruned`, `synced`, `pins` or `error`.

use crate::context::AgentContext;
use crate::keeper::{Asked, Keeper};
use crate::prune::pins::{self, PinOutcome, PinRequest};
use crate::prune::{PruneOptions, PruneReport};
use crate::snapshot::{SnapshotOutcome, SnapshotProgress};
use crate::status::Status;
use crate::sync::{self, Findings, SyncOptions, SyncReport};
use backstay_common::{Context, Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// A request is far shorter.
const REQUEST_BYTES_MAX: u64 = 4096;
/// How long a client may take to ask.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients served at the same time.
const CLIENTS_MAX: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", content = "with", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    Status,
    Snapshot,
    Prune(PruneOptions),
    Sync(SyncOptions),
    /// To hold a snapshot, to give it back, or to acknowledge damage.
    Pins(PinRequest),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    Status(Box<serde_json::Value>),
    Progress(SnapshotProgress),
    Outcome(SnapshotOutcome),
    Pruned(Box<PruneReport>),
    Synced(Box<SyncReport>),
    Pins(PinOutcome),
    Error { exit_code: u8, message: String, remedy: Option<String> },
}

impl Reply {
    fn of_error(error: &Error) -> Reply {
        Reply::Error {
            exit_code: error.kind().exit_code(),
            message: error.message().to_string(),
            remedy: error.remedy_text().map(str::to_string),
        }
    }
}

pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("agent.sock")
}

/// Opens the socket; what a dead agent left there is removed. The caller holds the state directory's lock.
pub fn listen(state_dir: &Path) -> Result<UnixListener> {
    let path = socket_path(state_dir);
    let doing = || format!("open the control socket {}", path.display());
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context(doing());
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).context(doing())?;
    let only_us = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&path, only_us).context(doing())?;
    Ok(listener)
}

/// Answers clients until `stop`.
pub async fn serve(
    listener: UnixListener,
    status: Arc<dyn Fn() -> Status + Send + Sync>,
    keeper: Keeper,
    context: Arc<AgentContext>,
) -> Result<()> {
    let stop = context.stop.clone();
    let places = Arc::new(tokio::sync::Semaphore::new(CLIENTS_MAX));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        let (Ok((stream, _)), Ok(place)) = (accepted, places.clone().try_acquire_owned()) else {
            continue;
        };
        let (status, keeper, stop) = (status.clone(), keeper.clone(), stop.clone());
        let context = context.clone();
        tokio::spawn(async move {
            let _place = place;
            // A client that goes away ends its own conversation and nothing else.
            tokio::select! {
                () = stop.cancelled() => {}
                _ = answer(stream, &*status, keeper, &context) => {}
            }
        });
    }
}

async fn answer(
    stream: UnixStream,
    status: &(dyn Fn() -> Status + Send + Sync),
    keeper: Keeper,
    context: &AgentContext,
) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(read.take(REQUEST_BYTES_MAX));
    tokio::time::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await??;
    match serde_json::from_str(&line) {
        Err(error) => {
            let error =
                Error::new(Kind::Config, format!("the agent does not know the request: {error}"))
                    .remedy("use a backstay-agent of the agent's version");
            send(&mut write, &Reply::of_error(&error)).await
        }
        Ok(Request::Status) => {
            let status = serde_json::to_value(status()).map_err(std::io::Error::other)?;
            send(&mut write, &Reply::Status(Box::new(status))).await
        }
        Ok(Request::Snapshot) => snapshot(&mut write, keeper).await,
        Ok(Request::Prune(options)) => {
            let report = match options.dry_run {
                // Changes nothing, and need not wait for a snapshot to end.
                true => keeper.prune_dry_run(options).await,
                false => keeper.prune(options).await,
            };
            let reply = report.map_or_else(|e| Reply::of_error(&e), |r| Reply::Pruned(Box::new(r)));
            send(&mut write, &reply).await
        }
        Ok(Request::Sync(options)) => {
            let report = synchronise(context, &keeper, options).await;
            let reply = report.map_or_else(|e| Reply::of_error(&e), |r| Reply::Synced(Box::new(r)));
            send(&mut write, &reply).await
        }
        Ok(Request::Pins(request)) => {
            let outcome = pins::run(context, request).await;
            send(&mut write, &outcome.map_or_else(|e| Reply::of_error(&e), Reply::Pins)).await
        }
    }
}

/// Everything is read before the keeper is asked: that takes long, and snapshots go on meanwhile.
async fn synchronise(
    context: &AgentContext,
    keeper: &Keeper,
    options: SyncOptions,
) -> Result<SyncReport> {
    if options.check {
        return sync::check(context, options.deep).await;
    }
    let mut unread = SyncReport::default();
    let findings = match options.deep {
        true => sync::inspect(context, &mut unread).await?,
        false => Findings::new(),
    };
    let mut report = keeper.synchronise(options.deep, findings).await?;
    report.not_read(unread);
    Ok(report)
}

async fn snapshot(
    write: &mut tokio::net::unix::OwnedWriteHalf,
    keeper: Keeper,
) -> std::io::Result<()> {
    let Asked { mut progress, mut outcome } = match keeper.ask().await {
        Ok(asked) => asked,
        Err(error) => return send(write, &Reply::of_error(&error)).await,
    };
    let reply = loop {
        tokio::select! {
            outcome = &mut outcome => break match outcome {
                Ok(Ok(outcome)) => Reply::Outcome(outcome),
                Ok(Err(error)) => Reply::of_error(&error),
                Err(_) => Reply::of_error(&Error::new(Kind::Cancelled, "the agent is stopping")),
            },
            changed = progress.changed() => {
                let now = progress.borrow_and_update().clone();
                if changed.is_ok() {
                    send(write, &Reply::Progress(now)).await?;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    send(write, &reply).await
}

async fn send(write: &mut tokio::net::unix::OwnedWriteHalf, reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply).map_err(std::io::Error::other)?;
    line.push(b'\n');
    write.write_all(&line).await
}

/// Asks the running agent. `progress` sees what precedes the last reply, which is returned.
pub async fn ask(
    state_dir: &Path,
    request: Request,
    mut progress: impl FnMut(SnapshotProgress),
) -> Result<Reply> {
    let path = socket_path(state_dir);
    let nobody = |reason: std::io::Error| {
        Error::new(Kind::NoAgent, format!("no agent answers at {}: {reason}", path.display()))
            .remedy(
                "start it with `backstay-agent --config FILE run`, or ask as the user it runs as",
            )
    };
    let mut stream = UnixStream::connect(&path).await.map_err(nobody)?;
    let mut line = serde_json::to_vec(&request).map_err(|e| Error::new(Kind::Bug, e))?;
    line.push(b'\n');
    stream.write_all(&line).await.map_err(nobody)?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await.map_err(nobody)? {
        let reply = serde_json::from_str(&line);
        match reply.map_err(|e| Error::new(Kind::NoAgent, format!("the agent's answer: {e}")))? {
            Reply::Progress(now) => progress(now),
            last => return Ok(last),
        }
    }
    Err(nobody(std::io::ErrorKind::UnexpectedEof.into()))
}
