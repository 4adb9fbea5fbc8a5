//! The file table: what is in the data directory, in the order in which it was read. A folder comes before what is in it.

use super::filemap::{BytesRef, FrameRef};
use crate::cbor::Fields;
use crate::{Error, Kind, Result};
use minicbor::{Decode, Encode};

/// One file or directory of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct FileEntry {
    /// Relative to the data directory, `/` between parts; tablespaces are `pg_tblspc/<oid>/...`.
    #[n(0)]
    pub path: String,
    #[n(1)]
    pub kind: FileKind,
    /// Unix permission bits.
    #[n(2)]
    pub mode: u32,
    /// Bytes.
    #[n(3)]
    pub size: u64,
    /// [`super::FileDigest`]; absent for directories.
    #[cbor(n(4), with = "minicbor::bytes")]
    pub digest: Option<[u8; 32]>,
    #[n(5)]
    pub content: Content,
}

/// Kinds of entries that a restore may make: no others exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum FileKind {
    #[n(0)]
    Directory,
    #[n(1)]
    File,
}

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Content {
    /// No bytes at all.
    #[n(0)]
    Empty,
    /// All of it lies in one frame, from `at` on.
    #[n(1)]
    Within {
        #[n(0)]
        frame: FrameRef,
        #[n(1)]
        at: u32,
    },
    /// A [`super::FileMap`] says.
    #[n(2)]
    Mapped(#[n(0)] BytesRef),
}

impl FileEntry {
    /// Refuses a path that could lead out of the data directory.
    pub fn check_path(&self) -> Result<()> {
        check_relative(&self.path)
    }
}

/// A path from a manifest must be relative, without `.`, `..`, empty parts or NUL.
pub fn check_relative(path: &str) -> Result<()> {
    let plain =
        |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    match path.split('/').all(plain) {
        true => Ok(()),
        false => {
            Err(Error::new(Kind::Corrupt, format!("the snapshot names the unsafe path {path:?}")))
        }
    }
}

/// A run of file entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TablePart {
    #[n(0)]
    pub files: Vec<FileEntry>,
}

impl Fields for TablePart {
    const KNOWN: u64 = 1;
    const WHAT: &'static str = "a part of the file table";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        for good in ["base/1/1259", "pg_tblspc/16385/PG_15_202209061/5/16386", "PG_VERSION"] {
            assert!(check_relative(good).is_ok(), "{good}");
        }
        for bad in ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a\0b"] {
            assert!(check_relative(bad).is_err(), "{bad:?}");
        }
    }
}
