//! Positions in the write-ahead log.

use std::fmt;
use std::str::FromStr;

/// A byte position in the WAL of one timeline ("log sequence number").
///
/// Written as PostgreSQL does, `16/B374D848`; in object names as 16 hex digits ([`Lsn::name`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(u64);

/// Stored WAL is cut at multiples of this, whatever the cluster's segment size: 16 MiB.
pub const SPAN_BYTES: u64 = 16 << 20;

impl Lsn {
    /// PostgreSQL's "no position".
    pub const INVALID: Lsn = Lsn(0);
    /// Later than every position.
    pub const MAX: Lsn = Lsn(u64::MAX);

    pub const fn new(position: u64) -> Lsn {
        Lsn(position)
    }

    pub const fn get(self) -> u64 {
        self.0
    }

    /// False only for the "no position" of zero.
    pub fn is_valid(self) -> bool {
        self != Lsn::INVALID
    }

    /// The start of the 16 MiB span that holds this byte.
    pub fn span_start(self) -> Lsn {
        self.align_down(SPAN_BYTES)
    }

    /// The start of the 16 MiB span that follows the one holding this byte.
    pub fn next_span(self) -> Lsn {
        Lsn(self.span_start().0.saturating_add(SPAN_BYTES))
    }

    /// The greatest multiple of `unit` (a power of two) that is not after this position.
    pub fn align_down(self, unit: u64) -> Lsn {
        debug_assert!(unit.is_power_of_two());
        Lsn(self.0 & !(unit - 1))
    }

    /// The least multiple of `unit` (a power of two) that is not before this position.
    pub fn align_up(self, unit: u64) -> Lsn {
        Lsn(self.0.saturating_add(unit - 1)).align_down(unit)
    }

    /// This position and `bytes` more. Saturates, which `+` would not suggest.
    #[allow(clippy::should_implement_trait)]
    pub fn add(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_add(bytes))
    }

    /// How many bytes this position is after `earlier`; zero if it is not.
    pub fn since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The 16 hex digits that stand for it in an object name.
    pub fn name(self) -> String {
        format!("{:016X}", self.0)
    }

    /// Reads the 16 upper-case hex digits of an object name, and nothing else.
    pub fn from_name(text: &str) -> Option<Lsn> {
        let canonical = text.len() == 16
            && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        if !canonical {
            return None;
        }
        u64::from_str_radix(text, 16).ok().map(Lsn)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 as u32)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not an LSN.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a WAL position such as 16/B374D848")]
pub struct BadLsn(String);

impl FromStr for Lsn {
    type Err = BadLsn;

    fn from_str(text: &str) -> Result<Lsn, BadLsn> {
        let half = |digits: &str| match digits.len() {
            1..=8 if digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
                u64::from_str_radix(digits, 16).ok()
            }
            _ => None,
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Lsn(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| BadLsn(text.to_string()))
    }
}

impl serde::Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Lsn, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl<C> minicbor::Encode<C> for Lsn {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.u64(self.0)?.ok()
    }
}

impl<'b, C> minicbor::Decode<'b, C> for Lsn {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Lsn, minicbor::decode::Error> {
        d.u64().map(Lsn)
    }
}

/// The bytes from `start` up to and without `end`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LsnRange {
    pub start: Lsn,
    pub end: Lsn,
}

impl LsnRange {
    pub fn new(start: Lsn, end: Lsn) -> LsnRange {
        LsnRange { start, end }
    }

    /// Bytes in the range.
    pub fn len(&self) -> u64 {
        self.end.since(self.start)
    }

    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    pub fn contains(&self, lsn: Lsn) -> bool {
        self.start <= lsn && lsn < self.end
    }

    /// Every byte of `other` is in this range.
    pub fn covers(&self, other: &LsnRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// True for a range that is exactly one whole span.
    pub fn is_span(&self) -> bool {
        self.start == self.start.span_start() && self.end == self.start.next_span()
    }
}

impl fmt::Display for LsnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for LsnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How far `ranges` cover the WAL without a hole from `from` on. `ranges` may overlap and need no order.
pub fn covered_until(from: Lsn, ranges: &mut [LsnRange]) -> Lsn {
    ranges.sort_unstable();
    ranges.iter().fold(from, |end, range| match range.start <= end {
        true => end.max(range.end),
        false => end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_and_name_are_inverse(position: u64) {
            let lsn = Lsn::new(position);
            prop_assert_eq!(lsn.to_string().parse::<Lsn>(), Ok(lsn));
            prop_assert_eq!(Lsn::from_name(&lsn.name()), Some(lsn));
        }

        #[test]
        fn coverage_stops_at_the_first_hole(cuts in proptest::collection::vec(0u64..1000, 1..40)) {
            let mut ranges: Vec<LsnRange> =
                cuts.windows(2).map(|w| LsnRange::new(Lsn::new(w[0].min(w[1])), Lsn::new(w[0].max(w[1])))).collect();
            let mut expected = 0;
            while ranges.iter().any(|r| r.contains(Lsn::new(expected))) {
                expected += 1;
            }
            prop_assert_eq!(covered_until(Lsn::new(0), &mut ranges), Lsn::new(expected));
        }
    }

    #[test]
    fn only_postgres_text_is_an_lsn() {
        for bad in ["", "/", "1", "1/", "/1", "1/+2", "123456789/0", "0/0 ", "g/0"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?}");
        }
        assert_eq!("16/b374d848".parse::<Lsn>().map(Lsn::get), Ok(0x16_b374_d848));
        assert_eq!(Lsn::from_name("00000016b374d848"), None, "names are upper case");
    }

    #[test]
    fn spans_are_16_mib() {
        let lsn = Lsn::new(0x1_2345_6789);
        assert_eq!(lsn.span_start(), Lsn::new(0x1_2300_0000));
        assert_eq!(lsn.next_span(), Lsn::new(0x1_2400_0000));
        assert!(LsnRange::new(lsn.span_start(), lsn.next_span()).is_span());
        assert!(!LsnRange::new(lsn, lsn.next_span()).is_span());
    }
}
