//! Makes WAL for tests: valid pages and records of any version and segment size.

use super::page::{
    FIRST_IS_CONTRECORD, FIRST_IS_OVERWRITE_CONTRECORD, LONG_HEADER, LONG_HEADER_BYTES, PAGE_BYTES,
    SHORT_HEADER_BYTES,
};
use super::record::{HEADER_BYTES, RM_XACT, RM_XLOG};
use super::version::WalVersion;
use crate::id::SystemId;
use crate::lsn::{Lsn, LsnRange};
use crate::segment::{SegmentSize, TimelineId};

/// RM_HEAP: a manager whose records mean nothing to a backup.
const RM_HEAP: u8 = 10;
const PAGE: usize = PAGE_BYTES as usize;

/// Writes one timeline's WAL into memory, from a page's start on.
#[derive(Clone, Debug)]
pub struct WalBuilder {
    version: WalVersion,
    segment_size: SegmentSize,
    system: SystemId,
    timeline: TimelineId,
    start: Lsn,
    prev: Lsn,
    bytes: Vec<u8>,
    records: Vec<LsnRange>,
    /// Bytes of the record being written that are still to come, for the headers of the pages that it crosses.
    remaining: u32,
    /// The page that begins next drops the record that broke off before it.
    overwrites: bool,
}

impl WalBuilder {
    /// `start` is a page's start, other than the very first, for there is no record before that.
    pub fn new(
        version: WalVersion,
        segment_size: SegmentSize,
        system: SystemId,
        timeline: TimelineId,
        start: Lsn,
    ) -> WalBuilder {
        assert!(start.is_valid() && start == start.align_down(PAGE_BYTES), "{start} is no page");
        WalBuilder {
            version,
            segment_size,
            system,
            timeline,
            start,
            prev: Lsn::new(start.get() - 64),
            bytes: Vec::new(),
            records: Vec::new(),
            remaining: 0,
            overwrites: false,
        }
    }

    /// All that has been written.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub fn start(&self) -> Lsn {
        self.start
    }

    /// Where the next byte goes.
    pub fn position(&self) -> Lsn {
        self.start.add(self.bytes.len() as u64)
    }

    /// Every complete record: its start, and its end with padding.
    pub fn records(&self) -> &[LsnRange] {
        &self.records
    }

    /// Pages from here on carry this timeline.
    pub fn set_timeline(&mut self, timeline: TimelineId) {
        self.timeline = timeline;
    }

    /// Writes a record whose main data is `main`; returns its start.
    pub fn record(&mut self, manager: u8, info: u8, xid: u32, main: &[u8]) -> Lsn {
        let mut body = match u8::try_from(main.len()) {
            Ok(0) => Vec::new(),
            Ok(length) => vec![255, length],
            Err(_) => {
                let length = u32::try_from(main.len()).expect("a record is below 1 GiB");
                [&[254u8][..], &length.to_le_bytes()].concat()
            }
        };
        body.extend_from_slice(main);
        self.record_body(manager, info, xid, &body)
    }

    /// Writes a record with this very body; returns its start.
    pub fn record_body(&mut self, manager: u8, info: u8, xid: u32, body: &[u8]) -> Lsn {
        let record = self.encode(manager, info, xid, body);
        let start = self.begin();
        self.put(&record);
        self.pad();
        self.prev = start;
        self.records.push(LsnRange::new(start, self.position()));
        start
    }

    /// Ordinary data of `bytes` bytes in one record.
    pub fn ordinary(&mut self, xid: u32, bytes: usize) -> Lsn {
        let data: Vec<u8> = (0..bytes).map(|n| (n * 31 + bytes) as u8).collect();
        self.record(RM_HEAP, 0, xid, &data)
    }

    /// `time` here and below is in microseconds since 2000.
    pub fn commit(&mut self, xid: u32, time: i64) -> Lsn {
        self.record(RM_XACT, 0x00, xid, &time.to_le_bytes())
    }

    pub fn abort(&mut self, xid: u32, time: i64) -> Lsn {
        self.record(RM_XACT, 0x20, xid, &time.to_le_bytes())
    }

    pub fn prepare(&mut self, xid: u32, time: i64) -> Lsn {
        let mut main = vec![0; 72];
        main[8..12].copy_from_slice(&xid.to_le_bytes());
        main[16..24].copy_from_slice(&time.to_le_bytes());
        self.record(RM_XACT, 0x10, xid, &main)
    }

    /// Ends the prepared transaction `xid`, which had `subtransactions` and whose end drops `dropped` relations.
    pub fn end_prepared(
        &mut self,
        commits: bool,
        xid: u32,
        time: i64,
        subtransactions: u32,
        dropped: u32,
    ) -> Lsn {
        let has_dropped_stats = self.version.major() >= 15;
        let mut present: u32 = 0b1_0111;
        if has_dropped_stats {
            present |= 1 << 8;
        }
        if commits {
            present |= 1 << 3;
        }
        let mut main = time.to_le_bytes().to_vec();
        let list = |items: u32, item_bytes: usize| {
            let mut bytes = items.to_le_bytes().to_vec();
            bytes.resize(4 + items as usize * item_bytes, 0xA5);
            bytes
        };
        main.extend(present.to_le_bytes());
        main.extend([1; 8]);
        main.extend(list(subtransactions, 4));
        main.extend(list(dropped, 12));
        if has_dropped_stats {
            main.extend(list(dropped, if self.version.major() >= 18 { 16 } else { 12 }));
        }
        if commits {
            main.extend(list(dropped + 1, 16));
        }
        main.extend(xid.to_le_bytes());
        self.record(RM_XACT, 0x80 | if commits { 0x30 } else { 0x40 }, 0, &main)
    }

    pub fn restore_point(&mut self, name: &str, time: i64) -> Lsn {
        let mut main = time.to_le_bytes().to_vec();
        main.extend_from_slice(name.as_bytes());
        assert!(main.len() < 72, "{name:?} is longer than 63 bytes");
        main.resize(72, 0);
        self.record(RM_XLOG, 0x70, 0, &main)
    }

    /// All five settings are `each`.
    pub fn parameter_change(&mut self, each: i32, wal_level: i32) -> Lsn {
        let mut main = each.to_le_bytes().repeat(5);
        main.extend(wal_level.to_le_bytes());
        main.extend([0; 4]);
        self.record(RM_XLOG, 0x60, 0, &main)
    }

    pub fn checkpoint(&mut self, shutdown: bool, redo: Lsn, full_page_writes: bool) -> Lsn {
        let mut main = vec![0; 88];
        main[..8].copy_from_slice(&redo.get().to_le_bytes());
        main[8..12].copy_from_slice(&self.timeline.get().to_le_bytes());
        main[12..16].copy_from_slice(&self.timeline.get().to_le_bytes());
        main[16] = full_page_writes.into();
        main[20] = 1;
        self.record(RM_XLOG, if shutdown { 0x00 } else { 0x10 }, 0, &main)
    }

    pub fn end_of_recovery(&mut self, time: i64, from: TimelineId) -> Lsn {
        let mut main = time.to_le_bytes().to_vec();
        main.extend(self.timeline.get().to_le_bytes());
        main.extend(from.get().to_le_bytes());
        main.extend(1u32.to_le_bytes());
        self.record(RM_XLOG, 0x90, 0, &main)
    }

    /// Switches to the next segment. `headers` on the empty pages or plain zeros: PostgreSQL has written both.
    pub fn switch(&mut self, headers: bool) -> Lsn {
        let start = self.record(RM_XLOG, 0x40, 0, &[]);
        while self.position() != self.segment_size.start_of(self.position()) {
            if headers {
                self.page();
            }
            self.bytes.extend_from_slice(&[0; 8]);
        }
        start
    }

    /// Begins a record of `bytes` bytes of main data, breaks off at the next page and goes on there as a server does after
    /// a crash. Returns the start of the record that is lost.
    pub fn overwritten(&mut self, bytes: usize, time: i64) -> Lsn {
        let data = vec![0x5A; bytes];
        let body = [&[254u8][..], &(bytes as u32).to_le_bytes(), &data].concat();
        let record = self.encode(RM_HEAP, 0, 5, &body);
        let lost = self.begin();
        let room = PAGE - self.bytes.len() % PAGE;
        assert!(record.len() > room, "the record would fit");
        self.bytes.extend_from_slice(&record[..room]);
        self.overwrites = true;
        let mut main = lost.get().to_le_bytes().to_vec();
        main.extend(time.to_le_bytes());
        self.record(RM_XLOG, 0xD0, 0, &main);
        lost
    }

    fn encode(&self, manager: u8, info: u8, xid: u32, body: &[u8]) -> Vec<u8> {
        let total = (HEADER_BYTES + body.len()) as u32;
        let mut record = total.to_le_bytes().to_vec();
        record.extend(xid.to_le_bytes());
        record.extend(self.prev.get().to_le_bytes());
        record.extend([info, manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend(crc.to_le_bytes());
        record.extend_from_slice(body);
        record
    }

    /// Writes the page header if a page begins here; returns where the record begins.
    fn begin(&mut self) -> Lsn {
        self.page();
        self.position()
    }

    fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.remaining = bytes.len() as u32;
            self.page();
            let room = PAGE - self.bytes.len() % PAGE;
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.bytes.extend_from_slice(now);
            bytes = later;
        }
        self.remaining = 0;
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    fn page(&mut self) {
        let page = self.position();
        if page != page.align_down(PAGE_BYTES) {
            return;
        }
        let long = page == self.segment_size.start_of(page);
        let overwrites = std::mem::take(&mut self.overwrites);
        let mut info = if long { LONG_HEADER } else { 0 };
        if self.remaining > 0 {
            info |= FIRST_IS_CONTRECORD;
        }
        if overwrites {
            info |= FIRST_IS_OVERWRITE_CONTRECORD;
        }
        let mut header = Vec::with_capacity(LONG_HEADER_BYTES);
        header.extend(self.version.magic().to_le_bytes());
        header.extend(info.to_le_bytes());
        header.extend(self.timeline.get().to_le_bytes());
        header.extend(page.get().to_le_bytes());
        header.extend(self.remaining.to_le_bytes());
        header.resize(SHORT_HEADER_BYTES, 0);
        if long {
            header.extend(self.system.get().to_le_bytes());
            header.extend((self.segment_size.bytes() as u32).to_le_bytes());
            header.extend((PAGE_BYTES as u32).to_le_bytes());
        }
        self.bytes.extend_from_slice(&header);
    }
}
