//! The spool of one line: its WAL in local files, one for each span.
//!
//! `<state-dir>/spool/<system>/<TLI>[-<branch>].<line>/<start>.wal` holds raw WAL from `start` to at most the end of
//! the 16 MiB span; the next file begins there. A line has no hole: where WAL is missing, another line begins.
//!
//! What a crash leaves, whatever it interrupts:
//! - appending: a file that ends early or, after a power failure, in garbage, all of it beyond what was synced; the
//!   scan takes the files up to the first hole, and whoever opens the line decodes its tail and truncates it;
//! - creating a file: an empty file, or none; the entry is synced before a byte in it counts as synced;
//! - forgetting files: they go from the oldest on, each removal synced before the next, so what is left is one run;
//! - giving the line its branch: the folder has the old name or the new.
//!
//! A failed fsync is an error that stops the process. What the kernel holds of the file is unknown then, and a second
//! fsync would report a success that is none.

use crate::durable::sync_folder;
use backstay_common::id::Branch;
use backstay_common::lsn::{Lsn, LsnRange};
use backstay_common::{Context, Error, Kind, Result};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// The WAL of one line on the local disk. One task appends; any may read, sync and forget meanwhile.
#[derive(Debug)]
pub struct Spool {
    /// Held over I/O.
    inner: Mutex<Inner>,
    /// What is here. Held for moments only: told at once, whatever the disk is doing. It changes while `inner` is held, after
    /// the files have.
    extent: Mutex<LsnRange>,
    /// Held while files are fsynced; true once that has failed.
    syncing: Mutex<bool>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    /// By start. Consecutive, each within one span.
    files: BTreeMap<Lsn, SpoolFile>,
    /// Counts truncations: a sync that one of them overtook proves nothing.
    truncations: u64,
}

#[derive(Debug)]
struct SpoolFile {
    end: Lsn,
    /// Kept open while it is written or not yet synced.
    open: Option<Arc<File>>,
    dirty: bool,
}

impl Spool {
    /// A new line that begins at `begin`; `folder` must be there, and empty of WAL.
    pub fn create(folder: PathBuf, begin: Lsn) -> Result<Spool> {
        let file = create_file(&folder, begin).context(format!("create {}", folder.display()))?;
        let open = Some(Arc::new(file));
        let files = BTreeMap::from([(begin, SpoolFile { end: begin, open, dirty: false })]);
        Ok(Spool::of(Inner { folder, files, truncations: 0 }))
    }

    /// What a line's folder holds, up to the first hole; files beyond it are removed. `None` without any file.
    pub fn open(folder: PathBuf) -> Result<Option<Spool>> {
        let doing = format!("open the spool {}", folder.display());
        let files = scan(&folder).context(doing)?;
        let inner = Inner { folder, files, truncations: 0 };
        Ok((!inner.files.is_empty()).then(|| Spool::of(inner)))
    }

    fn of(inner: Inner) -> Spool {
        let extent = Mutex::new(inner.extent());
        Spool { inner: Mutex::new(inner), extent, syncing: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while held")
    }

    pub fn folder(&self) -> PathBuf {
        self.lock().folder.clone()
    }

    fn extent(&self) -> LsnRange {
        *self.extent.lock().expect("no panic while held")
    }

    /// Tells how far the files reach now.
    fn publish(&self, inner: &Inner) {
        *self.extent.lock().expect("no panic while held") = inner.extent();
    }

    /// The first byte that is still here. Never waits for the disk.
    pub fn begin(&self) -> Lsn {
        self.extent().start
    }

    /// Where the oldest file ends and the next begins; none if there is only one.
    pub fn second(&self) -> Option<Lsn> {
        self.lock().files.keys().nth(1).copied()
    }

    /// Where the next byte goes. Never waits for the disk.
    pub fn end(&self) -> Lsn {
        self.extent().end
    }

    /// Never waits for the disk.
    pub fn bytes(&self) -> u64 {
        self.extent().len()
    }

    /// Adds `bytes`, which lie within one span, at the end. After an error nothing was added.
    pub fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let (file, start, end) = self.lock().writable()?;
        assert!(end.add(bytes.len() as u64) <= end.next_span(), "bytes beyond the span of {end}");
        file.write_all_at(bytes, end.since(start))?;
        let mut inner = self.lock();
        let last = inner.files.get_mut(&start).expect("only the appender removes the last file");
        last.end = end.add(bytes.len() as u64);
        last.dirty = true;
        self.publish(&inner);
        Ok(())
    }

    /// Makes durable what has been appended. Returns up to where everything is; `None` if the end was cut back
    /// meanwhile. What another sync has begun is durable too when this one returns. Blocks.
    pub fn sync(&self) -> Result<Option<Lsn>> {
        let mut has_failed = self.syncing.lock().expect("no panic while held");
        if *has_failed {
            return Err(Error::new(Kind::Local, "an fsync of the spool failed before"));
        }
        let (end, truncations, dirty) = self.lock().begin_sync();
        let synced = dirty.iter().try_for_each(|file| file.sync_data());
        *has_failed = synced.is_err();
        synced.context(format!("fsync the spool {}", self.folder().display()))?;
        let mut inner = self.lock();
        inner.close_full();
        Ok((inner.truncations == truncations).then_some(end))
    }

    /// The WAL of `range`, all of which is here. Blocks.
    pub fn read(&self, range: LsnRange) -> Result<Vec<u8>> {
        let mut wal = vec![0; range.len() as usize];
        let mut at = range.start;
        while at < range.end {
            let (file, start, end) = self.lock().readable(at)?;
            let to = end.min(range.end);
            let into = at.since(range.start) as usize..to.since(range.start) as usize;
            file.read_exact_at(&mut wal[into], at.since(start))
                .context(format!("read {at} from the spool"))?;
            at = to;
        }
        Ok(wal)
    }

    /// Cuts the end back to `to`, durably. Nothing happens if it is not after `to`. Blocks.
    pub fn truncate(&self, to: Lsn) -> Result<()> {
        let mut inner = self.lock();
        let result = inner.truncate(to);
        self.publish(&inner);
        result.context(format!("truncate the spool to {to}"))
    }

    /// Removes the files that end at or before `until`, but never the last one. Blocks.
    pub fn forget(&self, until: Lsn) -> Result<()> {
        let doing = || format!("remove WAL before {until} from the spool");
        loop {
            let mut inner = self.lock();
            let Some((&start, _)) =
                inner.files.iter().next().filter(|(_, f)| f.end <= until && !f.dirty)
            else {
                return Ok(());
            };
            if inner.files.len() == 1 {
                return Ok(());
            }
            std::fs::remove_file(file_path(&inner.folder, start)).context(doing())?;
            sync_folder(&inner.folder).context(doing())?;
            inner.files.remove(&start);
            self.publish(&inner);
        }
    }

    /// Gives the line its branch: the folder is renamed, durably. Blocks.
    pub fn settle(&self, branch: Branch) -> Result<()> {
        let mut inner = self.lock();
        let name = inner.folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = name.rsplit_once('.').map_or("", |(_, number)| number);
        let to = inner.folder.with_file_name(format!("{branch}.{number}"));
        let parent = inner.folder.parent().unwrap_or(Path::new("/")).to_path_buf();
        std::fs::rename(&inner.folder, &to)
            .and_then(|()| sync_folder(&parent))
            .context(format!("rename {} to {}", inner.folder.display(), to.display()))?;
        inner.folder = to;
        Ok(())
    }
}

impl Inner {
    fn begin(&self) -> Lsn {
        *self.files.first_key_value().expect("a spool has a file").0
    }

    fn end(&self) -> Lsn {
        self.files.last_key_value().expect("a spool has a file").1.end
    }

    fn extent(&self) -> LsnRange {
        LsnRange::new(self.begin(), self.end())
    }

    /// The file that the next byte goes to, with its start and end.
    fn writable(&mut self) -> io::Result<(Arc<File>, Lsn, Lsn)> {
        let end = self.end();
        let (&start, last) = self.files.last_key_value().expect("a spool has a file");
        let is_full = end > start && end == end.span_start();
        let start = if is_full { end } else { start };
        let open = last.open.clone().filter(|_| !is_full);
        let file = match (open, is_full) {
            (Some(file), _) => file,
            (None, true) => Arc::new(create_file(&self.folder, start)?),
            (None, false) => {
                let path = file_path(&self.folder, start);
                Arc::new(OpenOptions::new().read(true).write(true).open(path)?)
            }
        };
        let entry = self.files.entry(start);
        entry.or_insert(SpoolFile { end, open: None, dirty: false }).open = Some(file.clone());
        Ok((file, start, end))
    }

    fn readable(&self, at: Lsn) -> Result<(Arc<File>, Lsn, Lsn)> {
        let found = self.files.range(..=at).next_back().filter(|(_, file)| file.end > at);
        let Some((&start, file)) = found else {
            return Err(Error::new(Kind::Bug, format!("{at} is not in the spool")));
        };
        let open = match &file.open {
            Some(open) => open.clone(),
            None => {
                let path = file_path(&self.folder, start);
                Arc::new(File::open(&path).context(format!("open {}", path.display()))?)
            }
        };
        Ok((open, start, file.end))
    }

    fn begin_sync(&mut self) -> (Lsn, u64, Vec<Arc<File>>) {
        let end = self.end();
        let mut dirty = Vec::new();
        for file in self.files.values_mut().filter(|file| file.dirty) {
            dirty.extend(file.open.clone());
            file.dirty = false;
        }
        (end, self.truncations, dirty)
    }

    /// Closes files that are full and synced.
    fn close_full(&mut self) {
        let last = *self.files.last_key_value().expect("a spool has a file").0;
        for (_, file) in self.files.range_mut(..last).filter(|(_, file)| !file.dirty) {
            file.open = None;
        }
    }

    fn truncate(&mut self, to: Lsn) -> io::Result<()> {
        if self.end() <= to {
            return Ok(());
        }
        self.truncations += 1;
        while let Some((&start, _)) = self.files.last_key_value().filter(|_| self.files.len() > 1)
            && start >= to
        {
            std::fs::remove_file(file_path(&self.folder, start))?;
            sync_folder(&self.folder)?;
            self.files.remove(&start);
        }
        let (&start, last) = self.files.iter_mut().next_back().expect("a spool has a file");
        let file = OpenOptions::new().write(true).open(file_path(&self.folder, start))?;
        file.set_len(to.since(start))?;
        file.sync_all()?;
        last.end = to.max(start);
        last.dirty = false;
        Ok(())
    }
}

fn file_path(folder: &Path, start: Lsn) -> PathBuf {
    folder.join(format!("{}.wal", start.name()))
}

fn create_file(folder: &Path, start: Lsn) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let path = file_path(folder, start);
    // A file may be there after a failure between its creation and the first byte.
    let file = options.read(true).write(true).create(true).truncate(true).open(path)?;
    sync_folder(folder)?;
    Ok(file)
}

/// True if the disk or the quota is full.
pub fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn scan(folder: &Path) -> io::Result<BTreeMap<Lsn, SpoolFile>> {
    let mut lengths = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(start) = name.strip_suffix(".wal").and_then(Lsn::from_name) {
            lengths.insert(start, entry.metadata()?.len());
        }
    }
    let mut files: BTreeMap<Lsn, SpoolFile> = BTreeMap::new();
    let mut next = None;
    for (&start, &length) in &lengths {
        if next.is_some_and(|next| next != start) {
            std::fs::remove_file(file_path(folder, start))?;
            continue;
        }
        let end = start.add(length).min(start.next_span());
        // Synced anew: what the process before this one had not synced may be in the page cache only.
        let open = OpenOptions::new().read(true).write(true).open(file_path(folder, start))?;
        open.sync_all()?;
        files.insert(start, SpoolFile { end, open: None, dirty: false });
        next = Some(end);
    }
    sync_folder(folder)?;
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use backstay_common::lsn::SPAN_BYTES;
    use std::sync::mpsc;
    use std::time::Duration;

    const BEGIN: Lsn = Lsn::new(3 * SPAN_BYTES - 100);

    fn at(offset: u64) -> Lsn {
        BEGIN.add(offset)
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|n| (n % 251) as u8).collect()
    }

    /// A folder with 100 bytes in one span, all of the next and 50 in the third.
    fn filled() -> (tempfile::TempDir, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::create(folder.path().to_path_buf(), BEGIN).unwrap();
        let wal = pattern(100 + SPAN_BYTES as usize + 50);
        spool.append(&wal[..60]).unwrap();
        spool.append(&wal[60..100]).unwrap();
        spool.append(&wal[100..100 + SPAN_BYTES as usize]).unwrap();
        spool.append(&wal[100 + SPAN_BYTES as usize..]).unwrap();
        assert_eq!(spool.sync().unwrap(), Some(at(wal.len() as u64)));
        assert_eq!(spool.bytes(), wal.len() as u64);
        (folder, wal)
    }

    fn reopen(folder: &tempfile::TempDir) -> Spool {
        Spool::open(folder.path().to_path_buf()).unwrap().unwrap()
    }

    fn all(spool: &Spool) -> Vec<u8> {
        spool.read(LsnRange::new(spool.begin(), spool.end())).unwrap()
    }

    #[test]
    fn what_was_appended_is_read_back_after_a_restart() {
        let (folder, wal) = filled();
        let spool = reopen(&folder);
        assert_eq!((spool.begin(), spool.end()), (BEGIN, at(wal.len() as u64)));
        assert!(all(&spool) == wal);
        spool.append(b"more").unwrap();
        let end = spool.end();
        assert_eq!(spool.read(LsnRange::new(at(wal.len() as u64), end)).unwrap(), b"more");
        assert!(spool.read(LsnRange::new(end, end.add(1))).is_err());
    }

    #[test]
    fn a_lost_tail_ends_the_line_there() {
        let (folder, wal) = filled();
        let second = file_path(folder.path(), at(100));
        OpenOptions::new().write(true).open(&second).unwrap().set_len(4096).unwrap();
        let spool = reopen(&folder);
        assert_eq!(spool.end(), at(100 + 4096), "the third file lies beyond a hole");
        assert!(all(&spool) == wal[..100 + 4096]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn an_empty_last_file_and_strangers_do_no_harm() {
        let (folder, wal) = filled();
        let third = file_path(folder.path(), at(100 + SPAN_BYTES));
        File::create(&third).unwrap();
        std::fs::write(folder.path().join("history"), "x").unwrap();
        let spool = reopen(&folder);
        assert_eq!(spool.end(), at(100 + SPAN_BYTES));
        spool.append(&wal[100 + SPAN_BYTES as usize..]).unwrap();
        assert!(all(&spool) == wal);
    }

    #[test]
    fn truncation_goes_over_files_and_is_appended_to() {
        let (folder, wal) = filled();
        let spool = reopen(&folder);
        spool.truncate(at(wal.len() as u64 + 5)).unwrap();
        assert_eq!(spool.end(), at(wal.len() as u64));
        spool.truncate(at(70)).unwrap();
        assert_eq!(spool.end(), at(70));
        spool.append(&wal[70..100]).unwrap();
        spool.append(&wal[100..200]).unwrap();
        assert!(all(&reopen(&folder)) == wal[..200]);
    }

    #[test]
    fn a_truncation_to_a_border_leaves_a_line_that_goes_on() {
        let (folder, wal) = filled();
        let spool = reopen(&folder);
        spool.truncate(at(100)).unwrap();
        spool.append(&wal[100..200]).unwrap();
        assert!(all(&reopen(&folder)) == wal[..200]);
        let spool = reopen(&folder);
        spool.truncate(BEGIN).unwrap();
        assert_eq!(spool.end(), BEGIN);
    }

    #[test]
    fn what_is_forgotten_goes_from_the_oldest_on_and_never_the_last() {
        let (folder, wal) = filled();
        let spool = reopen(&folder);
        spool.forget(at(99)).unwrap();
        assert_eq!(spool.begin(), BEGIN);
        spool.forget(at(100)).unwrap();
        assert_eq!(spool.begin(), at(100));
        assert_eq!(spool.bytes(), wal.len() as u64 - 100);
        spool.forget(Lsn::MAX).unwrap();
        assert_eq!(spool.begin(), at(100 + SPAN_BYTES));
        assert!(all(&reopen(&folder)) == wal[100 + SPAN_BYTES as usize..]);
    }

    /// What a thread of its own makes of `spool`; none as long as it waits.
    fn beside<'s, T: Send + 's>(
        scope: &'s std::thread::Scope<'s, '_>,
        spool: &'s Spool,
        work: impl FnOnce(&Spool) -> T + Send + 's,
    ) -> mpsc::Receiver<T> {
        let (sender, receiver) = mpsc::channel();
        scope.spawn(move || sender.send(work(spool)));
        receiver
    }

    #[test]
    fn what_is_here_is_told_while_the_disk_is_slow() {
        let (folder, wal) = filled();
        let spool = reopen(&folder);
        std::thread::scope(|scope| {
            let _io = spool.lock();
            let told = beside(scope, &spool, |s| (s.begin(), s.end(), s.bytes()));
            let told = told.recv_timeout(Duration::from_secs(10));
            assert_eq!(told, Ok((BEGIN, at(wal.len() as u64), wal.len() as u64)));
        });
    }

    #[test]
    fn a_sync_waits_for_another_and_an_append_for_none() {
        let (folder, wal) = filled();
        let spool = reopen(&folder);
        let end = at(wal.len() as u64).add(4);
        std::thread::scope(|scope| {
            let other = spool.syncing.lock().unwrap();
            spool.append(b"more").unwrap();
            let synced = beside(scope, &spool, |s| s.sync().unwrap());
            let early = synced.recv_timeout(Duration::from_millis(200));
            assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
            drop(other);
            assert_eq!(synced.recv_timeout(Duration::from_secs(10)), Ok(Some(end)));
        });
    }

    #[test]
    fn after_a_sync_that_failed_none_succeeds() {
        let (folder, _) = filled();
        let spool = reopen(&folder);
        spool.append(b"more").unwrap();
        // A device that cannot be synced.
        let null = Arc::new(File::open("/dev/null").unwrap());
        spool.lock().files.last_entry().unwrap().get_mut().open = Some(null);
        assert!(spool.sync().is_err());
        assert!(spool.sync().is_err(), "what was lost is not known");
    }

    #[test]
    fn the_branch_is_in_the_name_of_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("00000002.0005");
        std::fs::create_dir(&folder).unwrap();
        let spool = Spool::create(folder, BEGIN).unwrap();
        spool.append(b"before").unwrap();
        spool.settle("00000002-01020304".parse().unwrap()).unwrap();
        spool.append(b"after").unwrap();
        let renamed = root.path().join("00000002-01020304.0005");
        assert_eq!(spool.folder(), renamed);
        assert!(all(&Spool::open(renamed).unwrap().unwrap()) == b"beforeafter");
    }
}
