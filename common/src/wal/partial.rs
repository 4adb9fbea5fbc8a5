//! A record that crosses pages or the cuts of the input, as it comes in.
//!
//! The header is gathered, the body is hashed as it passes, and only the few kinds that are read are kept.

use super::record::{self, HEADER_BYTES, RecordHeader};
use crate::lsn::Lsn;

/// Memory for kept bytes that stays from one record to the next.
const KEPT_CAPACITY_MAX: usize = 1 << 20;

/// A record that is not all there yet.
#[derive(Debug, Default)]
pub(super) struct Partial {
    pub start: Lsn,
    pub header: [u8; HEADER_BYTES],
    /// Bytes so far, of header, body and padding.
    pub got: u32,
    pub body_crc: u32,
    /// The beginning of the body, for the kinds that are read.
    pub kept: Vec<u8>,
}

impl Partial {
    pub fn begin(&mut self, start: Lsn) {
        self.start = start;
        self.got = 0;
        self.body_crc = 0;
        self.kept.clear();
    }

    /// The record's length. It is all there from the first eight bytes on, which never part.
    pub fn total(&self) -> u32 {
        RecordHeader::parse(&self.header).total
    }

    /// Takes what the header still lacks; returns what follows it.
    pub fn take_header<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let have = (self.got as usize).min(HEADER_BYTES);
        let (taken, rest) = bytes.split_at(bytes.len().min(HEADER_BYTES - have));
        self.header[have..have + taken.len()].copy_from_slice(taken);
        self.got += taken.len() as u32;
        rest
    }

    /// Hashes what `bytes` has of the body, keeps its first `kept_max` bytes, and counts the padding.
    pub fn take_body(&mut self, bytes: &[u8], header: &RecordHeader, kept_max: usize) {
        let wanted = header.total.saturating_sub(self.got) as usize;
        let body = &bytes[..bytes.len().min(wanted)];
        self.body_crc = crc32c::crc32c_append(self.body_crc, body);
        let room = kept_max.saturating_sub(self.kept.len());
        self.kept.extend_from_slice(&body[..body.len().min(room)]);
        let padded = (record::padded(header.total) - self.got) as usize;
        self.got += bytes.len().min(padded) as u32;
    }

    /// Keeps the memory of `kept` for the next record, unless it is much.
    pub fn give_back(&mut self, kept: Vec<u8>) {
        if kept.capacity() <= KEPT_CAPACITY_MAX {
            self.kept = kept;
        }
    }
}
