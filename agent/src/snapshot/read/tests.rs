use super::*;
use backstay_common::page::page_checksum;
use std::os::unix::fs::FileExt;

const PAGE: usize = 8192;
const START: Lsn = Lsn::new(1000);

fn reading() -> Reading {
    let (segment_pages, hash_key) = (131_072, [1; 32]);
    Reading {
        page_bytes: PAGE as u32,
        segment_pages,
        checksums: true,
        start: START,
        hash_key,
        level: 1,
    }
}

/// A page of block `block`, last changed at `lsn`.
fn page(block: u32, lsn: u64) -> Vec<u8> {
    let mut page = vec![block as u8 + 1; PAGE];
    page[..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
    page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
    let checksum = page_checksum(&page, block);
    page[8..10].copy_from_slice(&checksum.to_le_bytes());
    page
}

/// Reads all of a file of segment `segment`, and what is doubtful about it.
fn judged(file: &File, segment: u32) -> (Vec<u8>, Vec<(u32, Option<Lsn>)>) {
    let mut plain = vec![0; file.metadata().unwrap().len() as usize];
    read_full(file, &mut plain, 0).unwrap();
    let pages = Pages { file: Some(file), offset: 0, segment: Some(segment) };
    let doubts = reading().judge(&mut plain, &pages, &|_| false).unwrap().doubts;
    (plain, doubts.into_iter().map(|d| (d.block, d.newer)).collect())
}

fn file_of(pages: &[Vec<u8>]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&pages.concat(), 0).unwrap();
    file
}

#[test]
fn sound_and_new_pages_pass_in_any_segment() {
    let file = file_of(&[page(131_072, 5), vec![0; PAGE], page(131_074, 2000)]);
    assert_eq!(judged(&file, 1).1, []);
    assert_ne!(judged(&file, 0).1, [], "the block number is part of the checksum");
}

#[test]
fn a_wrong_page_is_damaged_if_old_and_doubtful_if_new() {
    let (mut old, mut new) = (page(1, 999), page(2, 1000));
    old[5000] ^= 1;
    new[5000] ^= 1;
    let (plain, doubts) = judged(&file_of(&[page(0, 5), old.clone(), new]), 0);
    assert_eq!(doubts, [(2, Some(Lsn::new(1000))), (1, None)]);
    assert_eq!(plain[PAGE..2 * PAGE], old, "it is kept as it is");
}

#[test]
fn a_page_that_was_torn_is_taken_from_the_second_read() {
    let file = file_of(&[page(0, 5), page(1, 5)]);
    let mut torn = [page(0, 5), page(1, 4)].concat();
    torn[PAGE + 100] ^= 1;
    let pages = Pages { file: Some(&file), offset: 0, segment: Some(0) };
    let doubts = reading().judge(&mut torn, &pages, &|_| false).unwrap();
    assert!(doubts.doubts.is_empty());
    assert_eq!(doubts.read_again, [1], "its hash is made anew");
    assert_eq!(torn[PAGE..], page(1, 5));
}

#[test]
fn a_page_that_is_gone_by_the_second_read_is_no_damage() {
    let file = file_of(&[page(0, 5)]);
    let mut plain = [page(0, 5), page(1, 5)].concat();
    plain[PAGE + 100] ^= 1;
    let pages = Pages { file: Some(&file), offset: 0, segment: Some(0) };
    assert!(reading().judge(&mut plain, &pages, &|_| false).unwrap().doubts.is_empty());
}

#[test]
fn files_that_are_no_relations_are_not_judged() {
    let file = file_of(&[vec![9; PAGE]]);
    let pages = Pages { file: Some(&file), offset: 0, segment: None };
    assert!(reading().judge(&mut [9; PAGE], &pages, &|_| false).unwrap().doubts.is_empty());
}

#[test]
fn a_page_that_cannot_be_read_again_is_a_doubt_at_once() {
    let first = 2 * reading().segment_pages;
    let mut plain = [page(first, 5), page(first + 1, 5)].concat();
    plain[PAGE + 100] ^= 1;
    let pages = Pages { file: None, offset: 0, segment: Some(2) };
    let judged = reading().judge(&mut plain, &pages, &|_| false).unwrap();
    let doubts: Vec<_> = judged.doubts.iter().map(|d| (d.page, d.block, d.newer)).collect();
    assert_eq!(doubts, [(1, first + 1, None)]);
}
