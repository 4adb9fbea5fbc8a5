//! What can be wrong with WAL.

use crate::error::{Error, Kind};
use crate::lsn::Lsn;
use std::fmt;

/// Why the decoder goes no further. It then stands at its last good record's end, and can be fed from there again.
///
/// A recycled segment file holds old WAL behind its valid part: whoever reads `pg_wal` of a stopped server must
/// take every one of these as the end of the WAL. In a stream or an archive only `EndOfWal` may be innocent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Zeros where a record or a page should begin. `at` is where the valid WAL ends.
    #[error("the WAL ends at {at}: zeros follow")]
    EndOfWal { at: Lsn },
    /// A field of a page's header is off.
    #[error("WAL page {page}: {field} is {found:#X}, not {expected:#X}")]
    BadPage { page: Lsn, field: PageField, expected: u64, found: u64 },
    /// No record has such a length.
    #[error("WAL record at {lsn}: a length of {found} bytes, not 24 to {expected_max}")]
    BadLength { lsn: Lsn, expected_max: u32, found: u32 },
    /// The record does not follow the one before it: bytes are missing, or were never part of this WAL.
    #[error("WAL record at {lsn}: says that it follows {found}, not {expected}")]
    BadPrev { lsn: Lsn, expected: Lsn, found: Lsn },
    /// The bytes are not those that the server wrote. `expected` stands in the record.
    #[error("WAL record at {lsn}: its CRC-32C is {found:08X}, not {expected:08X}")]
    BadCrc { lsn: Lsn, expected: u32, found: u32 },
    /// The record is whole but makes no sense.
    #[error("WAL record at {lsn}: {reason}")]
    BadRecord { lsn: Lsn, reason: &'static str },
    /// No page and no record begins there.
    #[error("WAL cannot be read from {lsn}: neither a page nor a record begins there")]
    BadStart { lsn: Lsn },
}

/// A field of a WAL page's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageField {
    Magic,
    InfoBits,
    Address,
    Timeline,
    SystemId,
    SegmentSize,
    PageSize,
    /// `xlp_rem_len`: what is left of the record that the page before began.
    Remaining,
}

impl fmt::Display for PageField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PageField::Magic => "the magic number",
            PageField::InfoBits => "the set of info bits",
            PageField::Address => "the page address",
            PageField::Timeline => "the timeline",
            PageField::SystemId => "the system identifier",
            PageField::SegmentSize => "the segment size",
            PageField::PageSize => "the page size",
            PageField::Remaining => "the rest of the continued record",
        })
    }
}

impl DecodeError {
    /// True where zeros follow the last record, which is how WAL ends in a file that was filled with zeros.
    pub fn is_end_of_wal(&self) -> bool {
        matches!(self, DecodeError::EndOfWal { .. })
    }
}

impl From<DecodeError> for Error {
    fn from(fault: DecodeError) -> Error {
        let kind = match fault {
            DecodeError::EndOfWal { .. } => Kind::Missing,
            DecodeError::BadStart { .. } => Kind::Bug,
            _ => Kind::Corrupt,
        };
        Error::new(kind, fault)
    }
}
