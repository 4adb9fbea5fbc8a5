//! What a snapshot is made of, as it is stored.
//!
//! ```text
//! manifest ── plain: packs, epochs, branch, start, stop      (no key needed)
//!    └─ root ── table ─► file entries ─► file map ─► frames in packs, one for each page
//! ```
//!
//! A snapshot is complete, whatever it stores: its maps name a frame for every page. File maps and parts of the
//! table are themselves bytes in frames, so that what did not change is a reference.

pub mod begin;
pub mod filemap;
pub mod hashes;
pub mod manifest;
pub mod packs;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use begin::Begin;
pub use filemap::{BytesRef, FileMap, FrameRef, Run};
pub use hashes::page_hashes;
pub use manifest::{CorruptPage, Manifest, ManifestPlain, PackEntry, Root, Tablespace};
pub use table::{Content, FileEntry, FileKind, TablePart};

use crate::cbor::Fields;

/// A keyed hash of one page, over the very bytes that are packed.
pub type PageHash = [u8; 8];

/// The hash of one page. `key` belongs to the snapshot's lineage, so that equal pages of two snapshots hash alike.
pub fn page_hash(key: &[u8; 32], page: &[u8]) -> PageHash {
    blake3::keyed_hash(key, page).as_bytes()[..8].try_into().expect("8 bytes")
}

/// A file's digest: BLAKE3 over its page hashes in order, then its length.
#[derive(Debug, Default)]
pub struct FileDigest(blake3::Hasher);

impl FileDigest {
    pub fn new() -> FileDigest {
        FileDigest::default()
    }

    pub fn push(&mut self, hashes: &[PageHash]) {
        self.0.update(hashes.as_flattened());
    }

    pub fn finish(mut self, size: u64) -> [u8; 32] {
        self.0.update(&size.to_le_bytes());
        *self.0.finalize().as_bytes()
    }
}

/// What is in a frame of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
#[cbor(index_only)]
pub enum FrameUse {
    /// Pages of one file, in order.
    #[n(0)]
    Image,
    /// A sorted set of pages of one file.
    #[n(1)]
    Delta,
    /// Several small files, one behind the other.
    #[n(2)]
    Small,
    /// File maps.
    #[n(3)]
    Maps,
    /// Parts of the file table.
    #[n(4)]
    Table,
}

/// The footer metadata of a pack: what each frame is for, and the hashes of its pages.
#[derive(Debug, Default, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
#[cbor(map)]
pub struct PackMeta {
    #[n(0)]
    pub frames: Vec<PackFrame>,
}

/// One frame of a pack.
#[derive(Debug, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
#[cbor(array)]
pub struct PackFrame {
    #[n(0)]
    pub usage: FrameUse,
    /// Page hashes, eight bytes each, in the order of the pages in the frame; none for maps and tables.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub hashes: Vec<u8>,
}

impl Fields for PackMeta {
    const KNOWN: u64 = 1;
    const WHAT: &'static str = "a pack's footer";
}
