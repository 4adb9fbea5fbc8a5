//! What a restore may read: the locations that answer, and the key.
//!
//! Made from the config, or on a bare host from nothing but URLs and a key file. A location that is down or has no
//! `cluster` object is set aside with the reason, and the others go on; two locations of different clusters are
//! refused, for their WAL must never mix.

mod read;

use backstay_common::catalog::{LOCATIONS_MAX, none_reachable};
use backstay_common::cluster::ClusterRecord;
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
    pub system: SystemId,
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
        let records = futures::future::join_all(locations.iter().map(record)).await;
        let mut answered: Vec<(Location, ClusterRecord)> = Vec::new();
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
        refuse_strangers(&answered)?;
        Ok(Access {
            keyring: Arc::new(Keyring::new(provider, first.cluster.clone())),
            cluster: first.cluster,
            system: first.system,
            locations: answered.into_iter().map(|(location, _)| location).collect(),
            unreachable,
        })
    }

    /// The names of the locations that answered.
    pub fn location_names(&self) -> Vec<LocationName> {
        self.locations.iter().map(|location| location.name().clone()).collect()
    }
}

async fn record(location: &Location) -> Result<ClusterRecord> {
    let answer = tokio::time::timeout(ANSWER_TIME_MAX, location.require_cluster()).await;
    let bytes = answer.map_err(|_| {
        let (name, seconds) = (location.name(), ANSWER_TIME_MAX.as_secs());
        Error::new(Kind::Storage, format!("location {name}: no answer in {seconds} s"))
    })??;
    ClusterRecord::read(&bytes)
        .map_err(|error| error.context(format!("location {}", location.name())))
}

fn refuse_strangers(answered: &[(Location, ClusterRecord)]) -> Result<()> {
    let Some(((first, ours), rest)) = answered.split_first() else { return Ok(()) };
    let say = |record: &ClusterRecord| format!("{} (system {})", record.cluster, record.system);
    let same =
        |record: &ClusterRecord| (&record.cluster, record.system) == (&ours.cluster, ours.system);
    match rest.iter().find(|(_, record)| !same(record)) {
        None => Ok(()),
        Some((other, theirs)) => Err(Error::new(
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
