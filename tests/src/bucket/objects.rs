//! What is stored: under one lock, in memory or in a folder.
//!
//! Every operation takes effect at one instant, so of two conditional writes exactly one wins. In a
//! folder, an object is a file that is renamed into place; its key is in its name, percent-encoded.

use bytes::Bytes;
use s3s::crypto::{Checksum as _, Md5};
use s3s::dto::ETagCondition;
use s3s::{S3Error, S3Result, s3_error};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Under what condition a write is done.
#[derive(Debug, Default)]
pub(super) struct Condition {
    pub(super) if_match: Option<ETagCondition>,
    pub(super) if_none_match: Option<ETagCondition>,
}

/// What is known of an object.
#[derive(Clone, Debug)]
pub(super) struct Object {
    content: Content,
    pub(super) size: u64,
    pub(super) etag: String,
    pub(super) modified: SystemTime,
}

#[derive(Clone, Debug)]
enum Content {
    Memory(Bytes),
    File(PathBuf),
}

/// A multipart upload that is not complete.
#[derive(Debug, Default)]
pub(super) struct Upload {
    pub(super) key: String,
    pub(super) parts: BTreeMap<i32, (String, Bytes)>,
}

#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) objects: BTreeMap<String, Object>,
    pub(super) uploads: BTreeMap<String, Upload>,
}

#[derive(Debug)]
pub(super) struct Objects {
    buckets: Mutex<BTreeMap<String, Held>>,
    dir: Option<PathBuf>,
}

impl Objects {
    /// Takes up what an earlier server left in `dir`.
    pub(super) fn open(buckets: &[String], dir: Option<&Path>) -> io::Result<Objects> {
        let mut held = BTreeMap::new();
        for bucket in buckets {
            let objects = dir.map_or(Ok(BTreeMap::new()), |dir| load(&dir.join(bucket)))?;
            held.insert(bucket.clone(), Held { objects, uploads: BTreeMap::new() });
        }
        Ok(Objects { buckets: Mutex::new(held), dir: dir.map(Path::to_path_buf) })
    }

    /// Does `work` on a bucket, at one instant.
    pub(super) fn with<T>(
        &self,
        bucket: &str,
        work: impl FnOnce(&mut Held) -> S3Result<T>,
    ) -> S3Result<T> {
        work(self.lock().get_mut(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?)
    }

    /// Stores an object if `condition` holds; its entity tag.
    pub(super) fn put(
        &self,
        bucket: &str,
        key: &str,
        bytes: Bytes,
        condition: &Condition,
    ) -> S3Result<String> {
        let etag = etag(&bytes);
        let size = bytes.len() as u64;
        let staged = match &self.dir {
            None => None,
            Some(dir) => Some(Staged::write(&dir.join(bucket), key, &bytes).map_err(internal)?),
        };
        self.with(bucket, |held| {
            condition.check(held.objects.get(key))?;
            let content = match staged {
                None => Content::Memory(bytes),
                Some(staged) => Content::File(staged.publish().map_err(internal)?),
            };
            let modified = SystemTime::now();
            let object = Object { content, size, etag: etag.clone(), modified };
            held.objects.insert(key.to_string(), object);
            Ok(etag)
        })
    }

    pub(super) fn look(&self, bucket: &str, key: &str) -> S3Result<Object> {
        self.with(bucket, |held| held.objects.get(key).cloned().ok_or_else(|| s3_error!(NoSuchKey)))
    }

    /// Whether it was there.
    pub(super) fn remove(&self, bucket: &str, key: &str) -> S3Result<bool> {
        self.with(bucket, |held| match held.objects.remove(key) {
            Some(Object { content: Content::File(path), .. }) => {
                fs::remove_file(path).map_err(internal).map(|()| true)
            }
            gone => Ok(gone.is_some()),
        })
    }

    /// Every object that can still be read.
    pub(super) fn all(&self, bucket: &str) -> BTreeMap<String, Bytes> {
        let objects = self.lock().get(bucket).map(|held| held.objects.clone()).unwrap_or_default();
        let read = |(key, object): (String, Object)| Some((key, object.read(0..object.size).ok()?));
        objects.into_iter().filter_map(read).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Held>> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Object {
    pub(super) fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        match &self.content {
            Content::Memory(bytes) => Ok(bytes.slice(range.start as usize..range.end as usize)),
            Content::File(path) => {
                let mut buffer = vec![0; (range.end - range.start) as usize];
                File::open(path)?.read_exact_at(&mut buffer, range.start)?;
                Ok(buffer.into())
            }
        }
    }
}

impl Condition {
    fn check(&self, there: Option<&Object>) -> S3Result<()> {
        let is = |condition: &ETagCondition| match (condition, there) {
            (_, None) => false,
            (ETagCondition::Any, Some(_)) => true,
            (ETagCondition::ETag(etag), Some(object)) => etag.value() == object.etag,
        };
        match (&self.if_match, &self.if_none_match) {
            (Some(_), _) if there.is_none() => Err(s3_error!(NoSuchKey)),
            (Some(wanted), _) if !is(wanted) => Err(s3_error!(PreconditionFailed)),
            (_, Some(unwanted)) if is(unwanted) => Err(s3_error!(PreconditionFailed)),
            _ => Ok(()),
        }
    }
}

/// As S3 has it for objects that came in one piece: MD5, in hex.
pub(super) fn etag(bytes: &[u8]) -> String {
    Md5::checksum(bytes).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

pub(super) fn internal(error: io::Error) -> S3Error {
    S3Error::internal_error(error)
}

/// A file that is written and not yet an object; removed if it never becomes one.
struct Staged {
    temporary: tempfile::NamedTempFile,
    path: PathBuf,
}

impl Staged {
    fn write(folder: &Path, key: &str, bytes: &[u8]) -> io::Result<Staged> {
        let temporary = tempfile::Builder::new().prefix("%tmp").tempfile_in(folder)?;
        fs::write(temporary.path(), bytes)?;
        Ok(Staged { temporary, path: folder.join(encode(key)) })
    }

    fn publish(self) -> io::Result<PathBuf> {
        self.temporary.persist(&self.path).map_err(|e| e.error)?;
        Ok(self.path)
    }
}

fn load(folder: &Path) -> io::Result<BTreeMap<String, Object>> {
    fs::create_dir_all(folder)?;
    let mut objects = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Some(key) = entry.file_name().to_str().and_then(decode) else { continue };
        let (found, content) = (entry.metadata()?, Content::File(entry.path()));
        let (size, modified) = (found.len(), found.modified()?);
        let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        let etag = format!("{size:x}-{:x}", since.as_nanos());
        objects.insert(key, Object { content, size, etag, modified });
    }
    Ok(objects)
}

fn encode(key: &str) -> String {
    key.bytes().fold(String::new(), |mut name, byte| {
        match byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            true => name.push(char::from(byte)),
            false => {
                let _ = write!(name, "%{byte:02X}");
            }
        }
        name
    })
}

/// `None` if it is not what `encode` makes.
fn decode(name: &str) -> Option<String> {
    let mut parts = name.split('%');
    let mut key = parts.next()?.as_bytes().to_vec();
    for part in parts {
        key.push(u8::from_str_radix(part.get(..2)?, 16).ok()?);
        key.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(key).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_taken_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let buckets = ["one".to_string()];
        let objects = Objects::open(&buckets, Some(dir.path())).unwrap();
        let any = Condition::default();
        objects.put("one", "a/b%c ü", Bytes::from_static(b"12"), &any).unwrap();
        objects.put("one", "gone", Bytes::from_static(b"34"), &any).unwrap();
        assert!(objects.remove("one", "gone").unwrap());
        let again = Objects::open(&buckets, Some(dir.path())).unwrap();
        assert_eq!(again.all("one"), BTreeMap::from([("a/b%c ü".into(), Bytes::from("12"))]));
    }

    #[test]
    fn a_refused_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let objects = Objects::open(&["one".to_string()], Some(dir.path())).unwrap();
        let absent = Condition { if_none_match: Some(ETagCondition::Any), ..Condition::default() };
        objects.put("one", "k", Bytes::from_static(b"12"), &absent).unwrap();
        assert!(objects.put("one", "k", Bytes::from_static(b"34"), &absent).is_err());
        assert_eq!(objects.all("one")["k"], "12");
        assert_eq!(fs::read_dir(dir.path().join("one")).unwrap().count(), 1);
    }
}
