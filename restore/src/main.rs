//! `backstay`: parses, resolves, runs, and turns an error into an exit code.

use backstay::cli::{Cli, Global, KeysVerb, PlanArgs, RestoreArgs, Verb, WalFetchArgs};
use backstay::{keys, ledger, list, plan, recovery_end, restore, wal_fetch, wal_spool};
use backstay_common::catalog::Catalog;
use backstay_common::say::say;
use backstay_common::{Error, Kind, Result};
use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "wal-fetch") {
        return wal_fetch_only();
    }
    let cli = Cli::parse();
    start_log(cli.global.verbose);
    let outcome = match &cli.verb {
        Verb::WalFetch(args) => return fetch_wal(args),
        Verb::RecoveryEnd(args) => recovery_end::finish(&args.plan).map(|()| 0),
        Verb::Keys(KeysVerb::Generate { out }) => generate(out, cli.global.json).map(|()| 0),
        _ => runtime().and_then(|runtime| runtime.block_on(run(&cli))),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&error, cli.global.json);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// Returns the exit code of what did not fail.
async fn run(cli: &Cli) -> Result<u8> {
    let work = async {
        match &cli.verb {
            Verb::List => show_list(&cli.global).await,
            Verb::Plan(args) => show_plan(&cli.global, args).await,
            Verb::Restore(args) => run_restore(&cli.global, args).await,
            Verb::Ledger => return show_ledger(&cli.global).await,
            Verb::WalFetch(_) | Verb::RecoveryEnd(_) | Verb::Keys(_) => Ok(()),
        }
        .map(|()| 0)
    };
    tokio::select! {
        outcome = work => outcome,
        () = asked_to_stop() => Err(Error::new(Kind::Cancelled, "stopped; nothing is lost")
            .remedy("the same command takes up an interrupted restore where it was")),
    }
}

async fn asked_to_stop() {
    let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
    match terminate {
        Ok(mut terminate) => {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        }
        Err(_) => drop(tokio::signal::ctrl_c().await),
    }
}

async fn show_list(global: &Global) -> Result<()> {
    let access = global.access().await?;
    let listing = match global.system {
        Some(system) => list::list(&access.of(system)?).await?,
        None => list::list_all(&access).await?,
    };
    print(global, &listing, &listing)
}

/// A ledger that is broken is shown, and is an integrity failure.
async fn show_ledger(global: &Global) -> Result<u8> {
    let access = global.access().await?;
    let told = match global.system {
        Some(system) => ledger::read(&access, &[system]).await?,
        None => ledger::read(&access, &access.systems).await?,
    };
    print(global, &told, &told)?;
    Ok(if told.faults.is_empty() { 0 } else { Kind::Corrupt.exit_code() })
}

async fn show_plan(global: &Global, args: &PlanArgs) -> Result<()> {
    let access = global.access().await?;
    let (_, _, plan) = plan::choose(&access, global.system, &args.request()?).await?;
    print(global, &plan, &plan)
}

async fn run_restore(global: &Global, args: &RestoreArgs) -> Result<()> {
    let begun = Instant::now();
    let (asked, request) = (args.plan.request()?, args.request(global)?);
    let access = global.access().await?;
    let (access, catalog, plan) = plan::choose(&access, global.system, &asked).await?;
    if !global.json {
        say(format_args!("{plan}\n"))?;
    }
    let report = restore::restore(&access, catalog, &plan, &request, begun).await?;
    print(global, &report, &report)
}

fn print(
    global: &Global,
    text: &impl std::fmt::Display,
    value: &impl serde::Serialize,
) -> Result<()> {
    match global.json {
        true => {
            let json = serde_json::to_string_pretty(value).map_err(|e| Error::new(Kind::Bug, e))?;
            say(json)
        }
        false => say(text.to_string().trim_end()),
    }
}

fn generate(out: &std::path::Path, json: bool) -> Result<()> {
    let id = keys::generate(out)?;
    match json {
        true => say(serde_json::json!({ "key": id, "file": out })),
        false => say(format_args!("Key {id} is in {}.\n\n{}", out.display(), keys::warning(out))),
    }
}

/// Recovery must never take a usage error or a panic for "not found", so neither may end with a code below 126.
fn wal_fetch_only() -> ExitCode {
    let outcome = std::panic::catch_unwind(|| match Cli::try_parse() {
        Ok(Cli { verb: Verb::WalFetch(args), .. }) => fetch_wal(&args),
        Ok(_) => ExitCode::from(wal_fetch::REFUSED),
        Err(error) => {
            // The log of PostgreSQL is all that can be told; if that fails there is nobody to tell.
            let _ = error.print();
            ExitCode::from(wal_fetch::REFUSED)
        }
    });
    outcome.unwrap_or(ExitCode::from(wal_fetch::REFUSED))
}

fn fetch_wal(args: &WalFetchArgs) -> ExitCode {
    match wal_fetch::answer(&args.plan, &args.file, &args.to, &fetch_alone) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("backstay wal-fetch: {error}");
            ExitCode::from(wal_fetch::REFUSED)
        }
    }
}

/// Fetches a segment when no restore runs, with the access that the plan was made with.
fn fetch_alone(
    spool: &wal_spool::Spool,
    frozen: &wal_spool::Frozen,
    size: backstay_common::segment::SegmentSize,
    segment: wal_spool::Segment,
) -> Result<()> {
    runtime()?.block_on(async {
        let access = frozen.access.open().await?.of(frozen.plan.system)?;
        let catalog = Arc::new(Catalog::load(&access.locations, access.system).await?);
        let source = restore::wal_source(&access, catalog, &frozen.plan)?;
        spool.fetch(&frozen.plan, size, segment, &*restore::reader(&source)).await
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::new(Kind::Local, e).context("start"))
}

fn complain(error: &Error, json: bool) {
    if json {
        let object = serde_json::json!({
            "error": error.message(),
            "kind": format!("{:?}", error.kind()).to_lowercase(),
            "remedy": error.remedy_text(),
        });
        // The exit code says it too.
        let _ = say(object);
        return;
    }
    eprintln!("error: {}", error.message());
    if let Some(remedy) = error.remedy_text() {
        eprintln!("remedy: {remedy}");
    }
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("BACKSTAY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
}
