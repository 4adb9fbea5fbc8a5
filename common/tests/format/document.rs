//! What `FORMAT.md` says, read from its text, and the code held to it.

use crate::contents::{fixtures, pins, span_meta};
use crate::fixtures::all;
use backstay_common::name::ObjectName;
use backstay_common::pin::PinRecord;
use backstay_common::seal::{Codec, Header, Object, ObjectKind, Suite, Unpacker};
use backstay_common::snapshot::{FileKind, FrameUse, Manifest, ManifestPlain, PackEntry};
use backstay_common::wal::WalVersion;
use backstay_common::{cbor, keys, lsn, seal, snapshot, wal, walindex};
use minicbor::Decoder;
use minicbor::data::Type;
use std::collections::BTreeMap;

const TEXT: &str = include_str!("../../FORMAT.md");

/// What stands under a heading, up to the next one.
pub fn section(heading: &str) -> &'static str {
    let start = TEXT.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading:?}"));
    let body = &TEXT[start + heading.len() + 2..];
    &body[..body.find("\n## ").or(body.find("\n### ")).unwrap_or(body.len())]
}

/// The rows of the first table whose header begins with `first`; code marks are dropped.
pub fn table(heading: &str, first: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        let inner = line.trim().trim_start_matches('|').trim_end_matches('|');
        inner.split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    let lines =
        section(heading).lines().skip_while(|line| !line.starts_with(&format!("| {first} |")));
    lines.take_while(|line| line.starts_with('|')).skip(2).map(cells).collect()
}

/// The `number`th block of code under a heading.
pub fn code(heading: &str, number: usize) -> &'static str {
    let block = section(heading).split("```").nth(2 * number + 1).unwrap();
    block.split_once('\n').unwrap().1
}

#[test]
fn limits_are_the_codes() {
    let known = BTreeMap::from([
        ("FORMAT_VERSION", u64::from(seal::FORMAT_VERSION)),
        ("FRAME_BYTES_MAX", seal::FRAME_BYTES_MAX as u64),
        ("OBJECT_BYTES_MAX", seal::OBJECT_BYTES_MAX as u64),
        ("CONTENTS_BYTES_MAX", seal::CONTENTS_BYTES_MAX as u64),
        ("HEADER_BYTES_MAX", seal::HEADER_BYTES_MAX as u64),
        ("TAG_BYTES", seal::TAG_BYTES as u64),
        ("TRAILER_BYTES", seal::TRAILER_BYTES as u64),
        ("WRAP_BYTES_MAX", keys::WRAP_BYTES_MAX),
        ("SPAN_BYTES", lsn::SPAN_BYTES),
        ("INDEX_BYTES_MAX", walindex::INDEX_BYTES_MAX as u64),
        ("RESTORE_POINTS_MAX", wal::RESTORE_POINTS_MAX as u64),
        ("CRITICAL_BELOW", cbor::CRITICAL_BELOW),
    ]);
    let rows = table("### 5.6 Limits", "name");
    let stated: BTreeMap<&str, u64> =
        rows.iter().map(|row| (row[0].as_str(), row[1].parse().unwrap())).collect();
    assert_eq!(stated, known);
    assert_eq!(backstay_common::location::OBJECT_BYTES_MAX, seal::OBJECT_BYTES_MAX as u64);
}

#[test]
fn the_tree_is_that_of_the_fixtures() {
    let mut stored = Vec::new();
    let mut folders = vec![fixtures()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(fixtures()).unwrap().to_str().unwrap().to_string();
            match path.is_dir() {
                true => folders.push(path),
                false if name == "orders.key" => {}
                false => stored.push(name),
            }
        }
    }
    let mut stated: Vec<&str> = code("## 2. The tree", 0).lines().collect();
    assert!(stated.iter().all(|name| name.parse::<ObjectName>().is_ok()));
    stated.sort_unstable();
    stored.sort_unstable();
    assert_eq!(stated, stored);
}

#[test]
fn reserved_names_are_no_names_of_today() {
    for name in ["7/snapshots/20261122T020000Z-1f2e3d4c/retired", "probe/1/1"] {
        assert!(name.parse::<ObjectName>().is_err(), "{name}");
    }
}

#[tokio::test]
async fn kinds_and_suites_are_the_codes() {
    let (objects, _) = all().await;
    let rows = table("### 5.2 Kinds", "kind");
    assert_eq!(rows.len(), 15);
    for row in rows {
        let (number, suite): (u8, u8) = (row[0].parse().unwrap(), row[2].parse().unwrap());
        let kind =
            |name: &&ObjectName| format!("{:?}", ObjectKind::of(name)).to_lowercase() == row[1];
        let name = objects.keys().find(kind).unwrap_or_else(|| panic!("no fixture of {}", row[1]));
        assert_eq!(
            (ObjectKind::of(name) as u8, ObjectKind::of(name).suite() as u8),
            (number, suite)
        );
        let header = Header::check(&objects[name], name).unwrap();
        assert_eq!(header.plain().is_empty(), row[3] == "empty", "{name}");
    }
    let numbers = |heading, first| -> Vec<u8> {
        table(heading, first).iter().map(|row| row[0].parse().unwrap()).collect()
    };
    assert_eq!(numbers("### 5.3 Suites", "suite"), [Suite::Plain as u8, Suite::Sealed as u8]);
    assert_eq!(numbers("### 5.5 Codecs", "codec"), [Codec::Raw as u8, Codec::Zstd as u8]);
    assert!(Codec::from_byte(2).is_none());
}

#[test]
fn majors_and_their_magics_are_the_codes() {
    let rows = table("## 11. PostgreSQL's facts", "major");
    let stated: Vec<(u32, u16)> = rows
        .iter()
        .map(|row| (row[0].parse().unwrap(), u16::from_str_radix(&row[1], 16).unwrap()))
        .collect();
    let known: Vec<(u32, u16)> = WalVersion::all().map(|v| (v.major(), v.magic())).collect();
    assert_eq!(stated, known);
}

#[test]
fn numbers_of_uses_and_kinds_of_files_are_the_codes() {
    use FrameUse::{Delta, Image, Maps, Small, Table};
    assert_eq!([Image, Delta, Small, Maps, Table].map(|usage| usage as u8), [0, 1, 2, 3, 4]);
    assert!(
        section("### PackFrame").contains("0 image, 1 delta, 2 small files, 3 file maps, 4 table")
    );
    assert_eq!([FileKind::Directory, FileKind::File].map(|kind| kind as u8), [0, 1]);
    assert!(section("### FileEntry").contains("0 directory, 1 file"));
    for bytes in [1024, 2048, 4096, 8192, 16384, 32768] {
        assert!(snapshot::filemap::is_page_size(bytes));
    }
    assert!(!snapshot::filemap::is_page_size(512) && !snapshot::filemap::is_page_size(65536));
}

/// Encoded bytes of every record, out of the fixtures, by the heading of its table. Fields that a record may lack are
/// found in another of its kind.
async fn records() -> BTreeMap<&'static str, Vec<Vec<u8>>> {
    let (objects, epoch) = all().await;
    let mut records: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    for (name, bytes) in &objects {
        let plain = Header::check(bytes, name).unwrap().plain().to_vec();
        let open = || Object::open(bytes.clone(), name, &epoch).unwrap();
        let (heading, record) = match ObjectKind::of(name) {
            ObjectKind::Cluster => ("ClusterRecord", plain),
            ObjectKind::Wrap => ("WrapRecord", plain),
            ObjectKind::Origin => ("Origin", open().meta().to_vec()),
            ObjectKind::Wal => ("SpanMeta", open().meta().to_vec()),
            ObjectKind::WalIndex => {
                let part = open().frame(0, &mut Unpacker::new()).unwrap();
                records.insert("IndexEntry", vec![member(&part, &[0, 1])]);
                records.insert("IndexPart", vec![part]);
                ("IndexMeta", open().meta().to_vec())
            }
            ObjectKind::Head => ("Head", open().meta().to_vec()),
            ObjectKind::Begin => ("Begin", plain),
            ObjectKind::Pin => ("PinRecord", plain),
            ObjectKind::Condemned => ("Condemned", plain),
            ObjectKind::Accepted => ("AcceptedRecord", plain),
            ObjectKind::Lease => ("Lease", plain),
            ObjectKind::Gap => ("Gap", open().meta().to_vec()),
            ObjectKind::Ledger => ("Entry", open().meta().to_vec()),
            ObjectKind::Manifest => {
                records.entry("Root").or_default().push(open().contents().unwrap());
                ("ManifestPlain", plain)
            }
            ObjectKind::Pack => {
                let meta = cbor::decode::<snapshot::PackMeta>(open().meta()).unwrap();
                for (number, frame) in meta.frames.iter().enumerate() {
                    let plain = open().frame(number, &mut Unpacker::new()).unwrap();
                    match frame.usage {
                        Maps => records.entry("FileMap").or_default().push(plain),
                        Table => records.entry("TablePart").or_default().push(plain),
                        _ => {}
                    }
                    records.entry("PackFrame").or_default().push(cbor::encode(frame));
                }
                ("PackMeta", open().meta().to_vec())
            }
        };
        records.entry(heading).or_default().push(record);
    }
    use FrameUse::{Maps, Table};
    let add = |records: &mut BTreeMap<&str, _>, heading, bytes| {
        let before = records.insert(heading, vec![bytes]);
        assert!(before.is_none(), "{heading}");
    };
    let summary = span_meta().summary;
    add(&mut records, "RestorePoint", cbor::encode(&summary.restore_points[0]));
    add(&mut records, "Minima", cbor::encode(&summary.parameter_change.unwrap()));
    add(&mut records, "Summary", cbor::encode(&summary));
    let manifest = objects.keys().find(|n| ObjectKind::of(n) == ObjectKind::Manifest).unwrap();
    let manifest = Manifest::open(objects[manifest].clone(), manifest, &epoch).unwrap();
    // As agents write them today; the stored examples are of before.
    let abandoned = Some(vec![manifest.plain.snapshot]);
    let plain = cbor::encode(&ManifestPlain {
        abandoned,
        new_corrupt_pages: Some(0),
        ..manifest.plain.clone()
    });
    records.entry("ManifestPlain").or_default().push(plain);
    let (_, pin) = &pins()[0];
    let pin = cbor::encode(&PinRecord { restore: Some(true), ..pin.clone() });
    records.entry("PinRecord").or_default().push(pin);
    let pack = PackEntry { frame_bytes: Some(1), ..manifest.plain.packs[0].clone() };
    add(&mut records, "PackEntry", cbor::encode(&pack));
    add(&mut records, "Tablespace", cbor::encode(&manifest.root.tablespaces[0]));
    add(&mut records, "ConfigFile", cbor::encode(&manifest.root.config_files[0]));
    add(&mut records, "CorruptPage", cbor::encode(&manifest.root.corrupt_pages[0]));
    let bytes_ref = &manifest.root.table[0];
    add(&mut records, "BytesRef", cbor::encode(bytes_ref));
    add(&mut records, "BytesPiece", cbor::encode(&bytes_ref.pieces[0]));
    add(&mut records, "FrameRef", cbor::encode(&bytes_ref.pieces[0].frame));
    let map = snapshot::FileMap::decode(&records["FileMap"][0], 4 * 8192, 8192).unwrap();
    add(&mut records, "Run", cbor::encode(&map.runs[1]));
    let frame = member(&records["FileMap"][0], &[1, 0]);
    add(&mut records, "MapFrame", frame);
    let files: Vec<Vec<u8>> = (0..3).map(|n| member(&records["TablePart"][0], &[0, n])).collect();
    records.insert("FileEntry", files);
    records
}

/// The bytes of what lies at a path of field numbers and indices.
fn member(record: &[u8], path: &[u64]) -> Vec<u8> {
    let Some((first, rest)) = path.split_first() else { return record.to_vec() };
    let fields = fields(record);
    member(&fields.iter().find(|(number, _)| number == first).unwrap().1, rest)
}

/// Number and bytes of each field of a map, or of each member of an array.
fn fields(record: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut decoder = Decoder::new(record);
    let is_map = decoder.datatype().unwrap() == Type::Map;
    let count =
        if is_map { decoder.map() } else { decoder.array() }.unwrap().expect("of stated length");
    let mut fields = Vec::new();
    for index in 0..count {
        let number = if is_map { decoder.u64().unwrap() } else { index };
        let start = decoder.position();
        decoder.skip().unwrap();
        fields.push((number, record[start..decoder.position()].to_vec()));
    }
    assert_eq!(decoder.position(), record.len());
    fields
}

fn is_of_type(value: &[u8], stated: &str) -> bool {
    let mut decoder = Decoder::new(value);
    let uint = |found| matches!(found, Type::U8 | Type::U16 | Type::U32 | Type::U64);
    let found = decoder.datatype().unwrap();
    let (stated, size) = match stated.split_once('(') {
        Some((stated, size)) => (stated, size.trim_end_matches(')').parse::<usize>().ok()),
        None => (stated, None),
    };
    match stated {
        "uint" => uint(found),
        "int" => uint(found) || matches!(found, Type::I8 | Type::I16 | Type::I32 | Type::I64),
        "text" => found == Type::String,
        "bool" => found == Type::Bool,
        "array" => found == Type::Array,
        "map" => found == Type::Map,
        "bytes" => {
            found == Type::Bytes && size.is_none_or(|size| decoder.bytes().unwrap().len() == size)
        }
        other => panic!("the type {other} is not explained"),
    }
}

#[tokio::test]
async fn every_record_has_the_fields_that_are_stated() {
    let records = records().await;
    let metadata = &TEXT[TEXT.find("\n## 8.").unwrap()..TEXT.find("\n## 9.").unwrap()];
    let headings: Vec<&str> =
        metadata.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let mut known: Vec<&str> = records.keys().copied().collect();
    let mut stated = headings.clone();
    known.sort_unstable();
    stated.sort_unstable();
    assert_eq!(stated, known);
    for heading in headings {
        let rows = table(&format!("### {heading}"), "field");
        let is_array = section(&format!("### {heading}")).trim_start().starts_with("An array.");
        let mut seen = BTreeMap::new();
        for record in &records[heading] {
            let found = Decoder::new(record).datatype().unwrap();
            assert_eq!(found, if is_array { Type::Array } else { Type::Map }, "{heading}");
            seen.extend(fields(record));
            for row in rows.iter().filter(|row| !row[2].ends_with('?')) {
                let number: u64 = row[0].parse().unwrap();
                assert!(fields(record).iter().any(|(n, _)| *n == number), "{heading} {row:?}");
            }
        }
        let stated: Vec<u64> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
        assert_eq!(stated, seen.keys().copied().collect::<Vec<_>>(), "{heading}");
        for row in rows {
            let (number, stated) = (row[0].parse::<u64>().unwrap(), row[2].trim_end_matches('?'));
            assert!(is_of_type(&seen[&number], stated), "{heading}: field {number} is no {stated}");
        }
    }
}
