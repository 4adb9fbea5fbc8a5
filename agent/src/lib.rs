//! The sidecar: it writes.
//!
//! ```text
//!                 PostgreSQL
//!       walsender │        │ data directory, or BASE_BACKUP
//!                 ▼        ▼
//!               wal      snapshot ◄── keeper ◄── schedule, control ("snapshot"), first start
//!                 │        │
//!                 ▼        ▼
//!               writer (wraps first) ─► locations          sync: from one location to another
//!                 │
//!                 ▼
//!               status, alarms ─► control ("status")
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`connect`] | who the server is, and whether it can be backed up |
//! | [`init`], [`check`] | the verbs that come before `run` |
//! | [`wal`] | receive, decode, spool, ship, acknowledge |
//! | [`snapshot`] | read the data directory or receive it, pack it, commit the manifest |
//! | [`schedule`], [`keeper`] | when a snapshot is taken, and the one task that takes it |
//! | [`lease`] | which agent may |
//! | [`ledger`] | what happened, told to every location |
//! | [`epochs`], [`writer`] | data keys; writing to a location in the order of the format |
//! | [`copy`] | one object from one location to another |
//! | [`sync`] | compares the locations, copies to each what it lacks, replaces what is damaged |
//! | [`prune`] | deletes what no moment of the window needs |
//! | [`synchronous`] | whether commits wait for this agent |
//! | `indexer` | footers of many spans in one object |
//! | [`control`], [`status`], [`alarms`] | what the running agent tells |
//! | [`context`], [`allocator`], `durable` | what every task is given; how memory is given back; files that are there whole |

pub mod alarms;
pub mod allocator;
pub mod check;
pub mod connect;
pub mod context;
pub mod control;
pub mod copy;
mod durable;
pub mod epochs;
mod indexer;
pub mod init;
pub mod keeper;
pub mod lease;
pub mod ledger;
pub mod prune;
mod run;
pub mod schedule;
pub mod snapshot;
pub mod status;
pub mod sync;
pub mod synchronous;
pub mod wal;
pub mod writer;

pub use run::run;
