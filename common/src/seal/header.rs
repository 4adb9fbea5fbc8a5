//! The plain header of every object.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `BACKSTAY` |
//! | 8 | 2 | format version |
//! | 10 | 1 | suite |
//! | 11 | 1 | kind |
//! | 12 | 2 | length n of the name |
//! | 14 | 2 | zero |
//! | 16 | 4 | length p of the plain section |
//! | 20 | n | name, relative to the prefix |
//! | 20+n | 16 | epoch |
//! | 36+n | 32 | salt |
//! | 68+n | 32 | key commitment |
//! | 100+n | p | plain section |
//!
//! Numbers are little-endian. What precedes the commitment, and the plain section, make the object's key.

use crate::id::EpochId;
use crate::name::ObjectName;
use crate::{Error, Kind, Result};
use bytes::Bytes;

const MAGIC: &[u8; 8] = b"BACKSTAY";
/// The only format that this version reads and writes.
pub const FORMAT_VERSION: u16 = 1;
const NAME_AT: usize = 20;
const NAME_BYTES_MAX: usize = 512;
/// No header is longer, without its plain section.
pub const HEADER_BYTES_MAX: usize = NAME_AT + NAME_BYTES_MAX + 16 + 32 + 32;

/// What an object is. The number is stored and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ObjectKind {
    Cluster = 1,
    Wrap = 2,
    Origin = 3,
    Wal = 4,
    WalIndex = 5,
    Head = 6,
    Pack = 7,
    Begin = 8,
    Manifest = 9,
    Pin = 10,
    Condemned = 11,
    Accepted = 12,
    Lease = 14,
    Gap = 15,
    Ledger = 16,
}

impl ObjectKind {
    const ALL: [ObjectKind; 15] = [
        ObjectKind::Cluster,
        ObjectKind::Wrap,
        ObjectKind::Origin,
        ObjectKind::Wal,
        ObjectKind::WalIndex,
        ObjectKind::Head,
        ObjectKind::Pack,
        ObjectKind::Begin,
        ObjectKind::Manifest,
        ObjectKind::Pin,
        ObjectKind::Condemned,
        ObjectKind::Accepted,
        ObjectKind::Lease,
        ObjectKind::Gap,
        ObjectKind::Ledger,
    ];

    /// The kind of the object that `name` names.
    pub fn of(name: &ObjectName) -> ObjectKind {
        match name {
            ObjectName::Cluster => ObjectKind::Cluster,
            ObjectName::Accepted { .. } => ObjectKind::Accepted,
            ObjectName::Wrap { .. } => ObjectKind::Wrap,
            ObjectName::Origin { .. } => ObjectKind::Origin,
            ObjectName::Wal { .. } => ObjectKind::Wal,
            ObjectName::WalIndex { .. } => ObjectKind::WalIndex,
            ObjectName::Head { .. } => ObjectKind::Head,
            ObjectName::Pack { .. } => ObjectKind::Pack,
            ObjectName::Begin { .. } => ObjectKind::Begin,
            ObjectName::Manifest { .. } => ObjectKind::Manifest,
            ObjectName::Pin { .. } => ObjectKind::Pin,
            ObjectName::Condemned { .. } => ObjectKind::Condemned,
            ObjectName::Lease { .. } => ObjectKind::Lease,
            ObjectName::Gap { .. } => ObjectKind::Gap,
            ObjectName::Ledger { .. } => ObjectKind::Ledger,
        }
    }

    /// The only suite in which objects of this kind are written and read.
    pub fn suite(self) -> Suite {
        match self {
            ObjectKind::Cluster | ObjectKind::Wrap | ObjectKind::Accepted => Suite::Plain,
            _ => Suite::Sealed,
        }
    }
}

/// The algorithms of an object. The number is stored and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Suite {
    /// Only a plain section, and the BLAKE3 trailer.
    Plain = 0,
    /// zstd, AES-256-GCM, BLAKE3.
    Sealed = 1,
}

/// What precedes the commitment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fixed {
    pub kind: ObjectKind,
    pub suite: Suite,
    pub name: ObjectName,
    pub epoch: EpochId,
    pub salt: [u8; 32],
}

impl Fixed {
    pub fn encode(&self, plain_bytes: u32) -> Vec<u8> {
        let name = self.name.to_string();
        let mut out = Vec::with_capacity(NAME_AT + name.len() + 48);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&[self.suite as u8, self.kind as u8]);
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&plain_bytes.to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(self.epoch.as_bytes());
        out.extend_from_slice(&self.salt);
        out
    }
}

/// The plain header of an object, and its plain section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    fixed: Fixed,
    commitment: [u8; 32],
    plain: Bytes,
}

impl Header {
    pub(super) fn new(fixed: Fixed, commitment: [u8; 32], plain: Bytes) -> Header {
        Header { fixed, commitment, plain }
    }

    /// The header of a sealed object without a plain section, from what a manifest keeps of it.
    pub fn rebuild(
        name: ObjectName,
        epoch: EpochId,
        salt: [u8; 32],
        commitment: [u8; 32],
    ) -> Header {
        let fixed = Fixed { kind: ObjectKind::of(&name), suite: Suite::Sealed, name, epoch, salt };
        Header { fixed, commitment, plain: Bytes::new() }
    }

    /// Checks a whole object without a key: its trailer, and that it is what `expected` names.
    pub fn check(object: &Bytes, expected: &ObjectName) -> Result<Header> {
        super::check_trailer(object, &expected.to_string())?;
        let corrupt =
            |reason: String| Error::new(Kind::Corrupt, format!("object {expected}: {reason}"));
        let header = Header::parse(object).map_err(corrupt)?;
        if header.name() != expected {
            let reason = format!("object {expected} is in truth object {}", header.name());
            return Err(Error::new(Kind::Corrupt, reason)
                .remedy("somebody renamed or swapped objects; read it from another location"));
        }
        header.check_end(object).map_err(|reason| corrupt(reason.to_string()))?;
        Ok(header)
    }

    /// What follows the header: nothing in the plain suite, room for a footer in the other.
    fn check_end(&self, object: &[u8]) -> Result<(), &'static str> {
        if object.len() > super::OBJECT_BYTES_MAX {
            return Err("it is longer than any object may be");
        }
        let footer = super::footer_range(object, self).ok_or("its footer has no room")?;
        match self.fixed.suite {
            Suite::Plain if footer != (self.len()..self.len()) => {
                Err("something follows its plain section")
            }
            _ => Ok(()),
        }
    }

    /// Reads a header from the start of an object.
    pub(super) fn parse(object: &Bytes) -> Result<Header, String> {
        let bytes = |at: usize, count: usize| {
            object.get(at..at + count).ok_or_else(|| "its header is cut off".to_string())
        };
        if bytes(0, 8)? != MAGIC {
            return Err("it does not begin as Backstay's objects do".into());
        }
        let start = bytes(8, 12)?;
        let version = u16::from_le_bytes([start[0], start[1]]);
        if version != FORMAT_VERSION {
            return Err(format!(
                "it has format version {version}; this program reads {FORMAT_VERSION}"
            ));
        }
        let suite = match start[2] {
            0 => Suite::Plain,
            1 => Suite::Sealed,
            other => return Err(format!("its suite {other} is unknown")),
        };
        let kind = (ObjectKind::ALL.into_iter().find(|&kind| kind as u8 == start[3]))
            .ok_or_else(|| format!("its kind {} is unknown", start[3]))?;
        let name_bytes = usize::from(u16::from_le_bytes([start[4], start[5]]));
        let plain_bytes = u32::from_le_bytes([start[8], start[9], start[10], start[11]]) as usize;
        if name_bytes > NAME_BYTES_MAX || start[6..8] != [0, 0] {
            return Err("its header is malformed".into());
        }
        let name: ObjectName = std::str::from_utf8(bytes(NAME_AT, name_bytes)?)
            .ok()
            .and_then(|name| name.parse().ok())
            .ok_or("the name in its header is none of ours")?;
        if ObjectKind::of(&name) != kind {
            return Err(format!("its kind and its name {name} disagree"));
        }
        if kind.suite() != suite {
            return Err(format!("its kind is never stored in suite {}", suite as u8));
        }
        let at = NAME_AT + name_bytes;
        let epoch = EpochId::from_bytes(bytes(at, 16)?.try_into().expect("16 bytes"));
        let salt: [u8; 32] = bytes(at + 16, 32)?.try_into().expect("32 bytes");
        let commitment: [u8; 32] = bytes(at + 48, 32)?.try_into().expect("32 bytes");
        if name.id().is_some_and(|id| id.as_bytes()[..] != salt[..8]) {
            return Err(format!("its salt does not give the id in its name {name}"));
        }
        let is_keyless = *epoch.as_bytes() == [0; 16] && commitment == [0; 32];
        if suite == Suite::Plain && !is_keyless {
            return Err("its header is malformed".into());
        }
        bytes(at + 80, plain_bytes)?;
        let plain = object.slice(at + 80..at + 80 + plain_bytes);
        Ok(Header { fixed: Fixed { kind, suite, name, epoch, salt }, commitment, plain })
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.fixed.encode(self.plain.len() as u32));
        out.extend_from_slice(&self.commitment);
        out.extend_from_slice(&self.plain);
    }

    pub(super) fn fixed(&self) -> &Fixed {
        &self.fixed
    }

    pub fn name(&self) -> &ObjectName {
        &self.fixed.name
    }

    pub fn kind(&self) -> ObjectKind {
        self.fixed.kind
    }

    pub fn epoch(&self) -> EpochId {
        self.fixed.epoch
    }

    pub fn salt(&self) -> &[u8; 32] {
        &self.fixed.salt
    }

    pub fn commitment(&self) -> &[u8; 32] {
        &self.commitment
    }

    /// What is authenticated but needs no key to be read.
    pub fn plain(&self) -> &Bytes {
        &self.plain
    }

    /// Bytes of the header with its plain section: where the first frame begins.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        NAME_AT + self.fixed.name.to_string().len() + 80 + self.plain.len()
    }
}
