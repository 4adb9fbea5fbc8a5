//! `backstay-agent`: parses, resolves, runs, and turns an error into an exit code.

use anyhow::anyhow;
use backstay_agent::control::{self, Reply, Request};
use backstay_agent::init::Initialised;
use backstay_agent::prune::PruneOptions;
use backstay_agent::prune::pins::PinRequest;
use backstay_agent::schedule::Schedule;
use backstay_agent::sync::SyncOptions;
use backstay_agent::{allocator, check, init, status};
use backstay_common::config::Settings;
use backstay_common::id::LocationName;
use backstay_common::say::say;
use backstay_common::{Error, Kind};
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Streams the WAL and takes the snapshots of one PostgreSQL cluster.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Arguments {
    /// The TOML file that both programs read.
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/backstay/backstay.toml")]
    config: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make each location ready, once, before the first run.
    Init {
        /// The server is the same cluster with a new system identifier, as after pg_upgrade: back it up beside the old one.
        #[arg(long)]
        accept_new_system: bool,
    },
    /// Look whether everything is as the agent needs it.
    Check {
        /// Print the findings as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Stream WAL and take snapshots until stopped.
    Run,
    /// Ask the running agent for a snapshot now, and wait for it.
    Snapshot {
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Delete what no moment of the window needs: condemn it, and delete what was condemned a day ago.
    Prune {
        /// Only say what may go, and why.
        #[arg(long)]
        dry_run: bool,
        /// The config's window is shorter than the last one applied, and that is meant.
        #[arg(long)]
        accept_window: bool,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make the locations equal: copy to each what it lacks, replace what is damaged.
    Sync {
        /// Only say what differs.
        #[arg(long)]
        check: bool,
        /// Read every object everywhere, and find damage that a listing does not show.
        #[arg(long)]
        deep: bool,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Hold a snapshot, so that prune leaves it alone.
    Pin {
        /// Its id, or the beginning of it.
        snapshot: String,
        /// Why, for whoever finds it later.
        #[arg(long)]
        reason: String,
        /// When the pin ends by itself, such as 2027-01-31T00:00:00Z.
        #[arg(long)]
        until: Option<jiff::Timestamp>,
        /// Keep all WAL from its start on, not only what makes it consistent.
        #[arg(long)]
        with_wal: bool,
        #[arg(long)]
        json: bool,
    },
    /// Give back the pins of a snapshot, but those of restores; or one pin.
    Unpin {
        /// A snapshot's id or the beginning of it, or a pin's id.
        which: String,
        #[arg(long)]
        json: bool,
    },
    /// Acknowledge damaged pages: what was kept because it has them whole may go.
    AckDamage {
        #[arg(long)]
        json: bool,
    },
    /// Show how far the WAL has come, the snapshots and the alarms.
    Status {
        /// Print everything as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// How long threads that hang are waited for at the end.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

const EXIT_CODES: &str = "Exit codes: 0 done, 1 internal, 2 usage or configuration, 4 integrity, \
5 storage (or committed at some required locations only), 6 PostgreSQL, 7 key, 8 another agent holds the lease, 9 no agent answers, 10 alarms";

fn main() -> ExitCode {
    allocator::keep_no_large_buffers();
    let arguments = Arguments::parse();
    log_to_stderr();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow!(error).context("start the runtime")),
    };
    let result = runtime.block_on(run(arguments));
    // A thread may hang on a disk that does not answer.
    runtime.shutdown_timeout(STOP_PATIENCE);
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    let kind = error.downcast_ref::<Error>().map_or(Kind::Bug, Error::kind);
    ExitCode::from(kind.exit_code())
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BACKSTAY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,object_store=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

async fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let settings = Settings::read(&arguments.config)?;
    Schedule::of(&settings.snapshot)?;
    match arguments.verb {
        Verb::Init { accept_new_system } => run_init(&settings, accept_new_system).await,
        Verb::Check { json } => run_check(&settings, json).await,
        Verb::Run => {
            backstay_agent::run(settings).await?;
            Ok(0)
        }
        Verb::Snapshot { json } => run_snapshot(&settings, json).await,
        Verb::Status { json } => run_status(&settings, json).await,
        Verb::Prune { dry_run, accept_window, json } => {
            run_prune(&settings, PruneOptions { dry_run, accept_window }, json).await
        }
        Verb::Sync { check, deep, json } => {
            run_sync(&settings, SyncOptions { check, deep }, json).await
        }
        Verb::Pin { snapshot, reason, until, with_wal, json } => {
            let request = PinRequest::Pin { snapshot, reason, until, with_wal };
            run_pins(&settings, request, json).await
        }
        Verb::Unpin { which, json } => run_pins(&settings, PinRequest::Unpin { which }, json).await,
        Verb::AckDamage { json } => run_pins(&settings, PinRequest::AckDamage, json).await,
    }
}

async fn run_init(settings: &Settings, accept_new_system: bool) -> anyhow::Result<u8> {
    for (location, initialised) in init::run(settings, accept_new_system).await? {
        let what = match initialised {
            Initialised::Made => "initialised",
            Initialised::AlreadyThere => "was initialised before",
            Initialised::Accepted => "takes the new system's backups from now on",
        };
        say(format_args!("location {} ({}): {what}", location.name(), location.url()))?;
    }
    Ok(0)
}

async fn run_check(settings: &Settings, json: bool) -> anyhow::Result<u8> {
    let findings = check::run(settings).await;
    if json {
        let list: Vec<_> = findings.iter().map(check::Finding::for_programs).collect();
        say(serde_json::to_string_pretty(&list)?)?;
    } else {
        findings.iter().try_for_each(|finding| say(finding.for_people()))?;
    }
    Ok(check::exit_code(&findings))
}

async fn run_status(settings: &Settings, json: bool) -> anyhow::Result<u8> {
    match control::ask(&settings.state_dir, Request::Status, |_| {}).await? {
        Reply::Status(status) => {
            match json {
                true => say(serde_json::to_string_pretty(&status)?)?,
                false => say(status::for_people(&status).trim_end())?,
            }
            let alarms = status["alarms"].as_array().is_some_and(|alarms| !alarms.is_empty());
            Ok(if alarms { 10 } else { 0 })
        }
        other => refused(other),
    }
}

async fn run_snapshot(settings: &Settings, json: bool) -> anyhow::Result<u8> {
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new(0),
        false => ProgressBar::hidden(),
    };
    bar.set_style(ProgressStyle::with_template(
        "{msg:12} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    )?);
    let reply = control::ask(&settings.state_dir, Request::Snapshot, |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
        bar.set_message(progress.phase.to_string());
    })
    .await?;
    bar.finish_and_clear();
    let Reply::Outcome(outcome) = reply else { return refused(reply) };
    show(&outcome, json)?;
    let required =
        |name: &LocationName| settings.locations.iter().any(|l| l.name == *name && l.is_required());
    let is_done = !outcome.pending.iter().any(|(location, _)| required(location));
    Ok(if is_done { 0 } else { Kind::Storage.exit_code() })
}

async fn run_prune(settings: &Settings, options: PruneOptions, json: bool) -> anyhow::Result<u8> {
    let reply = control::ask(&settings.state_dir, Request::Prune(options), |_| {}).await?;
    let Reply::Pruned(report) = reply else { return refused(reply) };
    show(&report, json)?;
    Ok(if report.failed.is_empty() { 0 } else { Kind::Storage.exit_code() })
}

async fn run_sync(settings: &Settings, options: SyncOptions, json: bool) -> anyhow::Result<u8> {
    let reply = control::ask(&settings.state_dir, Request::Sync(options), |_| {}).await?;
    let Reply::Synced(report) = reply else { return refused(reply) };
    show(&report, json)?;
    Ok(report.exit_code())
}

async fn run_pins(settings: &Settings, request: PinRequest, json: bool) -> anyhow::Result<u8> {
    let reply = control::ask(&settings.state_dir, Request::Pins(request), |_| {}).await?;
    let Reply::Pins(outcome) = reply else { return refused(reply) };
    show(&outcome, json)?;
    Ok(if outcome.failed.is_empty() { 0 } else { Kind::Storage.exit_code() })
}

/// For a program, or for people.
fn show(report: &(impl serde::Serialize + std::fmt::Display), json: bool) -> anyhow::Result<()> {
    match json {
        true => say(serde_json::to_string_pretty(report)?)?,
        false => say(report.to_string().trim_end())?,
    }
    Ok(())
}

fn refused(reply: Reply) -> anyhow::Result<u8> {
    let Reply::Error { exit_code, message, remedy } = reply else {
        return Err(anyhow!("the agent answered something else than it was asked"));
    };
    eprintln!("error: {message}");
    if let Some(remedy) = remedy {
        eprintln!("  remedy: {remedy}");
    }
    Ok(exit_code)
}
