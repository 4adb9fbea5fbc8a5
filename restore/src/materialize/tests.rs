//! Snapshots made by hand, stored at two folders, and written out again.

use super::*;
use backstay_common::id::{Branch, BranchId, SnapshotId, SystemId, random_bytes};
use backstay_common::keys::{Epoch, Keyring, file::FileProvider};
use backstay_common::location::{Location, LocationSettings};
use backstay_common::lsn::Lsn;
use backstay_common::name::ObjectName;
use backstay_common::seal::{Draft, Frame, ObjectKind, Packer, Sealed, seal};
use backstay_common::segment::TimelineId;
use backstay_common::snapshot::filemap::BytesPiece;
use backstay_common::snapshot::{
    BytesRef, Content, FileDigest, FileKind, FileMap, FrameRef, FrameUse, ManifestPlain, PackEntry,
    PackFrame, PackMeta, Root, Run, Tablespace, page_hash, testing,
};
use backstay_common::{Error, Kind};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const PAGE: usize = 8192;
const SYSTEM: SystemId = SystemId::new(7);

/// A snapshot at two locations, and what must come out of it.
pub(crate) struct Stored {
    folder: tempfile::TempDir,
    locations: Vec<Location>,
    keyring: Keyring,
    manifest: Manifest,
    expected: BTreeMap<String, Vec<u8>>,
    data_pack: ObjectName,
    meta_pack: ObjectName,
}

/// Frames of one pack in the making.
struct Pack {
    packer: Packer,
    frames: Vec<Frame>,
    meta: PackMeta,
    hash_key: [u8; 32],
}

impl Pack {
    fn new(hash_key: [u8; 32]) -> Pack {
        let (packer, meta) = (Packer::new(1).unwrap(), PackMeta::default());
        Pack { packer, frames: Vec::new(), meta, hash_key }
    }

    fn frame(&mut self, plain: &[u8]) -> usize {
        let hashes = plain.chunks(PAGE).flat_map(|page| page_hash(&self.hash_key, page)).collect();
        self.meta.frames.push(PackFrame { usage: FrameUse::Image, hashes });
        self.frames.push(Frame::pack(&mut self.packer, plain).unwrap());
        self.frames.len() - 1
    }

    fn seal(self, epoch: &Epoch) -> Sealed {
        let draft = Draft {
            kind: ObjectKind::Pack,
            plain: Vec::new(),
            frames: self.frames,
            meta: cbor::encode(&self.meta),
        };
        seal(draft, epoch, |id| ObjectName::Pack { system: SYSTEM, id })
    }
}

fn reference(pack: &Sealed, frame: usize) -> FrameRef {
    let ObjectName::Pack { id, .. } = pack.name else { panic!("a pack") };
    FrameRef { pack: id, span: pack.spans[frame] }
}

fn entry_of(pack: &Sealed) -> PackEntry {
    PackEntry {
        epoch: 0,
        salt: *pack.header.salt(),
        commitment: *pack.header.commitment(),
        size: pack.bytes.len() as u64,
        hash: pack.hash(),
        live_bytes: 1,
        frame_bytes: None,
    }
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut out = vec![0; bytes];
    let mut next = generator(seed);
    out.iter_mut().for_each(|byte| *byte = next());
    out
}

/// A small generator: the data need only differ from page to page.
fn generator(seed: u64) -> impl FnMut() -> u8 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    }
}

fn digest(key: &[u8; 32], content: &[u8]) -> [u8; 32] {
    let mut digest = FileDigest::new();
    digest.push(&content.chunks(PAGE).map(|page| page_hash(key, page)).collect::<Vec<_>>());
    digest.finish(content.len() as u64)
}

impl Stored {
    /// Files of each kind: mapped with a delta, with a short last page, in a tablespace, small, empty, `pg_control`.
    pub(crate) async fn new() -> Stored {
        let folder = tempfile::tempdir().unwrap();
        let mut locations = Vec::new();
        for name in ["frankfurt", "virginia"] {
            let url = format!("file://{}/{name}", folder.path().display());
            let location =
                Location::open(&LocationSettings::new(name.parse().unwrap(), url)).unwrap();
            location.create_root().await.unwrap();
            locations.push(location);
        }
        let keyring = Keyring::new(Arc::new(FileProvider::generate()), "orders".parse().unwrap());
        let (epoch, wrap) = keyring.new_epoch(SYSTEM).await.unwrap();

        let (old, new) = (noise(300 * PAGE, 1), noise(PAGE, 2));
        let (short, small) = (noise(5 * PAGE + 100, 3), noise(700, 4));
        let hash_key: [u8; 32] = random_bytes();
        let mut data = Pack::new(hash_key);
        let images: Vec<usize> = old.chunks(128 * PAGE).map(|chunk| data.frame(chunk)).collect();
        let delta = data.frame(&new);
        let short_frame = data.frame(&short);
        let small_frame = data.frame(&small);
        let data = data.seal(&epoch);

        let run = |first_page, pages, frame, at| Run { first_page, pages, frame, at };
        let big_map = FileMap {
            frames: images.iter().chain([&delta]).map(|f| reference(&data, *f)).collect(),
            // Page 130 is newer than its image.
            runs: vec![
                run(0, 128, 0, 0),
                run(128, 2, 1, 0),
                run(130, 1, 3, 0),
                run(131, 125, 1, 3 * PAGE as u32),
                run(256, 44, 2, 0),
            ],
        };
        let short_map =
            FileMap { frames: vec![reference(&data, short_frame)], runs: vec![run(0, 6, 0, 0)] };
        let mut patched = old;
        patched[130 * PAGE..131 * PAGE].copy_from_slice(&new);

        let maps = [big_map.encode(), short_map.encode()];
        let mut meta = Pack::new(hash_key);
        let maps_frame = meta.frame(&maps.concat());
        // The references need the offsets of a sealed pack, so maps and table are packs of their own.
        let maps_pack = meta.seal(&epoch);
        let map_ref = |at: usize, bytes: usize| {
            let frame = reference(&maps_pack, maps_frame);
            Content::Mapped(BytesRef {
                pieces: vec![BytesPiece { frame, at: at as u32, bytes: bytes as u32 }],
            })
        };
        let within = |at: u32| Content::Within { frame: reference(&data, small_frame), at };
        let contents: Vec<(&str, Vec<u8>, Content)> = vec![
            ("PG_VERSION", small[..3].to_vec(), within(0)),
            ("base/1/100", patched, map_ref(0, maps[0].len())),
            ("base/1/101", Vec::new(), Content::Empty),
            ("global/pg_control", small[3..603].to_vec(), within(3)),
            ("pg_tblspc/16385/PG_15/5/9", short, map_ref(maps[0].len(), maps[1].len())),
            ("postmaster.pid", small[..3].to_vec(), within(0)),
        ];
        let mut files: Vec<FileEntry> = contents
            .iter()
            .map(|(path, content, place)| FileEntry {
                path: path.to_string(),
                kind: FileKind::File,
                mode: 0o640,
                size: content.len() as u64,
                digest: Some(digest(&hash_key, content)),
                content: place.clone(),
            })
            .collect();
        for path in ["base", "base/1", "global", "pg_xact"] {
            let kind = FileKind::Directory;
            let path = path.to_string();
            files.push(FileEntry {
                path,
                kind,
                mode: 0o750,
                size: 0,
                digest: None,
                content: Content::Empty,
            });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut table = Pack::new(hash_key);
        let parts =
            [TablePart { files: files[..4].to_vec() }, TablePart { files: files[4..].to_vec() }];
        let encoded: Vec<Vec<u8>> = parts.iter().map(cbor::encode).collect();
        let frames: Vec<usize> = encoded.iter().map(|bytes| table.frame(bytes)).collect();
        let table = table.seal(&epoch);
        let part_ref = |(frame, bytes): (&usize, &Vec<u8>)| BytesRef {
            pieces: vec![BytesPiece {
                frame: reference(&table, *frame),
                at: 0,
                bytes: bytes.len() as u32,
            }],
        };
        let snapshot = "20261122T020000Z-1f2e3d4c".parse::<SnapshotId>().unwrap();
        let branch = Branch { timeline: TimelineId::FIRST, id: BranchId::from_bytes([1, 2, 3, 4]) };
        let plain = ManifestPlain {
            start: Lsn::new(0x100_0028),
            stop: Lsn::new(0x100_0100),
            epochs: vec![epoch.id()],
            packs: vec![entry_of(&data), entry_of(&maps_pack), entry_of(&table)],
            database_bytes: files.iter().map(|file| file.size).sum(),
            stored_bytes: 1,
            files: files.len() as u64,
            ..testing::plain(SYSTEM, snapshot, branch)
        };
        let root = Root {
            hash_key,
            page_bytes: PAGE as u32,
            table: frames.iter().zip(&encoded).map(part_ref).collect(),
            backup_label: "START WAL LOCATION: 0/1000028 (file 000000010000000000000001)\n".into(),
            tablespaces: vec![Tablespace { oid: 16385, location: "/srv/fast".into() }],
            ..testing::root()
        };
        for location in &locations {
            for object in [&wrap, &data, &maps_pack, &table] {
                location.put(&object.name, object.bytes.clone()).await.unwrap();
            }
        }
        let mut expected: BTreeMap<String, Vec<u8>> =
            contents.into_iter().map(|(path, content, _)| (path.to_string(), content)).collect();
        expected.remove("postmaster.pid");
        expected.insert("backup_label".into(), root.backup_label.clone().into_bytes());
        let (data_pack, meta_pack) = (data.name, maps_pack.name);
        let manifest = Manifest { plain, root };
        Stored { folder, locations, keyring, manifest, expected, data_pack, meta_pack }
    }

    /// Where a location keeps an object.
    fn path(&self, location: usize, name: &ObjectName) -> PathBuf {
        self.folder.path().join(self.locations[location].name().as_str()).join(name.to_string())
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("restored")
    }

    async fn restore(&self, existing: Existing) -> Result<(Materialized, Vec<(String, u64)>)> {
        let packs = Packs::open(&self.locations, &self.keyring, &self.manifest.plain).await?;
        let layout = Layout::new(self.target(), &self.manifest.root.tablespaces, &[])?;
        make_directory(layout.root(), Owner::of_process())?;
        let work = Materialize {
            packs: &packs,
            manifest: &self.manifest,
            layout: &layout,
            owner: Owner::of_process(),
            existing,
            progress: Arc::new(Progress::new("test", 1, true)),
        };
        Ok((work.run().await?, packs.read_from()))
    }

    fn check(&self) {
        for (path, content) in &self.expected {
            assert!(std::fs::read(self.target().join(path)).unwrap() == *content, "{path}");
        }
    }

    async fn refusal(&self) -> Error {
        let error = self.restore(Existing::Nothing).await.unwrap_err();
        assert!(!self.target().join(CONTROL_FILE).exists(), "not finished");
        error
    }
}

fn bend(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn remove(path: &Path) {
    std::fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn every_file_comes_back_as_it_was() {
    let stored = Stored::new().await;
    let (done, from) = stored.restore(Existing::Nothing).await.unwrap();
    stored.check();
    assert_eq!(done.kept_bytes, 0);
    assert!(from[0].1 > 0 && from[1].1 == 0, "one location is enough: {from:?}");
    let mode = |path: &str| {
        std::fs::metadata(stored.target().join(path)).unwrap().permissions().mode() & 0o777
    };
    assert_eq!((mode("base/1/100"), mode("base"), mode("pg_wal")), (0o640, 0o750, 0o700));
    assert!(!stored.target().join("postmaster.pid").exists());
    let link = std::fs::read_link(stored.target().join("pg_tblspc/16385")).unwrap();
    assert_eq!(link, stored.target().join("backstay-tablespaces/16385"));
}

#[tokio::test]
async fn what_one_location_lacks_comes_from_the_other() {
    for harm in [
        remove as fn(&Path),
        |path| bend(path, 3000),
        |path| {
            std::fs::File::options().write(true).open(path).unwrap().set_len(2000).unwrap();
        },
    ] {
        let stored = Stored::new().await;
        harm(&stored.path(0, &stored.data_pack));
        let (_, from) = stored.restore(Existing::Nothing).await.unwrap();
        stored.check();
        assert!(from[1].1 > 0, "{from:?}");
    }
}

#[tokio::test]
async fn damage_at_different_places_of_one_pack_is_overcome() {
    let stored = Stored::new().await;
    let length = std::fs::metadata(stored.path(0, &stored.data_pack)).unwrap().len() as usize;
    bend(&stored.path(0, &stored.data_pack), 3000);
    bend(&stored.path(1, &stored.meta_pack), 300);
    assert!(length > 4000);
    stored.restore(Existing::Nothing).await.unwrap();
    stored.check();
}

#[tokio::test]
async fn what_no_location_has_whole_is_refused_by_name() {
    let stored = Stored::new().await;
    bend(&stored.path(0, &stored.data_pack), 3000);
    bend(&stored.path(1, &stored.data_pack), 3000);
    let error = stored.refusal().await;
    assert_eq!(error.kind(), Kind::Corrupt);
    let text = error.to_string();
    for part in
        [&stored.data_pack.to_string(), "frankfurt", "virginia", "authentication tag", "remedy"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }

    let stored = Stored::new().await;
    remove(&stored.path(0, &stored.meta_pack));
    remove(&stored.path(1, &stored.meta_pack));
    let error = stored.refusal().await;
    assert_eq!(error.kind(), Kind::Missing);
    assert!(error.to_string().contains(&stored.meta_pack.to_string()));
}

#[tokio::test]
async fn swapped_packs_are_found() {
    let stored = Stored::new().await;
    for location in 0..2 {
        let (a, b) =
            (stored.path(location, &stored.data_pack), stored.path(location, &stored.meta_pack));
        let spare = a.with_extension("spare");
        std::fs::rename(&a, &spare).unwrap();
        std::fs::rename(&b, &a).unwrap();
        std::fs::rename(&spare, &b).unwrap();
    }
    assert_eq!(stored.refusal().await.kind(), Kind::Corrupt);
}

#[tokio::test]
async fn an_attempt_is_taken_up_again() {
    let stored = Stored::new().await;
    stored.restore(Existing::Nothing).await.unwrap();
    bend(&stored.target().join("base/1/100"), 12345);
    std::fs::write(stored.target().join("base/1/stranger"), b"x").unwrap();
    remove(&stored.target().join(CONTROL_FILE));
    let (done, _) = stored.restore(Existing::Unfinished).await.unwrap();
    stored.check();
    assert!(!stored.target().join("base/1/stranger").exists());
    let size = |path: &str| stored.expected[path].len() as u64;
    assert_eq!(done.written_bytes, PAGE as u64, "only the page that was wrong");
    let all = size("PG_VERSION") + size("base/1/100") + size("pg_tblspc/16385/PG_15/5/9");
    assert_eq!(done.kept_bytes, all - PAGE as u64);
    assert_eq!(done.removed_files, 2, "the stranger and the label, which is written anew");
}

/// Changes of every kind in a file: at its ends, in an image and in a delta, shorter, longer, gone, not a file.
#[tokio::test]
async fn only_the_pages_that_differ_are_fetched() {
    let file = |stored: &Stored| stored.target().join("base/1/100");
    let set_size = |path: &Path, bytes: u64| {
        std::fs::File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
    };
    type Change = Box<dyn Fn(&Path)>;
    let page = PAGE as u64;
    let cases: Vec<(&str, Change, u64)> = vec![
        ("nothing", Box::new(|_| {}), 0),
        ("first", Box::new(|path| bend(path, 0)), page),
        ("last", Box::new(|path| bend(path, 300 * PAGE - 1)), page),
        ("of a delta", Box::new(|path| bend(path, 130 * PAGE + 1)), page),
        ("two frames", Box::new(|path| (bend(path, 5 * PAGE), bend(path, 290 * PAGE)).1), 2 * page),
        ("shorter", Box::new(move |path| set_size(path, 299 * PAGE as u64 - 1)), 2 * page),
        ("longer", Box::new(move |path| set_size(path, 301 * PAGE as u64)), 0),
        ("empty", Box::new(move |path| set_size(path, 0)), 300 * page),
        ("gone", Box::new(remove), 300 * page),
        (
            "a link",
            Box::new(|path| {
                remove(path);
                std::os::unix::fs::symlink("/etc/hostname", path).unwrap();
            }),
            300 * page,
        ),
        (
            "shared",
            Box::new(|path| std::fs::hard_link(path, path.with_extension("x")).unwrap()),
            300 * page,
        ),
        (
            "mode",
            Box::new(|path| {
                let mode = std::fs::Permissions::from_mode(0o666);
                std::fs::set_permissions(path, mode).unwrap();
            }),
            0,
        ),
    ];
    for (name, change, written) in cases {
        let stored = Stored::new().await;
        stored.restore(Existing::Nothing).await.unwrap();
        change(&file(&stored));
        let (done, _) = stored.restore(Existing::Cluster).await.unwrap();
        assert_eq!(done.written_bytes, written, "{name}");
        stored.check();
        let mode = std::fs::metadata(file(&stored)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o640, "{name}");
    }
}

/// A page whose hash is not the sealed one is never kept, whatever the footers say or do not say.
#[tokio::test]
async fn without_footers_whole_files_are_fetched() {
    let stored = Stored::new().await;
    stored.restore(Existing::Nothing).await.unwrap();
    for location in 0..2 {
        let path = stored.path(location, &stored.data_pack);
        let length = std::fs::metadata(&path).unwrap().len() as usize;
        bend(&path, length - 60);
    }
    bend(&stored.target().join("base/1/100"), 12345);
    let (done, _) = stored.restore(Existing::Cluster).await.unwrap();
    stored.check();
    assert_eq!(done.written_bytes, stored.expected["base/1/100"].len() as u64);
}

#[tokio::test]
async fn what_is_not_postgresqls_is_left_alone() {
    let stored = Stored::new().await;
    stored.restore(Existing::Nothing).await.unwrap();
    let at = |path: &str| stored.target().join(path);
    let place = at("backstay-tablespaces/16385");
    let foreign = [
        "postgresql.conf",
        "conf.d/own.conf",
        "log/today.log",
        "server.key",
        "base/1/notes.txt",
        "base/7/notes.txt",
        "backstay-tablespaces/16385/notes.txt",
        "backstay-tablespaces/16385/PG_14_202107181/5/9",
    ];
    let stale = [
        "base/1/100.1",
        "base/1/pg_internal.init",
        "base/6/1259",
        "base/7/1259",
        "pg_wal/000000010000000000000009",
        "pg_replslot/standby/state",
        "tablespace_map",
        "standby.signal",
        "backstay-tablespaces/16385/PG_15/5/77",
        "backstay-tablespaces/20000/PG_15/5/77",
    ];
    for path in foreign.iter().chain(&stale) {
        std::fs::create_dir_all(at(path).parent().unwrap()).unwrap();
        std::fs::write(at(path), path).unwrap();
    }
    std::os::unix::fs::symlink(&place, at("pg_tblspc/20000")).unwrap();
    let (done, _) = stored.restore(Existing::Cluster).await.unwrap();
    stored.check();
    for path in foreign {
        assert_eq!(std::fs::read_to_string(at(path)).unwrap(), path);
    }
    for path in stale {
        assert!(!at(path).exists(), "{path}");
    }
    assert!(std::fs::symlink_metadata(at("pg_tblspc/20000")).is_err());
    assert!(!at("base/6").exists() && !at("backstay-tablespaces/20000").exists());
    assert_eq!(done.written_bytes, 0);
    assert_eq!(done.removed_files, stale.len() as u64 + 2, "and the label and the link");
}

#[tokio::test]
async fn a_cluster_cannot_be_started_from_the_first_change_to_the_last() {
    let stored = Stored::new().await;
    stored.restore(Existing::Nothing).await.unwrap();
    bend(&stored.target().join("base/1/100"), 12345);
    for location in 0..2 {
        bend(&stored.path(location, &stored.data_pack), 3000);
    }
    assert_eq!(stored.restore(Existing::Cluster).await.unwrap_err().kind(), Kind::Corrupt);
    assert!(!stored.target().join(CONTROL_FILE).exists());
}

#[tokio::test]
async fn a_path_that_leads_out_is_refused() {
    let stored = Stored::new().await;
    let layout = Layout::new(stored.target(), &[], &[]).unwrap();
    let packs =
        Packs::open(&stored.locations, &stored.keyring, &stored.manifest.plain).await.unwrap();
    let file = FileEntry {
        path: "../escaped".into(),
        kind: FileKind::File,
        mode: 0o600,
        size: 0,
        digest: None,
        content: Content::Empty,
    };
    let refused = Batch::plan(
        vec![(file, Local::Absent)],
        &layout,
        Owner::of_process(),
        &packs,
        &Arc::default(),
        PAGE as u32,
    )
    .await;
    assert_eq!(refused.unwrap_err().kind(), Kind::Corrupt);
    assert!(!stored.folder.path().join("escaped").exists());
}
