//! The records of the journal, byte by byte.
//!
//! ```text
//! u32 length of the CBOR │ u32 length of the hashes │ CBOR │ page hashes │ BLAKE3 of all of these
//! ```

use backstay_common::cbor::{self, Fields};
use backstay_common::id::{EpochId, SnapshotId, SystemId};
use backstay_common::snapshot::{FrameRef, PackEntry};
use backstay_common::{Error, Kind, Result};
use minicbor::{Decode, Encode};
use std::io::Read;

const HASH_BYTES: usize = 32;
/// More than what is to be said of any pack.
const RECORD_BYTES_MAX: u32 = 64 << 20;

/// One record: one of the two.
#[derive(Debug, Default, Encode, Decode)]
#[cbor(map)]
pub struct Record {
    #[n(0)]
    pub begun: Option<Begun>,
    #[n(1)]
    pub pack: Option<PackNote>,
}

/// A snapshot begins; the packs that follow are its.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Begun {
    #[n(0)]
    pub snapshot: SnapshotId,
    #[n(1)]
    pub system: SystemId,
    /// [`super::super::cache::fingerprint`] of the key of the hashes.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub key: [u8; 32],
    #[n(3)]
    pub page_bytes: u32,
}

/// A pack that was sealed. The hashes are of the pages of all runs, in their order.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PackNote {
    #[n(0)]
    pub epoch: EpochId,
    #[n(1)]
    pub entry: PackEntry,
    #[n(2)]
    pub paths: Vec<String>,
    /// Those with pages.
    #[n(3)]
    pub frames: Vec<FrameNote>,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct FrameNote {
    #[n(0)]
    pub frame: FrameRef,
    #[n(1)]
    pub runs: Vec<RunNote>,
}

/// Pages of one file in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct RunNote {
    /// Index of the path.
    #[n(0)]
    pub path: u32,
    #[n(1)]
    pub first_page: u32,
    #[n(2)]
    pub pages: u32,
    #[n(3)]
    pub at: u32,
}

impl Fields for Record {
    const KNOWN: u64 = 2;
    const WHAT: &'static str = "a record of what an interrupted snapshot stored";
}

impl Record {
    pub fn encode(&self, hashes: &[u8]) -> Vec<u8> {
        let cbor = cbor::encode(self);
        let mut bytes = Vec::with_capacity(8 + cbor.len() + hashes.len() + HASH_BYTES);
        bytes.extend_from_slice(&(cbor.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(hashes.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&cbor);
        bytes.extend_from_slice(hashes);
        bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
        bytes
    }
}

/// A record as it was read.
#[derive(Debug)]
pub struct Found {
    pub record: Record,
    /// All of it.
    pub bytes: Vec<u8>,
    /// Where the hashes are in `bytes`.
    pub hashes_at: usize,
}

/// Reads the next record; an error at the end, and at whatever is not whole.
pub fn read(from: &mut impl Read) -> Result<Found> {
    let wrong = || Error::new(Kind::Corrupt, "a record is not whole");
    let mut bytes = vec![0; 8];
    from.read_exact(&mut bytes).map_err(|_| wrong())?;
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let (cbor, hashes) = (word(0), word(4));
    if cbor > RECORD_BYTES_MAX || hashes > RECORD_BYTES_MAX {
        return Err(wrong());
    }
    let hashes_at = 8 + cbor as usize;
    let end = hashes_at + hashes as usize;
    bytes.resize(end + HASH_BYTES, 0);
    from.read_exact(&mut bytes[8..]).map_err(|_| wrong())?;
    if blake3::hash(&bytes[..end]) != bytes[end..] {
        return Err(wrong());
    }
    let record: Record = cbor::decode(&bytes[8..hashes_at])?;
    let pages = |frame: &FrameNote| frame.runs.iter().map(|run| u64::from(run.pages)).sum::<u64>();
    let noted: u64 = record.pack.iter().flat_map(|pack| &pack.frames).map(pages).sum();
    match noted * 8 == u64::from(hashes) {
        true => Ok(Found { record, bytes, hashes_at }),
        false => Err(wrong()),
    }
}
