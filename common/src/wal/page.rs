//! WAL page headers.

use super::fault::{DecodeError, PageField};
use super::version::WalVersion;
use super::{u32_at, u64_at};
use crate::id::SystemId;
use crate::lsn::Lsn;
use crate::segment::{SegmentSize, TimelineId};

/// Bytes in a page of WAL. The long header of every segment says so too, and other sizes are refused.
pub const PAGE_BYTES: u64 = 8192;

pub(super) const SHORT_HEADER_BYTES: usize = 24;
pub(super) const LONG_HEADER_BYTES: usize = 40;

pub(super) const FIRST_IS_CONTRECORD: u16 = 0x1;
pub(super) const LONG_HEADER: u16 = 0x2;
/// A hint that full-page images of the page's records can be dropped. Nothing here looks at it.
const BKP_REMOVABLE: u16 = 0x4;
pub(super) const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x8;
const ALL_INFO: u16 =
    FIRST_IS_CONTRECORD | LONG_HEADER | BKP_REMOVABLE | FIRST_IS_OVERWRITE_CONTRECORD;

/// What every page of a run of WAL must agree with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub version: WalVersion,
    pub segment_size: SegmentSize,
    pub system: SystemId,
    pub timeline: TimelineId,
}

/// What the decoder needs of a page's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageHeader {
    pub timeline: u32,
    /// The record that the page before began goes on here.
    pub continues: bool,
    /// The record that the page before began was given up.
    pub overwrites: bool,
    /// Bytes of the continued record that are still to come, on this page and after it.
    pub remaining: u32,
}

impl Place {
    /// Bytes of the header of the page that holds `lsn`.
    pub fn header_bytes(&self, lsn: Lsn) -> usize {
        match self.segment_size.start_of(lsn) == lsn.align_down(PAGE_BYTES) {
            true => LONG_HEADER_BYTES,
            false => SHORT_HEADER_BYTES,
        }
    }

    /// Checks the header of the page at `page`. `timeline_min` is the timeline of the page before: a segment may begin
    /// as a copy of an ancestor's, so timelines below the expected one are good, but they never fall.
    pub fn check(
        &self,
        page: Lsn,
        header: &[u8],
        timeline_min: u32,
    ) -> Result<PageHeader, DecodeError> {
        let u16_at = |n: usize| u16::from_le_bytes([header[n], header[n + 1]]);
        let u32_at = |n| u32_at(header, n).unwrap_or_default();
        let u64_at = |n| u64_at(header, n).unwrap_or_default();
        let same = |field, expected: u64, found: u64| match expected == found {
            true => Ok(()),
            false => Err(DecodeError::BadPage { page, field, expected, found }),
        };

        same(PageField::Magic, self.version.magic().into(), u16_at(0).into())?;
        let (info, long) = (u16_at(2), header.len() == LONG_HEADER_BYTES);
        let long_bit = if long { LONG_HEADER } else { 0 };
        let info_expected = info & (ALL_INFO & !LONG_HEADER) | long_bit;
        same(PageField::InfoBits, info_expected.into(), info.into())?;
        same(PageField::Address, page.get(), u64_at(8))?;
        let timeline = u32_at(4);
        let timeline_expected = timeline.clamp(timeline_min, self.timeline.get());
        same(PageField::Timeline, timeline_expected.into(), timeline.into())?;
        if long {
            same(PageField::SystemId, self.system.get(), u64_at(24))?;
            same(PageField::SegmentSize, self.segment_size.bytes(), u32_at(32).into())?;
            same(PageField::PageSize, PAGE_BYTES, u32_at(36).into())?;
        }
        Ok(PageHeader {
            timeline,
            continues: info & FIRST_IS_CONTRECORD != 0,
            overwrites: info & FIRST_IS_OVERWRITE_CONTRECORD != 0,
            remaining: u32_at(16),
        })
    }
}
