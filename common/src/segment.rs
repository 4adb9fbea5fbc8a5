//! Timelines, WAL segments and the names that PostgreSQL gives their files.

use crate::lsn::Lsn;
use std::fmt;
use std::str::FromStr;

/// One of PostgreSQL's timelines. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimelineId(u32);

impl TimelineId {
    /// The timeline that `initdb` begins.
    pub const FIRST: TimelineId = TimelineId(1);

    pub fn new(number: u32) -> Option<TimelineId> {
        (number != 0).then_some(TimelineId(number))
    }

    pub fn get(self) -> u32 {
        self.0
    }

    /// The name of its history file, such as `00000002.history`.
    pub fn history_file(self) -> String {
        format!("{:08X}.history", self.0)
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for TimelineId {
    type Err = String;

    fn from_str(text: &str) -> Result<TimelineId, String> {
        text.parse()
            .ok()
            .and_then(TimelineId::new)
            .ok_or_else(|| format!("{text:?} is not a timeline number from 1 on"))
    }
}

impl serde::Serialize for TimelineId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for TimelineId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<TimelineId, D::Error> {
        let number = u32::deserialize(deserializer)?;
        TimelineId::new(number).ok_or_else(|| serde::de::Error::custom("timeline 0"))
    }
}

impl<C> minicbor::Encode<C> for TimelineId {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.u32(self.0)?.ok()
    }
}

impl<'b, C> minicbor::Decode<'b, C> for TimelineId {
    fn decode(
        d: &mut minicbor::Decoder<'b>,
        _: &mut C,
    ) -> Result<TimelineId, minicbor::decode::Error> {
        TimelineId::new(d.u32()?).ok_or_else(|| minicbor::decode::Error::message("timeline 0"))
    }
}

/// Bytes in one WAL segment of a cluster: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// What `initdb` chooses unless told otherwise: 16 MiB.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    pub fn new(bytes: u32) -> Option<SegmentSize> {
        (bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes))
            .then_some(SegmentSize(bytes))
    }

    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// The segment that holds the byte at `lsn`.
    pub fn number(self, lsn: Lsn) -> SegmentNumber {
        SegmentNumber(lsn.get() / self.bytes())
    }

    /// Where a segment begins.
    pub fn start(self, number: SegmentNumber) -> Lsn {
        Lsn::new(number.0 * self.bytes())
    }

    /// The start of the segment that holds the byte at `lsn`.
    pub fn start_of(self, lsn: Lsn) -> Lsn {
        lsn.align_down(self.bytes())
    }

    /// The name of a segment's file: three times eight hex digits.
    pub fn file_name(self, timeline: TimelineId, number: SegmentNumber) -> String {
        let per_id = (1u64 << 32) / self.bytes();
        format!("{:08X}{:08X}{:08X}", timeline.0, number.0 / per_id, number.0 % per_id)
    }

    /// Reads the name of a segment's file. `None` for history, backup, partial and other files.
    pub fn parse_file_name(self, name: &str) -> Option<(TimelineId, SegmentNumber)> {
        let hex = |digits: &str| u32::from_str_radix(digits, 16).ok();
        if name.len() != 24 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let per_id = (1u64 << 32) / self.bytes();
        let (id, segment) = (hex(&name[8..16])?, hex(&name[16..])?);
        if u64::from(segment) >= per_id {
            return None;
        }
        let number = u64::from(id) * per_id + u64::from(segment);
        Some((TimelineId::new(hex(&name[..8])?)?, SegmentNumber(number)))
    }
}

/// The place of a segment in its timeline, counted from the segment that holds `0/0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNumber(u64);

impl SegmentNumber {
    pub fn get(self) -> u64 {
        self.0
    }

    pub fn next(self) -> SegmentNumber {
        SegmentNumber(self.0 + 1)
    }
}

/// One line of a timeline's history: the parent, and where the child left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ancestor {
    pub timeline: TimelineId,
    pub switch: Lsn,
}

/// Reads a `.history` file, oldest ancestor first ("src/backend/access/transam/timeline.c").
pub fn parse_history(text: &str) -> Result<Vec<Ancestor>, String> {
    let mut ancestors: Vec<Ancestor> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let mut words = line.split_whitespace();
        let ancestor = (|| {
            let timeline = words.next()?.parse().ok()?;
            Some(Ancestor { timeline, switch: words.next()?.parse().ok()? })
        })()
        .ok_or_else(|| format!("history line {line:?} is not \"timeline<TAB>LSN<TAB>reason\""))?;
        if ancestors.last().is_some_and(|last| last.timeline >= ancestor.timeline) {
            return Err(format!("history line {line:?} is out of order"));
        }
        ancestors.push(ancestor);
    }
    Ok(ancestors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn file_names_are_inverse(timeline in 1u32.., position: u64, power in 20u32..=30) {
            let size = SegmentSize::new(1 << power).unwrap();
            let number = size.number(Lsn::new(position));
            let timeline = TimelineId::new(timeline).unwrap();
            let name = size.file_name(timeline, number);
            prop_assert_eq!(size.parse_file_name(&name), Some((timeline, number)));
        }
    }

    #[test]
    fn names_as_postgres_writes_them() {
        let lsn: Lsn = "16/B374D848".parse().unwrap();
        let name = |mib: u32| {
            let size = SegmentSize::new(mib << 20).unwrap();
            size.file_name(TimelineId::new(3).unwrap(), size.number(lsn))
        };
        assert_eq!(name(16), "0000000300000016000000B3");
        assert_eq!(name(1), "000000030000001600000B37");
        assert_eq!(name(64), "00000003000000160000002C");
        assert_eq!(SegmentSize::DEFAULT.parse_file_name("0000000300000016000000B3.partial"), None);
        assert_eq!(SegmentSize::DEFAULT.parse_file_name("000000030000001600000B37"), None);
    }

    #[test]
    fn history_files() {
        let text = "1\t0/3000000\tno recovery target specified\n\n2\t0/5000148\tbefore 2026\n";
        let ancestors = parse_history(text).unwrap();
        assert_eq!(ancestors.len(), 2);
        assert_eq!(ancestors[1].switch.to_string(), "0/5000148");
        assert!(parse_history("2\t0/1\tx\n1\t0/2\ty\n").is_err());
        assert!(parse_history("what\n").is_err());
    }
}
