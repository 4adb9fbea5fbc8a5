//! Manifests as servers write them, and what each difference is called.

use super::*;
use std::fmt::Write;

const EXPECTED: Expected =
    Expected { system: SystemId::new(7), start: Lsn::new(0x200_0028), stop: Lsn::new(0x200_0158) };

const FILES: [(&str, &[u8]); 3] =
    [("backup_label", b"LABEL"), ("base/5/1259", b"pages"), ("base/5/empty", b"")];

fn streamed() -> Streamed {
    let mut streamed = Streamed::default();
    for (path, content) in FILES {
        assert!(streamed.note(path, content.len() as u64, crc32c::crc32c(content)));
    }
    streamed
}

/// As the server writes it: the digest covers all lines but the last.
fn manifest(version: u32, edit: impl Fn(&mut String)) -> String {
    let mut text = format!("{{ \"PostgreSQL-Backup-Manifest-Version\": {version},\n");
    if version > 1 {
        text += "\"System-Identifier\": 7,\n";
    }
    text += "\"Files\": [";
    for (n, (path, content)) in FILES.iter().enumerate() {
        let crc = crc32c::crc32c(content).to_le_bytes().iter().fold(String::new(), |mut hex, b| {
            let _ = write!(hex, "{b:02x}");
            hex
        });
        let comma = if n > 0 { "," } else { "" };
        let _ = write!(
            text,
            "{comma}\n{{ \"Path\": \"{path}\", \"Size\": {}, \"Last-Modified\": \"2026-11-22 02:00:00 GMT\", \
             \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{crc}\" }}",
            content.len()
        );
    }
    text += "\n],\n\"WAL-Ranges\": [\n\
        { \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000158\" }\n],\n";
    edit(&mut text);
    let digest: [u8; 32] = Sha256::digest(text.as_bytes()).into();
    let digest = digest.iter().map(|b| format!("{b:02x}")).collect::<String>();
    text + &format!("\"Manifest-Checksum\": \"{digest}\"}}\n")
}

fn judged(text: &str) -> Result<()> {
    compare(text.as_bytes(), streamed())?.check(&EXPECTED)
}

#[test]
fn both_versions_are_read() {
    for version in [1, 2] {
        judged(&manifest(version, |_| {})).unwrap();
    }
    let error = judged(&manifest(3, |_| {})).unwrap_err();
    assert!(error.message().contains("version 3"), "{error}");
}

#[test]
fn every_difference_is_named() {
    let replaced = |from: &'static str, to: &'static str| {
        let text = manifest(2, |text| *text = text.replacen(from, to, 1));
        let error = judged(&text).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
        error.to_string()
    };
    let crc = format!("{:08x}", crc32c::crc32c(b"pages").swap_bytes());
    let crc: &'static str = crc.leak();
    assert!(replaced(crc, "00000000").contains("base/5/1259 has the CRC-32C"));
    assert!(replaced("\"Size\": 5, ", "\"Size\": 6, ").contains("has 6 bytes in it, and 5"));
    assert!(replaced("base/5/empty", "base/5/other").contains("other is in it, and was not"));
    assert!(replaced("0/2000028", "0/1000028").contains("needs the WAL"));
    assert!(replaced("0/2000158", "0/3000158").contains("needs the WAL"));
    assert!(replaced("\"System-Identifier\": 7", "\"System-Identifier\": 8").contains("system 8"));
    assert!(replaced("CRC32C", "SHA256").contains("has no CRC32C"));
    assert!(replaced("\"Files\"", "\"Filed\"").contains("3 files were streamed that are not"));
}

#[test]
fn a_changed_or_cut_manifest_is_found_by_its_own_checksum() {
    let whole = manifest(2, |_| {});
    let changed = whole.replacen("02:00:00", "02:00:01", 1);
    assert!(judged(&changed).unwrap_err().message().contains("its own checksum"));
    for end in (0..whole.len() - 2).step_by(5) {
        assert_eq!(judged(&whole[..end]).unwrap_err().kind(), Kind::Corrupt, "{end}");
    }
    assert!(judged(&format!("{whole}x")).is_err());
    let endless = format!("{{ \"x\": \"{}\"", "y".repeat(LINE_BYTES_MAX));
    assert!(judged(&endless).unwrap_err().message().contains("a line without an end"));
}

#[test]
fn paths_that_are_no_text_are_decoded() {
    let text = manifest(1, |text| {
        *text = text.replacen(
            "\"Path\": \"base/5/empty\"",
            "\"Encoded-Path\": \"626173652f352f656d707479\"",
            1,
        );
    });
    judged(&text).unwrap();
}

#[test]
fn a_file_is_streamed_once() {
    let mut streamed = streamed();
    assert!(!streamed.note("base/5/1259", 5, 1));
}

#[test]
fn a_channel_is_read_to_its_end() {
    let (send, parts) = mpsc::channel(8);
    let text = manifest(2, |_| {});
    let feeding = std::thread::spawn(move || {
        for part in text.as_bytes().chunks(37) {
            send.blocking_send(Bytes::copy_from_slice(part)).unwrap();
        }
    });
    let said = compare(ChannelReader::new(parts), streamed()).unwrap();
    said.check(&EXPECTED).unwrap();
    feeding.join().unwrap();
}
