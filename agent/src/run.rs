//! `run`: starts every long-lived task of the agent, and joins them.
//!
//! The first task that fails stops all others, and its error is how the program ends; a task that panics stops the
//! process loudly. SIGTERM and SIGINT stop everything cleanly: the spool is fsynced, and what waits in it is shipped
//! for a few seconds. What a kill leaves is described at each task.

use crate::alarms::Alarms;
use crate::connect::{self, Server};
use crate::context::AgentContext;
use crate::control;
use crate::durable;
use crate::epochs::Epochs;
use crate::indexer;
use crate::init::check_location;
use crate::keeper;
use crate::lease::Leasing;
use crate::ledger::Ledger;
use crate::prune::Systems;
use crate::schedule::Schedule;
use crate::status::{LocationRequests, Status};
use crate::synchronous;
use crate::wal::{self, WalStatus};
use crate::writer::Writer;
use backstay_common::config::{GRACE, Settings};
use backstay_common::id::SystemId;
use backstay_common::keys::Keyring;
use backstay_common::location::Location;
use backstay_common::segment::SegmentSize;
use backstay_common::{Context, Error, Kind, Result};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How long a store may take to show its `cluster` object before the agent starts without it.
const FIRST_LOOK: Duration = Duration::from_secs(10);

/// How long the tasks may take to end when the agent stops: longer than what waits in the spool is shipped for.
const STOP_PATIENCE: Duration = Duration::from_secs(15);

/// How long an agent that was killed may take to be gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Runs until a signal or a failure.
pub async fn run(settings: Settings) -> Result<()> {
    let stop = CancellationToken::new();
    stop_on_signals(stop.clone())?;
    let provider = settings.keys.provider()?;
    if settings.retention.grace < GRACE {
        tracing::warn!(
            "[retention] grace is below 24 h: a restore that is running may lose what it reads; this is for trials only"
        );
    }
    let schedule = Schedule::of(&settings.snapshot)?;
    let _lock = lock_state_dir(&settings).await?;
    let alarms = Arc::new(Alarms::default());
    let Some((server, is_recalled)) = find_server(&settings, &alarms, &stop).await? else {
        return Ok(());
    };

    let keyring = Arc::new(Keyring::new(provider, settings.cluster.clone()));
    let epochs = Arc::new(Epochs::new(keyring, server.system, &settings.state_dir)?);
    let mut writers = Vec::new();
    for location in &settings.locations {
        let location = Location::open(location)?;
        look_at(&location, &settings, server, &alarms).await?;
        let expected = (settings.cluster.clone(), server.system);
        writers.push(Arc::new(Writer::new(location, epochs.clone(), expected)));
    }
    if !is_recalled {
        // None of the locations is another cluster's.
        keep(&settings, server);
    }
    let listener = control::listen(&settings.state_dir)?;
    let ledger = Ledger::open(
        &settings.state_dir,
        server.system,
        settings.agent.clone(),
        settings.locations.len(),
    )?;
    let context = Arc::new(AgentContext {
        settings,
        system: server.system,
        server_version: server.version,
        segment_size: server.segment_size,
        writers,
        epochs,
        nobody_waits: Default::default(),
        is_asynchronous: Default::default(),
        is_recalled,
        alarms,
        ledger,
        systems: Systems::default(),
        strays: Default::default(),
        damage: Default::default(),
        stop: stop.clone(),
    });
    tracing::info!(agent = %context.settings.agent, system = %context.system, "agent started");
    let result = supervise(context.clone(), schedule, listener).await;
    let _ = std::fs::remove_file(control::socket_path(&context.settings.state_dir));
    tracing::info!("agent stopped");
    result
}

async fn supervise(
    context: Arc<AgentContext>,
    schedule: Schedule,
    listener: tokio::net::UnixListener,
) -> Result<()> {
    let leasing = Leasing::new(context.clone())?;
    let (wal_status, wal_seen) = watch::channel(WalStatus::default());
    let (keeper, keeper_task) =
        keeper::new(context.clone(), leasing.clone(), wal_seen.clone(), schedule);
    let indexing = indexer::run(context.clone(), leasing.clone(), wal_seen.clone());
    let status = {
        let (context, keeper, started) = (context.clone(), keeper.clone(), jiff::Timestamp::now());
        Arc::new(move || Status {
            agent: context.settings.agent.clone(),
            version: env!("CARGO_PKG_VERSION"),
            cluster: context.settings.cluster.clone(),
            system: context.system,
            started,
            wal: wal_seen.borrow().clone(),
            snapshots: keeper.status(),
            requests: requests(&context),
            alarms: context.alarms.list(),
        })
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(wal::run(context.clone(), leasing, wal_status));
    tasks.spawn(keeper_task.run());
    tasks.spawn(indexing);
    tasks.spawn(control::serve(listener, status, keeper, context.clone()));
    tasks.spawn(synchronous::watch(context.clone()));
    tasks.spawn(tell(context.clone()));

    let mut result = Ok(());
    let over = async {
        context.stop.cancelled().await;
        tokio::time::sleep(STOP_PATIENCE).await;
    };
    let mut over = std::pin::pin!(over);
    loop {
        let ended = tokio::select! {
            ended = tasks.join_next() => ended,
            () = &mut over => {
                let reason = "stopped, and not all has ended: a store or a disk does not answer";
                return result.and(Err(Error::new(Kind::Storage, reason)));
            }
        };
        let Some(ended) = ended else { break };
        let ended = ended.unwrap_or_else(|panic| {
            Err(Error::new(Kind::Bug, format!("a task of the agent panicked: {panic}")))
        });
        // The first failure is the cause; those that follow are its consequences.
        if result.is_ok() {
            result = ended;
        }
        context.stop.cancel();
    }
    result
}

/// Keeps the ledger.
async fn tell(context: Arc<AgentContext>) -> Result<()> {
    let AgentContext { ledger, writers, epochs, alarms, stop, .. } = &*context;
    tokio::select! {
        () = stop.cancelled() => {}
        () = ledger.tell(writers, epochs, alarms) => {}
    }
    Ok(())
}

/// What each location has been asked since the agent started, in the order of the config.
fn requests(context: &AgentContext) -> Vec<LocationRequests> {
    let of = |writer: &Arc<Writer>| LocationRequests {
        location: writer.location().name().clone(),
        requests: writer.location().requests(),
    };
    context.writers.iter().map(of).collect()
}

fn stop_on_signals(stop: CancellationToken) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
            _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
        }
        stop.cancel();
    });
    Ok(())
}

/// Held while the agent lives; the kernel releases it however the agent ends, though a moment after a kill.
async fn lock_state_dir(settings: &Settings) -> Result<File> {
    let path = settings.state_dir.join("agent.lock");
    let doing = || format!("lock the state directory {}", settings.state_dir.display());
    std::fs::create_dir_all(&settings.state_dir).context(doing())?;
    let file =
        File::options().create(true).truncate(false).write(true).open(&path).context(doing())?;
    let patience = std::time::Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::WouldBlock) if std::time::Instant::now() < patience => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(std::fs::TryLockError::WouldBlock) => {
                let reason = format!("another agent uses {}", settings.state_dir.display());
                return Err(Error::new(Kind::Config, reason)
                    .remedy("stop it first, or give this one a state-dir of its own"));
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(error).context(doing()),
        }
    }
}

/// Who the server is, and whether that is only recalled: one that is away, or refuses us, is taken for the one that was here last, and what
/// waits in the spool is stored all the same. `None` if the agent was stopped meanwhile.
async fn find_server(
    settings: &Settings,
    alarms: &Alarms,
    stop: &CancellationToken,
) -> Result<Option<(Server, bool)>> {
    let Some(known) = recall(settings) else {
        return Ok(wait_for_server(settings, alarms, stop).await?.map(|server| (server, false)));
    };
    let late = || Error::new(Kind::Postgres, "the server did not answer within 10 s");
    let asked = tokio::time::timeout(FIRST_LOOK, connect::identify(settings)).await;
    Ok(Some(match asked.unwrap_or_else(|_| Err(late())) {
        Ok(server) => (server, false),
        Err(error) => {
            alarms.raise("postgres-down", "", &error);
            (known, true)
        }
    }))
}

/// One line: system identifier, version number, bytes of a segment.
const REMEMBERED: &str = "server";

fn keep(settings: &Settings, server: Server) {
    let Server { system, version, segment_size } = server;
    let line = format!("{system} {version} {}\n", segment_size.bytes());
    let path = settings.state_dir.join(REMEMBERED);
    if recall(settings) != Some(server)
        && let Err(error) = durable::write(&path, line.as_bytes())
    {
        tracing::warn!("the server is not remembered in {}: {error}", path.display());
    }
}

/// `None` if there is no file that says it.
fn recall(settings: &Settings) -> Option<Server> {
    let text = std::fs::read_to_string(settings.state_dir.join(REMEMBERED)).ok()?;
    let mut words = text.split_whitespace();
    let mut next = || words.next()?.parse::<u64>().ok();
    let (system, version, bytes) = (next()?, next()?, next()?);
    let segment_size = SegmentSize::new(u32::try_from(bytes).ok()?)?;
    Some(Server {
        system: SystemId::new(system),
        version: u32::try_from(version).ok()?,
        segment_size,
    })
}

/// Waits while the server is away or starting; `None` if the agent was stopped meanwhile.
async fn wait_for_server(
    settings: &Settings,
    alarms: &Alarms,
    stop: &CancellationToken,
) -> Result<Option<Server>> {
    let mut pause = Duration::from_millis(200);
    loop {
        match connect::identify(settings).await {
            Ok(server) => {
                alarms.clear("postgres-down", "");
                return Ok(Some(server));
            }
            Err(error) if connect::is_transient(&error) => {
                alarms.raise("postgres-down", "", error.message());
            }
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(Duration::from_secs(15));
    }
}

/// A location that shows another cluster stops the agent; one that cannot be asked does not.
async fn look_at(
    location: &Location,
    settings: &Settings,
    server: Server,
    alarms: &Alarms,
) -> Result<()> {
    let name = location.name().as_str();
    let look = async {
        location.require_cluster().await?;
        Ok(check_location(location, settings, Some(server.system)).await)
    };
    match tokio::time::timeout(FIRST_LOOK, look).await {
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(error))) if error.kind() != Kind::Storage => {
            Err(error.context(format!("location {name}")))
        }
        Ok(Ok(Err(error)) | Err(error)) => {
            alarms.raise("location-down", name, error.message());
            Ok(())
        }
        Err(_) => {
            alarms.raise("location-down", name, "it did not answer within 10 s");
            Ok(())
        }
    }
}
