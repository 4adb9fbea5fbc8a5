//! The file table in the making: entries in any order, then parts in the order of paths.
//!
//! Entries are kept encoded, some 200 bytes each. A part ends where the hash of a path says so, or when it is full: so a
//! change in one part leaves the others as they were, and the next snapshot refers to them.

use backstay_common::cbor;
use backstay_common::seal::FRAME_BYTES_MAX;
use backstay_common::snapshot::FileEntry;
use std::cmp::Ordering;

/// Encoded bytes at which a part is closed in any case; the last entry still fits into the frame.
const PART_BYTES_MAX: usize = FRAME_BYTES_MAX - (64 << 10);
/// One path in so many ends a part.
const PART_FILES: u64 = 1024;

/// All entries so far.
#[derive(Debug, Default)]
pub struct Entries(Vec<(Box<str>, Box<[u8]>)>);

impl Entries {
    pub fn add(&mut self, entry: &FileEntry) {
        self.0.push((entry.path.as_str().into(), cbor::encode(entry).into()));
    }

    /// Folders and files.
    pub fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// The encoded parts, a folder before what is in it.
    pub fn into_parts(mut self) -> impl Iterator<Item = Vec<u8>> {
        self.0.sort_unstable_by(|a, b| by_path(&a.0, &b.0));
        let mut rest = self.0.into_iter().peekable();
        std::iter::from_fn(move || {
            rest.peek()?;
            let (mut entries, mut bytes) = (Vec::new(), 0);
            for (path, entry) in rest.by_ref() {
                bytes += entry.len();
                entries.push(entry);
                if bytes >= PART_BYTES_MAX || ends_part(&path) {
                    break;
                }
            }
            Some(encode(&entries))
        })
    }
}

/// In the order of the names' bytes, folder by folder.
fn by_path(a: &str, b: &str) -> Ordering {
    a.split('/').cmp(b.split('/'))
}

fn ends_part(path: &str) -> bool {
    let hash = blake3::hash(path.as_bytes());
    let low: [u8; 8] = hash.as_bytes()[..8].try_into().expect("8 bytes");
    u64::from_le_bytes(low).is_multiple_of(PART_FILES)
}

/// A [`backstay_common::snapshot::TablePart`] of entries that are encoded already.
fn encode(entries: &[Box<[u8]>]) -> Vec<u8> {
    let mut encoder = minicbor::Encoder::new(Vec::new());
    let begun = encoder.map(1).and_then(|e| e.u8(0)).and_then(|e| e.array(entries.len() as u64));
    begun.expect("writing to memory cannot fail");
    let mut part = encoder.into_writer();
    entries.iter().for_each(|entry| part.extend_from_slice(entry));
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::snapshot::{Content, FileKind, TablePart};

    fn entry(path: &str, size: u64) -> FileEntry {
        let (path, kind) = (path.to_string(), FileKind::File);
        FileEntry { path, kind, mode: 0o600, size, digest: Some([7; 32]), content: Content::Empty }
    }

    fn parts(paths: &[String], size_of_first: u64) -> Vec<Vec<u8>> {
        let mut entries = Entries::default();
        for (n, path) in paths.iter().enumerate().rev() {
            entries.add(&entry(path, if n == 0 { size_of_first } else { 1 }));
        }
        entries.into_parts().collect()
    }

    #[test]
    fn a_folder_comes_before_what_is_in_it_and_before_its_longer_siblings() {
        let paths = ["base", "base/1", "base/1/2", "base/10", "base-x"].map(String::from);
        let part = parts(&paths, 1).concat();
        let part: TablePart = cbor::decode(&part).unwrap();
        let listed: Vec<&str> = part.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(listed, paths);
        assert_eq!(cbor::encode(&part), parts(&paths, 1)[0], "as if encoded whole");
    }

    #[test]
    fn a_change_in_one_part_leaves_the_others() {
        let paths: Vec<String> = (0..20_000).map(|n| format!("base/5/{n:05}")).collect();
        let (before, after) = (parts(&paths, 1), parts(&paths, 2));
        assert!(before.len() > 5 && before.iter().all(|part| part.len() <= FRAME_BYTES_MAX));
        assert_ne!(before[0], after[0]);
        assert_eq!(before[1..], after[1..]);
        let fewer = parts(&paths[1..], 1);
        assert_eq!(before[1..], fewer[1..]);
    }
}
