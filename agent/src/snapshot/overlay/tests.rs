use super::*;
use backstay_common::id::ObjectId;
use backstay_common::seal::{Codec, FrameSpan};
use proptest::prelude::*;

const PAGE: u32 = 8192;

/// Frames by number, with a number for each page in them.
#[derive(Default)]
struct Store(Vec<Vec<u32>>);

impl Store {
    fn add(&mut self, pages: Vec<u32>) -> FrameRef {
        let (number, plain_bytes) = (self.0.len() as u32, pages.len() as u32 * PAGE);
        let offset = 200 + u64::from(number) * 100;
        let codec = Codec::Zstd;
        self.0.push(pages);
        let span = FrameSpan { number, offset, sealed_bytes: 100, plain_bytes, codec };
        FrameRef { pack: ObjectId::from_bytes([number as u8 % 3; 8]), span }
    }

    fn content(&self, map: &FileMap) -> Vec<u32> {
        let of = |run: &Run| {
            let frame = &self.0[map.frames[run.frame as usize].span.number as usize];
            frame[(run.at / PAGE) as usize..][..run.pages as usize].to_vec()
        };
        map.runs.iter().flat_map(of).collect()
    }
}

/// What changes in one generation: the size, then pages.
fn edits() -> impl Strategy<Value = Vec<(usize, Vec<(usize, usize)>)>> {
    let pages = proptest::collection::vec((0usize..400, 1usize..40), 0..12);
    proptest::collection::vec((0usize..400, pages), 1..8)
}

proptest! {
    #[test]
    fn a_map_holds_the_content_after_any_edits(generations in edits(), seed: u32) {
        let (mut store, mut map, mut content) = (Store::default(), FileMap::default(), Vec::new());
        let mut stamp = 0;
        for (size, changes) in generations {
            let before = content.clone();
            content.resize(size, 0);
            for (at, pages) in changes {
                for page in content.iter_mut().skip(at).take(pages) {
                    stamp += 1;
                    *page = stamp;
                }
            }
            let changed: Vec<u32> = (0..size).filter(|&n| before.get(n) != content.get(n)).map(|n| n as u32).collect();
            // Cut into frames of different lengths, each with its pages in order, given out of order.
            let mut stored = Vec::new();
            for pages in changed.chunks(1 + (seed as usize + size) % 60) {
                let frame = store.add(pages.iter().map(|n| content[*n as usize]).collect());
                stored.extend(pages.iter().zip(0..).map(|(&first_page, n)| Stored { first_page, pages: 1, frame, at: n * PAGE }));
            }
            stored.reverse();
            map = overlay(&map, stored, size as u32, PAGE).unwrap();
            prop_assert_eq!(store.content(&map), content.clone());
            let bytes = size as u64 * u64::from(PAGE);
            let again = FileMap::decode(&map.encode(), bytes, PAGE);
            prop_assert_eq!(again.unwrap(), map.clone());
            prop_assert!(read_bytes(&map) >= bytes);
        }
    }
}

#[test]
fn runs_that_follow_each_other_are_one_and_a_tail_is_cut() {
    let mut store = Store::default();
    let frame = store.add((0..10).collect());
    let stored = (0..10).map(|n| Stored { first_page: n, pages: 1, frame, at: n * PAGE }).collect();
    let map = overlay(&FileMap::default(), stored, 7, PAGE).unwrap();
    assert_eq!(map.runs, [Run { first_page: 0, pages: 7, frame: 0, at: 0 }]);
}

#[test]
fn a_page_that_is_nowhere_or_twice_is_a_bug() {
    let mut store = Store::default();
    let frame = store.add((0..10).collect());
    let old = FileMap {
        frames: vec![frame],
        runs: vec![Run { first_page: 0, pages: 10, frame: 0, at: 0 }],
    };
    assert_eq!(overlay(&old, Vec::new(), 11, PAGE).unwrap_err().kind(), Kind::Bug);
    let twice = Stored { first_page: 3, pages: 2, frame, at: 0 };
    assert_eq!(overlay(&old, vec![twice, twice], 10, PAGE).unwrap_err().kind(), Kind::Bug);
}
