//! What happened, as the agents told it: their chains, checked, and merged by time.
//!
//! An entry that is missing, altered or cannot be read is a fault, and named; the rest is shown all the same. Nobody can tell
//! whether the last entries of a chain are missing.

use crate::access::Access;
use backstay_common::catalog::{Places, none_reachable};
use backstay_common::id::{ClusterName, LedgerWriter, LocationName, SystemId};
use backstay_common::ledger::{Entry, breaks};
use backstay_common::name::{ObjectName, folder};
use backstay_common::{Kind, Result};
use futures::StreamExt;
use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

const READS_AT_ONCE: usize = 16;

/// All that `ledger --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Told {
    pub cluster: ClusterName,
    /// Oldest first.
    pub entries: Vec<ToldEntry>,
    /// What is wrong with the chains.
    pub faults: Vec<String>,
    pub unreachable: Vec<(LocationName, String)>,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToldEntry {
    /// By the agent's clock.
    pub at: Timestamp,
    pub system: SystemId,
    pub writer: LedgerWriter,
    /// Its number in the writer's chain.
    pub seq: u64,
    pub event: String,
    pub subject: String,
    pub detail: String,
}

/// Reads the ledgers of these systems. Changes nothing; safe to drop.
pub async fn read(access: &Access, systems: &[SystemId]) -> Result<Told> {
    let mut told = Told {
        cluster: access.cluster.clone(),
        entries: Vec::new(),
        faults: Vec::new(),
        unreachable: access.unreachable.clone(),
    };
    for &system in systems {
        told.add(&access.of(system)?).await?;
    }
    told.entries.sort_by_key(|entry| (entry.at, entry.seq));
    told.unreachable.dedup();
    Ok(told)
}

impl Told {
    /// Adds the chains of one system.
    async fn add(&mut self, access: &Access) -> Result<()> {
        for (writer, chain) in self.list(access).await? {
            let reads = chain.iter().map(|(&seq, &places)| {
                let writer = writer.clone();
                async move {
                    let name = ObjectName::Ledger { system: access.system, writer, seq };
                    (seq, access.read(&name, places, Entry::open).await)
                }
            });
            let reads: Vec<_> =
                futures::stream::iter(reads).buffered(READS_AT_ONCE).collect().await;
            let (mut links, mut unread) = (Vec::new(), None);
            for (seq, read) in reads {
                match read {
                    Ok(chained) => {
                        links.push((seq, chained.previous, chained.hash));
                        let Entry { at, event, subject, detail } = chained.entry;
                        let at = Timestamp::from_millisecond(at).unwrap_or_default();
                        let (system, writer) = (access.system, writer.clone());
                        let entry = ToldEntry { at, system, writer, seq, event, subject, detail };
                        self.entries.push(entry);
                    }
                    Err(error) => {
                        self.faults.push(error.message().to_string());
                        unread = Some(error);
                    }
                }
            }
            // A wrong key is wrong for all.
            if let (true, Some(error)) = (links.is_empty(), unread)
                && matches!(error.kind(), Kind::Key | Kind::Storage)
            {
                return Err(error);
            }
            self.faults.extend(breaks(&links).into_iter().map(|what| format!("{writer}: {what}")));
        }
        Ok(())
    }

    /// The numbers of each writer's entries, and where they are.
    async fn list(
        &mut self,
        access: &Access,
    ) -> Result<BTreeMap<LedgerWriter, BTreeMap<u64, Places>>> {
        let folder = folder::ledger(access.system);
        let listings = access.locations.iter().map(|location| location.list(&folder));
        let listings = futures::future::join_all(listings).await;
        let mut chains: BTreeMap<LedgerWriter, BTreeMap<u64, Places>> = BTreeMap::new();
        let mut failed = Vec::new();
        for (index, listed) in listings.into_iter().enumerate() {
            match listed {
                Ok(listed) => {
                    for object in listed {
                        let Some(ObjectName::Ledger { writer, seq, .. }) = object.name else {
                            continue;
                        };
                        let places = chains.entry(writer).or_default().entry(seq).or_default();
                        *places = places.with(index);
                    }
                }
                Err(error) => {
                    let name = access.locations[index].name().clone();
                    failed.push((name, error.message().to_string()));
                }
            }
        }
        if failed.len() == access.locations.len() {
            return Err(none_reachable(&failed));
        }
        self.unreachable.extend(failed);
        Ok(chains)
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.entries.is_empty() {
            writeln!(f, "Nothing is in the ledger of cluster {}.", self.cluster)?;
        }
        for entry in &self.entries {
            let ToldEntry { at, writer, seq, event, subject, detail, .. } = entry;
            let at = at.strftime("%Y-%m-%d %H:%M:%SZ");
            writeln!(f, "{at}  {}  {event}  {subject}: {detail}  ({writer} {seq})", writer.agent)?;
        }
        for fault in &self.faults {
            writeln!(f, "BROKEN: {fault}")?;
        }
        for (location, reason) in &self.unreachable {
            writeln!(f, "location {location} is left out: {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Repo, SYSTEM};
    use backstay_common::ledger::{Event, NOTHING_BEFORE};

    /// A location with three entries of one writer and one of another, later in time than the first two.
    async fn repo() -> (Repo, Vec<ObjectName>) {
        let repo = Repo::new(2).await;
        let mut names = Vec::new();
        for (writer, times) in
            [("db1-0000000000000001", &[10, 30, 50][..]), ("db2-0000000000000002", &[40])]
        {
            let (writer, mut previous) = (writer.parse().unwrap(), NOTHING_BEFORE);
            for (&at, seq) in times.iter().zip(1..) {
                let entry = Entry {
                    at,
                    event: Event::Gap.word().into(),
                    subject: "a branch".into(),
                    detail: at.to_string(),
                };
                let sealed = entry.seal(&repo.epoch, SYSTEM, &writer, seq, previous);
                previous = sealed.hash();
                repo.put(&sealed, &[(seq % 2) as usize]).await;
                names.push(sealed.name);
            }
        }
        (repo, names)
    }

    #[tokio::test]
    async fn chains_are_merged_by_time_from_wherever_they_are() {
        let (repo, _) = repo().await;
        let told = read(&repo.access, &[SYSTEM]).await.unwrap();
        let times: Vec<&str> = told.entries.iter().map(|entry| entry.detail.as_str()).collect();
        assert_eq!(times, ["10", "30", "40", "50"]);
        assert!(told.faults.is_empty(), "{told}");
    }

    #[tokio::test]
    async fn what_is_missing_or_damaged_is_named() {
        let (repo, names) = repo().await;
        for index in 0..2 {
            repo.access.locations[index].delete(&names[1..2]).await.unwrap();
        }
        let told = read(&repo.access, &[SYSTEM]).await.unwrap();
        assert_eq!(told.entries.len(), 3);
        assert_eq!(told.faults, ["db1-0000000000000001: entry 2 is missing"]);
        assert!(told.to_string().contains("BROKEN"), "{told}");
    }
}
