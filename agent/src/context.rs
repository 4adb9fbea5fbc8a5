//! What every task of the agent is given.

use crate::alarms::Alarms;
use crate::epochs::Epochs;
use crate::ledger::Ledger;
use crate::prune::Systems;
use crate::sync::{Damage, Strays};
use crate::writer::Writer;
use backstay_common::config::Settings;
use backstay_common::id::SystemId;
use backstay_common::ledger::Event;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio_util::sync::CancellationToken;

/// Settings and the things made from them. Shared by all tasks of one agent.
#[derive(Debug)]
pub struct AgentContext {
    pub settings: Settings,
    pub system: SystemId,
    /// `server_version_num` of the server, such as 150018.
    pub server_version: u32,
    pub segment_size: backstay_common::segment::SegmentSize,
    /// In the order of the config.
    pub writers: Vec<Arc<Writer>>,
    pub epochs: Arc<Epochs>,
    /// The server was away at the start, and is taken for the one that was here before.
    pub is_recalled: bool,
    /// PostgreSQL has said that no commit waits for our spool.
    pub nobody_waits: AtomicBool,
    /// PostgreSQL has said that no commit waits for us at all.
    pub is_asynchronous: AtomicBool,
    pub alarms: Arc<Alarms>,
    pub ledger: Ledger,
    /// The systems that the cluster has had, for prune.
    pub systems: Systems,
    /// WAL that was copied while it was being shipped.
    pub strays: Strays,
    /// Objects that were found damaged, and not put right yet.
    pub damage: Damage,
    /// Cancelled when the agent shall stop.
    pub stop: CancellationToken,
}

impl AgentContext {
    /// PostgreSQL's major version.
    pub fn major(&self) -> u32 {
        self.server_version / 10_000
    }

    /// Notes in the ledger what has been done. What cannot be noted is an alarm, and undoes nothing. Blocks for moments.
    pub fn tell(&self, event: Event, subject: impl ToString, detail: impl ToString) {
        if let Err(error) = self.ledger.note(event, subject, detail) {
            self.alarms.raise("ledger-behind", "", error);
        }
    }
}
