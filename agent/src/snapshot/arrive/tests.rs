//! Small backups, sorted.

use super::super::tar::tests::TarBuilder;
use super::*;

/// Says what it is given.
#[derive(Debug, Default)]
struct Told {
    lines: Vec<String>,
    bytes: Vec<u8>,
}

impl Sink for Told {
    fn folder(&mut self, path: &str, mode: u32) -> Result<()> {
        self.lines.push(format!("{path}/ {mode:o}"));
        Ok(())
    }

    fn file(&mut self, path: &str, mode: u32, size: u64, segment: Option<u32>) -> Result<()> {
        self.lines.push(format!("{path} {mode:o} {size} {segment:?}"));
        self.bytes.clear();
        Ok(())
    }

    fn bytes(&mut self, bytes: &Bytes) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn file_end(&mut self) -> Result<()> {
        let text = String::from_utf8_lossy(&self.bytes);
        self.lines.last_mut().expect("a file").push_str(&format!(" {text:?}"));
        Ok(())
    }

    fn finish(self) -> Result<()> {
        Ok(())
    }
}

fn origin(tablespaces: &[u32]) -> Origin {
    let space =
        |oid: &u32| BackupArchive { tablespace: Some((*oid, format!("/srv/{oid}"))), bytes: 0 };
    let base = BackupArchive { tablespace: None, bytes: 0 };
    let archives = tablespaces.iter().map(space).chain([base]).collect();
    let foreign = vec!["backstay".to_string()];
    Origin { archives, major: 17, folder_mode: 0o750, foreign }
}

fn base() -> TarBuilder {
    TarBuilder::default()
        .file("backup_label", b"START WAL LOCATION")
        .file("tablespace_map", b"16385 /srv/fast")
        .folder("pg_wal")
        .folder("./pg_wal/archive_status")
        .folder("./pg_wal/summaries")
        .folder("base")
        .folder("base/5")
        .file("base/5/16384", b"heap")
        .file("base/5/16384.2", b"more")
        .file("base/5/16384_vm", b"")
        .file("base/5/t3_16390", b"temporary")
        .file("base/5/PG_VERSION", b"17")
        .folder("pg_tblspc")
        .folder("pg_stat_tmp")
        .file("pg_stat_tmp/global.stat", b"volatile")
        .file("current_logfiles", b"log")
        .folder("backstay")
        .file("backstay/spool", b"ours")
        .file("backstay_too", b"theirs")
        .file("global/pg_control", b"control")
}

fn sorted(origin: Origin, archives: &[TarBuilder]) -> Result<(Vec<String>, Kept)> {
    let (mut arrivals, mut told) = (Arrivals::new(origin), Told::default());
    for (number, tar) in archives.iter().enumerate() {
        arrivals.archive(number, &mut told)?;
        for part in tar.0.chunks(300) {
            arrivals.data(Bytes::copy_from_slice(part), &mut told)?;
        }
    }
    Ok((told.lines, arrivals.finish()?))
}

const BASE: [&str; 13] = [
    "pg_wal/ 700",
    "pg_wal/archive_status/ 700",
    "pg_wal/summaries/ 700",
    "base/ 700",
    "base/5/ 700",
    "base/5/16384 600 4 Some(0) \"heap\"",
    "base/5/16384.2 600 4 Some(2) \"more\"",
    "base/5/16384_vm 600 0 Some(0) \"\"",
    "base/5/PG_VERSION 600 2 None \"17\"",
    "pg_tblspc/ 700",
    "pg_stat_tmp/ 700",
    "backstay_too 600 6 None \"theirs\"",
    "",
];

#[test]
fn what_belongs_into_a_snapshot_is_passed_on() {
    let (lines, kept) = sorted(origin(&[]), &[base()]).unwrap();
    assert_eq!(lines, BASE[..12]);
    assert_eq!((&kept.label[..], &kept.control[..]), (&b"START WAL LOCATION"[..], &b"control"[..]));
    assert_eq!(kept.control_mode, 0o600);
    let mut streamed = kept.streamed;
    for (path, content) in [("pg_stat_tmp/global.stat", &b"volatile"[..]), ("tablespace_map", b"x")]
    {
        let is_new = streamed.note(path, content.len() as u64, crc32c::crc32c(content));
        assert!(!is_new, "{path} was left out, and counts for the manifest all the same");
    }
}

#[test]
fn tablespaces_come_first_and_keep_their_place() {
    let space = TarBuilder::default()
        .folder("PG_17_202406281")
        .folder("PG_17_202406281/5")
        .file("PG_17_202406281/5/16500", b"far")
        .ended();
    let (lines, _) = sorted(origin(&[16385]), &[space, base().ended()]).unwrap();
    let first = [
        "pg_tblspc/ 750",
        "pg_tblspc/16385/ 750",
        "pg_tblspc/16385/PG_17_202406281/ 700",
        "pg_tblspc/16385/PG_17_202406281/5/ 700",
        "pg_tblspc/16385/PG_17_202406281/5/16500 600 3 Some(0) \"far\"",
    ];
    assert_eq!(lines[..5], first);
    let rest: Vec<&str> =
        BASE[..12].iter().copied().filter(|line| *line != "pg_tblspc/ 700").collect();
    assert_eq!(lines[5..], rest);
}

#[test]
fn what_cannot_be_a_data_directory_is_refused() {
    let refused = |tar: TarBuilder| sorted(origin(&[]), &[tar]).unwrap_err().to_string();
    assert!(refused(base().file("../etc/passwd", b"x")).contains("unsafe path"));
    assert!(refused(base().file("/etc/passwd", b"x")).contains("unsafe path"));
    assert!(refused(base().file("base/5/16384", b"x")).contains("is in it twice"));
    assert!(refused(TarBuilder::default()).contains("no backup_label"));
    let label = TarBuilder::default().file("backup_label", b"x");
    assert!(refused(label).contains("no global/pg_control"));
    let long = TarBuilder::default().file("backup_label", &[b'x'; 70_000]);
    assert!(refused(long).contains("70000 bytes"));
    let mut cut = base();
    cut.0.truncate(1500);
    assert!(refused(cut).contains("ends in the middle"));
}
