//! The lease: one agent takes snapshots, indexes and prunes, whoever stores WAL.
//!
//! `lease/<generation>` is created once at each location, never renewed. Whether its holder lives is asked of PostgreSQL: a
//! holder streams through its slot, and the server shows that. No host's clock is compared with another's. The agent
//! of a standby takes it only while nobody has held it, so as the only agent of a cluster; never from another one, whose slot
//! its server does not show. A holder that was only asleep finds a greater generation; what it began
//! without looking readers ignore (`backstay_common::lease`).
//!
//! A location that does not answer, or takes nothing, is left out, and gets the lease when the next snapshot asks. A crash between two
//! locations leaves a generation that is ours where it is, by the holder's number in the state directory.

use crate::connect;
use crate::context::AgentContext;
use crate::durable;
use backstay_common::id::{SnapshotId, random_bytes};
use backstay_common::lease::Lease;
use backstay_common::location::{Location, PutNew};
use backstay_common::name::{ObjectName, folder};
use backstay_common::postgres::{Connection, Mode, literal};
use backstay_common::{Context, Error, Kind, Result};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// How long a location that does not answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Others may be taking it at the same time.
const TRIES_MAX: u32 = 5;
/// A lease names no more snapshots; retention keeps them far below.
const BEGUN_MAX: usize = 100_000;

/// What this agent needs to hold the lease. Cheap to share.
#[derive(Clone, Debug)]
pub struct Leasing {
    context: Arc<AgentContext>,
    /// This state directory's own number.
    holder: [u8; 16],
}

/// What a location that answered knows.
struct Seen {
    /// Its number in the config.
    location: usize,
    /// The newest.
    lease: Option<Lease>,
    begun: BTreeSet<SnapshotId>,
}

impl Leasing {
    /// Reads or makes the holder's number. Blocks for moments.
    pub fn new(context: Arc<AgentContext>) -> Result<Leasing> {
        let holder = read_or_make(&context)?;
        Ok(Leasing { context, holder })
    }

    /// The generation that this agent holds now, taken if nobody alive holds it. [`Kind::Fenced`] if another does, or
    /// may. Ask before each snapshot and each run of prune.
    pub async fn held(&self) -> Result<u64> {
        for _ in 0..TRIES_MAX {
            let seen = self.look().await?;
            let newest = newest(&seen);
            let generation = match &newest {
                Some(lease) if lease.holder == self.holder => {
                    if self.give(&seen, lease.clone()).await? {
                        return Ok(lease.generation);
                    }
                    continue;
                }
                Some(lease) => {
                    self.require_dead(lease).await?;
                    lease.generation + 1
                }
                None => 1,
            };
            let lease = self.next(generation, &seen);
            if self.give(&seen, lease.clone()).await? {
                let before = newest.map_or("nobody".to_string(), |lease| lease.agent.to_string());
                tracing::info!(generation, before, "the lease is taken");
                return Ok(generation);
            }
        }
        Err(Error::new(Kind::Fenced, "other agents keep taking the lease"))
    }

    /// True if no other agent holds the lease, dead or alive: then the agent of a standby need not stand by.
    pub async fn is_free(&self) -> Result<bool> {
        let slot = &self.context.settings.postgres.slot;
        let newest = newest(&self.look().await?);
        Ok(newest.is_none_or(|lease| lease.holder == self.holder || lease.slot == *slot))
    }

    /// Of the lease that anybody holds; 0 as long as nobody has held one.
    pub async fn newest_generation(&self) -> Result<u64> {
        Ok(newest(&self.look().await?).map_or(0, |lease| lease.generation))
    }

    fn next(&self, generation: u64, seen: &[Seen]) -> Lease {
        let begun: BTreeSet<SnapshotId> = seen.iter().flat_map(|s| &s.begun).copied().collect();
        let is_complete = seen.len() == self.context.writers.len() && begun.len() <= BEGUN_MAX;
        Lease {
            generation,
            agent: self.context.settings.agent.clone(),
            slot: self.context.settings.postgres.slot.clone(),
            holder: self.holder,
            begun: begun.into_iter().take(BEGUN_MAX).collect(),
            is_complete,
            made: jiff::Timestamp::now().as_second(),
        }
    }

    /// What every location that answers knows; an error if none does.
    async fn look(&self) -> Result<Vec<Seen>> {
        let asked = self.context.writers.iter().enumerate().map(|(number, writer)| async move {
            tokio::time::timeout(PATIENCE, self.look_at(number, writer.location())).await
        });
        let (mut seen, mut reasons) = (Vec::new(), Vec::new());
        for answer in futures::future::join_all(asked).await {
            match answer {
                Ok(Ok(one)) => seen.push(one),
                Ok(Err(error)) if error.kind() == Kind::Corrupt => return Err(error),
                Ok(Err(error)) => reasons.push(error.message().to_string()),
                Err(_) => reasons.push("no answer within 10 s".to_string()),
            }
        }
        match seen.is_empty() {
            false => Ok(seen),
            true => {
                let reason =
                    format!("no location says who holds the lease: {}", reasons.join("; "));
                Err(Error::new(Kind::Storage, reason))
            }
        }
    }

    async fn look_at(&self, number: usize, location: &Location) -> Result<Seen> {
        location.require_cluster().await?;
        let system = self.context.system;
        let listed = location.list(&folder::leases(system)).await?;
        let newest = listed.into_iter().filter_map(|listed| listed.name).max();
        let lease = match &newest {
            Some(name) => Some(Lease::read(&location.get(name).await?, name)?),
            None => None,
        };
        let listed = location.list(&folder::snapshots(system)).await?;
        let begun = listed.into_iter().filter_map(|listed| match listed.name? {
            ObjectName::Begin { snapshot, .. } | ObjectName::Manifest { snapshot, .. } => {
                Some(snapshot)
            }
            _ => None,
        });
        Ok(Seen { location: number, lease, begun: begun.collect() })
    }

    /// Creates the lease wherever it is not. False if somebody else was first anywhere.
    async fn give(&self, seen: &[Seen], lease: Lease) -> Result<bool> {
        let name = ObjectName::Lease { system: self.context.system, generation: lease.generation };
        let has =
            |one: &&Seen| one.lease.as_ref().is_some_and(|l| l.generation == lease.generation);
        // Equal names are equal bytes: where it is already, it is copied from.
        let (bytes, epoch) = match seen.iter().find(has) {
            Some(one) => {
                let from = self.context.writers[one.location].location();
                (from.get(&name).await?, None)
            }
            None => {
                let epoch = self.context.epochs.current().await?;
                (lease.seal(&epoch, self.context.system).bytes, Some(epoch.id()))
            }
        };
        let mut is_anywhere = seen.iter().any(|one| has(&one));
        let mut refused = None;
        for one in seen.iter().filter(|one| !has(one)) {
            let writer = &self.context.writers[one.location];
            let create = async {
                if let Some(epoch) = epoch {
                    writer.ready(epoch).await?;
                }
                writer.location().put_new(&name, bytes.clone()).await
            };
            let late = || Error::new(Kind::Storage, "no answer within 10 s");
            let put = tokio::time::timeout(PATIENCE, create).await.unwrap_or_else(|_| Err(late()));
            match put {
                Ok(PutNew::Created | PutNew::Present) => is_anywhere = true,
                Ok(PutNew::Conflict) => return Ok(false),
                // As one that does not answer: it takes nothing now, and holds up nobody.
                Err(error) if error.kind() == Kind::Storage => {
                    let location = writer.location().name();
                    let error = error.context(format!("create the lease at {location}"));
                    tracing::warn!("{error}");
                    refused = Some(error);
                }
                Err(error) => return Err(error.context("create the lease")),
            }
        }
        match refused {
            Some(error) if !is_anywhere => Err(error),
            _ => Ok(true),
        }
    }

    /// The holder lives if our server shows that it streams. What shares our slot is us, before the state directory was
    /// lost: nobody else can stream through it.
    async fn require_dead(&self, lease: &Lease) -> Result<()> {
        if lease.slot == self.context.settings.postgres.slot {
            return Ok(());
        }
        self.require_primary().await?;
        let asked = format!(
            "SELECT 1 FROM pg_catalog.pg_replication_slots WHERE slot_name = {} AND active",
            literal(&lease.slot)
        );
        let mut sql = self.sql().await?;
        let is_alive = !sql.query(&asked).await?.is_empty();
        sql.close().await;
        match is_alive {
            false => Ok(()),
            true => {
                let Lease { agent, generation, slot, .. } = lease;
                let reason = format!(
                    "agent {agent} takes the snapshots (lease {generation}), and streams through slot {slot}"
                );
                Err(Error::new(Kind::Fenced, reason).remedy(format!(
                    "ask agent {agent}; this one takes over when that one is gone"
                )))
            }
        }
    }

    async fn require_primary(&self) -> Result<()> {
        let mut sql = self.sql().await?;
        let row = sql.query_one("SELECT pg_is_in_recovery() AS standby").await?;
        let is_standby = row.text("standby")? == "t";
        sql.close().await;
        match is_standby {
            false => Ok(()),
            true => {
                Err(Error::new(Kind::Fenced, "the server is a standby, and its agent stands by")
                    .remedy("ask the agent of the primary"))
            }
        }
    }

    async fn sql(&self) -> Result<Connection> {
        let conninfo = connect::conninfo(&self.context.settings)?;
        Connection::connect(&conninfo, Mode::Sql).await.context("ask who holds the lease")
    }
}

/// Of two agents that made one generation at different locations, neither is to go on with it unless it is one of ours.
fn newest(seen: &[Seen]) -> Option<Lease> {
    let leases = seen.iter().filter_map(|one| one.lease.as_ref());
    leases.max_by_key(|lease| lease.generation).cloned()
}

fn read_or_make(context: &AgentContext) -> Result<[u8; 16]> {
    let path = context.settings.state_dir.join("lease-holder");
    let doing = || format!("read {}", path.display());
    match std::fs::read(&path) {
        Ok(bytes) => bytes.try_into().map_err(|_| {
            Error::new(Kind::Local, format!("{} does not hold 16 bytes", path.display()))
                .remedy("remove it: the agent then takes the lease anew")
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let holder = random_bytes();
            durable::write(&path, &holder).context(format!("write {}", path.display()))?;
            Ok(holder)
        }
        Err(error) => Err(error).context(doing()),
    }
}
