//! Reads that leave the page cache as it was: what the database had cached stays, what only the snapshot wanted goes.
//!
//! Where kernel and file system take `RWF_DONTCACHE` they see to that. Elsewhere it is looked up which pages are cached
//! before the read (mincore), and the others are dropped behind it. Where that cannot be seen, because
//! the kernel tells it only to those who may write the file, nothing is dropped.

use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Reads until `buffer` is full or the file ends; how much.
pub fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    read_all(buffer, offset, |buffer, offset| dont_cache(file, buffer, offset)).or_else(|error| {
        match refuses(&error) {
            true => read_and_drop(file, buffer, offset),
            false => Err(error),
        }
    })
}

fn read_all(
    buffer: &mut [u8],
    offset: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match read(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// `RWF_DONTCACHE` of Linux 6.14 ("include/uapi/linux/fs.h"): what the read brings into the page cache leaves it again, and
/// what was there before stays.
const DONT_CACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

fn dont_cache(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut buffers = [io::IoSliceMut::new(buffer)];
    Ok(rustix::io::preadv2(file, &mut buffers, offset, DONT_CACHE)?)
}

fn refuses(error: &io::Error) -> bool {
    let refusals = [Errno::OPNOTSUPP, Errno::INVAL, Errno::NOSYS, Errno::PERM];
    refusals.iter().any(|refusal| error.raw_os_error() == Some(refusal.raw_os_error()))
}

/// The same for kernels and file systems that have no such reads.
fn read_and_drop(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    // No reading ahead: what it brings would look like the database's. Advice may be refused.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Random);
    let range = offset..offset + buffer.len() as u64;
    let absent = absent(file, range).unwrap_or_default();
    let read = read_all(buffer, offset, |buffer, offset| file.read_at(buffer, offset))?;
    for gone in absent {
        let length = NonZeroU64::new(gone.end - gone.start);
        let _ = rustix::fs::fadvise(file, gone.start, length, Advice::DontNeed);
    }
    Ok(read)
}

/// The ranges of whole memory pages within the file that are not cached.
fn absent(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let page = page_size() as u64;
    let start = range.start / page * page;
    let end = range.end.min(file.metadata()?.len());
    if start >= end {
        return Ok(Vec::new());
    }
    let mut absent: Vec<Range<u64>> = Vec::new();
    for (at, cached) in (start..).step_by(page as usize).zip(cached(file, start, end - start)?) {
        match absent.last_mut() {
            _ if cached => {}
            Some(last) if last.end == at => last.end += page,
            _ => absent.push(at..at + page),
        }
    }
    Ok(absent)
}

/// For each memory page from `start` on, which begins one, whether it is cached. `length` is not 0.
#[allow(unsafe_code)]
fn cached(file: &File, start: u64, length: u64) -> io::Result<Vec<bool>> {
    let too_far = |_| io::Error::from(ErrorKind::InvalidInput);
    let offset = libc::off_t::try_from(start).map_err(too_far)?;
    let length = usize::try_from(length).map_err(too_far)?;
    let mut pages = vec![0u8; length.div_ceil(page_size())];
    // SAFETY: the kernel chooses the address, so no memory of ours is touched. The mapping is never read: the file may become
    // shorter meanwhile. mincore writes a byte for each page of the mapping, and `pages` has that many.
    unsafe {
        let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
        let address =
            libc::mmap(std::ptr::null_mut(), length, read, shared, file.as_raw_fd(), offset);
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let told = match libc::mincore(address, length, pages.as_mut_ptr()) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        libc::munmap(address, length);
        told?;
    }
    Ok(pages.into_iter().map(|page| page & 1 == 1).collect())
}

/// Of memory, in bytes.
#[allow(unsafe_code)]
fn page_size() -> usize {
    // SAFETY: an integer, and no memory.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("every Unix says how large its memory pages are")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 8192;
    const PAGES: u64 = 64;

    /// A file on disk of which only some pages are cached.
    fn file_with_cached(pages: Range<u64>) -> File {
        let dir = env!("CARGO_MANIFEST_DIR");
        let file = tempfile::tempfile_in(dir).unwrap();
        file.write_all_at(&vec![7; (PAGES * PAGE) as usize], 0).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap();
        let mut some = vec![0; ((pages.end - pages.start) * PAGE) as usize];
        file.read_exact_at(&mut some, pages.start * PAGE).unwrap();
        file
    }

    fn cached_pages(file: &File) -> Vec<u64> {
        let each = PAGE as usize / page_size();
        let cached = cached(file, 0, PAGES * PAGE).unwrap();
        let pages = cached.chunks(each).zip(0..);
        pages.filter(|(page, _)| page.contains(&true)).map(|(_, n)| n).collect()
    }

    #[test]
    fn what_was_cached_stays_and_what_was_not_is_gone() {
        type Read = fn(&File, &mut [u8], u64) -> io::Result<usize>;
        for read in [read_full as Read, read_and_drop as Read] {
            let file = file_with_cached(16..24);
            assert_eq!(
                cached_pages(&file),
                (16..24).collect::<Vec<u64>>(),
                "nothing can be seen here"
            );
            let mut buffer = vec![0; (PAGES * PAGE) as usize + 100];
            assert_eq!(read(&file, &mut buffer, 0).unwrap(), (PAGES * PAGE) as usize);
            assert!(buffer[..(PAGES * PAGE) as usize].iter().all(|byte| *byte == 7));
            assert_eq!(cached_pages(&file), (16..24).collect::<Vec<u64>>());
        }
    }

    #[test]
    fn what_lies_at_and_behind_the_end_is_read_as_far_as_it_goes() {
        let file = file_with_cached(0..1);
        let mut buffer = [0; 100];
        assert_eq!(read_and_drop(&file, &mut buffer, PAGES * PAGE).unwrap(), 0);
        assert_eq!(read_and_drop(&file, &mut buffer, PAGES * PAGE - 10).unwrap(), 10);
        assert!(file_with_cached(0..1).set_len(5).is_ok());
    }
}
