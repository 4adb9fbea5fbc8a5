//! The state machine that follows pages and records.

use super::event::{self, Event, EventKind};
use super::fault::{DecodeError, PageField};
use super::page::{LONG_HEADER_BYTES, PAGE_BYTES, Place};
use super::partial::Partial;
use super::record::{self, HEADER_BYTES, RecordHeader};
use super::touch;
use super::version::WalVersion;
use crate::id::SystemId;
use crate::lsn::Lsn;
use crate::segment::{SegmentSize, TimelineId};
use minicbor::{Decode, Encode};

/// Follows one timeline's WAL from a start on. Bytes go in by [`Decoder::feed`], events come out.
///
/// The start may be any page's first byte, or a record's. At a page that begins in the middle of a record, the rest
/// of that record is passed over unchecked.
#[derive(Debug)]
pub struct Decoder {
    place: Place,
    start: Lsn,
    position: Lsn,
    state: State,
    /// Zeros here may be the rest of a switched segment: nothing before tells, for the decoder began in the middle.
    may_be_filler: bool,
    /// The header of the page at `position`, as far as it has come.
    page_header: [u8; LONG_HEADER_BYTES],
    /// The timeline of the last page.
    timeline: u32,
    partial: Partial,
    /// The start of the record that the server gave up in a crash, until the next one tells.
    dropped: Option<Lsn>,
    proven: Proven,
    first_record: Option<Lsn>,
    record_count: u64,
    watches_touches: bool,
}

/// What the bytes at `position` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A record begins here, past the page header if a page begins here.
    Boundary,
    /// The middle of `partial`.
    Record,
    /// The rest of a record from before the start: so many bytes with its padding.
    Tail { left: u64 },
    /// What a switch left of a segment. It is zeros, with or without page headers; PostgreSQL never reads it.
    Filler { until: Lsn },
}

/// Where decoding can go on, with all that later records are checked against.
///
/// It may be kept (it is CBOR) while bytes after it are not: [`Decoder::resume`] wants those from `at` on again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ResumePoint {
    /// The next byte to feed: [`Decoder::record_end`].
    #[n(0)]
    pub at: Lsn,
    /// The record that ends there. `None`: none has been seen, and `at` is where decoding began.
    #[n(1)]
    pub last_record: Option<Lsn>,
    /// The timeline of the page that `last_record` ends on. Later pages' are never lower.
    #[n(2)]
    pub timeline: Option<TimelineId>,
    /// `last_record` is a switch: the rest of the segment is passed over.
    #[n(3)]
    pub switched: bool,
}

/// The last complete record, and what to go back to after an error.
#[derive(Clone, Copy, Debug)]
struct Proven {
    record: Option<Lsn>,
    end: Lsn,
    timeline: u32,
}

type Sink<'a> = &'a mut dyn FnMut(Event);

impl Decoder {
    /// Pages must be of `system`, have `segment_size`, and be of `timeline` or, where a segment began as the copy of an
    /// ancestor's, a lower one.
    pub fn new(
        version: WalVersion,
        segment_size: SegmentSize,
        system: SystemId,
        timeline: TimelineId,
        start: Lsn,
    ) -> Decoder {
        let at_page = start == start.align_down(PAGE_BYTES);
        Decoder {
            place: Place { version, segment_size, system, timeline },
            start,
            position: start,
            state: State::Boundary,
            may_be_filler: at_page && start != segment_size.start_of(start),
            page_header: [0; LONG_HEADER_BYTES],
            timeline: 0,
            partial: Partial::default(),
            dropped: None,
            proven: Proven { record: None, end: start, timeline: 0 },
            first_record: None,
            record_count: 0,
            watches_touches: false,
        }
    }

    /// Also tells of each record that touches relations' files: [`EventKind::Touches`].
    pub fn watching_touches(mut self) -> Decoder {
        self.watches_touches = true;
        self
    }

    /// Goes on where a decoder of the same cluster said that it could. The first record's `xl_prev` is checked against
    /// the record before, which a decoder that begins anew cannot do. `timeline` may be a later one than before:
    /// after a promotion, where the history says that the timelines part at `point.at` or behind it.
    pub fn resume(
        version: WalVersion,
        segment_size: SegmentSize,
        system: SystemId,
        timeline: TimelineId,
        point: ResumePoint,
    ) -> Decoder {
        let mut decoder = Decoder::new(version, segment_size, system, timeline, point.at);
        let Some(record) = point.last_record else { return decoder };
        decoder.may_be_filler = false;
        // A lower `timeline` than the point's is a mistake that the pages will tell of.
        decoder.timeline = point.timeline.map_or(0, TimelineId::get).min(timeline.get());
        decoder.proven = Proven { record: Some(record), end: point.at, timeline: decoder.timeline };
        if point.switched {
            decoder.state = State::Filler { until: point.at.align_up(segment_size.bytes()) };
        }
        decoder
    }

    /// Where another decoder can go on, with the bytes from there on: never behind [`Decoder::position`].
    pub fn resume_point(&self) -> ResumePoint {
        let Proven { record, end, timeline } = self.proven;
        let switched = record.is_some() && matches!(self.state, State::Filler { .. });
        ResumePoint { at: end, last_record: record, timeline: TimelineId::new(timeline), switched }
    }

    /// The next byte expected.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The end of the last complete, checked record with its padding, or of the segment that it switched away from once
    /// that has been passed; the start if there is none yet.
    pub fn record_end(&self) -> Lsn {
        self.proven.end
    }

    /// The start of the last complete record.
    pub fn last_record(&self) -> Option<Lsn> {
        self.proven.record
    }

    /// Complete records so far, of every kind.
    pub fn record_count(&self) -> u64 {
        self.record_count
    }

    /// The start of the first record that was completed since the last call.
    pub fn take_first_record(&mut self) -> Option<Lsn> {
        self.first_record.take()
    }

    /// Takes the bytes at [`Decoder::position`], however they are cut, and hands on the events of the records that they
    /// complete. After an error the events handed on before it stand, and the decoder goes on at
    /// [`Decoder::record_end`] as if nothing after that had come.
    pub fn feed(&mut self, mut bytes: &[u8], on: &mut dyn FnMut(Event)) -> Result<(), DecodeError> {
        self.check_start()?;
        while !bytes.is_empty() {
            match self.step(bytes, on) {
                Ok(taken) => bytes = &bytes[taken..],
                Err(fault) => {
                    self.rewind();
                    return Err(fault);
                }
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn kept_capacity(&self) -> usize {
        self.partial.kept.capacity()
    }

    fn check_start(&self) -> Result<(), DecodeError> {
        let (lsn, offset) = (self.start, self.start.get() % PAGE_BYTES);
        let in_header = offset != 0 && offset < self.place.header_bytes(lsn) as u64;
        match in_header || offset % 8 != 0 || lsn.get() > u64::MAX / 2 {
            true => Err(DecodeError::BadStart { lsn }),
            false => Ok(()),
        }
    }

    fn rewind(&mut self) {
        let fresh = Decoder::new(
            self.place.version,
            self.place.segment_size,
            self.place.system,
            self.place.timeline,
            self.start,
        );
        self.may_be_filler = fresh.may_be_filler && self.proven.record.is_none();
        self.position = self.proven.end;
        self.state = State::Boundary;
        self.timeline = self.proven.timeline;
        self.dropped = None;
    }

    /// Goes on by at least one byte and at most to the end of the page; returns by how many.
    fn step(&mut self, bytes: &[u8], on: Sink) -> Result<usize, DecodeError> {
        let before = self.position;
        let offset = (before.get() % PAGE_BYTES) as usize;
        if let State::Filler { until } = self.state {
            self.fill(bytes, until);
        } else if offset < self.place.header_bytes(before) {
            self.page_header(bytes, offset)?;
        } else {
            let page = &bytes[..bytes.len().min(PAGE_BYTES as usize - offset)];
            match self.state {
                State::Tail { left } => self.tail(page, left),
                _ => self.records(page, on)?,
            }
        }
        Ok(self.position.since(before) as usize)
    }

    fn fill(&mut self, bytes: &[u8], until: Lsn) {
        self.position = self.position.add(bytes.len() as u64).min(until);
        if self.position == until {
            self.state = State::Boundary;
            if self.proven.record.is_some() {
                self.proven.end = until;
            }
        }
    }

    fn tail(&mut self, page: &[u8], left: u64) {
        let taken = left.min(page.len() as u64);
        self.position = self.position.add(taken);
        self.state = match left - taken {
            // What was passed over may have been a switch.
            0 => {
                self.may_be_filler = true;
                State::Boundary
            }
            left => State::Tail { left },
        };
    }

    /// Gathers the page header, of which `have` bytes are there, and checks it when it is complete.
    fn page_header(&mut self, bytes: &[u8], have: usize) -> Result<(), DecodeError> {
        let size = self.place.header_bytes(self.position);
        let taken = bytes.len().min(size - have);
        self.page_header[have..have + taken].copy_from_slice(&bytes[..taken]);
        let page = self.position.align_down(PAGE_BYTES);
        self.position = self.position.add(taken as u64);
        match have + taken == size {
            true => self.enter_page(page, size),
            false => Ok(()),
        }
    }

    fn enter_page(&mut self, page: Lsn, header_bytes: usize) -> Result<(), DecodeError> {
        let bytes = &self.page_header[..header_bytes];
        if bytes.iter().all(|&byte| byte == 0) {
            return self.zeros(page);
        }
        let header = self.place.check(page, bytes, self.timeline)?;
        self.timeline = header.timeline;
        let found = if header.continues { header.remaining } else { 0 };
        let remaining = |expected: u32| match expected == found {
            true => Ok(()),
            false => Err(DecodeError::BadPage {
                page,
                field: PageField::Remaining,
                expected: expected.into(),
                found: found.into(),
            }),
        };
        match self.state {
            State::Record | State::Tail { .. } if header.overwrites => {
                remaining(0)?;
                self.dropped = (self.state == State::Record).then_some(self.partial.start);
                self.state = State::Boundary;
            }
            State::Record => {
                let total = self.partial.total();
                record::check_length(self.place.version, self.partial.start, total)?;
                remaining(total.saturating_sub(self.partial.got))?;
            }
            State::Tail { left } if u64::from(found).next_multiple_of(8) != left => {
                remaining(u32::try_from(left).unwrap_or(u32::MAX))?;
            }
            State::Boundary if page == self.start && found > 0 && self.proven.record.is_none() => {
                self.state = State::Tail { left: u64::from(found).next_multiple_of(8) };
            }
            State::Boundary => remaining(0)?,
            State::Tail { .. } | State::Filler { .. } => {}
        }
        Ok(())
    }

    /// Zeros where a page or a record should begin.
    fn zeros(&mut self, at: Lsn) -> Result<(), DecodeError> {
        let segment = self.place.segment_size.start_of(at);
        let (at, inside) = match self.state {
            State::Record => (self.partial.start, at != self.partial.start),
            state => (at, matches!(state, State::Tail { .. })),
        };
        if inside || !self.may_be_filler || at == segment {
            return Err(DecodeError::EndOfWal { at });
        }
        self.may_be_filler = false;
        self.state = State::Filler { until: segment.add(self.place.segment_size.bytes()) };
        Ok(())
    }

    /// Goes through the records of one page's bytes, up to their end or to a switch.
    fn records(&mut self, mut page: &[u8], on: Sink) -> Result<(), DecodeError> {
        while !page.is_empty() && !matches!(self.state, State::Filler { .. }) {
            let before = self.position;
            if self.state == State::Record || !self.whole(page, on)? {
                self.part(page, on)?;
            }
            page = &page[self.position.since(before) as usize..];
        }
        Ok(())
    }

    /// Reads the record that begins `page` in place. False if it is not all there, or no record at all.
    #[inline]
    fn whole(&mut self, page: &[u8], on: Sink) -> Result<bool, DecodeError> {
        let Some(header_bytes) = page.first_chunk::<HEADER_BYTES>() else { return Ok(false) };
        let header = RecordHeader::parse(header_bytes);
        let total = header.total as usize;
        if total < HEADER_BYTES || total.next_multiple_of(8) > page.len() {
            return Ok(false);
        }
        let start = self.position;
        header.check(self.place.version, start, self.proven.record)?;
        let body = &page[HEADER_BYTES..total];
        header.check_crc(start, header_bytes, crc32c::crc32c(body))?;
        self.position = start.add(total.next_multiple_of(8) as u64);
        self.complete(start, &header, body, on)?;
        Ok(true)
    }

    /// Takes what `page` has of a record that is longer than that.
    fn part(&mut self, page: &[u8], on: Sink) -> Result<(), DecodeError> {
        if self.state == State::Boundary {
            self.partial.begin(self.position);
            self.state = State::Record;
        }
        let before = self.partial.got;
        let body = self.partial.take_header(page);
        self.position = self.position.add(u64::from(self.partial.got - before));
        if self.partial.got != before {
            self.check_partial()?;
        }
        if (self.partial.got as usize) < HEADER_BYTES || self.state != State::Record {
            return Ok(());
        }
        let (before, header) = (self.partial.got, RecordHeader::parse(&self.partial.header));
        let watched = if self.watches_touches { touch::KEPT_BYTES } else { 0 };
        self.partial.take_body(body, &header, header.kept_bytes().max(watched));
        self.position = self.position.add(u64::from(self.partial.got - before));
        match self.partial.got == record::padded(header.total) {
            true => self.complete_partial(&header, on),
            false => Ok(()),
        }
    }

    /// Checks what has come of a record's header.
    fn check_partial(&mut self) -> Result<(), DecodeError> {
        let Partial { start, got, .. } = self.partial;
        let on_page = (PAGE_BYTES - start.get() % PAGE_BYTES).min(HEADER_BYTES as u64);
        if self.partial.header[..got as usize].iter().all(|&byte| byte == 0) {
            return if u64::from(got) < on_page { Ok(()) } else { self.zeros(start) };
        }
        if got as usize == HEADER_BYTES {
            let header = RecordHeader::parse(&self.partial.header);
            header.check(self.place.version, start, self.proven.record)?;
        }
        Ok(())
    }

    fn complete_partial(&mut self, header: &RecordHeader, on: Sink) -> Result<(), DecodeError> {
        header.check_crc(self.partial.start, &self.partial.header, self.partial.body_crc)?;
        let kept = std::mem::take(&mut self.partial.kept);
        self.state = State::Boundary;
        let completed = self.complete(self.partial.start, header, &kept, on);
        self.partial.give_back(kept);
        completed
    }

    /// A record of which everything has been checked ends at `position`.
    #[inline]
    fn complete(
        &mut self,
        start: Lsn,
        header: &RecordHeader,
        kept: &[u8],
        on: Sink,
    ) -> Result<(), DecodeError> {
        let kind = match header.kept_bytes() {
            0 => None,
            _ => self.read(start, header, kept)?,
        };
        let mut end = self.position;
        self.may_be_filler = false;
        self.record_count += 1;
        self.proven = Proven { record: Some(start), end, timeline: self.timeline };
        self.first_record = self.first_record.or(Some(start));
        if header.is_switch() {
            end = end.align_up(self.place.segment_size.bytes());
            if end > self.position {
                self.state = State::Filler { until: end };
            }
        }
        if self.watches_touches {
            self.touches(start, end, header, kept, on)?;
        }
        if let Some(kind) = kind {
            on(Event { start, end, prev: header.prev, xid: header.xid, kind });
        }
        Ok(())
    }

    #[cold]
    fn touches(
        &mut self,
        start: Lsn,
        end: Lsn,
        header: &RecordHeader,
        kept: &[u8],
        on: Sink,
    ) -> Result<(), DecodeError> {
        let body_bytes = header.total as usize - HEADER_BYTES;
        let touches = touch::read(self.place.version, header, kept, body_bytes)
            .map_err(|reason| DecodeError::BadRecord { lsn: start, reason })?;
        if !touches.is_empty() {
            let kind = EventKind::Touches(touches);
            on(Event { start, end, prev: header.prev, xid: header.xid, kind });
        }
        Ok(())
    }

    #[cold]
    fn read(
        &mut self,
        start: Lsn,
        header: &RecordHeader,
        kept: &[u8],
    ) -> Result<Option<EventKind>, DecodeError> {
        let bad = |reason| DecodeError::BadRecord { lsn: start, reason };
        let body_bytes = header.total as usize - HEADER_BYTES;
        let main = record::main_data(self.place.version, kept, body_bytes).map_err(bad)?;
        let kind = event::read(self.place.version, header, main).map_err(bad)?;
        if let Some(EventKind::OverwriteContrecord { lsn, .. }) = kind
            && self.dropped.take().is_some_and(|dropped| dropped != lsn)
        {
            return Err(bad("it drops another record than the one that broke off"));
        }
        Ok(kind)
    }
}
