//! What a restore may read: the locations that answer, and the key.
//!
//! Made from the config, or on a bare host from nothing but URLs and a key file. A location that is down or has no
//! `cluster` object is set aside with the reason, and the others go on; two locations of different clusters are
//! refused, for their WAL must never mix. A cluster may have had several systems: what is read is read of one of them.

mod read;

use backstay_common::catalog::{LOCATIONS_MAX, none_reachable};
use backstay_common::cluster::Identity;
use backstay_common::config::Settings;
use backstay_common::id::{ClusterName, LocationName, SystemId};
use backstay_common::keys::{KeyProvider, Keyring, file::FileProvider};
use backstay_common::location::{Location, LocationSettings};
use backstay_common::{Error, Kind, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a location may take to show its `cluster` object before the restore goes on without it.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// The locations of one cluster, and what opens their objects. Clones share connections and keys.
#[derive(Clone, Debug)]
pub struct Access {
    pub cluster: ClusterName,
    /// The one that is meant: the newest, until told otherwise.
    pub system: SystemId,
    /// All that the cluster has had, newest first.
    pub systems: Vec<SystemId>,
    /// Those that answered, in the order in which they were given.
    pub locations: Vec<Location>,
    pub keyring: Arc<Keyring>,
    /// Those that did not, with the reason.
    pub unreachable: Vec<(LocationName, String)>,
}

/// How to reach locations that are given as URLs only.
#[derive(Clone, Debug, Default)]
pub struct UrlOptions {
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub allow_http: bool,
    /// PEM certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
}

impl Access {
    /// The locations and the key that the config names.
    pub async fn from_settings(settings: &Settings) -> Result<Access> {
        let access = Access::open(&settings.locations, settings.keys.provider()?).await?;
        match access.cluster == settings.cluster {
            true => Ok(access),
            false => Err(Error::new(
                Kind::Config,
                format!(
                    "the config is of cluster {}, but the locations hold cluster {}",
                    settings.cluster, access.cluster
                ),
            )
            .remedy("correct `cluster` or the locations' urls in the config")),
        }
    }

    /// Locations by URL; they are called `location-1`, `location-2` and so on.
    pub async fn from_urls(
        urls: &[String],
        key_file: &Path,
        options: &UrlOptions,
    ) -> Result<Access> {
        let provider = Arc::new(FileProvider::read(key_file)?);
        let settings = urls.iter().zip(1..).map(|(url, number)| {
            let name = format!("location-{number}").parse().expect("a plain name");
            LocationSettings {
                endpoint: options.endpoint.clone(),
                region: options.region.clone(),
                allow_http: options.allow_http,
                ca_file: options.ca_file.clone(),
                ..LocationSettings::new(name, url.as_str())
            }
        });
        Access::open(&settings.collect::<Vec<_>>(), provider).await
    }

    async fn open(settings: &[LocationSettings], provider: Arc<dyn KeyProvider>) -> Result<Access> {
        if settings.is_empty() || settings.len() > LOCATIONS_MAX {
            let reason = format!("{} locations are given", settings.len());
            return Err(Error::new(Kind::Config, reason)
                .remedy(format!("give 1 to {LOCATIONS_MAX}, with --from or in the config")));
        }
        let locations: Vec<Location> =
            settings.iter().map(Location::open).collect::<Result<_>>()?;
        let records = futures::future::join_all(locations.iter().map(identity)).await;
        let mut answered: Vec<(Location, Identity)> = Vec::new();
        let mut unreachable = Vec::new();
        for (location, record) in locations.into_iter().zip(records) {
            match record {
                Ok(record) => answered.push((location, record)),
                Err(error) if error.kind() == Kind::Config => return Err(error),
                Err(error) => unreachable.push((location.name().clone(), reason(&error))),
            }
        }
        let Some((_, first)) = answered.first().cloned() else {
            return Err(none_reachable(&unreachable));
        };
        let identity = together(first, &answered)?;
        Ok(Access {
            keyring: Arc::new(Keyring::new(provider, identity.cluster.clone())),
            system: identity.newest(),
            systems: identity.systems.iter().rev().map(|(system, _)| *system).collect(),
            cluster: identity.cluster,
            locations: answered.into_iter().map(|(location, _)| location).collect(),
            unreachable,
        })
    }

    /// The same for one of the cluster's systems. Refuses one that it never had.
    pub fn of(&self, system: SystemId) -> Result<Access> {
        if !self.systems.contains(&system) {
            let all: Vec<String> = self.systems.iter().map(ToString::to_string).collect();
            let reason = format!("cluster {} never had the system {system}", self.cluster);
            return Err(Error::new(Kind::Config, reason)
                .remedy(format!("give one of {} with --system", all.join(", "))));
        }
        Ok(Access { system, ..self.clone() })
    }

    /// The names of the locations that answered.
    pub fn location_names(&self) -> Vec<LocationName> {
        self.locations.iter().map(|location| location.name().clone()).collect()
    }
}

async fn identity(location: &Location) -> Result<Identity> {
    let answer = tokio::time::timeout(ANSWER_TIME_MAX, Identity::read(location)).await;
    let name = location.name();
    let answer = answer.map_err(|_| {
        let seconds = ANSWER_TIME_MAX.as_secs();
        Error::new(Kind::Storage, format!("location {name}: no answer in {seconds} s"))
    })?;
    // A location that is not there says so by itself.
    answer.map_err(|error| match error.message().contains(&format!("location {name}")) {
        true => error,
        false => error.context(format!("location {name}")),
    })
}

/// What all of them say together. They are of one cluster if they have its name, and each a system that another one has.
fn together(first: Identity, answered: &[(Location, Identity)]) -> Result<Identity> {
    let mut all = first;
    let mut rest: Vec<&(Location, Identity)> = answered.iter().skip(1).collect();
    loop {
        let is_ours = |identity: &Identity| {
            let knows = |(system, _): &(SystemId, i64)| all.has(*system);
            identity.cluster == all.cluster && identity.systems.iter().any(knows)
        };
        let next = rest.iter().position(|(_, identity)| is_ours(identity));
        let Some(next) = next else { break };
        let (_, found) = rest.swap_remove(next);
        for &(system, made) in &found.systems {
            all.add_system(system, made);
        }
    }
    let say = |identity: &Identity| {
        let systems: Vec<String> = identity.systems.iter().map(|(s, _)| s.to_string()).collect();
        format!("{} (system {})", identity.cluster, systems.join(", "))
    };
    match (rest.first(), answered.first()) {
        (Some((other, theirs)), Some((first, ours))) => Err(Error::new(
            Kind::Config,
            format!(
                "the locations are of different clusters: {} holds {}, {} holds {}",
                first.name(),
                say(ours),
                other.name(),
                say(theirs)
            ),
        )
        .remedy("give only locations of the cluster that you want to restore")),
        _ => Ok(all),
    }
}

/// Each location has its own remedy.
fn reason(error: &Error) -> String {
    match error.remedy_text() {
        Some(remedy) => format!("{} ({remedy})", error.message()),
        None => error.message().to_string(),
    }
}

#[cfg(test)]
mod tests;
