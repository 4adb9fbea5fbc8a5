//! Objects that version 1 wrote are read by what is here now.

use crate::contents::*;
use backstay_common::cbor;
use backstay_common::cluster::{AcceptedRecord, ClusterRecord, Identity};
use backstay_common::condemned::Condemned;
use backstay_common::gap::Gap;
use backstay_common::head::Head;
use backstay_common::keys::Epoch;
use backstay_common::lease::Lease;
use backstay_common::ledger::{Entry, NOTHING_BEFORE, previous_of};
use backstay_common::name::{ObjectName, folder};
use backstay_common::origin::Origin;
use backstay_common::pin::PinRecord;
use backstay_common::seal::{
    Codec, FrameSpan, Header, Object, ObjectKind, Opener, Unpacker, trailer_of,
};
use backstay_common::snapshot::manifest::read_plain;
use backstay_common::snapshot::{
    Begin, BytesRef, Content, FileMap, FrameRef, FrameUse, Manifest, ManifestPlain, PackMeta,
    TablePart,
};
use backstay_common::span::WalObject;
use backstay_common::walindex::WalIndex;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Every object of the fixtures, and the one epoch that they are sealed under.
pub async fn all() -> (BTreeMap<ObjectName, Bytes>, Arc<Epoch>) {
    let location = location(&fixtures());
    let mut objects = BTreeMap::new();
    for listed in location.list("").await.unwrap() {
        match listed.name {
            Some(name) => drop(objects.insert(name.clone(), location.get(&name).await.unwrap())),
            None => assert_eq!(listed.path, "orders.key"),
        }
    }
    let wrap = location.list(&folder::keys(SYSTEM)).await.unwrap().remove(0);
    let Some(ObjectName::Wrap { epoch, .. }) = wrap.name else { panic!("{}", wrap.path) };
    (objects, keyring().epoch(SYSTEM, epoch, &location).await.unwrap())
}

fn of_kind(objects: &BTreeMap<ObjectName, Bytes>, kind: ObjectKind) -> Vec<(&ObjectName, Bytes)> {
    let of = |(name, bytes)| (ObjectKind::of(name) == kind).then_some((name, Bytes::clone(bytes)));
    objects.iter().filter_map(of).collect()
}

#[tokio::test]
async fn every_object_checks_without_a_key() {
    let (objects, _) = all().await;
    assert_eq!(objects.len(), 20);
    for (name, bytes) in &objects {
        assert_eq!(Header::check(bytes, name).unwrap().name(), name);
    }
    let cluster = ClusterRecord::read(&objects[&ObjectName::Cluster]).unwrap();
    let made = snapshot().began();
    assert_eq!(cluster, ClusterRecord::new("orders".parse().unwrap(), SYSTEM, made));
    let (name, bytes) = of_kind(&objects, ObjectKind::Begin).remove(0);
    assert_eq!(Begin::read(&bytes, name).unwrap(), begin());
    for (name, pin) in pins() {
        assert_eq!(PinRecord::read(&objects[&name], &name).unwrap(), pin);
    }
    let (name, bytes) = of_kind(&objects, ObjectKind::Condemned).remove(0);
    assert_eq!(Condemned::read(&bytes, name).unwrap(), condemned());
    let (name, bytes) = of_kind(&objects, ObjectKind::Accepted).remove(0);
    assert_eq!(AcceptedRecord::read(&bytes, name).unwrap(), accepted());
    let identity = Identity::read(&location(&fixtures())).await.unwrap();
    assert_eq!(identity.systems, [(SYSTEM, cluster.made), (NEXT_SYSTEM, accepted().made)]);
    let (name, bytes) = of_kind(&objects, ObjectKind::Lease).remove(0);
    assert_eq!(Lease::read(&bytes, name).unwrap(), lease());
    let ledger = of_kind(&objects, ObjectKind::Ledger);
    let previous = ledger.iter().map(|(name, bytes)| previous_of(bytes, name).unwrap());
    assert_eq!(previous.collect::<Vec<_>>(), [NOTHING_BEFORE, trailer_of(&ledger[0].1)]);
}

#[tokio::test]
async fn branches_and_heads_open() {
    let (objects, epoch) = all().await;
    let origins = of_kind(&objects, ObjectKind::Origin);
    for ((name, bytes), beginnings) in origins.into_iter().zip(beginnings()) {
        let origin = Origin::open(bytes, name, &epoch).unwrap();
        assert!(origin.agrees(&beginnings).unwrap(), "{name}");
        assert_eq!(origin.history(), beginnings.history.as_deref());
    }
    let (name, bytes) = of_kind(&objects, ObjectKind::Gap).remove(0);
    assert_eq!(Gap::open(bytes, name, &epoch).unwrap(), gap());
    let ledger = of_kind(&objects, ObjectKind::Ledger);
    for (((name, bytes), expected), seq) in ledger.into_iter().zip(entries()).zip(1..) {
        assert_eq!(*name, ObjectName::Ledger { system: SYSTEM, writer: writer(), seq });
        assert_eq!(Entry::open(bytes, name, &epoch).unwrap().entry, expected);
    }
    let (name, expected) = head();
    assert_eq!(Head::open(objects[&name].clone(), &name, &epoch).unwrap(), expected);
}

#[tokio::test]
async fn wal_opens() {
    let (objects, epoch) = all().await;
    let (name, bytes) = of_kind(&objects, ObjectKind::Wal).remove(0);
    let codecs: Vec<Codec> = (Object::open(bytes.clone(), name, &epoch).unwrap().spans().iter())
        .map(|span| span.codec)
        .collect();
    assert_eq!(codecs, [Codec::Zstd, Codec::Raw]);
    let object = WalObject::open(bytes, name, &epoch).unwrap();
    assert_eq!((object.range, &object.meta), (range(), &span_meta()));
    assert!(object.wal().unwrap() == wal());
}

#[tokio::test]
async fn an_index_opens() {
    let (objects, epoch) = all().await;
    let (wal, stored) = of_kind(&objects, ObjectKind::Wal).remove(0);
    let (name, bytes) = of_kind(&objects, ObjectKind::WalIndex).remove(0);
    let opened = WalIndex::open(bytes, name, &epoch).unwrap();
    assert_eq!(opened, index(wal.id().unwrap(), stored.len() as u64));
}

/// Reads as a restore does: only what the manifest names, with ranges of packs.
struct Restore<'a> {
    objects: &'a BTreeMap<ObjectName, Bytes>,
    epoch: &'a Epoch,
    plain: &'a ManifestPlain,
}

impl Restore<'_> {
    fn frame(&self, frame: &FrameRef) -> Vec<u8> {
        let entry = self.plain.packs.iter().find(|entry| entry.id() == frame.pack).unwrap();
        let opener = Opener::new(&entry.header(self.plain).unwrap(), self.epoch).unwrap();
        let sealed = self.objects[&entry.name(SYSTEM)].slice(frame.span.range());
        opener.frame(&frame.span, &sealed, &mut Unpacker::new()).unwrap()
    }

    fn bytes(&self, bytes: &BytesRef) -> Vec<u8> {
        let piece = |piece: &backstay_common::snapshot::filemap::BytesPiece| {
            self.frame(&piece.frame)[piece.at as usize..][..piece.bytes as usize].to_vec()
        };
        bytes.pieces.iter().flat_map(piece).collect()
    }

    fn file(&self, content: &Content, size: u64) -> Vec<u8> {
        let map = match content {
            Content::Empty => return Vec::new(),
            Content::Within { frame, at } => {
                return self.frame(frame)[*at as usize..][..size as usize].to_vec();
            }
            Content::Mapped(map) => FileMap::decode(&self.bytes(map), size, PAGE as u32).unwrap(),
        };
        let mut file = Vec::new();
        for run in &map.runs {
            let frame = self.frame(&map.frames[run.frame as usize]);
            file.extend_from_slice(&frame[run.at as usize..][..run.pages as usize * PAGE]);
        }
        file.truncate(size as usize);
        file
    }
}

#[tokio::test]
async fn a_snapshot_restores() {
    let (objects, epoch) = all().await;
    let (name, bytes) = of_kind(&objects, ObjectKind::Manifest).remove(0);
    let (_, plain) = read_plain(&bytes, name).unwrap();
    let manifest = Manifest::open(bytes, name, &epoch).unwrap();
    assert_eq!((&manifest.plain, plain.snapshot), (&plain, snapshot()));
    for pack in &plain.packs {
        let bytes = &objects[&pack.name(SYSTEM)];
        assert_eq!(pack.size, bytes.len() as u64);
        assert_eq!(pack.hash, bytes[bytes.len() - 32..]);
    }
    assert_eq!((manifest.root.hash_key, manifest.root.page_bytes), (HASH_KEY, PAGE as u32));

    let restore = Restore { objects: &objects, epoch: &epoch, plain: &plain };
    let part: TablePart = cbor::decode(&restore.bytes(&manifest.root.table[0])).unwrap();
    let pages = pages();
    let pages: Vec<&[u8]> = pages.iter().map(Vec::as_slice).collect();
    let expected: [(&str, &[&[u8]]); 3] =
        [("PG_VERSION", &[small_file()]), ("base", &[]), ("base/1259", &pages)];
    assert_eq!(part.files.len(), expected.len());
    for (entry, (path, pages)) in part.files.iter().zip(expected) {
        assert_eq!(entry.path, path);
        assert!(restore.file(&entry.content, entry.size) == pages.concat(), "{path}");
        assert!(entry.digest.is_none_or(|stated| stated == digest(pages)), "{path}");
    }
}

#[tokio::test]
async fn a_packs_footer_has_the_hashes_of_its_pages() {
    let (objects, epoch) = all().await;
    let mut seen = Vec::new();
    for (name, bytes) in of_kind(&objects, ObjectKind::Pack) {
        let object = Object::open(bytes, name, &epoch).unwrap();
        let meta: PackMeta = cbor::decode(object.meta()).unwrap();
        assert_eq!(meta.frames.len(), object.spans().len());
        for (number, frame) in meta.frames.iter().enumerate() {
            let plain = object.frame(number, &mut Unpacker::new()).unwrap();
            seen.push(frame.usage as u8);
            match frame.usage {
                FrameUse::Maps | FrameUse::Table => assert!(frame.hashes.is_empty()),
                _ => {
                    let pages: Vec<&[u8]> = plain.chunks(PAGE).collect();
                    assert_eq!(frame.hashes, hashes(&pages).concat());
                }
            }
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3, 4]);
}

/// A wrong key, a changed byte and a swapped object are all found in each of them.
#[tokio::test]
async fn nothing_of_it_can_be_changed() {
    let (objects, epoch) = all().await;
    let sealed = objects.iter().filter(|(name, _)| {
        !matches!(
            ObjectKind::of(name),
            ObjectKind::Cluster | ObjectKind::Wrap | ObjectKind::Accepted
        )
    });
    for (name, bytes) in sealed {
        assert!(Object::open(bytes.clone(), name, &Epoch::generate()).is_err(), "{name}");
        let last: FrameSpan = match Object::open(bytes.clone(), name, &epoch).unwrap().spans() {
            [] => continue,
            [.., last] => *last,
        };
        let mut bent = bytes.to_vec();
        bent[last.offset as usize] ^= 1;
        let body = bent.len() - 32;
        let hash = blake3::hash(&bent[..body]);
        bent[body..].copy_from_slice(hash.as_bytes());
        let object = Object::open(bent.into(), name, &epoch).unwrap();
        assert!(object.frame(last.number as usize, &mut Unpacker::new()).is_err(), "{name}");
    }
}
