//! Segment files of a directory, decoded in a row.

use anyhow::{Context, Result, bail, ensure};
use backstay_common::id::SystemId;
use backstay_common::lsn::Lsn;
use backstay_common::segment::{SegmentNumber, SegmentSize, TimelineId};
use backstay_common::wal::{DecodeError, Decoder, Event, WalVersion};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Segment files that follow each other, as a server would replay them: of each segment the newest timeline's.
#[derive(Debug)]
pub struct Segments {
    version: WalVersion,
    size: SegmentSize,
    system: SystemId,
    timeline: TimelineId,
    files: BTreeMap<SegmentNumber, PathBuf>,
}

/// What the decoder made of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Decoded {
    pub events: Vec<Event>,
    /// Of every kind.
    pub records: u64,
    pub last_record: Option<Lsn>,
    /// Where the last record ends.
    pub end: Lsn,
    /// Why it ended before the bytes did.
    pub fault: Option<DecodeError>,
}

impl Segments {
    /// Looks for the segments in a directory, such as `pg_wal`.
    pub fn find(dir: &Path) -> Result<Segments> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .with_context(|| format!("list {}", dir.display()))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| is_segment(name))
            .collect();
        names.sort();
        let Some(first) = names.first() else { bail!("{} has no segments", dir.display()) };
        let mut header = [0; 40];
        File::open(dir.join(first))?.read_exact(&mut header).context("read the first header")?;
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| header[at + n]));
        let version =
            WalVersion::from_magic(number(0) as u16).context("an unknown magic number")?;
        let size = SegmentSize::new(number(32)).context("an impossible segment size")?;
        let system = SystemId::new(u64::from(number(28)) << 32 | u64::from(number(24)));

        let mut found: Vec<_> =
            names.iter().filter_map(|n| Some((size.parse_file_name(n)?, n))).collect();
        found.sort_by_key(|&((timeline, number), _)| (number, timeline));
        let mut timeline = TimelineId::FIRST;
        let mut files = BTreeMap::new();
        for ((of, number), name) in found {
            if of >= timeline {
                timeline = of;
                files.insert(number, dir.join(name));
            }
        }
        Ok(Segments { version, size, system, timeline, files })
    }

    pub fn size(&self) -> SegmentSize {
        self.size
    }

    /// The newest.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Where the first of them begins.
    pub fn start(&self) -> Lsn {
        self.files.keys().next().map_or(Lsn::new(0), |&number| self.size.start(number))
    }

    /// Decodes from a page or a record on up to `until`, a missing segment or a fault, `read` bytes at a time.
    pub fn decode(&self, start: Lsn, until: Lsn, read: usize) -> Result<Decoded> {
        let mut decoder = Decoder::new(self.version, self.size, self.system, self.timeline, start);
        let mut decoded = Decoded::default();
        self.feed(&mut decoder, until, read, &mut decoded)?;
        Ok(decoded)
    }

    /// Decodes the same with a new decoder for each stretch of `stretch` bytes, which goes on where the one before
    /// could say that everything was proven.
    pub fn decode_resuming(
        &self,
        start: Lsn,
        until: Lsn,
        read: usize,
        stretch: u64,
    ) -> Result<Decoded> {
        let mut decoder = Decoder::new(self.version, self.size, self.system, self.timeline, start);
        let (mut decoded, mut to, mut records) = (Decoded::default(), start, 0);
        while to < until && decoded.fault.is_none() {
            to = to.add(stretch).min(until);
            let point = decoder.resume_point();
            decoder = Decoder::resume(self.version, self.size, self.system, self.timeline, point);
            ensure!(decoder.position() == point.at && point.at <= to, "it goes on elsewhere");
            self.feed(&mut decoder, to, read, &mut decoded)?;
            records += decoded.records;
        }
        decoded.records = records;
        Ok(decoded)
    }

    fn feed(
        &self,
        decoder: &mut Decoder,
        until: Lsn,
        read: usize,
        decoded: &mut Decoded,
    ) -> Result<()> {
        for (&number, path) in self.files.range(self.size.number(decoder.position())..) {
            let (start, position) = (self.size.start(number), decoder.position());
            if position >= until || number != self.size.number(position) {
                break;
            }
            let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
            let end = bytes.len().min(until.since(start) as usize);
            let bytes = &bytes[(position.since(start) as usize).min(end)..end];
            let mut note = |event| decoded.events.push(event);
            decoded.fault =
                bytes.chunks(read).find_map(|chunk| decoder.feed(chunk, &mut note).err());
            if decoded.fault.is_some() {
                break;
            }
        }
        decoded.records = decoder.record_count();
        decoded.last_record = decoder.last_record();
        decoded.end = decoder.record_end();
        Ok(())
    }
}

/// A segment's name in the shape of any segment size.
fn is_segment(name: &str) -> bool {
    name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit())
}
