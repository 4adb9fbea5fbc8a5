//! `init`: makes the object `cluster` at every location, once; and, when told to, accepts the system that the cluster has had since
//! `pg_upgrade`.
//!
//! Nothing else ever makes it, so that a location that has lost it (an unmounted disk, a wrong prefix) is noticed and
//! not filled anew. Running `init` again is harmless: it completes what is missing and changes nothing. A crash leaves some
//! locations done, and `init` does the others.

use crate::connect;
use backstay_common::cluster::{AcceptedRecord, ClusterRecord, Identity, accepts};
use backstay_common::config::Settings;
use backstay_common::id::SystemId;
use backstay_common::location::{Location, PutNew, is_overload};
use backstay_common::name::ObjectName;
use backstay_common::{Context, Error, Kind, Result};
use std::time::{Duration, Instant};

/// How long an overloaded store is tried again, and the pauses between.
const OVERLOAD_PATIENCE: Duration = Duration::from_secs(60);
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));

/// What `init` did at one location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initialised {
    Made,
    AlreadyThere,
    /// It takes the backups of the new system too, from now on.
    Accepted,
}

/// Checks key and server first, then prepares each location; stops at the first that refuses. A system other than the one that a
/// location was made for is refused unless `accept_new_system`.
pub async fn run(
    settings: &Settings,
    accept_new_system: bool,
) -> Result<Vec<(Location, Initialised)>> {
    settings.keys.provider()?;
    let server = connect::identify(settings).await?;
    let mut done = Vec::new();
    for location in &settings.locations {
        let location = Location::open(location)?;
        let prepared = || prepare(settings, server.system, accept_new_system, &location);
        let initialised = while_overloaded(prepared).await;
        let initialised = initialised.context(format!("location {}", location.name()))?;
        done.push((location, initialised));
    }
    agree(&done).await?;
    Ok(done)
}

/// Tries again, for a minute, what fails because a store has too much to do.
pub async fn while_overloaded<T>(work: impl AsyncFn() -> Result<T>) -> Result<T> {
    let (mut pause, longest) = PAUSES;
    let deadline = Instant::now() + OVERLOAD_PATIENCE;
    loop {
        match work().await {
            Err(error) if is_overload(&error) && Instant::now() + pause < deadline => {
                tracing::info!("{}; tried again in {} s", error.message(), pause.as_secs());
            }
            result => return result,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

/// Each location is to know every system that another one has backups of: they are copied to it.
async fn agree(done: &[(Location, Initialised)]) -> Result<()> {
    let reads = done.iter().map(|(location, _)| Identity::read(location));
    let identities = futures::future::try_join_all(reads).await?;
    let Some(mut all) = identities.first().cloned() else { return Ok(()) };
    for &(system, made) in identities.iter().flat_map(|identity| &identity.systems) {
        all.add_system(system, made);
    }
    for ((location, _), identity) in done.iter().zip(&identities) {
        for &(system, made) in all.systems.iter().filter(|(system, _)| !identity.has(*system)) {
            let record = AcceptedRecord { cluster: all.cluster.clone(), system, made };
            write(location, &record).await?;
        }
    }
    Ok(())
}

async fn write(location: &Location, record: &AcceptedRecord) -> Result<()> {
    let object = record.object();
    location.put(&object.name, object.bytes).await.context("accept another system").map(drop)
}

async fn prepare(
    settings: &Settings,
    system: SystemId,
    accept_new_system: bool,
    location: &Location,
) -> Result<Initialised> {
    location.create_root().await?;
    location.probe().await?;
    let now = jiff::Timestamp::now();
    let object = ClusterRecord::new(settings.cluster.clone(), system, now).object();
    let there = match location.put_new(&ObjectName::Cluster, object.bytes).await? {
        PutNew::Created | PutNew::Present => return Ok(Initialised::Made),
        PutNew::Conflict => location.require_cluster().await?,
    };
    let record = ClusterRecord::read(&there)?;
    check_name(&record, settings)?;
    if !accept_new_system || accepts(location, &record, system).await? {
        check_system(location, &record, system).await?;
        return Ok(Initialised::AlreadyThere);
    }
    write(location, &Identity::read(location).await?.accept(system, now)).await?;
    Ok(Initialised::Accepted)
}

/// Refuses a location of another cluster, and one that does not take the backups of `system`; without a `system` only the former.
pub async fn check_location(
    location: &Location,
    settings: &Settings,
    system: Option<SystemId>,
) -> Result<()> {
    let record = ClusterRecord::read(&location.require_cluster().await?)?;
    check_name(&record, settings)?;
    match system {
        Some(system) => check_system(location, &record, system).await,
        None => Ok(()),
    }
}

fn check_name(record: &ClusterRecord, settings: &Settings) -> Result<()> {
    if record.cluster != settings.cluster {
        return Err(Error::new(
            Kind::Config,
            format!("it holds the backups of cluster {:?}, not of {:?}", record.cluster.as_str(), settings.cluster.as_str()),
        )
        .remedy("give this cluster a prefix of its own in the location's url, or correct `cluster` in the config"));
    }
    Ok(())
}

async fn check_system(location: &Location, record: &ClusterRecord, system: SystemId) -> Result<()> {
    if !accepts(location, record, system).await? {
        return Err(Error::new(
            Kind::Config,
            format!(
                "it was made for the system {}, and the server is the system {system}: another \
                 cluster, or the same one after pg_upgrade or initdb",
                record.system
            ),
        )
        .remedy("check `conninfo`; if this is the same cluster after pg_upgrade, run `backstay-agent init --accept-new-system`; if it is another one, give the location's url another prefix and run init"));
    }
    Ok(())
}
