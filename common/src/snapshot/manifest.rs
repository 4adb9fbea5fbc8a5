//! The root of a snapshot, and its commit point.

use super::filemap::{BytesRef, is_page_size};
use crate::cbor::{self, Fields};
use crate::id::{AgentName, Branch, ClusterName, EpochId, ObjectId, SnapshotId, SystemId};
use crate::keys::Epoch;
use crate::lsn::Lsn;
use crate::name::ObjectName;
use crate::seal::{
    self, Draft, FRAME_BYTES_MAX, Frame, Header, OBJECT_BYTES_MAX, Object, ObjectKind, Packer,
    Sealed,
};
use crate::segment::SegmentSize;
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// What a manifest says without a key: enough to verify, copy and prune.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ManifestPlain {
    #[n(0)]
    pub snapshot: SnapshotId,
    #[n(1)]
    pub system: SystemId,
    #[n(2)]
    pub branch: Branch,
    /// Where replay begins.
    #[n(3)]
    pub start: Lsn,
    /// From here on the restored cluster is consistent: the later of the backup's stop and the copied `pg_control`'s
    /// minimum recovery point. No target before it can be reached from this snapshot.
    #[n(4)]
    pub stop: Lsn,
    /// WAL segment size in bytes.
    #[n(5)]
    pub segment_bytes: u32,
    /// Of the lease under which it was taken; 0 where there was none.
    #[n(6)]
    pub generation: u64,
    /// Unix seconds.
    #[n(7)]
    pub began: i64,
    /// Unix seconds.
    #[n(8)]
    pub finished: i64,
    /// `server_version_num`, such as 150018.
    #[n(9)]
    pub server_version: u32,
    #[n(10)]
    pub epochs: Vec<EpochId>,
    #[n(11)]
    pub packs: Vec<PackEntry>,
    /// Bytes of all files, as PostgreSQL has them.
    #[n(12)]
    pub database_bytes: u64,
    /// Bytes of the packs that this snapshot added.
    #[n(13)]
    pub stored_bytes: u64,
    #[n(14)]
    pub files: u64,
    #[n(15)]
    pub parent: Option<SnapshotId>,
    /// Pages whose checksum failed for good.
    #[n(16)]
    pub corrupt_pages: u64,
    /// Snapshots that were begun before by the same agent, and never ended: their `begin` keeps nothing any more.
    #[n(64)]
    pub abandoned: Option<Vec<SnapshotId>>,
    /// Those of [`ManifestPlain::corrupt_pages`] that the parent has whole, by file and block. None without damage or a parent, and
    /// where either root does not name all of its own.
    #[n(65)]
    pub new_corrupt_pages: Option<u64>,
}

impl Fields for ManifestPlain {
    const KNOWN: u64 = 17;
    const WHAT: &'static str = "a manifest's plain section";
}

impl ManifestPlain {
    /// PostgreSQL's major version.
    pub fn major(&self) -> u32 {
        self.server_version / 10_000
    }

    /// The WAL that must be stored before the snapshot is: from the segment of its start to its stop.
    pub fn wal_needed(&self) -> crate::lsn::LsnRange {
        let start = self.start.align_down(u64::from(self.segment_bytes));
        crate::lsn::LsnRange::new(start, self.stop)
    }
}

/// One pack that a snapshot needs, with all that opening its frames takes besides the epoch key.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct PackEntry {
    /// Index into [`ManifestPlain::epochs`].
    #[n(0)]
    pub epoch: u32,
    /// The first eight bytes are the pack's id.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub salt: [u8; 32],
    #[cbor(n(2), with = "minicbor::bytes")]
    pub commitment: [u8; 32],
    /// Bytes of the object.
    #[n(3)]
    pub size: u64,
    /// Its trailer.
    #[cbor(n(4), with = "minicbor::bytes")]
    pub hash: [u8; 32],
    /// Sealed bytes of the frames that this snapshot uses.
    #[n(5)]
    pub live_bytes: u64,
    /// Sealed bytes of all its frames: what is left of `size` is header and footer. None before agents said it.
    #[n(6)]
    pub frame_bytes: Option<u64>,
}

impl PackEntry {
    pub fn id(&self) -> ObjectId {
        ObjectId::from_bytes(self.salt[..8].try_into().expect("8 bytes"))
    }

    pub fn name(&self, system: SystemId) -> ObjectName {
        ObjectName::Pack { system, id: self.id() }
    }

    /// The pack's header, without a request for it.
    pub fn header(&self, plain: &ManifestPlain) -> Option<Header> {
        let epoch = *plain.epochs.get(self.epoch as usize)?;
        Some(Header::rebuild(self.name(plain.system), epoch, self.salt, self.commitment))
    }
}

/// The sealed part of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Root {
    #[n(0)]
    pub cluster: ClusterName,
    #[n(1)]
    pub agent: AgentName,
    /// Keys the page hashes of this snapshot and of those that descend from it.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub hash_key: [u8; 32],
    /// Bytes of a page: the cluster's block size.
    #[n(3)]
    pub page_bytes: u32,
    /// The file table, in the order of paths.
    #[n(4)]
    pub table: Vec<BytesRef>,
    /// To be written into the restored directory, byte for byte.
    #[n(5)]
    pub backup_label: String,
    #[n(6)]
    pub tablespaces: Vec<Tablespace>,
    /// Configuration that lives outside the data directory (Debian): name in the restored directory, content.
    #[n(7)]
    pub config_files: Vec<ConfigFile>,
    /// The name of a superuser, to ask the restored server with.
    #[n(8)]
    pub superuser: String,
    #[n(9)]
    pub checksums: bool,
    /// Pages whose checksum failed for good.
    #[n(10)]
    pub corrupt_pages: Vec<CorruptPage>,
    /// The program and version that took it.
    #[n(11)]
    pub written_by: String,
}

impl Fields for Root {
    const KNOWN: u64 = 12;
    const WHAT: &'static str = "a manifest's root";
}

/// A tablespace outside the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct Tablespace {
    #[n(0)]
    pub oid: u32,
    /// Where it was on the source.
    #[n(1)]
    pub location: String,
}

/// A configuration file from outside the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct ConfigFile {
    /// Relative to the restored data directory: `postgresql.conf`, `conf.d/x.conf`.
    #[n(0)]
    pub name: String,
    /// Where it was on the source.
    #[n(1)]
    pub source: String,
    #[cbor(n(2), with = "minicbor::bytes")]
    pub content: Vec<u8>,
}

/// A page that is damaged at the source.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct CorruptPage {
    #[n(0)]
    pub path: String,
    /// Block number in the fork, as PostgreSQL counts.
    #[n(1)]
    pub block: u32,
}

/// A manifest, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub plain: ManifestPlain,
    pub root: Root,
}

impl Manifest {
    pub fn seal(&self, epoch: &Epoch) -> Result<Sealed> {
        let (system, snapshot) = (self.plain.system, self.plain.snapshot);
        let (plain, root) = (cbor::encode(&self.plain), cbor::encode(&self.root));
        // Together they fill an object with room to spare for the rest of it.
        if plain.len() + root.len() > OBJECT_BYTES_MAX - FRAME_BYTES_MAX {
            let bytes = plain.len() + root.len();
            let reason =
                format!("the manifest of {snapshot} has {bytes} bytes, more than one object");
            return Err(Error::new(Kind::Config, reason)
                .remedy("the database has more packs than one snapshot can name"));
        }
        let draft = Draft {
            kind: ObjectKind::Manifest,
            plain,
            frames: Frame::pack_all(&mut Packer::new(3)?, &root)?,
            meta: Vec::new(),
        };
        Ok(seal::seal(draft, epoch, |_| ObjectName::Manifest { system, snapshot }))
    }

    /// All pages that are damaged in it; None if there are more than the root names.
    pub fn all_corrupt_pages(&self) -> Option<&[CorruptPage]> {
        let named = &self.root.corrupt_pages;
        (named.len() as u64 == self.plain.corrupt_pages).then_some(named)
    }

    /// Opens a manifest that was fetched as `name`.
    pub fn open(bytes: Bytes, name: &ObjectName, epoch: &Epoch) -> Result<Manifest> {
        let object = Object::open(bytes, name, epoch)?;
        let plain = decode_plain(object.header())?;
        let root: Root = cbor::decode(&object.contents()?)?;
        match is_page_size(root.page_bytes) {
            true => Ok(Manifest { plain, root }),
            false => Err(wrong(name, "its page size is none of PostgreSQL's")),
        }
    }
}

/// The plain section of a manifest, after its trailer has been checked. Needs no key.
pub fn read_plain(bytes: &Bytes, name: &ObjectName) -> Result<(Header, ManifestPlain)> {
    let header = Header::check(bytes, name)?;
    let plain = decode_plain(&header)?;
    Ok((header, plain))
}

/// The plain section, if it belongs to the name and what is computed from it can be. Who reads it without a key has
/// no other proof that the two belong together.
fn decode_plain(header: &Header) -> Result<ManifestPlain> {
    let plain: ManifestPlain = cbor::decode(header.plain())?;
    let name = ObjectName::Manifest { system: plain.system, snapshot: plain.snapshot };
    let packs_fit = plain.packs.iter().all(|pack| {
        (pack.epoch as usize) < plain.epochs.len() && pack.size <= OBJECT_BYTES_MAX as u64
    });
    let reason = match () {
        () if name != *header.name() => "its plain section is of another snapshot",
        () if SegmentSize::new(plain.segment_bytes).is_none() => "its segment size is impossible",
        () if plain.stop < plain.start => "it stops before it starts",
        () if !packs_fit => "it names an impossible pack",
        () => return Ok(plain),
    };
    Err(wrong(header.name(), reason))
}

fn wrong(name: &ObjectName, reason: &str) -> Error {
    Error::new(Kind::Corrupt, format!("object {name}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::BranchId;
    use crate::segment::TimelineId;

    fn manifest() -> Manifest {
        let branch = Branch { timeline: TimelineId::FIRST, id: BranchId::from_bytes([1, 2, 3, 4]) };
        let plain = ManifestPlain {
            snapshot: "20261122T020000Z-1f2e3d4c".parse().unwrap(),
            system: SystemId::new(7),
            branch,
            start: Lsn::new(0x1234_5678),
            stop: Lsn::new(0x2234_5678),
            segment_bytes: 16 << 20,
            generation: 0,
            began: 1,
            finished: 2,
            server_version: 150_018,
            epochs: vec![Epoch::generate().id()],
            packs: vec![PackEntry {
                epoch: 0,
                salt: [1; 32],
                commitment: [2; 32],
                size: 3,
                hash: [4; 32],
                live_bytes: 2,
                frame_bytes: Some(2),
            }],
            database_bytes: 100,
            stored_bytes: 3,
            files: 1,
            parent: None,
            corrupt_pages: 0,
            abandoned: None,
            new_corrupt_pages: None,
        };
        let root = Root {
            cluster: "orders".parse().unwrap(),
            agent: "db1".parse().unwrap(),
            hash_key: [9; 32],
            page_bytes: 8192,
            table: Vec::new(),
            backup_label: "START WAL LOCATION: 0/12345678\n".into(),
            tablespaces: vec![Tablespace { oid: 16385, location: "/srv/fast".into() }],
            config_files: Vec::new(),
            superuser: "postgres".into(),
            checksums: true,
            corrupt_pages: Vec::new(),
            written_by: "backstay-agent 0.1.0".into(),
        };
        Manifest { plain, root }
    }

    #[test]
    fn a_manifest_reads_back_and_its_plain_part_needs_no_key() {
        let (epoch, manifest) = (Epoch::generate(), manifest());
        let sealed = manifest.seal(&epoch).unwrap();
        let (header, plain) = read_plain(&sealed.bytes, &sealed.name).unwrap();
        assert_eq!((header.epoch(), &plain), (epoch.id(), &manifest.plain));
        assert_eq!(Manifest::open(sealed.bytes.clone(), &sealed.name, &epoch).unwrap(), manifest);
        assert_eq!(plain.wal_needed().start, Lsn::new(0x1200_0000));
        let needle = b"START WAL";
        assert!(!sealed.bytes.windows(needle.len()).any(|w| w == needle), "the root is sealed");
    }

    /// Such a manifest is authentic only to who has no key; it must still not mislead or panic.
    #[test]
    fn an_impossible_plain_part_is_refused() {
        let bend: [fn(&mut ManifestPlain); 5] = [
            |plain| plain.segment_bytes = 0,
            |plain| plain.segment_bytes = 3 << 20,
            |plain| plain.stop = Lsn::new(1),
            |plain| plain.packs[0].epoch = 1,
            |plain| plain.packs[0].size = u64::MAX,
        ];
        for bend in bend {
            let (epoch, mut manifest) = (Epoch::generate(), manifest());
            bend(&mut manifest.plain);
            let sealed = manifest.seal(&epoch).unwrap();
            let error = read_plain(&sealed.bytes, &sealed.name).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt);
            assert!(Manifest::open(sealed.bytes, &sealed.name, &epoch).is_err());
        }
    }

    #[test]
    fn the_plain_part_is_authenticated() {
        let (epoch, manifest) = (Epoch::generate(), manifest());
        let sealed = manifest.seal(&epoch).unwrap();
        let mut bytes = sealed.bytes.to_vec();
        let at = sealed.header.len() - 1;
        bytes[at] ^= 1;
        let body = bytes.len() - 32;
        let hash = blake3::hash(&bytes[..body]);
        bytes[body..].copy_from_slice(hash.as_bytes());
        let error = Manifest::open(bytes.into(), &sealed.name, &epoch).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
    }
}
