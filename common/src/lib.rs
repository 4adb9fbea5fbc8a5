//! The repository contract of Backstay: what both programs must agree on.
//!
//! ```text
//! postgres ── stream ─► wal (decode) ─► span ─┐
//!    └─ data files: control, page ─► snapshot ─┤─► seal ─► location
//!                               keys ─ epoch ──┘   (header, frames, footer, trailer)
//! location ─ listing ─► catalog ─► the same, backwards
//! ```
//!
//! In the order in which data meets them:
//!
//! | module | what it is |
//! |---|---|
//! | [`error`] | what went wrong, and what the caller does about it |
//! | [`lsn`], [`segment`], [`pgtime`], [`id`] | PostgreSQL's positions, timelines, clock; identities |
//! | [`config`] | the TOML file, resolved, with every fault at once |
//! | [`postgres`] | the one connection: SQL and replication |
//! | [`control`], [`page`] | `pg_control`, and data pages with their checksums |
//! | [`wal`] | the decoder: pages, records, and the events that recovery targets need |
//! | [`name`] | the one place where names of stored objects are spelt |
//! | [`keys`] | epochs, and the providers that wrap their keys |
//! | [`seal`], [`cbor`], [`pool`] | the envelope of every object; encoded metadata; where codecs run |
//! | [`cluster`], [`origin`], [`span`], [`head`] | the marker of a location; branches; stored WAL; idle coverage |
//! | [`lease`], [`gap`], [`ledger`] | who takes snapshots; WAL that nobody has; what happened |
//! | [`footer`] | an object's metadata, from its two ends |
//! | [`walindex`] | a cache: the footers of many spans in one object |
//! | [`snapshot`] | file maps, file table, manifest |
//! | [`pin`], [`condemned`] | what somebody holds; what prune is about to delete |
//! | [`location`] | one object store that holds a complete copy |
//! | [`catalog`] | what is in the locations, once listed |
//! | [`line`](mod@line) | a branch with its ancestors |
//! | [`retention`] | what must stay, and what may go |
//! | [`say`](mod@say) | what the programs print |
//!
//! [`format`](mod@format) has every byte.

pub mod catalog;
pub mod cbor;
pub mod cluster;
pub mod condemned;
pub mod config;
pub mod control;
pub mod error;
pub mod footer;
pub mod format;
pub mod gap;
pub mod head;
pub mod id;
pub mod keys;
pub mod lease;
pub mod ledger;
pub mod line;
pub mod location;
pub mod lsn;
pub mod name;
pub mod origin;
pub mod page;
pub mod pgtime;
pub mod pin;
pub mod pool;
pub mod postgres;
pub mod retention;
pub mod say;
pub mod seal;
pub mod segment;
pub mod snapshot;
pub mod span;
pub mod wal;
pub mod walindex;

pub use error::{Context, Error, Kind, Result};
