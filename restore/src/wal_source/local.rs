//! The `pg_wal` folder of the damaged server: WAL that no location has.
//!
//! Its segment files are recycled, so behind the valid WAL there is old WAL: nothing here is taken for granted until the
//! decoder has followed it from stored WAL on (see `resolve::extend`).

use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::segment::SegmentSize;
use backstay_common::{Context, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Segment files of one branch in a local folder.
#[derive(Clone, Debug)]
pub struct LocalWal {
    pub folder: PathBuf,
    pub branch: Branch,
    pub segment_size: SegmentSize,
}

impl LocalWal {
    pub fn new(folder: &Path, branch: Branch, segment_size: SegmentSize) -> LocalWal {
        LocalWal { folder: folder.to_path_buf(), branch, segment_size }
    }

    /// The bytes of `range`; `None` if a file is missing or short.
    pub fn read(&self, range: LsnRange) -> Result<Option<Vec<u8>>> {
        let mut wal = vec![0; range.len() as usize];
        let mut at = range.start;
        while at < range.end {
            let segment = self.segment_size.start_of(at);
            let end = segment.add(self.segment_size.bytes()).min(range.end);
            let (from, to) = (at.since(range.start) as usize, end.since(range.start) as usize);
            if !self.read_segment(at, &mut wal[from..to])? {
                return Ok(None);
            }
            at = end;
        }
        Ok(Some(wal))
    }

    /// Fills `out` from `at` on, within one segment. False if the file is not there or ends before.
    fn read_segment(&self, at: Lsn, out: &mut [u8]) -> Result<bool> {
        let number = self.segment_size.number(at);
        let name = self.segment_size.file_name(self.branch.timeline, number);
        let path = self.folder.join(name);
        let partial = path.with_extension("partial");
        let file = match File::open(&path).or_else(|_| File::open(&partial)) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).context(format!("open {}", path.display())),
        };
        match file.read_exact_at(out, at.since(self.segment_size.start(number))) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error).context(format!("read {}", path.display())),
        }
    }
}
