//! Which objects cover a range, and where the holes are. Pure.

use super::WalEntry;
use crate::lsn::{Lsn, LsnRange};

/// The union of `ranges`: sorted, disjoint, and with a hole between any two.
pub fn merged(ranges: impl Iterator<Item = LsnRange>) -> Vec<LsnRange> {
    let mut ranges: Vec<LsnRange> = ranges.filter(|range| !range.is_empty()).collect();
    ranges.sort_unstable();
    let mut merged: Vec<LsnRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// What of `range` none of `ranges` covers, in order.
pub fn uncovered(range: LsnRange, ranges: impl Iterator<Item = LsnRange>) -> Vec<LsnRange> {
    let mut left = Vec::new();
    let mut at = range.start;
    for there in merged(ranges.filter(|there| there.start < range.end && there.end > range.start)) {
        if at < there.start {
            left.push(LsnRange::new(at, there.start));
        }
        at = there.end;
    }
    if at < range.end {
        left.push(LsnRange::new(at, range.end));
    }
    left
}

/// As few of `entries` (sorted by range) as cover `wanted` without a hole, from its start on; they end where `wanted` or
/// the coverage ends. A whole span is taken before the pieces that it supersedes.
pub fn covering(entries: &[WalEntry], wanted: LsnRange) -> Vec<WalEntry> {
    let mut chosen: Vec<WalEntry> = Vec::new();
    let mut at = wanted.start;
    let mut rest = entries;
    while at < wanted.end {
        let reachable = rest.partition_point(|entry| entry.range.start <= at);
        let farthest = rest[..reachable].iter().max_by_key(|entry| entry.range.end);
        match farthest {
            Some(entry) if entry.range.end > at => {
                at = entry.range.end;
                chosen.push(*entry);
                // What begins before the chosen one and ends no later is of no further use.
                rest =
                    &rest[rest.partition_point(|other| other.range.start <= entry.range.start)..];
            }
            _ => break,
        }
    }
    chosen
}

/// Where the first of `entries` after `lsn` begins.
pub fn next_start(entries: &[WalEntry], lsn: Lsn) -> Option<Lsn> {
    let after = entries.partition_point(|entry| entry.range.start <= lsn);
    entries.get(after).map(|entry| entry.range.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Places;
    use crate::id::ObjectId;
    use crate::lsn::covered_until;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> LsnRange {
        LsnRange::new(Lsn::new(start), Lsn::new(end))
    }

    fn entry(range: LsnRange) -> WalEntry {
        WalEntry {
            range,
            id: ObjectId::from_bytes([0; 8]),
            size: 1,
            places: Places::default().with(0),
        }
    }

    proptest! {
        #[test]
        fn a_cover_reaches_as_far_as_the_union(
            cuts in proptest::collection::vec((0u64..200, 1u64..30), 0..40), from in 0u64..200, length in 1u64..200
        ) {
            let mut ranges: Vec<LsnRange> = cuts.iter().map(|&(at, n)| range(at, at + n)).collect();
            ranges.sort_unstable();
            let entries: Vec<WalEntry> = ranges.iter().copied().map(entry).collect();
            let wanted = range(from, from + length);
            let chosen = covering(&entries, wanted);
            let end = covered_until(wanted.start, &mut ranges).min(wanted.end);
            let mut reached = wanted.start;
            for one in &chosen {
                prop_assert!(one.range.start <= reached && one.range.end > reached);
                reached = one.range.end;
            }
            prop_assert_eq!(reached.min(wanted.end), end);
            let union = merged(ranges.iter().copied());
            prop_assert!(union.windows(2).all(|two| two[0].end < two[1].start));
        }
    }

    proptest! {
        #[test]
        fn what_is_uncovered_is_what_no_range_has(
            ends in proptest::collection::vec((0u64..50, 0u64..50), 0..8),
            (start, end) in (0u64..50, 0u64..50),
        ) {
            let between = |a: u64, b: u64| range(a.min(b), a.max(b));
            let (ranges, of): (Vec<LsnRange>, _) =
                (ends.into_iter().map(|(a, b)| between(a, b)).collect(), between(start, end));
            let left = uncovered(of, ranges.iter().copied());
            for at in (0..50).map(Lsn::new) {
                let is_left = of.contains(at) && !ranges.iter().any(|range| range.contains(at));
                prop_assert_eq!(left.iter().any(|range| range.contains(at)), is_left);
            }
            prop_assert!(left.windows(2).all(|two| two[0].end < two[1].start));
        }
    }

    #[test]
    fn a_span_is_taken_before_its_pieces() {
        let entries =
            [entry(range(0, 4)), entry(range(0, 16)), entry(range(4, 8)), entry(range(8, 16))];
        assert_eq!(covering(&entries, range(2, 16)), [entry(range(0, 16))]);
        assert_eq!(next_start(&entries, Lsn::new(4)), Some(Lsn::new(8)));
    }
}
