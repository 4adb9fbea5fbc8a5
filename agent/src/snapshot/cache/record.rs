//! What the page-hash cache says of each file, and of itself.

use backstay_common::cbor::Fields;
use backstay_common::id::{SnapshotId, SystemId};
use backstay_common::snapshot::{BytesRef, Content};
use minicbor::{Decode, Encode};

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct FileRecord {
    #[n(0)]
    pub path: String,
    /// Bytes; no file without any is recorded.
    #[n(1)]
    pub size: u64,
    #[cbor(n(2), with = "minicbor::bytes")]
    pub digest: [u8; 32],
    #[n(3)]
    pub content: Content,
    /// Where the page hashes of each part are in the cache.
    #[n(4)]
    pub chunks: Vec<u64>,
    /// Where the encoded map is in the cache, for mapped content.
    #[n(5)]
    pub map: Option<MapPlace>,
    /// Absent where the content comes from a location.
    #[n(6)]
    pub stat: Option<FileStat>,
    /// Pages whose checksum was wrong.
    #[n(7)]
    pub doubts: Vec<DoubtRecord>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct MapPlace {
    #[n(0)]
    pub at: u64,
    #[n(1)]
    pub bytes: u64,
}

/// What the file system said of a file before it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct FileStat {
    #[n(0)]
    pub device: u64,
    #[n(1)]
    pub inode: u64,
    /// Nanoseconds since 1970.
    #[n(2)]
    pub changed: i64,
    /// Bytes.
    #[n(3)]
    pub size: u64,
    /// Nanoseconds since 1970; the reading began then or later.
    #[n(4)]
    pub read_began: i64,
}

impl FileStat {
    /// True if a file that now has `self` has the very bytes that were read when it had `then`. A change within
    /// the clock's tick of the reading would not show, hence the distance.
    pub fn is_unchanged_since(&self, then: &FileStat) -> bool {
        const DISTANCE: i64 = 2_000_000_000;
        let same = |stat: &FileStat| (stat.device, stat.inode, stat.changed, stat.size);
        same(self) == same(then) && then.changed.saturating_add(DISTANCE) <= then.read_began
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct DoubtRecord {
    /// In the file.
    #[n(0)]
    pub page: u32,
}

/// What the cache is of.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Summary {
    #[n(0)]
    pub snapshot: SnapshotId,
    #[n(1)]
    pub system: SystemId,
    /// [`super::fingerprint`] of the key of the hashes.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub key: [u8; 32],
    #[n(3)]
    pub page_bytes: u32,
    /// Every page was held to its checksum, and [`FileRecord::doubts`] has all that failed.
    #[n(4)]
    pub judged: bool,
    /// The timeline that the server was on; 0 where that is not known.
    #[n(5)]
    pub timeline: u32,
    /// When all files were read for the last time, in seconds since 1970; 0 where that is not known.
    #[n(6)]
    pub all_read: i64,
    /// The parts of the file table.
    #[n(7)]
    pub table: Vec<SharedPart>,
}

/// A part of the file table that the next snapshot refers to if it has the very same.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct SharedPart {
    /// BLAKE3 of the encoded part.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub hash: [u8; 32],
    #[n(1)]
    pub place: BytesRef,
}

impl Fields for FileRecord {
    const KNOWN: u64 = 8;
    const WHAT: &'static str = "a record of the page-hash cache";
}

impl Fields for Summary {
    const KNOWN: u64 = 8;
    const WHAT: &'static str = "the footer of the page-hash cache";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_next_to_the_reading_is_not_trusted() {
        let second = 1_000_000_000;
        let then = FileStat {
            device: 1,
            inode: 2,
            changed: 10 * second,
            size: 5,
            read_began: 12 * second,
        };
        let now = FileStat { read_began: 99 * second, ..then };
        assert!(now.is_unchanged_since(&then));
        assert!(!now.is_unchanged_since(&FileStat { read_began: 12 * second - 1, ..then }));
        for other in [
            FileStat { device: 9, ..now },
            FileStat { inode: 9, ..now },
            FileStat { changed: 10 * second + 1, ..now },
            FileStat { size: 6, ..now },
        ] {
            assert!(!other.is_unchanged_since(&then), "{other:?}");
        }
    }
}
