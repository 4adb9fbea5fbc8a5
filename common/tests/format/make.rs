//! Makes the fixtures, once for each format version: `cargo test -p backstay-common --test format -- --ignored`.

use crate::contents::*;
use crate::fixtures::all;
use backstay_common::cbor;
use backstay_common::cluster::ClusterRecord;
use backstay_common::keys::file::FileProvider;
use backstay_common::keys::{Epoch, Keyring};
use backstay_common::ledger::NOTHING_BEFORE;
use backstay_common::name::ObjectName;
use backstay_common::origin::Origin;
use backstay_common::seal::{Draft, Frame, ObjectKind, Packer, Sealed, seal};
use backstay_common::snapshot::filemap::BytesPiece;
use backstay_common::snapshot::manifest::{ConfigFile, CorruptPage};
use backstay_common::snapshot::{
    BytesRef, Content, FileEntry, FileKind, FileMap, FrameRef, FrameUse, Manifest, ManifestPlain,
    PackEntry, PackFrame, PackMeta, Root, Run, TablePart, Tablespace,
};
use backstay_common::span::seal_wal;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

#[tokio::test]
#[ignore = "fixtures are files, and are never made again"]
async fn make_fixtures() {
    assert!(!fixtures().exists(), "fixtures are never made again");
    std::fs::create_dir_all(fixtures()).unwrap();
    let provider = FileProvider::generate();
    provider.write(&fixtures().join("orders.key")).unwrap();
    let keyring = Keyring::new(Arc::new(provider), "orders".parse().unwrap());
    let (epoch, wrap) = keyring.new_epoch(SYSTEM).await.unwrap();
    write(&ClusterRecord::new("orders".parse().unwrap(), SYSTEM, snapshot().began()).object());
    write(&wrap);
    for (branch, beginnings) in branches().into_iter().zip(beginnings()) {
        write(&Origin::new(&beginnings).unwrap().seal(&epoch, SYSTEM, branch));
    }
    let mut packer = Packer::new(3).unwrap();
    let [branch, _] = branches();
    write(&seal_wal(&epoch, SYSTEM, branch, range(), &wal(), &span_meta(), &mut packer).unwrap());
    let (ObjectName::Head { agent, seq, .. }, head) = head() else { unreachable!() };
    write(&head.seal(&epoch, SYSTEM, agent, seq));
    write(&begin().seal(&epoch, SYSTEM));
    let (packs, table) = store_files(&epoch);
    write(&manifest(&epoch, &packs, table).seal(&epoch).unwrap());
}

/// Kinds that came later are added, under the epoch that is there.
#[tokio::test]
#[ignore = "fixtures are files, and are never made again"]
async fn make_pins_and_condemned() {
    let (objects, epoch) = all().await;
    require_none(&objects, &[ObjectKind::Pin, ObjectKind::Condemned]);
    for (name, pin) in pins() {
        let ObjectName::Pin { pin: id, seq, .. } = name else { unreachable!() };
        write(&pin.seal(&epoch, SYSTEM, id, seq));
    }
    write(&condemned().seal(&epoch, SYSTEM));
}

#[tokio::test]
#[ignore = "fixtures are files, and are never made again"]
async fn make_accepted() {
    let (objects, _) = all().await;
    require_none(&objects, &[ObjectKind::Accepted]);
    write(&accepted().object());
}

#[tokio::test]
#[ignore = "fixtures are files, and are never made again"]
async fn make_leases_and_gaps() {
    let (objects, epoch) = all().await;
    require_none(&objects, &[ObjectKind::Lease, ObjectKind::Gap]);
    write(&lease().seal(&epoch, SYSTEM));
    write(&gap().seal(&epoch, SYSTEM));
}

#[tokio::test]
#[ignore = "fixtures are files, and are never made again"]
async fn make_the_ledger() {
    let (objects, epoch) = all().await;
    require_none(&objects, &[ObjectKind::Ledger]);
    let mut previous = NOTHING_BEFORE;
    for (entry, seq) in entries().iter().zip(1..) {
        let sealed = entry.seal(&epoch, SYSTEM, &writer(), seq, previous);
        write(&sealed);
        previous = sealed.hash();
    }
}

#[tokio::test]
#[ignore = "fixtures are files, and are never made again"]
async fn make_the_index() {
    let (objects, epoch) = all().await;
    require_none(&objects, &[ObjectKind::WalIndex]);
    let wal = objects.iter().find(|(name, _)| ObjectKind::of(name) == ObjectKind::Wal);
    let (name, bytes) = wal.unwrap();
    let index = index(name.id().unwrap(), bytes.len() as u64);
    write(&index.seal(&epoch, SYSTEM, branches()[0]).unwrap().unwrap());
}

fn require_none(objects: &BTreeMap<ObjectName, Bytes>, kinds: &[ObjectKind]) {
    let is_there = objects.keys().any(|name| kinds.contains(&ObjectKind::of(name)));
    assert!(!is_there, "fixtures are never made again");
}

fn write(sealed: &Sealed) {
    let path = fixtures().join(sealed.name.to_string());
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, &sealed.bytes).unwrap();
}

/// Each frame of a pack: what it is for, and its parts. Parts of files are pages, and have hashes.
fn pack(epoch: &Epoch, contents: &[(FrameUse, &[&[u8]])]) -> Sealed {
    let mut packer = Packer::new(3).unwrap();
    let frames =
        contents.iter().map(|(_, parts)| Frame::pack(&mut packer, &parts.concat()).unwrap());
    let meta = contents.iter().map(|&(usage, parts)| match usage {
        FrameUse::Maps | FrameUse::Table => PackFrame { usage, hashes: Vec::new() },
        _ => PackFrame { usage, hashes: hashes(parts).concat() },
    });
    let draft = Draft {
        kind: ObjectKind::Pack,
        plain: Vec::new(),
        frames: frames.collect(),
        meta: cbor::encode(&PackMeta { frames: meta.collect() }),
    };
    let sealed = seal(draft, epoch, |id| ObjectName::Pack { system: SYSTEM, id });
    write(&sealed);
    sealed
}

fn frame_of(sealed: &Sealed, number: usize) -> FrameRef {
    FrameRef { pack: sealed.name.id().unwrap(), span: sealed.spans[number] }
}

/// A map refers to frames that are sealed, and the table to maps: so each lies in a later pack.
fn store_files(epoch: &Epoch) -> (Vec<Sealed>, BytesRef) {
    let (pages, superseded) = (pages(), vec![9; PAGE]);
    let image = [&pages[0][..], &pages[1], &superseded, &pages[3]];
    let data = pack(
        epoch,
        &[
            (FrameUse::Image, &image),
            (FrameUse::Delta, &[&pages[2]]),
            (FrameUse::Small, &[small_file()]),
        ],
    );
    let run = |first_page, pages, frame, at| Run { first_page, pages, frame, at };
    let map = FileMap {
        frames: vec![frame_of(&data, 0), frame_of(&data, 1)],
        runs: vec![run(0, 2, 0, 0), run(2, 1, 1, 0), run(3, 1, 0, 3 * PAGE as u32)],
    };
    let map = map.encode();
    let maps = pack(epoch, &[(FrameUse::Maps, &[&map])]);
    let part = cbor::encode(&table(frame_of(&data, 2), whole(&maps, &map)));
    let tables = pack(epoch, &[(FrameUse::Table, &[&part])]);
    let table = whole(&tables, &part);
    (vec![data, maps, tables], table)
}

fn whole(sealed: &Sealed, bytes: &[u8]) -> BytesRef {
    let piece = BytesPiece { frame: frame_of(sealed, 0), at: 0, bytes: bytes.len() as u32 };
    BytesRef { pieces: vec![piece] }
}

fn table(version: FrameRef, map: BytesRef) -> TablePart {
    let pages = pages();
    let pages: Vec<&[u8]> = pages.iter().map(Vec::as_slice).collect();
    let file = |path: &str, pages: &[&[u8]], content| FileEntry {
        path: path.into(),
        kind: FileKind::File,
        mode: 0o600,
        size: pages.iter().map(|page| page.len() as u64).sum(),
        digest: Some(digest(pages)),
        content,
    };
    let folder = FileEntry {
        kind: FileKind::Directory,
        mode: 0o700,
        digest: None,
        ..file("base", &[], Content::Empty)
    };
    let version = Content::Within { frame: version, at: 0 };
    TablePart {
        files: vec![
            file("PG_VERSION", &[small_file()], version),
            folder,
            file("base/1259", &pages, Content::Mapped(map)),
        ],
    }
}

fn manifest(epoch: &Epoch, packs: &[Sealed], table: BytesRef) -> Manifest {
    let [branch, _] = branches();
    let entry = |sealed: &Sealed| PackEntry {
        epoch: 0,
        salt: *sealed.header.salt(),
        commitment: *sealed.header.commitment(),
        size: sealed.bytes.len() as u64,
        hash: sealed.hash(),
        live_bytes: sealed.spans.iter().map(|span| u64::from(span.sealed_bytes)).sum(),
        frame_bytes: None,
    };
    let plain = ManifestPlain {
        snapshot: snapshot(),
        system: SYSTEM,
        branch,
        start: range().start.add(0x28),
        stop: range().start.add(0x1000),
        segment_bytes: 16 << 20,
        generation: begin().generation,
        began: snapshot().began().as_second(),
        finished: snapshot().began().as_second() + 60,
        server_version: 170_004,
        epochs: vec![epoch.id()],
        packs: packs.iter().map(entry).collect(),
        database_bytes: 4 * PAGE as u64 + 3,
        stored_bytes: packs.iter().map(|pack| pack.bytes.len() as u64).sum(),
        files: 2,
        parent: begin().parent,
        corrupt_pages: 1,
        abandoned: None,
        new_corrupt_pages: None,
    };
    let root = Root {
        cluster: "orders".parse().unwrap(),
        agent: "db1".parse().unwrap(),
        hash_key: HASH_KEY,
        page_bytes: PAGE as u32,
        table: vec![table],
        backup_label: "START WAL LOCATION: 16/B3000028 (file 0000000100000016000000B3)\n".into(),
        tablespaces: vec![Tablespace { oid: 16385, location: "/srv/fast".into() }],
        config_files: vec![ConfigFile {
            name: "postgresql.conf".into(),
            source: "/etc/postgresql/17/main/postgresql.conf".into(),
            content: b"shared_buffers = 1GB\n".to_vec(),
        }],
        superuser: "postgres".into(),
        checksums: true,
        corrupt_pages: vec![CorruptPage { path: "base/1259".into(), block: 3 }],
        written_by: "backstay-agent 0.1.0".into(),
    };
    Manifest { plain, root }
}
