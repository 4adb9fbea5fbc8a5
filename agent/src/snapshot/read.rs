//! Readers: threads that turn jobs into frames. Positional reads, page checksums, page hashes, zstd.
//!
//! A file is read up to the size that it had when it was found. Pages that are appended later, or
//! changed while they are read, come right in replay: PostgreSQL logs them whole while the backup runs. A file that
//! became shorter ends where it ends now, and one that vanished is left out: the log says why.

use super::assemble::{Doubt, Message, Packed, Part};
use super::cut::{Job, Run, SmallFile};
use super::progress::Meter;
use super::walk::unreadable;
use backstay_common::lsn::Lsn;
use backstay_common::page::{self, PageState};
use backstay_common::seal::{FRAME_BYTES_MAX, Frame, Packer};
use backstay_common::snapshot::{FrameUse, page_hash};
use backstay_common::{Context, Error, Result};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

/// How often a page with a wrong checksum is read again before it is called damaged.
const READS_AGAIN_MAX: u32 = 5;
const READ_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// What readers need to know.
#[derive(Clone, Debug)]
pub struct Reading {
    pub page_bytes: u32,
    /// Pages in one segment of a relation.
    pub segment_pages: u32,
    pub checksums: bool,
    /// Where the backup's WAL starts.
    pub start: Lsn,
    pub hash_key: [u8; 32],
    /// zstd's.
    pub level: i32,
}

/// One reader.
#[derive(Debug)]
pub struct Reader {
    reading: Arc<Reading>,
    meter: Arc<Meter>,
    packer: Packer,
    buffer: Vec<u8>,
}

impl Reader {
    pub fn new(reading: Arc<Reading>, meter: Arc<Meter>) -> Result<Reader> {
        let packer = Packer::new(reading.level)?;
        Ok(Reader { reading, meter, packer, buffer: vec![0; FRAME_BYTES_MAX] })
    }

    /// Works until there are no more jobs, or nobody wants what becomes of them. Blocks.
    pub fn work(mut self, jobs: &Mutex<Receiver<Job>>, messages: &mpsc::Sender<Message>) {
        loop {
            let job = jobs.lock().expect("no panic while held").recv();
            let Ok(job) = job else { return };
            let message = match self.job(job) {
                Ok(packed) => Message::Packed(packed),
                Err(error) => Message::Failed(error),
            };
            let failed = matches!(message, Message::Failed(_));
            if messages.blocking_send(message).is_err() || failed {
                return;
            }
        }
    }

    fn job(&mut self, job: Job) -> Result<Packed> {
        match job {
            Job::Run(run) => self.run(&run),
            Job::Bundle(files) => self.bundle(&files),
        }
    }

    fn run(&mut self, run: &Run) -> Result<Packed> {
        let doing = || format!("read {}", run.file.path);
        let plain = &mut self.buffer[..run.bytes];
        let bytes = read_full(&run.file.handle, plain, run.offset).context(doing())?;
        let plain = &mut plain[..bytes];
        let pages = Pages { file: &run.file.handle, offset: run.offset, segment: run.file.segment };
        let doubts = self.reading.judge(plain, &pages).context(doing())?;
        let part = Part {
            file: run.file.number,
            part: run.part,
            at: 0,
            bytes: bytes as u32,
            whole: bytes == run.bytes,
            doubts,
        };
        self.meter.read(run.bytes as u64);
        self.pack(FrameUse::Image, bytes, vec![part], Vec::new())
    }

    fn bundle(&mut self, files: &[SmallFile]) -> Result<Packed> {
        let (mut at, mut parts, mut vanished) = (0, Vec::with_capacity(files.len()), Vec::new());
        for file in files {
            let part = self.small(file, at).map_err(|e| e.context("read a small file"))?;
            match part {
                Some(part) => {
                    at += part.bytes as usize;
                    parts.push(part);
                }
                None => vanished.push(file.number),
            }
            self.meter.read(file.bytes as u64);
        }
        self.pack(FrameUse::Small, at, parts, vanished)
    }

    /// Reads a file to `at` in the buffer; none if it has vanished.
    fn small(&mut self, small: &SmallFile, at: usize) -> Result<Option<Part>> {
        let plain = &mut self.buffer[at..at + small.bytes];
        let file = match File::open(&small.source) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(unreadable(&small.source, e)),
        };
        let fault = |e: io::Error| unreadable(&small.source, e);
        let bytes = read_full(&file, plain, 0).map_err(fault)?;
        let pages = Pages { file: &file, offset: 0, segment: small.segment };
        let doubts = self.reading.judge(&mut plain[..bytes], &pages).map_err(fault)?;
        let whole = bytes == small.bytes;
        Ok(Some(Part {
            file: small.number,
            part: 0,
            at: at as u32,
            bytes: bytes as u32,
            whole,
            doubts,
        }))
    }

    /// Hashes and compresses the first `bytes` of the buffer, in which the parts lie one behind the other.
    fn pack(
        &mut self,
        usage: FrameUse,
        bytes: usize,
        parts: Vec<Part>,
        vanished: Vec<u64>,
    ) -> Result<Packed> {
        let plain = &self.buffer[..bytes];
        let mut hashes =
            Vec::with_capacity((bytes / self.reading.page_bytes as usize + parts.len()) * 8);
        for part in &parts {
            let file = &plain[part.at as usize..][..part.bytes as usize];
            self.reading.hash(file, &mut hashes);
        }
        let frame = match bytes {
            0 => None,
            _ => Some(tight(Frame::pack(&mut self.packer, plain)?)),
        };
        Ok(Packed { usage, frame, hashes, parts, vanished })
    }
}

/// A file's bytes as one frame, for what is not read by a job.
pub fn pack_whole(reading: &Reading, plain: &[u8]) -> Result<(Frame, Vec<u8>)> {
    let mut hashes = Vec::new();
    reading.hash(plain, &mut hashes);
    Ok((tight(Frame::pack(&mut Packer::new(reading.level)?, plain)?), hashes))
}

/// The compressor reserves for the worst case, which frames that wait in a pack would hold on to.
fn tight(mut frame: Frame) -> Frame {
    frame.bytes.shrink_to_fit();
    frame
}

/// Where the pages in a buffer come from.
struct Pages<'a> {
    file: &'a File,
    /// Of the first, in the file.
    offset: u64,
    /// For a relation: which segment of the fork the file is.
    segment: Option<u32>,
}

impl Reading {
    fn hash(&self, file: &[u8], hashes: &mut Vec<u8>) {
        for page in file.chunks(self.page_bytes as usize) {
            hashes.extend_from_slice(&page_hash(&self.hash_key, page));
        }
    }

    /// Checks the checksums of a relation's pages, and reads again those that are wrong. What stays wrong is kept and
    /// reported.
    fn judge(&self, plain: &mut [u8], pages: &Pages<'_>) -> io::Result<Vec<Doubt>> {
        let (true, Some(segment)) = (self.checksums, pages.segment) else { return Ok(Vec::new()) };
        let page_bytes = self.page_bytes as usize;
        let first = pages.offset / page_bytes as u64;
        let block = |n: usize| {
            segment.wrapping_mul(self.segment_pages).wrapping_add(first as u32 + n as u32)
        };
        let (mut doubts, mut wrong) = (Vec::new(), Vec::new());
        let mut judge = |n: usize, page: &[u8]| match page::verify(page, block(n), self.start) {
            PageState::Valid | PageState::New => true,
            PageState::TornOk => {
                doubts.push(Doubt { block: block(n), newer: Some(page::page_lsn(page)) });
                true
            }
            PageState::Mismatch { .. } => false,
        };
        for (n, page) in plain.chunks_exact(page_bytes).enumerate() {
            if !judge(n, page) {
                wrong.push(n);
            }
        }
        for _ in 0..READS_AGAIN_MAX {
            if wrong.is_empty() {
                break;
            }
            std::thread::sleep(READ_AGAIN_AFTER);
            let mut failed = None;
            wrong.retain(|&n| {
                let page = &mut plain[n * page_bytes..][..page_bytes];
                let offset = pages.offset + (n * page_bytes) as u64;
                match reread(pages.file, page, offset) {
                    Ok(true) => !judge(n, page),
                    // The file is shorter by now: the page is gone, and replay knows.
                    Ok(false) => false,
                    Err(e) => {
                        failed = Some(e);
                        true
                    }
                }
            });
            failed.map_or(Ok(()), Err)?;
        }
        doubts.extend(wrong.into_iter().map(|n| Doubt { block: block(n), newer: None }));
        Ok(doubts)
    }
}

/// Reads one page again; false, and the page as it was, if it is not there any more.
fn reread(file: &File, page: &mut [u8], offset: u64) -> io::Result<bool> {
    let mut again = vec![0; page.len()];
    let whole = read_full(file, &mut again, offset)? == page.len();
    if whole {
        page.copy_from_slice(&again);
    }
    Ok(whole)
}

/// Reads until `buffer` is full or the file ends; how much.
fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Reads `global/pg_control` whole; its own checksum says that it is.
pub fn control(data_dir: &Path) -> Result<(backstay_common::control::ControlFile, Vec<u8>), Error> {
    backstay_common::control::read_with_bytes(&data_dir.join(super::walk::CONTROL_PATH))
}

#[cfg(test)]
mod tests;
