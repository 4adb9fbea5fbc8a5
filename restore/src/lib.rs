//! The CLI: it lists, plans and restores, and writes nothing to a location but pins on what it reads.
//!
//! ```text
//! cli.rs            what was typed
//!   │
//! access.rs         which locations answer, and the key
//!   │
//! target.rs         the moment after --to
//!   │
//! resolve.rs        an exact position, a branch, a snapshot ◄── wal_source.rs: any WAL, from wherever it is whole
//!   │
//! plan.rs           what follows from that, frozen and printed          list.rs: what could be asked for
//!   │
//! restore.rs        one screen: from the plan to the open cluster
//!   ├ directory.rs      may it be used? locked, marked, moved aside      running.rs, owner.rs, layout.rs, binaries.rs
//!   ├ pin.rs            what is read is held, so that prune leaves it alone
//!   ├ fetch.rs          frames, from whichever location has them whole
//!   ├ materialize.rs    each page at its place, then all of it on disk
//!   ├ settings_files.rs what recovery needs, what the original's role was
//!   ├ wal_spool.rs      WAL in the clear, ahead of replay ──► wal_fetch.rs: restore_command; recovery_end.rs
//!   ├ server.rs         a private server that replays, then the operator's
//!   ├ replay.rs         watched to the target, promoted
//!   └ report.rs         what was reached, lost, cleared; how long it took
//! ```
//!
//! keys.rs makes keys; ledger.rs tells what happened; progress.rs shows how far a phase has come.

pub mod access;
pub mod binaries;
pub mod cli;
pub mod directory;
pub mod fetch;
pub mod keys;
pub mod layout;
pub mod ledger;
pub mod list;
pub mod materialize;
pub mod owner;
pub mod pin;
pub mod plan;
pub mod progress;
pub mod recovery_commands;
pub mod recovery_end;
pub mod replay;
pub mod report;
pub mod resolve;
pub mod restore;
mod rounds;
pub mod running;
pub mod server;
pub mod settings_files;
pub mod target;
#[cfg(test)]
mod testing;
pub mod wal_fetch;
pub mod wal_source;
pub mod wal_spool;
