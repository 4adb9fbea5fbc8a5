//! `global/pg_control`: what a cluster knows of itself, for PostgreSQL 14 to 18.
//!
//! The server rewrites the file in place while it is read, so a read can be torn; [`read`] reads again until
//! the checksum is right, and calls the file damaged only when it is wrong in the same way twice.

use crate::id::SystemId;
use crate::lsn::Lsn;
use crate::segment::{SegmentSize, TimelineId};
use crate::{Context, Error, Kind, Result};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

/// The size of the file; what follows the structure is zero.
pub const CONTROL_FILE_BYTES: usize = 8192;

/// The file's content ("src/include/catalog/pg_control.h").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    pub system: SystemId,
    pub control_version: u32,
    pub catalog_version: u32,
    major: u32,
    pub state: ClusterState,
    /// When the file was last written, in seconds since 1970 UTC by the server's clock.
    pub written_at: i64,
    /// Where the last checkpoint's record begins.
    pub checkpoint: Lsn,
    /// Where replay from that checkpoint begins.
    pub redo: Lsn,
    /// The last checkpoint's timeline.
    pub timeline: TimelineId,
    pub previous_timeline: TimelineId,
    pub full_page_writes: bool,
    /// How far a standby must replay before it is consistent; `Lsn::INVALID` on a primary.
    pub min_recovery_point: Lsn,
    pub min_recovery_timeline: Option<TimelineId>,
    pub backup_start: Lsn,
    pub backup_end: Lsn,
    pub backup_end_required: bool,
    pub wal_level: WalLevel,
    pub wal_log_hints: bool,
    pub hot_standby: HotStandbySettings,
    /// Bytes in a data page.
    pub block_bytes: u32,
    /// Data pages in one file of a relation.
    pub relation_segment_blocks: u32,
    /// Bytes in a WAL page.
    pub wal_block_bytes: u32,
    pub segment_size: SegmentSize,
    /// Zero for a cluster without page checksums.
    pub data_checksum_version: u32,
}

/// A hot standby must have at least these, or it refuses to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotStandbySettings {
    pub max_connections: i32,
    pub max_worker_processes: i32,
    pub max_wal_senders: i32,
    pub max_prepared_transactions: i32,
    pub max_locks_per_transaction: i32,
}

/// What the cluster was doing when the file was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

/// How much the WAL says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalLevel {
    Minimal,
    Replica,
    Logical,
}

/// Bytes that are not a usable control file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadControlFile {
    #[error("has {0} bytes, too few")]
    Short(usize),
    #[error("was written on a machine with the other byte order")]
    ByteOrder,
    #[error(
        "has version {control} and catalog version {catalog}, not those of PostgreSQL 14 to 18"
    )]
    Version { control: u32, catalog: u32 },
    #[error("has checksum {stored:08X} where {computed:08X} is right")]
    Checksum { stored: u32, computed: u32 },
    #[error("has {value} as its {field}")]
    Value { field: &'static str, value: u64 },
}

impl From<BadControlFile> for Error {
    fn from(bad: BadControlFile) -> Error {
        match bad {
            BadControlFile::ByteOrder | BadControlFile::Version { .. } => {
                Error::new(Kind::Config, bad).remedy(
                    "use a released PostgreSQL 14, 15, 16, 17 or 18 on a little-endian machine",
                )
            }
            _ => Error::new(Kind::Corrupt, bad),
        }
    }
}

impl ControlFile {
    /// Reads the content of the file, and checks its checksum and every value that others build on.
    pub fn parse(bytes: &[u8]) -> Result<ControlFile, BadControlFile> {
        let field = Fields::checked(bytes)?;
        let catalog = field.u32(12);
        let major =
            major_of(catalog).ok_or(BadControlFile::Version { control: field.u32(8), catalog })?;
        Ok(ControlFile {
            system: SystemId::new(field.u64(0)),
            control_version: field.u32(8),
            catalog_version: catalog,
            major,
            state: ClusterState::from_number(field.u32(16))?,
            written_at: field.u64(24) as i64,
            checkpoint: field.lsn(32),
            redo: field.lsn(40),
            timeline: field.timeline(48)?,
            previous_timeline: field.timeline(52)?,
            full_page_writes: field.flag(56),
            min_recovery_point: field.lsn(136),
            min_recovery_timeline: TimelineId::new(field.u32(144)),
            backup_start: field.lsn(152),
            backup_end: field.lsn(160),
            backup_end_required: field.flag(168),
            wal_level: WalLevel::from_number(field.u32(172))?,
            wal_log_hints: field.flag(176),
            hot_standby: HotStandbySettings {
                max_connections: field.i32(180),
                max_worker_processes: field.i32(184),
                max_wal_senders: field.i32(188),
                max_prepared_transactions: field.i32(192),
                max_locks_per_transaction: field.i32(196),
            },
            block_bytes: field.power_of_two(216, "block size", 1024, 32 << 10)?,
            relation_segment_blocks: field.at_least_one(220, "relation segment size")?,
            wal_block_bytes: field.power_of_two(224, "WAL block size", 1024, 64 << 10)?,
            segment_size: SegmentSize::new(field.u32(228)).ok_or(BadControlFile::Value {
                field: "WAL segment size",
                value: field.u32(228).into(),
            })?,
            data_checksum_version: field.u32(252),
        })
    }

    /// PostgreSQL's major version, 14 to 18.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// True if the cluster's pages carry checksums.
    pub fn has_checksums(&self) -> bool {
        self.data_checksum_version != 0
    }
}

/// 14, 15 and 16 share one control version; each major has a catalog version of its own.
fn major_of(catalog_version: u32) -> Option<u32> {
    match catalog_version {
        202107181 => Some(14),
        202209061 => Some(15),
        202307071 => Some(16),
        202406281 => Some(17),
        202506291 => Some(18),
        _ => None,
    }
}

/// Where the checksum is: it covers all that precedes it.
fn checksum_offset(control_version: u32) -> Option<usize> {
    match control_version {
        1300 | 1700 => Some(288),
        1800 => Some(292),
        _ => None,
    }
}

/// The structure, whose checksum has been found right.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn checked(bytes: &'a [u8]) -> Result<Fields<'a>, BadControlFile> {
        let short = BadControlFile::Short(bytes.len());
        if bytes.len() < 296 {
            return Err(short);
        }
        let fields = Fields(bytes);
        let (control, catalog) = (fields.u32(8), fields.u32(12));
        let end = match checksum_offset(control) {
            Some(end) => end,
            None if checksum_offset(control.swap_bytes()).is_some() => {
                return Err(BadControlFile::ByteOrder);
            }
            None => return Err(BadControlFile::Version { control, catalog }),
        };
        let (stored, computed) = (fields.u32(end), crc32c::crc32c(&bytes[..end]));
        match stored == computed {
            true => Ok(fields),
            false => Err(BadControlFile::Checksum { stored, computed }),
        }
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("a slice of N bytes")
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn i32(&self, at: usize) -> i32 {
        i32::from_le_bytes(self.array(at))
    }

    fn flag(&self, at: usize) -> bool {
        self.0[at] != 0
    }

    fn lsn(&self, at: usize) -> Lsn {
        Lsn::new(self.u64(at))
    }

    fn timeline(&self, at: usize) -> Result<TimelineId, BadControlFile> {
        TimelineId::new(self.u32(at)).ok_or(BadControlFile::Value { field: "timeline", value: 0 })
    }

    fn at_least_one(&self, at: usize, field: &'static str) -> Result<u32, BadControlFile> {
        match self.u32(at) {
            0 => Err(BadControlFile::Value { field, value: 0 }),
            value => Ok(value),
        }
    }

    fn power_of_two(
        &self,
        at: usize,
        field: &'static str,
        least: u32,
        most: u32,
    ) -> Result<u32, BadControlFile> {
        match self.u32(at) {
            value if value.is_power_of_two() && (least..=most).contains(&value) => Ok(value),
            value => Err(BadControlFile::Value { field, value: value.into() }),
        }
    }
}

impl ClusterState {
    fn from_number(number: u32) -> Result<ClusterState, BadControlFile> {
        Ok(match number {
            0 => ClusterState::StartingUp,
            1 => ClusterState::ShutDown,
            2 => ClusterState::ShutDownInRecovery,
            3 => ClusterState::ShuttingDown,
            4 => ClusterState::InCrashRecovery,
            5 => ClusterState::InArchiveRecovery,
            6 => ClusterState::InProduction,
            _ => return Err(BadControlFile::Value { field: "state", value: number.into() }),
        })
    }
}

impl WalLevel {
    fn from_number(number: u32) -> Result<WalLevel, BadControlFile> {
        Ok(match number {
            0 => WalLevel::Minimal,
            1 => WalLevel::Replica,
            2 => WalLevel::Logical,
            _ => return Err(BadControlFile::Value { field: "wal_level", value: number.into() }),
        })
    }
}

/// A server that keeps writing the file for this many reads in a row has never been seen.
const READS_MAX: usize = 100;
const READ_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// Reads `path` until its checksum is right. Blocks, for a second at the most.
pub fn read(path: &Path) -> Result<ControlFile> {
    read_with_bytes(path).map(|(control, _)| control)
}

/// As [`read`], with the very bytes that were checked, for whoever stores them.
pub fn read_with_bytes(path: &Path) -> Result<(ControlFile, Vec<u8>)> {
    settle(|| read_once(path)).context(format_args!("read {}", path.display()))
}

fn read_once(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(CONTROL_FILE_BYTES);
    let file = std::fs::File::open(path).context("open")?;
    file.take(CONTROL_FILE_BYTES as u64).read_to_end(&mut bytes).context("read")?;
    Ok(bytes)
}

/// Repeats a read that may be torn, until it is right or wrong in the same way twice running.
fn settle(mut read: impl FnMut() -> Result<Vec<u8>>) -> Result<(ControlFile, Vec<u8>)> {
    let mut before: Option<Vec<u8>> = None;
    for _ in 0..READS_MAX {
        let bytes = read()?;
        match ControlFile::parse(&bytes) {
            Ok(control) => return Ok((control, bytes)),
            Err(bad) if before.as_ref() == Some(&bytes) => return Err(bad.into()),
            Err(_) => before = Some(bytes),
        }
        std::thread::sleep(READ_AGAIN_AFTER);
    }
    Err(Error::new(Kind::Corrupt, format_args!("changed in each of {READS_MAX} reads")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealed(mut bytes: Vec<u8>, crc_at: usize) -> Vec<u8> {
        let crc = crc32c::crc32c(&bytes[..crc_at]);
        bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn put(bytes: &mut [u8], at: usize, value: u32) {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn sample(control: u32, catalog: u32, crc_at: usize) -> Vec<u8> {
        let mut bytes = vec![0; CONTROL_FILE_BYTES];
        bytes[..8].copy_from_slice(&7_312_345_678_901_234_567u64.to_le_bytes());
        let fields = [
            (8, control),
            (12, catalog),
            (16, 6),
            (32, 0x100),
            (40, 0xA0),
            (48, 3),
            (52, 2),
            (172, 1),
            (180, 100),
            (184, 8),
            (188, 10),
            (192, 0),
            (196, 64),
            (216, 8192),
            (220, 131_072),
            (224, 8192),
            (228, 16 << 20),
            (252, 1),
        ];
        fields.iter().for_each(|&(at, value)| put(&mut bytes, at, value));
        sealed(bytes, crc_at)
    }

    #[test]
    fn every_major_is_known() {
        for (major, control, catalog, crc_at) in [
            (14, 1300, 202107181, 288),
            (15, 1300, 202209061, 288),
            (16, 1300, 202307071, 288),
            (17, 1700, 202406281, 288),
            (18, 1800, 202506291, 292),
        ] {
            let parsed = ControlFile::parse(&sample(control, catalog, crc_at)).unwrap();
            assert_eq!(parsed.major(), major);
            assert_eq!(parsed.system.to_string(), "7312345678901234567");
            assert_eq!((parsed.timeline.get(), parsed.previous_timeline.get()), (3, 2));
            assert_eq!((parsed.checkpoint, parsed.redo), (Lsn::new(0x100), Lsn::new(0xA0)));
            assert_eq!(parsed.wal_level, WalLevel::Replica);
            assert_eq!(parsed.state, ClusterState::InProduction);
            assert_eq!(parsed.min_recovery_timeline, None);
            assert_eq!(parsed.hot_standby.max_locks_per_transaction, 64);
            assert_eq!(parsed.segment_size.bytes(), 16 << 20);
            assert!(parsed.has_checksums());
        }
    }

    #[test]
    fn other_files_are_refused_by_reason() {
        let good = sample(1300, 202209061, 288);
        assert_eq!(ControlFile::parse(&good[..100]), Err(BadControlFile::Short(100)));
        let old = sample(1201, 201909212, 288);
        assert!(matches!(ControlFile::parse(&old), Err(BadControlFile::Version { .. })));
        let beta = sample(1300, 202205191, 288);
        assert!(matches!(ControlFile::parse(&beta), Err(BadControlFile::Version { .. })));
        let mut swapped = good.clone();
        put(&mut swapped, 8, 1300u32.swap_bytes());
        assert_eq!(ControlFile::parse(&swapped), Err(BadControlFile::ByteOrder));
        for (at, value) in [(16, 7), (48, 0), (172, 3), (216, 8000), (220, 0), (224, 0), (228, 3)] {
            let mut bad = good.clone();
            put(&mut bad, at, value);
            let refused = ControlFile::parse(&sealed(bad, 288));
            assert!(matches!(refused, Err(BadControlFile::Value { .. })), "{at}: {refused:?}");
        }
    }

    proptest! {
        #[test]
        fn no_flipped_bit_passes(at in 0usize..292, bit in 0u32..8) {
            let mut bytes = sample(1300, 202209061, 288);
            bytes[at] ^= 1u8 << bit;
            prop_assert!(ControlFile::parse(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = ControlFile::parse(&bytes);
        }
    }

    #[test]
    fn a_torn_read_is_repeated_and_damage_is_named() {
        let good = sample(1300, 202209061, 288);
        let mut torn = good.clone();
        torn[33] ^= 1;
        let mut reads = vec![good.clone(), torn.clone()];
        let (_, bytes) = settle(|| Ok(reads.pop().unwrap())).unwrap();
        assert_eq!(bytes, good);

        let mut reads = 0;
        let error = settle(|| {
            reads += 1;
            Ok(torn.clone())
        })
        .unwrap_err();
        assert_eq!((reads, error.kind()), (2, Kind::Corrupt));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read(Path::new("/nowhere/global/pg_control")).unwrap_err();
        assert!(error.message().contains("/nowhere/global/pg_control"), "{error}");
    }
}
