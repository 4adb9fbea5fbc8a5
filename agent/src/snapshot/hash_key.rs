//! The key of page hashes, kept in the state directory, one for each system.
//!
//! Equal pages of two snapshots must hash alike, so it is made once. Each manifest holds it too, sealed; a state directory
//! that lost it, or has another, takes it from there.

use backstay_common::id::{SystemId, random_bytes};
use backstay_common::{Context, Error, Kind, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Reads `<state-dir>/<system>.hash.key`, or makes it, durably and for its owner only.
pub fn read_or_make(state_dir: &Path, system: SystemId) -> Result<[u8; 32]> {
    if let Some(key) = read(state_dir, system)? {
        return Ok(key);
    }
    let key = random_bytes();
    adopt(state_dir, system, &key)?;
    Ok(key)
}

/// Reads it; none if there is no such file.
pub fn read(state_dir: &Path, system: SystemId) -> Result<Option<[u8; 32]>> {
    let path = path(state_dir, system);
    match fs::read(&path) {
        Ok(bytes) => bytes.try_into().map(Some).map_err(|_| {
            Error::new(Kind::Local, format!("{} does not have 32 bytes", path.display())).remedy(
                "delete it: the next snapshot takes the key of the one before, or makes a new one",
            )
        }),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).context(doing(&path)),
    }
}

/// Keeps `key`, that of the snapshot that the next one is compared with, in the place of any other.
pub fn adopt(state_dir: &Path, system: SystemId, key: &[u8; 32]) -> Result<()> {
    let path = path(state_dir, system);
    let new = path.with_extension("new");
    // The name appears only once the bytes are there: a crash leaves `.new`, which is made anew.
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .context(doing(&path))?;
    file.write_all(key).and_then(|()| file.sync_all()).context(doing(&path))?;
    fs::rename(&new, &path).context(doing(&path))?;
    File::open(state_dir).and_then(|folder| folder.sync_all()).context(doing(&path))
}

fn path(state_dir: &Path, system: SystemId) -> PathBuf {
    state_dir.join(format!("{system}.hash.key"))
}

fn doing(path: &Path) -> String {
    format!("keep the key of page hashes in {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_for_each_system() {
        let dir = tempfile::tempdir().unwrap();
        let key = |number| read_or_make(dir.path(), SystemId::new(number)).unwrap();
        assert_eq!(key(1), key(1));
        assert_ne!(key(1), key(2));
        adopt(dir.path(), SystemId::new(1), &[5; 32]).unwrap();
        assert_eq!(key(1), [5; 32]);
        fs::write(dir.path().join("3.hash.key"), b"short").unwrap();
        assert_eq!(read_or_make(dir.path(), SystemId::new(3)).unwrap_err().kind(), Kind::Local);
    }
}
