//! One file on its way to the disk.
//!
//! What always holds: a file has its own name, owner, mode and final size before the first byte of it is written; one that is made
//! new reads as zeros until then, one that was there keeps its pages. Nothing is written through a symbolic link. Large
//! parts bypass the page cache: the disk works from the first frame on, and what the host has cached stays. Nothing is on
//! disk for sure before the file system is synced.

use crate::owner::{Owner, is_root};
use backstay_common::{Context, Result};
use rustix::fs::{FallocateFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;

/// What direct I/O asks of addresses, offsets and lengths, on any disk.
const DIRECT_ALIGNMENT: usize = 4096;
/// Smaller parts go through the page cache, which gathers them.
const DIRECT_BYTES_MIN: usize = 64 << 10;

/// Where bytes go.
#[derive(Debug)]
pub struct Target {
    pub path: PathBuf,
    /// Unix permission bits.
    mode: u32,
    /// Bytes.
    size: u64,
    owner: Owner,
    /// True if it is there, and some of it is right.
    is_there: bool,
    is_made: Mutex<bool>,
}

impl Target {
    /// A file that is made new.
    pub fn new(path: PathBuf, mode: u32, size: u64, owner: Owner) -> Target {
        let mode = mode & 0o777;
        Target { path, mode, size, owner, is_there: false, is_made: Mutex::new(false) }
    }

    /// A file that is there, of which some pages are to be kept.
    pub fn existing(path: PathBuf, mode: u32, size: u64, owner: Owner) -> Target {
        Target { is_there: true, ..Target::new(path, mode, size, owner) }
    }

    /// Makes the file, once, or gives the one that is there its size and attributes. Where none is expected, one that is there
    /// is an error.
    pub fn make(&self) -> Result<()> {
        let mut is_made = self.is_made.lock().expect("no panic while held");
        if !*is_made {
            match self.is_there {
                true => self.adopt().context(self.doing("change"))?,
                false => self.make_new().context(self.doing("make"))?,
            }
            *is_made = true;
        }
        Ok(())
    }

    fn adopt(&self) -> std::io::Result<()> {
        let file = self.open(OFlags::empty())?;
        self.attribute(&file)?;
        file.set_len(self.size)
    }

    fn make_new(&self) -> std::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::open(&self.path, flags, Mode::RUSR | Mode::WUSR)?;
        self.attribute(&file)?;
        if self.size > 0 {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, self.size) {
                // Not every file system can; then the file is sparse until it is written.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    rustix::fs::ftruncate(&file, self.size)?;
                }
                result => result?,
            }
        }
        Ok(())
    }

    fn attribute(&self, file: impl AsFd) -> std::io::Result<()> {
        rustix::fs::fchmod(&file, Mode::from_raw_mode(self.mode))?;
        if is_root() {
            let (uid, gid) = (Uid::from_raw(self.owner.uid), Gid::from_raw(self.owner.gid));
            rustix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        Ok(())
    }

    /// A handle for parts that follow each other.
    pub fn pen(&self) -> Pen<'_> {
        Pen { target: self, file: None }
    }

    /// False if this file system or this disk wants it through the page cache.
    fn write_direct(&self, bytes: &[u8], offset: u64) -> std::io::Result<bool> {
        let is_refused = |error: &std::io::Error| error.kind() == std::io::ErrorKind::InvalidInput;
        match self.open(OFlags::DIRECT).and_then(|file| file.write_all_at(bytes, offset)) {
            Ok(()) => Ok(true),
            Err(error) if is_refused(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn open(&self, more: OFlags) -> std::io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
        Ok(File::from(rustix::fs::open(&self.path, flags, Mode::empty())?))
    }

    fn doing(&self, what: &'static str) -> String {
        format!("{what} {}", self.path.display())
    }
}

/// Writes parts of one file. What goes through the page cache shares one handle.
#[derive(Debug)]
pub struct Pen<'a> {
    pub target: &'a Target,
    file: Option<File>,
}

impl Pen<'_> {
    /// Writes `bytes` at `offset`. Blocks.
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let target = self.target;
        target.make()?;
        if !target.is_there && is_zero(bytes) {
            return Ok(());
        }
        let doing = || target.doing("write");
        if is_direct(bytes, offset) && target.write_direct(bytes, offset).context(doing())? {
            return Ok(());
        }
        let file = match self.file.take() {
            Some(file) => file,
            None => target.open(OFlags::empty()).context(doing())?,
        };
        self.file.insert(file).write_all_at(bytes, offset).context(doing())
    }
}

fn is_direct(bytes: &[u8], offset: u64) -> bool {
    let is_aligned = |n: usize| n.is_multiple_of(DIRECT_ALIGNMENT);
    bytes.len() >= DIRECT_BYTES_MIN
        && is_aligned(bytes.len())
        && is_aligned(bytes.as_ptr().addr())
        && offset.is_multiple_of(DIRECT_ALIGNMENT as u64)
}

fn is_zero(bytes: &[u8]) -> bool {
    // Most pages differ from zero in their first bytes; a chunk at a time is compared as fast as memory is.
    static ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|chunk| *chunk == ZEROS[..chunk.len()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    /// Bytes at an address that direct I/O takes.
    fn aligned(bytes: usize, room: &mut Vec<u8>) -> &mut [u8] {
        *room = vec![7; bytes + DIRECT_ALIGNMENT];
        let start = room.as_ptr().align_offset(DIRECT_ALIGNMENT);
        &mut room[start..start + bytes]
    }

    #[test]
    fn whatever_way_the_parts_go_the_file_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (page, big) = (8192, 128 * 1024);
        let size = 2 * big + page + 100;
        let path = folder.path().join("file");
        let target = Target::new(path.clone(), 0o640, size as u64, Owner::of_process());
        let mut room = Vec::new();
        let bytes = aligned(size, &mut room);
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = (at / 100) as u8;
        }
        bytes[big..2 * big].fill(0);
        assert!(is_direct(&bytes[..big], 0) && !is_direct(&bytes[1..], 0));
        assert!(!is_direct(&bytes[..page], 0) && !is_direct(&bytes[..big], 512));
        // The last first, and the middle not aligned in memory.
        target.pen().write(&bytes[2 * big..], 2 * big as u64).unwrap();
        target.pen().write(&bytes[big - page..2 * big], (big - page) as u64).unwrap();
        target.pen().write(&bytes[..big], 0).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn zeros_are_not_written_and_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let target = Target::new(path.clone(), 0o600, 1 << 20, Owner::of_process());
        target.pen().write(&vec![0; 1 << 20], 0).unwrap();
        assert!(std::fs::read(&path).unwrap() == vec![0; 1 << 20]);
        assert!(std::fs::metadata(&path).unwrap().size() == 1 << 20);
    }

    #[test]
    fn nothing_is_written_over_and_no_link_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let precious = folder.path().join("precious");
        std::fs::write(&precious, b"precious").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        for path in [precious.clone(), link] {
            let target = Target::new(path, 0o600, 4, Owner::of_process());
            assert!(target.pen().write(b"evil", 0).is_err());
        }
        assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
    }
}
