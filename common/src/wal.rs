//! Reading PostgreSQL's write-ahead log, without any I/O.
//!
//! ```text
//!   bytes of WAL, cut anywhere
//!        │ feed
//!        ▼
//!   decode.rs    the state machine: page, record, record over many pages, rest of a switched segment
//!     ├─ version.rs  what differs between PostgreSQL 14 and 18
//!     ├─ page.rs     page headers: magic, address, timeline, system identifier
//!     ├─ partial.rs  a record that is not all there yet
//!     ├─ record.rs   record headers and CRC; the way to a record's main data
//!     └─ fault.rs    what can be wrong, with the position, the expected and the found
//!        │ Event: only what matters to a backup
//!        ▼
//!   event.rs     commits, restore points, checkpoints, parameter changes
//!   touch.rs     which blocks a record changes, for who asks
//!   summary.rs   what the footer of a stored object says about its WAL
//!   testing.rs   makes WAL for tests (feature `testing`)
//! ```
//!
//! What always holds: an [`Event`] has been read from a record whose page headers, `xl_prev` and CRC-32C were
//! right; [`Decoder::record_end`] never passes a byte that has not been checked in that way; the same bytes give the
//! same events however they are cut. A record that is not all there yet is no error but a state: the
//! decoder waits. Memory does not grow with records: bodies are hashed as they pass, and only
//! the few that are read are kept.
//!
//! The decoder holds nothing that outlives it. After a crash a new one starts at any page, most simply the start of a
//! span, and finds the first record by itself; or one goes on at a [`ResumePoint`] that was kept, and checks the
//! chain across the gap.
//!
//! The layout is that of "src/include/access/xlogrecord.h" and "xlog_internal.h", on little-endian servers.

mod decode;
mod event;
mod fault;
mod page;
mod partial;
mod record;
mod summary;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod touch;
mod version;

pub use decode::{Decoder, ResumePoint};
pub use event::{Event, EventKind};
pub use fault::{DecodeError, PageField};
pub use page::PAGE_BYTES;
pub use summary::{Minima, RESTORE_POINTS_MAX, RestorePoint, Summary};
pub use touch::{RelationFiles, Touch};
pub use version::{UnknownVersion, WalVersion};

/// Reads a little-endian number of `N` bytes at `offset`, if it is all there.
fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes_at(bytes, offset).map(u32::from_le_bytes)
}

fn i32_at(bytes: &[u8], offset: usize) -> Option<i32> {
    bytes_at(bytes, offset).map(i32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes_at(bytes, offset).map(u64::from_le_bytes)
}

fn i64_at(bytes: &[u8], offset: usize) -> Option<i64> {
    bytes_at(bytes, offset).map(i64::from_le_bytes)
}
