//! The key of page hashes, kept in the state directory, one for each system.
//!
//! Equal pages of two snapshots must hash alike, so it is made once. Each manifest holds it too, sealed.

use backstay_common::id::{SystemId, random_bytes};
use backstay_common::{Context, Error, Kind, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Reads `<state-dir>/<system>.hash.key`, or makes it, durably and for its owner only.
pub fn read_or_make(state_dir: &Path, system: SystemId) -> Result<[u8; 32]> {
    let path = state_dir.join(format!("{system}.hash.key"));
    let doing = || format!("keep the key of page hashes in {}", path.display());
    match fs::read(&path) {
        Ok(bytes) => bytes.try_into().map_err(|_| {
            Error::new(Kind::Local, format!("{} does not have 32 bytes", path.display())).remedy(
                "delete it: a new one is made, and the next snapshot stores every page anew",
            )
        }),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let key = random_bytes();
            let new = path.with_extension("new");
            // The name appears only once the bytes are there: a crash leaves `.new`, which is made anew.
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)
                .context(doing())?;
            file.write_all(&key).and_then(|()| file.sync_all()).context(doing())?;
            fs::rename(&new, &path).context(doing())?;
            File::open(state_dir).and_then(|folder| folder.sync_all()).context(doing())?;
            Ok(key)
        }
        Err(e) => Err(e).context(doing()),
    }
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
        fs::write(dir.path().join("3.hash.key"), b"short").unwrap();
        assert_eq!(read_or_make(dir.path(), SystemId::new(3)).unwrap_err().kind(), Kind::Local);
    }
}
