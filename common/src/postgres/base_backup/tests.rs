//! Backups as both grammars send them, from a scripted server.

use super::*;
use crate::postgres::wire::Wire;
use bytes::{BufMut, BytesMut};
use std::collections::HashMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.put_u32(body.len() as u32 + 4);
    bytes.extend_from_slice(body);
    bytes
}

fn columns(names: &[&str]) -> Vec<u8> {
    let mut body = BytesMut::new();
    body.put_u16(names.len() as u16);
    for name in names {
        body.put_slice(name.as_bytes());
        body.put_slice(&[0; 19]);
    }
    message(b'T', &body)
}

fn row(fields: &[Option<&str>]) -> Vec<u8> {
    let mut body = BytesMut::new();
    body.put_u16(fields.len() as u16);
    for field in fields {
        match field {
            None => body.put_i32(-1),
            Some(text) => {
                body.put_i32(text.len() as i32);
                body.put_slice(text.as_bytes());
            }
        }
    }
    message(b'D', &body)
}

fn position(lsn: &str) -> Vec<u8> {
    [columns(&["recptr", "tli"]), row(&[Some(lsn), Some("3")]), message(b'C', b"SELECT\0")].concat()
}

/// Start and archives: one tablespace, and the data directory.
fn beginning() -> Vec<u8> {
    [
        position("0/2000028"),
        columns(&["spcoid", "spclocation", "size"]),
        row(&[Some("16385"), Some("/srv/fast"), Some("7")]),
        row(&[None, None, Some("1000")]),
        message(b'C', b"SELECT\0"),
    ]
    .concat()
}

fn ending() -> Vec<u8> {
    [position("0/2000158"), message(b'C', b"BASE_BACKUP\0"), message(b'Z', b"I")].concat()
}

fn copy(data: &[&[u8]]) -> Vec<u8> {
    let data = data.iter().flat_map(|body| message(b'd', body));
    [message(b'H', &[0, 0, 0]), data.collect(), message(b'c', b"")].concat()
}

fn untagged() -> Vec<u8> {
    [beginning(), copy(&[b"space"]), copy(&[b"ba", b"se"]), copy(&[b"{}"]), ending()].concat()
}

fn tagged() -> Vec<u8> {
    let messages: [&[u8]; 9] = [
        b"n16385.tar\0/srv/fast\0",
        b"dspace",
        b"p\0\0\0\0\0\0\0\x05",
        b"nbase.tar\0\0",
        b"dba",
        b"dse",
        b"p\0\0\0\0\0\0\0\x09",
        b"m",
        b"d{}",
    ];
    [beginning(), copy(&messages), ending()].concat()
}

/// A connection to a server that takes one command, and sends `script` in parts of `cut` bytes.
async fn served(script: Vec<u8>, cut: usize, major: u32) -> Result<(BaseBackup, String)> {
    let (mut server, client) = tokio::io::duplex(1 << 16);
    let mut wire = Wire::new(Box::new(client));
    wire.trust();
    let connection = Connection::new(wire, HashMap::new(), Mode::Replication, "test".into(), false);
    let task = tokio::spawn(async move {
        let mut command = vec![0; 4096];
        let read = server.read(&mut command).await.unwrap();
        for part in script.chunks(cut) {
            server.write_all(part).await.unwrap();
            tokio::task::yield_now().await;
        }
        String::from_utf8_lossy(&command[5..read - 1]).into_owned()
    });
    let options =
        BackupOptions { label: "back's".into(), fast_checkpoint: true, max_rate: Some(10 << 20) };
    let backup = connection.base_backup(major, &options).await?;
    Ok((backup, task.await.unwrap()))
}

async fn all(backup: &mut BaseBackup) -> Result<Vec<String>> {
    let mut told = Vec::new();
    loop {
        match backup.next().await? {
            BackupMessage::Archive(n) => told.push(format!("archive {n}")),
            BackupMessage::Manifest => told.push("manifest".into()),
            BackupMessage::Data(bytes) => told.push(String::from_utf8_lossy(&bytes).into_owned()),
            BackupMessage::End { stop, timeline } => {
                told.push(format!("end {stop} {}", timeline.get()));
                return Ok(told);
            }
        }
    }
}

#[tokio::test]
async fn both_grammars_tell_the_same() {
    for (script, major) in [(untagged(), 14), (tagged(), 15), (tagged(), 18)] {
        for cut in [1, 7, 1000] {
            let (mut backup, _) = served(script.clone(), cut, major).await.unwrap();
            assert_eq!(backup.start_lsn(), "0/2000028".parse().unwrap());
            assert_eq!(backup.timeline().get(), 3);
            let tablespace = Some((16385, "/srv/fast".to_string()));
            let expected = [
                BackupArchive { tablespace, bytes: 7 << 10 },
                BackupArchive { tablespace: None, bytes: 1000 << 10 },
            ];
            assert_eq!(backup.archives(), expected);
            let told = all(&mut backup).await.unwrap();
            let (archive, end) = (["archive 0", "archive 1"], "end 0/2000158 3");
            let expected = [archive[0], "space", archive[1], "ba", "se", "manifest", "{}", end];
            assert_eq!(told, expected, "{major}");
            assert_eq!(all(&mut backup).await.unwrap(), [end]);
        }
    }
}

#[tokio::test]
async fn each_major_is_asked_in_its_own_grammar() {
    let (_, command) = served(untagged(), 1000, 14).await.unwrap();
    assert_eq!(
        command,
        "BASE_BACKUP LABEL 'back''s' PROGRESS FAST NOWAIT MAX_RATE 10240 TABLESPACE_MAP \
         NOVERIFY_CHECKSUMS MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
    );
    let (_, command) = served(tagged(), 1000, 16).await.unwrap();
    assert_eq!(
        command,
        "BASE_BACKUP (LABEL 'back''s', PROGRESS, CHECKPOINT 'fast', WAIT false, MAX_RATE 10240, \
         TABLESPACE_MAP, VERIFY_CHECKSUMS false, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C')"
    );
}

#[test]
fn a_rate_is_held_to_what_the_server_takes() {
    let rate = |max_rate| {
        let options = BackupOptions { label: "x".into(), fast_checkpoint: false, max_rate };
        command(15, &options)
    };
    assert!(rate(Some(1)).contains("MAX_RATE 32,"));
    assert!(rate(Some(u64::MAX)).contains("MAX_RATE 1048576,"));
    assert!(!rate(None).contains("MAX_RATE"));
}

/// What comes of a script that has no good end.
async fn failure(script: Vec<u8>, major: u32) -> String {
    let served = served(script, 1000, major).await;
    let error = match served {
        Err(error) => error,
        Ok((mut backup, _)) => {
            let error = all(&mut backup).await.unwrap_err();
            assert_eq!(backup.next().await.unwrap_err().kind(), Kind::Bug, "nothing follows");
            error
        }
    };
    error.to_string()
}

#[tokio::test]
async fn whatever_is_cut_short_is_an_error() {
    for (script, major) in [(untagged(), 14), (tagged(), 15)] {
        for end in (0..script.len()).step_by(3) {
            failure(script[..end].to_vec(), major).await;
        }
    }
    let no_manifest = [beginning(), copy(&[b"space"]), copy(&[b"base"]), ending()].concat();
    assert!(failure(no_manifest, 14).await.contains("before all of it was sent"));
    let no_base = [beginning(), copy(&[b"n1.tar\0\0", b"dx"]), ending()].concat();
    assert!(failure(no_base, 15).await.contains("before all of it was sent"));
}

#[tokio::test]
async fn what_the_server_says_is_passed_on() {
    let error = message(b'E', b"SERROR\0C58P01\0Mcould not open file\0\0");
    let during = [beginning(), message(b'H', &[0, 0, 0]), error.clone()].concat();
    assert!(failure(during, 15).await.contains("could not open file"));
    let between = [beginning(), copy(&[b"space"]), error.clone(), message(b'Z', b"I")].concat();
    assert!(failure(between, 14).await.contains("could not open file"));
    let fatal = [beginning(), copy(&[b"space"]), error.clone()].concat();
    assert!(failure(fatal, 14).await.contains("could not open file"), "and the connection is gone");
    assert!(failure(error, 15).await.contains("could not open file"));
}

#[tokio::test]
async fn what_no_server_sends_is_refused() {
    let huge = [b"d\x00\x20\x00\x00".to_vec(), vec![0; 1000]].concat();
    let huge = [beginning(), message(b'H', &[0, 0, 0]), huge].concat();
    assert!(failure(huge, 14).await.contains("more than"), "a length is refused from its header");
    for wrong in [&b"dearly"[..], b"m", b"", b"x"] {
        let script = [beginning(), copy(&[wrong]), ending()].concat();
        failure(script, 15).await;
    }
    let more = [beginning(), copy(&[b"1"]), copy(&[b"2"]), copy(&[b"3"]), copy(&[b"4"])].concat();
    assert!(failure(more, 14).await.contains("unexpected message"));
    let list = [position("0/2000028"), columns(&["spcoid", "spclocation", "size"])].concat();
    let no_base = [list, message(b'C', b"SELECT\0")].concat();
    assert!(failure(no_base, 15).await.contains("without the data directory"));
}
