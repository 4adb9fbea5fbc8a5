//! Randomness that a printed number repeats.
//!
//! Everything a test draws comes from [`seed`] and the test's name, so a failure is repeated with
//! `./scripts/test --seed N`, whatever else runs beside it.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// The seed of this run: `BACKSTAY_SEED`, else the clock. Printed when first asked for.
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let seed = std::env::var("BACKSTAY_SEED")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(clock_seed);
        eprintln!("seed {seed} (BACKSTAY_SEED={seed} repeats this)");
        seed
    })
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64)
}

/// A stream of numbers (SplitMix64): quick, and the same everywhere. Not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn from_seed(seed: u64) -> Random {
        Random(seed)
    }

    /// The stream of one purpose of this run: same seed and label, same numbers.
    pub fn of(label: &str) -> Random {
        Random(seed()).fork(label)
    }

    /// A stream that doesn't depend on how much is drawn from this one.
    pub fn fork(&self, label: &str) -> Random {
        // FNV-1a: labels are few and short.
        let hash = label.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        Random(Random(self.0 ^ hash).next())
    }

    /// Any 64 bits.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..end`; `end` is at least 1.
    pub fn below(&mut self, end: u64) -> u64 {
        assert!(end > 0, "an empty range");
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// A number in `range`, which isn't empty.
    pub fn range(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of `items`, which isn't empty.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// Bytes that don't compress.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }

    /// Hex digits, half of which don't compress: text for a column that must be toasted.
    pub fn hex(&mut self, len: usize) -> String {
        self.bytes(len.div_ceil(2))
            .iter()
            .flat_map(|b| [b >> 4, b & 15])
            .take(len)
            .map(digit)
            .collect()
    }
}

fn digit(nibble: u8) -> char {
    char::from(b"0123456789abcdef"[usize::from(nibble)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_stream() {
        let (mut a, mut b) = (Random::from_seed(7).fork("x"), Random::from_seed(7).fork("x"));
        assert_eq!(a.bytes(33), b.bytes(33));
        assert_ne!(Random::from_seed(7).fork("y").next(), Random::from_seed(7).fork("x").next());
        assert_ne!(Random::from_seed(8).fork("x").next(), Random::from_seed(7).fork("x").next());
    }

    #[test]
    fn draws_stay_in_range_and_reach_both_ends() {
        let mut random = Random::from_seed(1);
        let drawn: std::collections::BTreeSet<u64> =
            (0..1000).map(|_| random.range(3..7)).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [3, 4, 5, 6]);
        assert_eq!(random.hex(7).len(), 7);
    }
}
