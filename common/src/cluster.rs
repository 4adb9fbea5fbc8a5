//! The objects `cluster` and `accepted/<system>`: whose backups a location takes.
//!
//! `init` makes them and nothing else does. An unmounted disk or a wrong prefix has no `cluster`, and is unavailable,
//! never filled anew. `cluster` names the system that the location was made for; after `pg_upgrade` or `initdb` the
//! same cluster has another one, which is refused until an operator has had it accepted. Both objects are written once.

use crate::cbor::{self, Fields};
use crate::id::{ClusterName, SystemId};
use crate::location::Location;
use crate::name::{ObjectName, folder};
use crate::seal::{FORMAT_VERSION, Header, ObjectKind, Sealed, plain_object};
use crate::{Context, Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// What `cluster` says. It is not secret.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ClusterRecord {
    #[n(0)]
    pub format_version: u16,
    #[n(1)]
    pub cluster: ClusterName,
    /// The system for which the location was made.
    #[n(2)]
    pub system: SystemId,
    /// Unix seconds.
    #[n(3)]
    pub made: i64,
}

impl Fields for ClusterRecord {
    const KNOWN: u64 = 4;
    const WHAT: &'static str = "the object cluster";
}

impl ClusterRecord {
    pub fn new(cluster: ClusterName, system: SystemId, made: jiff::Timestamp) -> ClusterRecord {
        ClusterRecord { format_version: FORMAT_VERSION, cluster, system, made: made.as_second() }
    }

    pub fn object(&self) -> Sealed {
        plain_object(ObjectKind::Cluster, cbor::encode(self), |_| ObjectName::Cluster)
    }

    /// Reads the object, and refuses a format that this version does not know.
    pub fn read(bytes: &Bytes) -> Result<ClusterRecord> {
        let header = Header::check(bytes, &ObjectName::Cluster)?;
        let record: ClusterRecord = cbor::decode(header.plain())?;
        match record.format_version {
            FORMAT_VERSION => Ok(record),
            other => Err(Error::new(
                Kind::Config,
                format!(
                    "the location has format version {other}; this program knows {FORMAT_VERSION}"
                ),
            )
            .remedy("use a version of Backstay that knows it")),
        }
    }
}

/// Plain section of `accepted/<system>`. It is not secret.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct AcceptedRecord {
    #[n(0)]
    pub cluster: ClusterName,
    #[n(1)]
    pub system: SystemId,
    /// Unix seconds; later than that of every system which the cluster had before, so that they have an order.
    #[n(2)]
    pub made: i64,
}

impl Fields for AcceptedRecord {
    const KNOWN: u64 = 3;
    const WHAT: &'static str = "the word that a system is accepted";
}

impl AcceptedRecord {
    pub fn object(&self) -> Sealed {
        let system = self.system;
        let name = |_| ObjectName::Accepted { system };
        plain_object(ObjectKind::Accepted, cbor::encode(self), name)
    }

    /// Refuses one that speaks of another system than its name.
    pub fn read(bytes: &Bytes, name: &ObjectName) -> Result<AcceptedRecord> {
        let header = Header::check(bytes, name)?;
        let record: AcceptedRecord = cbor::decode(header.plain())?;
        match *name {
            ObjectName::Accepted { system } if system == record.system => Ok(record),
            _ => Err(Error::new(
                Kind::Corrupt,
                format!("{name} speaks of the system {}", record.system),
            )),
        }
    }
}

/// What a location says of itself: whose backups it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub cluster: ClusterName,
    /// Oldest first, never empty: each with the Unix second since when it has been the cluster's.
    pub systems: Vec<(SystemId, i64)>,
}

impl Identity {
    /// Only the system that the location was made for.
    pub fn of(record: &ClusterRecord) -> Identity {
        Identity { cluster: record.cluster.clone(), systems: vec![(record.system, record.made)] }
    }

    /// Reads `cluster` and all that has been accepted. What is damaged, or of another cluster, accepts nothing: anybody who
    /// may write to the store can put junk there. Safe to drop.
    pub async fn read(location: &Location) -> Result<Identity> {
        let record = ClusterRecord::read(&location.require_cluster().await?)?;
        let mut identity = Identity::of(&record);
        for listed in location.list(folder::ACCEPTED).await.context("list what is accepted")? {
            let Some(name) = listed.name else { continue };
            match AcceptedRecord::read(&location.get(&name).await?, &name) {
                Ok(record) => identity.add(&record),
                Err(error) if error.kind() == Kind::Corrupt => {
                    tracing::warn!(location = %location.name(), "accepts nothing: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(identity)
    }

    /// Takes over what another location, or an object at this one, says of the same cluster.
    pub fn add(&mut self, record: &AcceptedRecord) {
        if record.cluster == self.cluster {
            self.add_system(record.system, record.made);
        }
    }

    /// Of two words on one system the earlier counts.
    pub fn add_system(&mut self, system: SystemId, made: i64) {
        match self.systems.iter_mut().find(|(known, _)| *known == system) {
            Some(known) => known.1 = known.1.min(made),
            None => self.systems.push((system, made)),
        }
        self.systems.sort_by_key(|&(system, made)| (made, system));
    }

    pub fn has(&self, system: SystemId) -> bool {
        self.systems.iter().any(|(known, _)| *known == system)
    }

    /// The system that the cluster has had last.
    pub fn newest(&self) -> SystemId {
        self.systems.last().expect("a location was made for a system").0
    }

    /// Accepts another system, at `now` or just after the last one: the order of systems does not hang on a clock.
    pub fn accept(&self, system: SystemId, now: jiff::Timestamp) -> AcceptedRecord {
        let last = self.systems.last().map_or(i64::MIN, |(_, made)| *made);
        let made = now.as_second().max(last.saturating_add(1));
        AcceptedRecord { cluster: self.cluster.clone(), system, made }
    }
}

/// Whether a location takes the backups of this system of its cluster; `record` is its `cluster`. One more request, and only
/// where the location was made for another system.
pub async fn accepts(
    location: &Location,
    record: &ClusterRecord,
    system: SystemId,
) -> Result<bool> {
    if record.system == system {
        return Ok(true);
    }
    let name = ObjectName::Accepted { system };
    match location.get(&name).await {
        Ok(bytes) => Ok(AcceptedRecord::read(&bytes, &name)?.cluster == record.cluster),
        Err(error) if error.kind() == Kind::Missing => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::location::LocationSettings;

    #[tokio::test]
    async fn systems_are_in_the_order_in_which_they_were_accepted() {
        let settings = LocationSettings::new("here".parse().unwrap(), "memory:");
        let here = Location::open(&settings).unwrap();
        let later = jiff::Timestamp::from_second(1_000).unwrap();
        let record = ClusterRecord::new("orders".parse().unwrap(), SystemId::new(9), later);
        here.put(&ObjectName::Cluster, record.object().bytes).await.unwrap();
        assert_eq!(Identity::read(&here).await.unwrap(), Identity::of(&record));
        assert!(accepts(&here, &record, SystemId::new(9)).await.unwrap());
        assert!(!accepts(&here, &record, SystemId::new(7)).await.unwrap());
        // A clock that was set back.
        let accepted = Identity::of(&record).accept(SystemId::new(7), jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(accepted.made, 1_001);
        let object = accepted.object();
        here.put(&object.name, object.bytes).await.unwrap();
        // Of another cluster, and damaged.
        let other = AcceptedRecord {
            cluster: "billing".parse().unwrap(),
            system: SystemId::new(6),
            made: 5,
        };
        here.put(&other.object().name, other.object().bytes).await.unwrap();
        let junk = ObjectName::Accepted { system: SystemId::new(5) };
        here.put(&junk, Bytes::from_static(b"junk")).await.unwrap();
        let identity = Identity::read(&here).await.unwrap();
        assert_eq!(identity.systems, [(SystemId::new(9), 1_000), (SystemId::new(7), 1_001)]);
        assert_eq!(identity.newest(), SystemId::new(7));
        assert!(accepts(&here, &record, SystemId::new(7)).await.unwrap());
        assert!(!accepts(&here, &record, SystemId::new(6)).await.unwrap());
        assert!(AcceptedRecord::read(&other.object().bytes, &junk).is_err());
    }
}
