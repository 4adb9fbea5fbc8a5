//! Which frame holds each page of one file.

use crate::cbor::{self, Fields};
use crate::id::ObjectId;
use crate::seal::{Codec, FrameSpan};
use crate::{Error, Kind, Result};
use minicbor::{Decode, Encode};

/// One frame, anywhere in the cluster's packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRef {
    pub pack: ObjectId,
    pub span: FrameSpan,
}

/// Pages that lie one behind the other in one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct Run {
    /// The first page of the file that the run holds.
    #[n(0)]
    pub first_page: u32,
    #[n(1)]
    pub pages: u32,
    /// Index into [`FileMap::frames`].
    #[n(2)]
    pub frame: u32,
    /// Where the first page lies in the frame's plain bytes.
    #[n(3)]
    pub at: u32,
}

/// For each page of a file the frame with its newest copy. The last page may be short.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileMap {
    pub frames: Vec<FrameRef>,
    /// In the order of pages, without a hole or an overlap, from page 0 to the last.
    pub runs: Vec<Run>,
}

impl FileMap {
    pub fn encode(&self) -> Vec<u8> {
        let mut packs: Vec<ObjectId> = self.frames.iter().map(|f| f.pack).collect();
        packs.sort_unstable();
        packs.dedup();
        let frames = self.frames.iter().map(|frame| {
            let pack = packs.binary_search(&frame.pack).expect("collected above") as u32;
            StoredFrame::new(pack, &frame.span)
        });
        cbor::encode(&Stored { frames: frames.collect(), runs: self.runs.clone(), packs })
    }

    /// Reads the map of a file of `size` bytes in pages of `page_bytes`, and checks that every page is there once.
    pub fn decode(bytes: &[u8], size: u64, page_bytes: u32) -> Result<FileMap> {
        let stored: Stored = cbor::decode(bytes)?;
        let frames = stored.frames.iter().map(|frame| frame.resolve(&stored.packs));
        let map = frames
            .collect::<Option<Vec<FrameRef>>>()
            .map(|frames| FileMap { frames, runs: stored.runs })
            .filter(|map| map.holds_every_page(size, page_bytes));
        map.ok_or_else(|| {
            Error::new(Kind::Corrupt, "a file map does not hold each page of its file once")
        })
    }

    fn holds_every_page(&self, size: u64, page_bytes: u32) -> bool {
        if !is_page_size(page_bytes) {
            return false;
        }
        let page_bytes = u64::from(page_bytes);
        let mut next = 0u64;
        for run in &self.runs {
            let Some(frame) = self.frames.get(run.frame as usize) else { return false };
            let start = next * page_bytes;
            let bytes = (u64::from(run.pages) * page_bytes).min(size.saturating_sub(start));
            let fits = u64::from(run.at) + bytes <= u64::from(frame.span.plain_bytes);
            if u64::from(run.first_page) != next || run.pages == 0 || !fits {
                return false;
            }
            next += u64::from(run.pages);
        }
        next == size.div_ceil(page_bytes)
    }
}

/// True for the block sizes that PostgreSQL can be built with ("configure --with-blocksize").
pub fn is_page_size(bytes: u32) -> bool {
    bytes.is_power_of_two() && (1024..=32768).contains(&bytes)
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Stored {
    #[n(0)]
    packs: Vec<ObjectId>,
    #[n(1)]
    frames: Vec<StoredFrame>,
    #[n(2)]
    runs: Vec<Run>,
}

impl Fields for Stored {
    const KNOWN: u64 = 3;
    const WHAT: &'static str = "a file map";
}

/// A frame with its pack as an index.
#[derive(Encode, Decode)]
#[cbor(array)]
struct StoredFrame {
    #[n(0)]
    pack: u32,
    #[n(1)]
    number: u32,
    #[n(2)]
    offset: u64,
    #[n(3)]
    sealed_bytes: u32,
    #[n(4)]
    plain_bytes: u32,
    #[n(5)]
    codec: u8,
}

impl StoredFrame {
    fn new(pack: u32, span: &FrameSpan) -> StoredFrame {
        StoredFrame {
            pack,
            number: span.number,
            offset: span.offset,
            sealed_bytes: span.sealed_bytes,
            plain_bytes: span.plain_bytes,
            codec: span.codec as u8,
        }
    }

    fn resolve(&self, packs: &[ObjectId]) -> Option<FrameRef> {
        let span = FrameSpan {
            number: self.number,
            offset: self.offset,
            sealed_bytes: self.sealed_bytes,
            plain_bytes: self.plain_bytes,
            codec: Codec::from_byte(self.codec)?,
        };
        span.is_possible().then_some(FrameRef { pack: *packs.get(self.pack as usize)?, span })
    }
}

impl<C> Encode<C> for FrameRef {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        ctx: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.array(2)?;
        self.pack.encode(e, ctx)?;
        StoredFrame::new(0, &self.span).encode(e, ctx)
    }
}

impl<'b, C> Decode<'b, C> for FrameRef {
    fn decode(
        d: &mut minicbor::Decoder<'b>,
        ctx: &mut C,
    ) -> Result<FrameRef, minicbor::decode::Error> {
        let wrong = || minicbor::decode::Error::message("not a frame reference");
        if d.array()? != Some(2) {
            return Err(wrong());
        }
        let pack = ObjectId::decode(d, ctx)?;
        StoredFrame::decode(d, ctx)?.resolve(&[pack]).ok_or_else(wrong)
    }
}

/// Bytes that lie in frames: a file map, or a part of the table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct BytesRef {
    #[n(0)]
    pub pieces: Vec<BytesPiece>,
}

/// `bytes` bytes from `at` on in the plain bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct BytesPiece {
    #[n(0)]
    pub frame: FrameRef,
    #[n(1)]
    pub at: u32,
    #[n(2)]
    pub bytes: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(pack: u8, number: u32) -> FrameRef {
        let span = FrameSpan {
            number,
            offset: 200 + u64::from(number) * 1000,
            sealed_bytes: 1000,
            plain_bytes: 128 * 8192,
            codec: Codec::Zstd,
        };
        FrameRef { pack: ObjectId::from_bytes([pack; 8]), span }
    }

    prop_compose! {
        fn any_map()(
            cuts in proptest::collection::vec((1u32..=128, 0u8..4), 0..60), last in 1u64..=8192,
        ) -> (FileMap, u64) {
            let mut map = FileMap::default();
            let mut page = 0;
            for (number, &(pages, pack)) in cuts.iter().enumerate() {
                map.frames.push(frame(pack, number as u32));
                map.runs.push(Run { first_page: page, pages, frame: number as u32, at: 0 });
                page += pages;
            }
            let size = if page == 0 { 0 } else { u64::from(page - 1) * 8192 + last };
            (map, size)
        }
    }

    proptest! {
        #[test]
        fn maps_read_back((map, size) in any_map()) {
            prop_assert_eq!(FileMap::decode(&map.encode(), size, 8192).unwrap(), map);
        }

        #[test]
        fn a_map_with_a_page_missing_or_twice_is_refused((map, size) in any_map(), at: usize, more: bool) {
            prop_assume!(!map.runs.is_empty());
            let mut bent = map.clone();
            let at = at % bent.runs.len();
            bent.runs[at].pages = if more { bent.runs[at].pages + 1 } else { bent.runs[at].pages - 1 };
            prop_assert!(FileMap::decode(&bent.encode(), size, 8192).is_err());
        }

        #[test]
        fn damage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = FileMap::decode(&bytes, 8192 * 3, 8192);
        }
    }

    #[test]
    fn impossible_frames_and_pages_are_refused() {
        let whole = |span| {
            let map = FileMap {
                frames: vec![FrameRef { pack: ObjectId::from_bytes([1; 8]), span }],
                runs: vec![Run { first_page: 0, pages: 1, frame: 0, at: 0 }],
            };
            move |page_bytes| FileMap::decode(&map.encode(), 8192, page_bytes)
        };
        let span = frame(1, 0).span;
        assert!(whole(span)(8192).is_ok());
        for page_bytes in [0, 512, 8193, 1 << 16] {
            assert!(whole(span)(page_bytes).is_err(), "{page_bytes}");
        }
        for bent in [
            FrameSpan { offset: u64::MAX - 10, ..span },
            FrameSpan { sealed_bytes: 15, ..span },
            FrameSpan { sealed_bytes: u32::MAX, ..span },
            FrameSpan { plain_bytes: (1 << 20) + 1, ..span },
            FrameSpan { codec: Codec::Raw, ..span },
        ] {
            assert!(whole(bent)(8192).is_err(), "{bent:?}");
        }
    }

    #[test]
    fn a_run_must_lie_inside_its_frame() {
        let map = FileMap {
            frames: vec![frame(1, 0)],
            runs: vec![Run { first_page: 0, pages: 2, frame: 0, at: 127 * 8192 }],
        };
        assert!(FileMap::decode(&map.encode(), 2 * 8192, 8192).is_err());
    }
}
