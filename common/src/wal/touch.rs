//! What a record does to relations' files: which blocks it changes, which files it makes or cuts.
//!
//! It is read only where somebody asks ([`super::Decoder::watching_touches`]): a page that was torn while it was read is
//! mended by replay if, and only if, a record of the backup's WAL touches it.

use super::record::{self, RecordHeader};
use super::u32_at;
use super::version::WalVersion;

/// Body bytes that hold the headers of all 33 blocks that a record may have, and the main data of the kinds below.
pub(super) const KEPT_BYTES: usize = 1024;

const RM_SMGR: u8 = 2;
const RM_DATABASE: u8 = 4;

/// A relation's files, as WAL names them (`RelFileLocator`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelationFiles {
    pub tablespace: u32,
    /// 0 for relations that all databases share.
    pub database: u32,
    pub relation: u32,
}

/// What a record touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    Block {
        files: RelationFiles,
        /// 0 main, 1 free space, 2 visibility, 3 init.
        fork: u8,
        block: u32,
    },
    /// Its files are made, or cut.
    Relation(RelationFiles),
    /// All of its files are made, by copying another database's.
    Database { tablespace: u32, database: u32 },
}

/// Reads what a record touches. `kept` is the beginning of its body, of `body_bytes` in all.
pub(super) fn read(
    version: WalVersion,
    header: &RecordHeader,
    kept: &[u8],
    body_bytes: usize,
) -> Result<Vec<Touch>, &'static str> {
    let mut touches = Vec::new();
    let main = record::parts(version, kept, body_bytes, &mut |files, fork, block| {
        touches.push(Touch::Block { files, fork, block });
    })?;
    let word = |at| u32_at(main, at).ok_or("it is shorter than its kind");
    let relation = |at| -> Result<Touch, &'static str> {
        let (tablespace, database, relation) = (word(at)?, word(at + 4)?, word(at + 8)?);
        Ok(Touch::Relation(RelationFiles { tablespace, database, relation }))
    };
    match (header.manager, header.info & record::OPCODE) {
        // xl_smgr_create, xl_smgr_truncate ("src/include/catalog/storage_xlog.h")
        (RM_SMGR, 0x10) => touches.push(relation(0)?),
        (RM_SMGR, 0x20) => touches.push(relation(4)?),
        // xl_dbase_create_rec and its two successors ("src/include/commands/dbcommands_xlog.h"); 0x10 is a drop in 14.
        (RM_DATABASE, 0x00) => touches.push(database(word(0)?, word(4)?)),
        (RM_DATABASE, 0x10) if version.major() >= 15 => touches.push(database(word(0)?, word(4)?)),
        _ => {}
    }
    Ok(touches)
}

fn database(database: u32, tablespace: u32) -> Touch {
    Touch::Database { tablespace, database }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SystemId;
    use crate::lsn::Lsn;
    use crate::segment::{SegmentSize, TimelineId};
    use crate::wal::testing::WalBuilder;
    use crate::wal::{Decoder, EventKind};

    const MIB: u64 = 1 << 20;
    const FILES: RelationFiles = RelationFiles { tablespace: 1663, database: 5, relation: 16384 };

    fn version(major: u32) -> WalVersion {
        WalVersion::from_major(major).unwrap()
    }

    fn wal(major: u32) -> WalBuilder {
        let segments = SegmentSize::new(1 << 20).unwrap();
        let timeline = TimelineId::new(1).unwrap();
        WalBuilder::new(version(major), segments, SystemId::new(7), timeline, Lsn::new(3 * MIB))
    }

    /// However the bytes are cut.
    fn touches(major: u32, wal: &WalBuilder, cut: usize) -> Vec<Vec<Touch>> {
        let segments = SegmentSize::new(1 << 20).unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let decoder =
            Decoder::new(version(major), segments, SystemId::new(7), timeline, wal.start());
        let (mut decoder, mut found) = (decoder.watching_touches(), Vec::new());
        for part in wal.bytes().chunks(cut) {
            let fed = decoder.feed(part, &mut |event| {
                if let EventKind::Touches(touches) = event.kind {
                    found.push(touches);
                }
            });
            fed.unwrap();
        }
        found
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Two blocks of one relation, the first with an image of `image` bytes; then 3 bytes of main data.
    fn two_blocks(image: usize) -> Vec<u8> {
        let mut body = vec![0, 0x10, 0, 0];
        body.extend_from_slice(&(image as u16).to_le_bytes());
        body.extend_from_slice(&[0, 0, 0]);
        body.extend_from_slice(&words(&[1663, 5, 16384, 77]));
        body.extend_from_slice(&[1, 0x80 | 0x20 | 2, 4, 0]);
        body.extend_from_slice(&words(&[3]));
        body.extend_from_slice(&[255, 3]);
        body.resize(body.len() + image + 4 + 3, 0xAA);
        body
    }

    #[test]
    fn blocks_are_named_in_short_and_long_records() {
        for image in [0, 100, 8192, 60_000] {
            let mut wal = wal(15);
            wal.record_body(10, 0x20, 1, &two_blocks(image));
            wal.record_body(0, 0xB0, 0, &two_blocks(image));
            wal.commit(1, 5);
            let block = |fork, block| Touch::Block { files: FILES, fork, block };
            let expected = vec![block(0, 77), block(2, 3)];
            for cut in [1, 100, 1 << 20] {
                assert_eq!(touches(15, &wal, cut), [expected.clone(), expected.clone()]);
            }
        }
    }

    #[test]
    fn files_that_are_made_or_cut_are_named() {
        for major in 14..=18 {
            let mut wal = wal(major);
            wal.record(RM_SMGR, 0x10, 1, &words(&[1663, 5, 16384, 0]));
            wal.record(RM_SMGR, 0x20, 1, &words(&[12, 1663, 5, 16384, 7]));
            wal.record(RM_DATABASE, 0x00, 1, &words(&[6, 1663, 1, 1663]));
            wal.record(RM_DATABASE, 0x10, 1, &words(&[6, 1663]));
            let made = vec![Touch::Database { tablespace: 1663, database: 6 }];
            let relation = vec![Touch::Relation(FILES)];
            let mut expected = vec![relation.clone(), relation, made.clone(), made];
            // What makes a database in later majors dropped one in 14.
            expected.truncate(if major == 14 { 3 } else { 4 });
            assert_eq!(touches(major, &wal, 1 << 20), expected, "{major}");
        }
    }

    #[test]
    fn who_does_not_ask_is_not_told() {
        let mut wal = wal(15);
        wal.record_body(10, 0x20, 1, &two_blocks(50));
        let segments = SegmentSize::new(1 << 20).unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let mut decoder =
            Decoder::new(version(15), segments, SystemId::new(7), timeline, wal.start());
        decoder.feed(wal.bytes(), &mut |event| panic!("{event:?}")).unwrap();
    }

    #[test]
    fn a_record_of_nonsense_is_an_error() {
        let mut wal = wal(15);
        wal.record(RM_SMGR, 0x10, 1, &words(&[1663, 5]));
        let segments = SegmentSize::new(1 << 20).unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let decoder = Decoder::new(version(15), segments, SystemId::new(7), timeline, wal.start());
        assert!(decoder.watching_touches().feed(wal.bytes(), &mut |_| {}).is_err());
    }
}
