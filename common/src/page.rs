//! Data pages: their checksums, and what a page that was read beside a running server may look like.
//!
//! A page read while the server writes it can be half old and half new. That is harmless when the page was
//! changed after the backup began, because replay then restores it from WAL; a page that was last changed
//! before is held to its checksum ("src/backend/backup/basebackup.c").

use crate::lsn::Lsn;

/// Bytes that the checksum reads side by side: 32 words of 32 bits.
const ROW_BYTES: usize = LANES * 4;
const LANES: usize = 32;
const FNV_PRIME: u32 = 16_777_619;

/// Where each lane starts ("src/include/storage/checksum_impl.h").
const BASE_OFFSETS: [u32; LANES] = [
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
];

/// What a page turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// The checksum is right.
    Valid,
    /// Nothing but zeros: allocated and not yet written.
    New,
    /// The checksum is wrong, but the page was changed since the start: torn, and replay repairs it.
    TornOk,
    /// The checksum is wrong. Read it again: torn if it is then valid or newer, damaged if it stays so.
    Mismatch { stored: u16, computed: u16 },
}

/// Judges one page of a cluster that has checksums; `block` counts from the start of the fork
/// (segment number times blocks in a segment, and the place in the segment).
///
/// `start` is where the backup's WAL starts. The page's own LSN is believed, so the caller also asks
/// whether a `TornOk` page's LSN is beyond the backup's stop, which no honest page's is.
///
/// # Panics
/// If the page's length is not a multiple of 128 bytes, or is zero.
pub fn verify(page: &[u8], block: u32, start: Lsn) -> PageState {
    // A written page has pd_upper; PostgreSQL accepts one without only if all of it is zero.
    let unwritten = page[14..16] == [0, 0];
    if unwritten && is_new(page) {
        return PageState::New;
    }
    let stored = u16::from_le_bytes([page[8], page[9]]);
    let computed = page_checksum(page, block);
    match stored == computed && !unwritten {
        true => PageState::Valid,
        false if page_lsn(page) >= start => PageState::TornOk,
        false => PageState::Mismatch { stored, computed },
    }
}

/// Where the WAL record ends that last changed the page.
pub fn page_lsn(page: &[u8]) -> Lsn {
    let word = |at: usize| {
        u64::from(u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]))
    };
    Lsn::new(word(0) << 32 | word(4))
}

/// True for a page of zeros. (PostgreSQL's `PageIsNew` looks at `pd_upper` alone.)
pub fn is_new(page: &[u8]) -> bool {
    let mut rows = page.chunks_exact(ROW_BYTES);
    rows.by_ref().all(|row| row.iter().fold(0, |bits, byte| bits | byte) == 0)
        && rows.remainder().iter().all(|byte| *byte == 0)
}

/// The checksum that PostgreSQL stores in a page at this place; its `pd_checksum` is taken as zero.
///
/// # Panics
/// If the page's length is not a multiple of 128 bytes, or is zero.
pub fn page_checksum(page: &[u8], block: u32) -> u16 {
    assert!(!page.is_empty() && page.len().is_multiple_of(ROW_BYTES), "{} bytes", page.len());
    // Never zero, so that a page without a checksum can be told from one with.
    ((mixed(page) ^ block) % 65_535 + 1) as u16
}

fn mixed(page: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor was just asked, and has AVX2.
        #[allow(unsafe_code)]
        return unsafe { mixed_avx2(page) };
    }
    mixed_portably(page)
}

/// The same code, compiled for a processor that multiplies eight words at once.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn mixed_avx2(page: &[u8]) -> u32 {
    mixed_portably(page)
}

/// 32 sums in the manner of FNV-1a, each over every 32nd word, two rounds of zeros, and folded.
#[inline(always)]
fn mixed_portably(page: &[u8]) -> u32 {
    let mut sums = BASE_OFFSETS;
    let mut rows = page.chunks_exact(ROW_BYTES);
    if let Some(header) = rows.next() {
        let mut words = row_words(header);
        words[2] &= 0xFFFF_0000; // pd_checksum is the low half of the third word
        mix_row(&mut sums, &words);
    }
    for row in rows {
        mix_row(&mut sums, &row_words(row));
    }
    mix_row(&mut sums, &[0; LANES]);
    mix_row(&mut sums, &[0; LANES]);
    sums.iter().fold(0, |folded, sum| folded ^ sum)
}

#[inline(always)]
fn row_words(row: &[u8]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for (word, bytes) in words.iter_mut().zip(row.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

#[inline(always)]
fn mix_row(sums: &mut [u32; LANES], words: &[u32; LANES]) {
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ word;
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `checksum_impl.h` read word for word, with nothing done side by side.
    fn by_the_book(page: &[u8], block: u32) -> u16 {
        let mut page = page.to_vec();
        page[8..10].fill(0);
        page.resize(page.len() + 2 * ROW_BYTES, 0);
        let mut sums = BASE_OFFSETS;
        for (n, bytes) in page.chunks(4).enumerate() {
            let mixed = sums[n % LANES] ^ u32::from_le_bytes(bytes.try_into().unwrap());
            sums[n % LANES] = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
        }
        ((sums.iter().fold(0, |a, b| a ^ b) ^ block) % 65_535 + 1) as u16
    }

    fn sealed(mut page: Vec<u8>, block: u32) -> Vec<u8> {
        page[14..16].copy_from_slice(&8000u16.to_le_bytes());
        let checksum = page_checksum(&page, block);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    fn page() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![Just(128usize), Just(1024), Just(8192), Just(32768)]
            .prop_flat_map(|size| proptest::collection::vec(any::<u8>(), size))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_path_follows_the_book(page in page(), block: u32) {
            let expected = by_the_book(&page, block);
            prop_assert_eq!(page_checksum(&page, block), expected);
            let portably = ((mixed_portably(&page) ^ block) % 65_535 + 1) as u16;
            prop_assert_eq!(portably, expected);
        }

        #[test]
        fn a_flipped_bit_is_found(page in page(), block: u32, at: prop::sample::Index, bit in 0u32..8) {
            let mut page = sealed(page, block);
            prop_assert_eq!(verify(&page, block, Lsn::MAX), PageState::Valid);
            let at = at.index(page.len());
            page[at] ^= 1u8 << bit;
            // 16 bits let one flip in some 65,000 pass.
            prop_assume!(u16::from_le_bytes([page[8], page[9]]) != by_the_book(&page, block));
            let state = verify(&page, block, Lsn::MAX);
            prop_assert!(matches!(state, PageState::Mismatch { .. }), "{:?}", state);
            prop_assert_eq!(verify(&page, block, page_lsn(&page)), PageState::TornOk);
        }
    }

    #[test]
    fn the_block_number_counts() {
        let page = sealed(vec![7; 8192], 4);
        assert_eq!(verify(&page, 4, Lsn::MAX), PageState::Valid);
        assert!(matches!(verify(&page, 5, Lsn::MAX), PageState::Mismatch { .. }));
    }

    #[test]
    fn only_zeros_are_new() {
        let mut page = vec![0; 8192];
        assert_eq!(verify(&page, 0, Lsn::new(1)), PageState::New);
        page[8191] = 1;
        assert!(matches!(verify(&page, 0, Lsn::new(1)), PageState::Mismatch { .. }));
        let checksum = page_checksum(&page, 0);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
        assert!(
            matches!(verify(&page, 0, Lsn::new(1)), PageState::Mismatch { .. }),
            "a page without pd_upper that is not zero is no page, whatever its checksum"
        );
    }

    #[test]
    fn the_lsn_is_two_halves() {
        let mut page = [0; 128];
        page[..8].copy_from_slice(&[0x16, 0, 0, 0, 0x48, 0xD8, 0x74, 0xB3]);
        assert_eq!(page_lsn(&page).to_string(), "16/B374D848");
    }
}
