//! The hashes of many pages at once: those of [`page_hash`], in half the time.
//!
//! BLAKE3 cuts its input into chunks of 1 KiB, and hashes as many of them side by side as a vector register takes: up to 16.
//! A page has 8, and above them lie rows of fewer and fewer nodes, down to one. So a page hashed alone leaves most of the
//! machine idle; here each row of nodes is hashed for [`TOGETHER`] pages at once.
//!
//! `blake3::platform` is public and not documented; a test holds what is computed with it to [`page_hash`].

use super::{PageHash, page_hash};
use blake3::platform::Platform;
use blake3::{BLOCK_LEN, CHUNK_LEN, IncrementCounter, OUT_LEN};
use std::sync::LazyLock;

/// Pages that are hashed side by side: as many as there are lanes in the widest registers.
const TOGETHER: usize = 16;
/// Chunks of the largest page, 32 KiB.
const CHUNKS_MAX: usize = 32;

/// What BLAKE3 is told of each node ("The BLAKE3 paper", 2.3, table 3).
mod flags {
    pub const CHUNK_START: u8 = 1;
    pub const CHUNK_END: u8 = 1 << 1;
    pub const PARENT: u8 = 1 << 2;
    pub const ROOT: u8 = 1 << 3;
    pub const KEYED_HASH: u8 = 1 << 4;
}

type Node = [u8; OUT_LEN];

/// Appends the hashes of all pages of `plain`; the last may be short. `page_bytes` is not 0.
pub fn page_hashes(key: &[u8; 32], plain: &[u8], page_bytes: usize, hashes: &mut Vec<PageHash>) {
    let chunks = page_bytes / CHUNK_LEN;
    let fits = page_bytes.is_multiple_of(CHUNK_LEN)
        && chunks.is_power_of_two()
        && (2..=CHUNKS_MAX).contains(&chunks);
    hashes.reserve(plain.len().div_ceil(page_bytes));
    let mut rest = plain;
    while let Some((together, after)) =
        rest.split_at_checked(TOGETHER * page_bytes).filter(|_| fits)
    {
        hashes.extend(hashes_together(key, together, chunks));
        rest = after;
    }
    hashes.extend(rest.chunks(page_bytes).map(|page| page_hash(key, page)));
}

/// Of [`TOGETHER`] pages of so many chunks, a power of two.
fn hashes_together(key: &[u8; 32], plain: &[u8], chunks: usize) -> [PageHash; TOGETHER] {
    static PLATFORM: LazyLock<Platform> = LazyLock::new(Platform::detect);
    let words = key.as_chunks::<4>().0;
    let key: [u32; 8] = std::array::from_fn(|n| u32::from_le_bytes(words[n]));
    let plain = plain.as_chunks::<CHUNK_LEN>().0;
    let many = |inputs: &[&[u8; BLOCK_LEN]], flags: u8, row: &mut [Node]| {
        let no = IncrementCounter::No;
        PLATFORM.hash_many(inputs, &key, 0, no, flags, 0, 0, row.as_flattened_mut());
    };
    // Node n of all pages lies from n * TOGETHER on.
    let mut nodes = [[0; OUT_LEN]; TOGETHER * CHUNKS_MAX];
    for chunk in 0..chunks {
        let inputs: [_; TOGETHER] = std::array::from_fn(|page| &plain[page * chunks + chunk]);
        let row = nodes[chunk * TOGETHER..][..TOGETHER].as_flattened_mut();
        let (start, end) = (flags::CHUNK_START, flags::CHUNK_END);
        let (number, no) = (chunk as u64, IncrementCounter::No);
        PLATFORM.hash_many(&inputs, &key, number, no, flags::KEYED_HASH, start, end, row);
    }
    let mut left = chunks;
    while left > 1 {
        left /= 2;
        let root = if left == 1 { flags::ROOT } else { 0 };
        for node in 0..left {
            let pair = |page: usize| -> [u8; BLOCK_LEN] {
                let child = |n: usize| nodes[(2 * node + n) * TOGETHER + page];
                let mut pair = [0; BLOCK_LEN];
                pair[..OUT_LEN].copy_from_slice(&child(0));
                pair[OUT_LEN..].copy_from_slice(&child(1));
                pair
            };
            let pairs: [_; TOGETHER] = std::array::from_fn(pair);
            let inputs: [_; TOGETHER] = std::array::from_fn(|page| &pairs[page]);
            let row = &mut nodes[node * TOGETHER..][..TOGETHER];
            many(&inputs, flags::KEYED_HASH | flags::PARENT | root, row);
        }
    }
    std::array::from_fn(|page| *nodes[page].first_chunk().expect("longer than 8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pages_hash_as_each_alone_does() {
        let key: [u8; 32] = std::array::from_fn(|n| n as u8 * 7);
        let plain: Vec<u8> = (0..40 * 32_768u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
        for page_bytes in [1000, 1024, 2048, 3072, 4096, 8192, 16_384, 32_768, 65_536] {
            for pages in [0, 1, 15, 16, 17, 33] {
                for short in [0, 1, page_bytes - 1] {
                    let bytes = (pages * page_bytes + short).min(plain.len());
                    let plain = &plain[..bytes];
                    let alone: Vec<PageHash> =
                        plain.chunks(page_bytes).map(|page| page_hash(&key, page)).collect();
                    let mut together = Vec::new();
                    page_hashes(&key, plain, page_bytes, &mut together);
                    assert!(together == alone, "{pages} pages of {page_bytes} bytes and {short}");
                }
            }
        }
    }
}
