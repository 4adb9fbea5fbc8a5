//! A second reader, written from `FORMAT.md` alone: it takes offsets, contexts and the worked example from the text.

use crate::contents::fixtures;
use crate::document::{code, section, table};
use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use std::collections::BTreeMap;
use std::ops::Range;

const EXAMPLE: &str = "## 14. An object, worked";
const EXAMPLE_NAME: &str = "7312345678901234567/head/db1/00000000000000000042";
const WRAP_NAME: &str =
    "7312345678901234567/keys/e5af335e76a0a37fc700a0346aa43b9b/b68afcfc1111855e";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks_exact(2).map(byte).collect()
}

fn object(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(name)).unwrap()
}

/// Where each field of the header lies, as the table of section 5.1 says: `36+n` is 36 and the length of the name.
fn header(object: &[u8]) -> BTreeMap<String, Range<usize>> {
    let number = |at: usize, bytes: usize| {
        object[at..at + bytes].iter().rev().fold(0, |sum, &byte| sum << 8 | usize::from(byte))
    };
    let mut lengths = BTreeMap::new();
    let mut fields = BTreeMap::new();
    for row in table("### 5.1 Header", "offset") {
        let value = |text: &str, lengths: &BTreeMap<String, usize>| -> usize {
            text.split('+').map(|part| part.parse().unwrap_or_else(|_| lengths[part])).sum()
        };
        let start = value(&row[0], &lengths);
        let end = start + value(&row[1], &lengths);
        if let Some((letter, _)) = row[2].split_once(": length") {
            lengths.insert(letter.to_string(), number(start, end - start));
        }
        let name = row[2].split([',', ';', ':']).next().unwrap().to_string();
        fields.insert(name, start..end);
    }
    fields
}

/// The contexts of section 7, by the beginning of what they give.
fn kdf(gives: &str, key: &[u8]) -> [u8; 32] {
    let rows = table("## 7. Keys", "from");
    let row = rows.iter().find(|row| row[2].starts_with(gives)).unwrap();
    blake3::derive_key(&row[1], key)
}

fn open(key: &[u8; 32], nonce: [u8; 12], aad: &[u8], sealed: &[u8]) -> Vec<u8> {
    let cipher = Aes256Gcm::new(key.into());
    cipher.decrypt(&Nonce::from(nonce), Payload { msg: sealed, aad }).expect("the tag fits")
}

/// The epoch key out of the wrap, with the key file.
fn epoch_key() -> [u8; 32] {
    let file = String::from_utf8(object("orders.key")).unwrap();
    let line = file.lines().find(|line| !line.starts_with('#')).unwrap();
    let words: Vec<&str> = line.split(' ').collect();
    let kek = from_hex(words[2]);
    assert_eq!(
        (words[0], words[1].to_string()),
        ("backstay-key-1", hex(&kdf("the key's id", &kek)[..8]))
    );
    let wrap = object(WRAP_NAME);
    let plain = header(&wrap)["plain section"].clone();
    // `wrapped` is the last field: 32 bytes of salt, 32 of key, 16 of tag.
    let wrapped = &wrap[plain.end - 80..plain.end];
    let (salt, sealed) = wrapped.split_at(32);
    let associated = [
        &b"backstay wrap v1"[..],
        b"orders",
        b"7312345678901234567",
        &WRAP_NAME.as_bytes()[25..57],
    ]
    .join(&0);
    let mut hasher =
        blake3::Hasher::new_keyed(&kdf("key of the hash that gives the key of one wrap", &kek));
    hasher.update(salt).update(&associated);
    let key = open(hasher.finalize().as_bytes(), [0; 12], &associated, sealed);
    assert_eq!(hex(&kdf("the epoch's id", &key)[..16]), WRAP_NAME[25..57]);
    key.try_into().unwrap()
}

/// Key and commitment of one object.
fn object_keys(object: &[u8], epoch_key: &[u8]) -> [u8; 64] {
    let fields = header(object);
    let keys = kdf("key of the hash that gives an object's key and commitment", epoch_key);
    let mut hasher = blake3::Hasher::new_keyed(&keys);
    hasher.update(&object[..fields["salt"].end]).update(&object[fields["plain section"].clone()]);
    let mut stream = [0; 64];
    hasher.finalize_xof().fill(&mut stream);
    stream
}

/// The footer, opened: its length lies before the trailer.
fn footer(object: &[u8], key: &[u8; 32]) -> (Range<usize>, Vec<u8>) {
    let end = object.len() - 36;
    let length = u32::from_le_bytes(object[end..end + 4].try_into().unwrap()) as usize;
    let mut nonce = [0xFF; 12];
    nonce[..4].fill(0);
    let mut associated = [0xFF; 10];
    (associated[0], associated[9]) = (object[header(object)["kind"].start], 1);
    (end - length..end, open(key, nonce, &associated, &object[end - length..end]))
}

#[test]
fn the_header_is_as_long_as_stated() {
    let object = object(EXAMPLE_NAME);
    let fields = header(&object);
    let at = |name: &str| &object[fields[name].clone()];
    assert_eq!(at("magic"), b"BACKSTAY");
    assert_eq!((at("format version"), at("suite"), at("kind")), (&[1, 0][..], &[1][..], &[6][..]));
    assert_eq!(at("name"), EXAMPLE_NAME.as_bytes());
    let keys = object_keys(&object, &epoch_key());
    assert_eq!(at("key commitment"), &keys[32..]);
}

#[test]
fn frames_open_as_the_document_says() {
    let name = "7312345678901234567/wal/00000001-3fa9c1d2/00000016/\
                00000016B3000000-00000016B3101388.8c10847fab1db520";
    let object = object(name);
    let key: [u8; 32] = object_keys(&object, &epoch_key())[..32].try_into().unwrap();
    let (sealed, footer) = footer(&object, &key);
    let word = |at: usize| u32::from_le_bytes(footer[at..at + 4].try_into().unwrap()) as usize;
    let mut at = header(&object)["plain section"].end;
    let mut wal = Vec::new();
    for i in 0..word(0) {
        let (sealed_bytes, plain_bytes, codec) =
            (word(4 + 9 * i), word(8 + 9 * i), footer[12 + 9 * i]);
        let number = (i as u64).to_be_bytes();
        let nonce = [&[0; 4][..], &number].concat().try_into().unwrap();
        let associated = [&[4][..], &number, &[0]].concat();
        let packed = open(&key, nonce, &associated, &object[at..at + sealed_bytes]);
        let plain = match codec {
            0 => packed,
            _ => zstd::bulk::decompress(&packed, plain_bytes).unwrap(),
        };
        assert_eq!(plain.len(), plain_bytes);
        wal.extend(plain);
        at += sealed_bytes;
    }
    assert_eq!(at, sealed.start, "frames end where the footer begins");
    assert!(wal == crate::contents::wal());
}

#[test]
fn the_worked_example_is_so() {
    let object = object(EXAMPLE_NAME);
    let dump: String = object
        .chunks(16)
        .enumerate()
        .map(|(line, bytes)| {
            let spaced: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{:04x}  {}\n", line * 16, spaced.join(" "))
        })
        .collect();
    assert!(code(EXAMPLE, 0) == dump, "the dump is\n{dump}");

    let epoch_key = epoch_key();
    let keys = object_keys(&object, &epoch_key);
    let (sealed, footer) = footer(&object, keys[..32].try_into().unwrap());
    let end = object.len();
    let mut places: Vec<(usize, usize, &str)> = Vec::new();
    let fields = header(&object);
    for (name, at) in &fields {
        places.push((at.start, at.len(), name));
    }
    places.extend([
        (sealed.start, sealed.len(), "sealed footer"),
        (end - 36, 4, "footer length"),
        (end - 32, 32, "trailer"),
    ]);
    places.retain(|(_, bytes, _)| *bytes > 0);
    places.sort_unstable();
    let rows: Vec<String> =
        places.iter().map(|(at, bytes, what)| format!("| {at:04x} | {bytes} | {what} |")).collect();
    assert!(section(EXAMPLE).contains(&rows.join("\n")), "the rows are\n{}", rows.join("\n"));

    let values = [
        ("epoch key", hex(&epoch_key)),
        (
            "object-keys",
            hex(&kdf("key of the hash that gives an object's key and commitment", &epoch_key)),
        ),
        ("key", hex(&keys[..32])),
        ("commitment", hex(&keys[32..])),
        ("nonce of the footer", "00000000ffffffffffffffff".into()),
        ("associated data of the footer", "06ffffffffffffffff01".into()),
        ("footer, opened", hex(&footer)),
    ];
    let rows: Vec<String> =
        values.iter().map(|(name, value)| format!("| {name} | `{value}` |")).collect();
    assert!(section(EXAMPLE).contains(&rows.join("\n")), "the rows are\n{}", rows.join("\n"));
    assert_eq!(object[end - 32..], *blake3::hash(&object[..end - 32]).as_bytes());
}
