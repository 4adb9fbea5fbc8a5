//! The sidecar: it writes.
//!
//! ```text
//!                 PostgreSQL
//!       walsender │        │ data directory
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
//! | [`snapshot`] | read the data directory, pack it, commit the manifest |
//! | [`schedule`], [`keeper`] | when a snapshot is taken, and the one task that takes it |
//! | [`epochs`], [`writer`] | data keys; writing to a location in the order of the format |
//! | [`sync`] | copies to a location what it lacks |
//! | `indexer` | footers of many spans in one object |
//! | [`control`], [`status`], [`alarms`] | what the running agent tells |
//! | [`context`] | what every task is given |

pub mod alarms;
pub mod check;
pub mod connect;
pub mod context;
pub mod control;
pub mod epochs;
mod indexer;
pub mod init;
pub mod keeper;
mod run;
pub mod schedule;
pub mod snapshot;
pub mod status;
pub mod sync;
pub mod wal;
pub mod writer;

pub use run::run;
