//! The WAL formats of the PostgreSQL majors that are understood.

use std::fmt;

/// The WAL format of one PostgreSQL major, from 14 to 18. Minor releases never change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalVersion(u8);

/// `XLOG_PAGE_MAGIC` ("src/include/access/xlog_internal.h"), by major.
const MAGICS: [(u8, u16); 5] =
    [(14, 0xD10D), (15, 0xD110), (16, 0xD113), (17, 0xD116), (18, 0xD118)];

/// A PostgreSQL major whose WAL is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the WAL of PostgreSQL {0} is not understood, only that of 14 to 18")]
pub struct UnknownVersion(pub u32);

impl WalVersion {
    /// Every version, oldest first.
    pub fn all() -> impl Iterator<Item = WalVersion> {
        MAGICS.iter().map(|&(major, _)| WalVersion(major))
    }

    pub fn from_major(major: u32) -> Result<WalVersion, UnknownVersion> {
        WalVersion::all().find(|v| v.major() == major).ok_or(UnknownVersion(major))
    }

    /// Finds the version from the first two bytes of any WAL page.
    pub fn from_magic(magic: u16) -> Option<WalVersion> {
        WalVersion::all().find(|v| v.magic() == magic)
    }

    /// What each page of it begins with.
    pub fn magic(self) -> u16 {
        MAGICS[usize::from(self.0 - MAGICS[0].0)].1
    }

    pub fn major(self) -> u32 {
        u32::from(self.0)
    }

    /// Bytes in the longest record that the server writes or reads back.
    pub(super) fn record_bytes_max(self) -> u32 {
        match self.0 {
            14 | 15 => (1 << 30) - 1, // the most that palloc gives
            _ => 1020 << 20,          // XLogRecordMaxSize
        }
    }

    /// Extensions may have resource managers of their own.
    pub(super) fn has_custom_managers(self) -> bool {
        self.0 >= 15
    }

    /// The bits of `bimg_info` that mean "has a hole", and any of those that mean "compressed". They changed
    /// places when 15 brought more than one compression.
    pub(super) fn image_bits(self) -> (u8, u8) {
        match self.0 {
            14 => (0x01, 0x02),
            _ => (0x01, 0x04 | 0x08 | 0x10),
        }
    }

    /// Bytes of one dropped-statistics item in a commit or abort record; 14 has none.
    pub(super) fn dropped_stat_bytes(self) -> u64 {
        match self.0 {
            14..=17 => 12,
            _ => 16,
        }
    }

    /// Checkpoints and ends of recovery carry `wal_level`.
    pub(super) fn checkpoints_tell_wal_level(self) -> bool {
        self.0 >= 17
    }
}

impl fmt::Display for WalVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
