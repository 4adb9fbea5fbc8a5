//! WAL records: their header, their CRC, and the way to their main data.

use super::fault::DecodeError;
use super::touch::RelationFiles;
use super::u32_at;
use super::version::WalVersion;
use crate::lsn::Lsn;

/// Bytes of `XLogRecord`, which every record begins with.
pub(super) const HEADER_BYTES: usize = 24;
/// The header's bytes that the CRC covers: all but the CRC itself.
const CRC_OFFSET: usize = 20;
/// Records begin at multiples of this.
const ALIGNMENT: u32 = 8;

pub(super) const RM_XLOG: u8 = 0;
pub(super) const RM_XACT: u8 = 1;
/// RM_LOGICALMSG, the last of the server's own.
const RM_BUILTIN_MAX: u8 = 21;
const RM_CUSTOM_MIN: u8 = 128;

const XLOG_SWITCH: u8 = 0x40;
const XLOG_FPI_FOR_HINT: u8 = 0xA0;
const XLOG_FPI: u8 = 0xB0;
/// The rmgr's half of `xl_info`.
pub(super) const OPCODE: u8 = 0xF0;

/// Body bytes that are kept of a record of the transaction manager: commit records may list millions of things.
const XACT_KEPT_MAX: usize = 64 << 20;
/// Body bytes that are kept of a record of the WAL's own manager, which are small.
const XLOG_KEPT_MAX: usize = 64 << 10;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RecordHeader {
    pub total: u32,
    pub xid: u32,
    pub prev: Lsn,
    pub info: u8,
    pub manager: u8,
    pub crc: u32,
}

impl RecordHeader {
    #[inline]
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> RecordHeader {
        let [t0, t1, t2, t3, x0, x1, x2, x3, prev @ .., info, manager, _, _, c0, c1, c2, c3] =
            *bytes;
        RecordHeader {
            total: u32::from_le_bytes([t0, t1, t2, t3]),
            xid: u32::from_le_bytes([x0, x1, x2, x3]),
            prev: Lsn::new(u64::from_le_bytes(prev)),
            info,
            manager,
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }

    /// Checks all that can be told before the body is there. `prev` is the record before, if it is known.
    #[inline]
    pub fn check(
        &self,
        version: WalVersion,
        lsn: Lsn,
        prev: Option<Lsn>,
    ) -> Result<(), DecodeError> {
        check_length(version, lsn, self.total)?;
        let known = self.manager <= RM_BUILTIN_MAX
            || self.manager >= RM_CUSTOM_MIN && version.has_custom_managers();
        if !known {
            return Err(DecodeError::BadRecord { lsn, reason: "no such resource manager" });
        }
        match prev {
            Some(expected) if self.prev != expected => {
                Err(DecodeError::BadPrev { lsn, expected, found: self.prev })
            }
            None if self.prev >= lsn => {
                Err(DecodeError::BadRecord { lsn, reason: "says that it follows a later record" })
            }
            _ => Ok(()),
        }
    }

    /// Compares the CRC. `body_crc` is that of everything after the header; the header comes last.
    #[inline]
    pub fn check_crc(
        &self,
        lsn: Lsn,
        header: &[u8; HEADER_BYTES],
        body_crc: u32,
    ) -> Result<(), DecodeError> {
        let found = crc32c::crc32c_append(body_crc, &header[..CRC_OFFSET]);
        match found == self.crc {
            true => Ok(()),
            false => Err(DecodeError::BadCrc { lsn, expected: self.crc, found }),
        }
    }

    /// How much of the body is to be kept for reading it; zero for all but a few kinds.
    #[inline]
    pub fn kept_bytes(&self) -> usize {
        match (self.manager, self.info & OPCODE) {
            (RM_XACT, _) => XACT_KEPT_MAX,
            (RM_XLOG, XLOG_FPI | XLOG_FPI_FOR_HINT) => 0,
            (RM_XLOG, _) => XLOG_KEPT_MAX,
            _ => 0,
        }
    }

    /// The rest of the segment holds no records.
    #[inline]
    pub fn is_switch(&self) -> bool {
        self.manager == RM_XLOG && self.info & OPCODE == XLOG_SWITCH
    }
}

#[inline]
pub(super) fn check_length(version: WalVersion, lsn: Lsn, total: u32) -> Result<(), DecodeError> {
    let expected_max = version.record_bytes_max();
    match (HEADER_BYTES as u32..=expected_max).contains(&total) {
        true => Ok(()),
        false => Err(DecodeError::BadLength { lsn, expected_max, found: total }),
    }
}

/// Bytes that a record of `total` bytes takes up, with the padding behind it.
#[inline]
pub(super) fn padded(total: u32) -> u32 {
    total.next_multiple_of(ALIGNMENT)
}

/// Finds the main data in a record's body, past block references, images and block data
/// (`DecodeXLogRecord` in "src/backend/access/transam/xlogreader.c").
///
/// `kept` is the beginning of the body, `body_bytes` its whole length; what comes back ends where `kept` ends.
pub(super) fn main_data(
    version: WalVersion,
    kept: &[u8],
    body_bytes: usize,
) -> Result<&[u8], &'static str> {
    parts(version, kept, body_bytes, &mut |_, _, _| {})
}

/// As [`main_data`], and names the blocks that the record refers to: files, fork, block.
pub(super) fn parts<'k>(
    version: WalVersion,
    kept: &'k [u8],
    body_bytes: usize,
    on_block: &mut dyn FnMut(RelationFiles, u8, u32),
) -> Result<&'k [u8], &'static str> {
    let mut walk = Walk { rest: kept, payload: 0, main: 0, files: None, on_block };
    while body_bytes - (kept.len() - walk.rest.len()) > walk.payload {
        walk.header(version).ok_or("its block headers make no sense")?;
    }
    let headers = kept.len() - walk.rest.len();
    if headers + walk.payload != body_bytes {
        return Err("its parts do not add up to its length");
    }
    Ok(kept.get(body_bytes - walk.main..).unwrap_or_default())
}

/// The part headers that are still to be read, and the bytes that those read so far announce.
struct Walk<'a, 'f> {
    rest: &'a [u8],
    payload: usize,
    main: usize,
    /// Those of the block before.
    files: Option<RelationFiles>,
    on_block: &'f mut dyn FnMut(RelationFiles, u8, u32),
}

impl<'a> Walk<'a, '_> {
    const DATA_SHORT: u8 = 255;
    const DATA_LONG: u8 = 254;
    const ORIGIN: u8 = 253;
    const TOPLEVEL_XID: u8 = 252;
    const BLOCK_ID_MAX: u8 = 32;

    fn header(&mut self, version: WalVersion) -> Option<()> {
        let id = self.take(1)?[0];
        match id {
            Self::DATA_SHORT => self.main = self.take(1)?[0].into(),
            Self::DATA_LONG => self.main = u32_at(self.take(4)?, 0)? as usize,
            Self::ORIGIN => return self.take(2).map(drop),
            Self::TOPLEVEL_XID => return self.take(4).map(drop),
            0..=Self::BLOCK_ID_MAX => return self.block(version),
            _ => return None,
        }
        self.payload = self.payload.checked_add(self.main)?;
        Some(())
    }

    fn block(&mut self, version: WalVersion) -> Option<()> {
        const FORK: u8 = 0x0F;
        const HAS_IMAGE: u8 = 0x10;
        const SAME_RELATION: u8 = 0x80;
        let flags = self.take(1)?[0];
        self.payload += self.u16()?;
        if flags & HAS_IMAGE != 0 {
            self.payload += self.u16()?;
            let (_hole_offset, info) = (self.u16()?, self.take(1)?[0]);
            let (has_hole, compressed) = version.image_bits();
            if info & has_hole != 0 && info & compressed != 0 {
                self.u16()?;
            }
        }
        if flags & SAME_RELATION == 0 {
            let files = self.take(12)?;
            self.files = Some(RelationFiles {
                tablespace: u32_at(files, 0)?,
                database: u32_at(files, 4)?,
                relation: u32_at(files, 8)?,
            });
        }
        let block = u32_at(self.take(4)?, 0)?;
        (self.on_block)(self.files?, flags & FORK, block);
        Some(())
    }

    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(bytes)?;
        self.rest = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<usize> {
        let bytes = self.take(2)?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]).into())
    }
}
