//! `init`: makes the object `cluster` at every location, once.
//!
//! Nothing else ever makes it, so that a location that has lost it (an unmounted disk, a wrong prefix) is noticed and
//! not filled anew. Running `init` again is harmless: it completes what is missing and changes nothing.

use crate::connect;
use backstay_common::cluster::ClusterRecord;
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
}

/// Checks key and server first, then prepares each location; stops at the first that refuses.
pub async fn run(settings: &Settings) -> Result<Vec<(Location, Initialised)>> {
    settings.keys.provider()?;
    let server = connect::identify(settings).await?;
    let mut done = Vec::new();
    for location in &settings.locations {
        let location = Location::open(location)?;
        let prepared = || prepare(settings, server.system, &location);
        let initialised = while_overloaded(prepared).await;
        let initialised = initialised.context(format!("location {}", location.name()))?;
        done.push((location, initialised));
    }
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

async fn prepare(
    settings: &Settings,
    system: SystemId,
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
    check_record(&ClusterRecord::read(&there)?, settings, system)?;
    Ok(Initialised::AlreadyThere)
}

/// Refuses a location that was made for another cluster or another system.
pub fn check_record(record: &ClusterRecord, settings: &Settings, system: SystemId) -> Result<()> {
    if record.cluster != settings.cluster {
        return Err(Error::new(
            Kind::Config,
            format!("it holds the backups of cluster {:?}, not of {:?}", record.cluster.as_str(), settings.cluster.as_str()),
        )
        .remedy("give this cluster a prefix of its own in the location's url, or correct `cluster` in the config"));
    }
    if record.system != system {
        return Err(Error::new(
            Kind::Config,
            format!(
                "it was made for the system {}, and the server is the system {system}: another \
                 cluster, or the same one after pg_upgrade or initdb",
                record.system
            ),
        )
        .remedy("check `conninfo`; for a server that is new, give the location's url another prefix and run init"));
    }
    Ok(())
}
