//! Which blocks of a branch get an index, which indexes a larger one replaces, and which of them to read. Pure.
//!
//! A block of level 0 is so many spans, aligned; one of the next level is [`FAN`] blocks, aligned. A block is indexed once
//! all WAL before its end is stored, and indexes of a whole block of the next level are merged into one. So every object is
//! indexed at most [`LEVELS`] times, and a branch of n spans has about n / (spans·FAN²) + 2·FAN indexes: 200,000 spans in
//! blocks of 128 have some 36 instead of 1,563. Nothing but the names tells what is to be done, so a crash at any
//! moment leaves nothing but work.

use crate::catalog::WalEntry;
use crate::id::ObjectId;
use crate::lsn::{Lsn, LsnRange, SPAN_BYTES};
use std::cmp::Reverse;
use std::collections::HashSet;

/// So many indexes are merged into one.
pub const FAN: u64 = 16;
/// Sizes of blocks.
pub const LEVELS: u32 = 3;

/// What is to be made next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// An index of this block, from the footers.
    Read(LsnRange),
    /// An index of this block, from smaller indexes.
    Merge(LsnRange),
}

/// How blocks are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// A power of two.
    spans: u64,
}

impl Blocks {
    /// `spans` is the number of spans in the smallest block: a power of two, at most 4096.
    pub fn new(spans: u64) -> Blocks {
        assert!(spans.is_power_of_two() && spans <= 4096, "blocks of {spans} spans");
        Blocks { spans }
    }

    /// Bytes of a block of this level.
    fn bytes(self, level: u32) -> u64 {
        self.spans * SPAN_BYTES * FAN.pow(level)
    }

    /// The end of the last smallest block that ends at or before `lsn`.
    pub fn last_end(self, lsn: Lsn) -> Lsn {
        lsn.align_down(self.bytes(0))
    }

    /// The blocks of `level` that hold any of `wal`, and end with it or before.
    fn within(self, level: u32, wal: LsnRange) -> impl DoubleEndedIterator<Item = LsnRange> {
        let bytes = self.bytes(level);
        let (first, last) = (wal.start.get() / bytes, wal.end.get() / bytes);
        (first..last).map(move |n| LsnRange::new(Lsn::new(n * bytes), Lsn::new((n + 1) * bytes)))
    }

    /// What is to be done where `indexes` are stored and all of `wal` is: the newest blocks first, for they are what is asked
    /// for, and merges last. Merges take it that what comes before them was done.
    pub fn work(self, indexes: &[LsnRange], wal: LsnRange) -> Vec<Work> {
        let lacks = |block: &LsnRange| !indexes.iter().any(|index| index.covers(block));
        let read = self.within(0, wal).rev().filter(lacks).map(Work::Read);
        let merges = (1..LEVELS).flat_map(|level| self.within(level, wal).rev());
        read.chain(merges.filter(lacks).map(Work::Merge)).collect()
    }
}

/// Those that a larger one at the same place replaces; of equal ones all but one, and everybody keeps the same.
pub fn superseded(indexes: &[WalEntry]) -> Vec<WalEntry> {
    let mut ordered: Vec<&WalEntry> = indexes.iter().collect();
    ordered.sort_by_key(|index| (index.range.start, Reverse(index.range.end), index.id));
    let mut reached = Lsn::INVALID;
    let mut replaced = Vec::new();
    for index in ordered {
        match index.range.end <= reached {
            true => replaced.push(*index),
            false => reached = index.range.end,
        }
    }
    replaced
}

/// The indexes to read for objects that lie at these places (sorted): no two that say the same, and none that would answer
/// for fewer than `worth` of them.
pub fn choose(indexes: &[WalEntry], wanted: &[LsnRange], worth: usize) -> Vec<WalEntry> {
    let replaced: HashSet<ObjectId> = superseded(indexes).iter().map(|index| index.id).collect();
    let answers = |index: &WalEntry| {
        let from = wanted.partition_point(|range| range.start < index.range.start);
        let to = wanted.partition_point(|range| range.start < index.range.end);
        to.saturating_sub(from)
    };
    let best = indexes.iter().filter(|index| !replaced.contains(&index.id));
    best.filter(|index| answers(index) >= worth.max(1)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Places;
    use proptest::prelude::*;

    fn spans(start: u64, end: u64) -> LsnRange {
        LsnRange::new(Lsn::new(start * SPAN_BYTES), Lsn::new(end * SPAN_BYTES))
    }

    fn index(start: u64, end: u64, id: u8) -> WalEntry {
        let id = ObjectId::from_bytes([id; 8]);
        WalEntry { range: spans(start, end), id, size: 1, places: Places::default().with(0) }
    }

    /// Does the work until there is none, and deletes what is superseded.
    fn settle(blocks: Blocks, indexes: &mut Vec<LsnRange>, wal: LsnRange) -> usize {
        let work = blocks.work(indexes, wal);
        for one in &work {
            match *one {
                Work::Read(block) => indexes.push(block),
                Work::Merge(block) => {
                    let parts: u64 =
                        indexes.iter().filter(|i| block.covers(i)).map(LsnRange::len).sum();
                    let first = wal.start.align_down(blocks.bytes(0)).max(block.start);
                    assert!(parts >= block.end.since(first), "parts of {block} are there");
                    indexes.retain(|index| !block.covers(index));
                    indexes.push(block);
                }
            }
        }
        work.len()
    }

    proptest! {
        #[test]
        fn every_finished_block_is_indexed_once_and_few_indexes_are_left(
            from in 0u64..3000, steps in proptest::collection::vec(0u64..700, 1..12)
        ) {
            let (blocks, mut indexes, mut to) = (Blocks::new(2), Vec::new(), from);
            for step in steps {
                to += step;
                settle(blocks, &mut indexes, spans(from, to));
                prop_assert_eq!(settle(blocks, &mut indexes, spans(from, to)), 0, "nothing is left to do");
                indexes.sort();
                prop_assert!(indexes.windows(2).all(|two| two[0].end == two[1].start));
                let covered = LsnRange::new(Lsn::new(from * SPAN_BYTES), blocks.last_end(spans(0, to).end));
                let end = indexes.last().map_or(covered.start.align_down(blocks.bytes(0)), |last| last.end);
                prop_assert!(end >= covered.end || covered.is_empty());
                prop_assert!(indexes.len() as u64 <= (to - from) / (2 * FAN * FAN) + 2 * FAN + 1);
            }
        }
    }

    #[test]
    fn a_month_of_a_busy_database_needs_few_indexes() {
        let mut indexes = Vec::new();
        settle(Blocks::new(128), &mut indexes, spans(7, 200_007));
        assert!(indexes.len() <= 36, "{} indexes", indexes.len());
    }

    #[test]
    fn larger_ones_replace_smaller_ones_and_one_of_equals_stays() {
        let all =
            [index(0, 4, 1), index(0, 32, 2), index(28, 32, 3), index(32, 36, 9), index(32, 36, 5)];
        assert_eq!(superseded(&all), [all[0], all[2], all[3]]);
        assert_eq!(superseded(&all[3..]), [all[3]], "everybody keeps the same one");
    }

    #[test]
    fn only_what_answers_enough_is_read() {
        let all = [index(0, 32, 1), index(0, 2, 2), index(32, 34, 3), index(34, 36, 4)];
        let wanted: Vec<LsnRange> = (30..35).map(|n| spans(n, n + 1)).collect();
        assert_eq!(choose(&all, &wanted, 2), [all[0], all[2]]);
        assert_eq!(choose(&all, &wanted, 1), [all[0], all[2], all[3]]);
        assert_eq!(choose(&all, &[], 0), []);
    }
}
