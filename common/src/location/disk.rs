//! What a folder needs beyond what `object_store` does for it.
//!
//! Two things. A folder that is not there, or is suddenly another one, is a disk that is not
//! mounted: writing there would fill the disk below, so nothing but `create_root` makes the root,
//! and a root whose identity changed is believed only if it holds a `cluster` object. And an object
//! is stored only when every directory entry that leads to it is: `object_store` syncs the
//! directories that it makes itself, but neither those that another writer made an instant ago, nor
//! those of an object that it finds there already.

use crate::error::{Error, Kind, Result};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Device and inode.
pub(super) type Identity = (u64, u64);

/// The root folder of one location. Every method blocks on the file system.
#[derive(Clone, Debug)]
pub(super) struct Disk(Arc<State>);

#[derive(Debug)]
struct State {
    root: PathBuf,
    /// Device and inode of the root when it was last believed.
    identity: Mutex<Option<Identity>>,
    /// Folders whose entries, up to the root's, this process has synced. There is one for each kind
    /// of object, and one for 4 GiB of WAL.
    synced: Mutex<HashSet<PathBuf>>,
}

impl Disk {
    pub(super) fn new(root: PathBuf) -> Disk {
        Disk(Arc::new(State { root, identity: Mutex::default(), synced: Mutex::default() }))
    }

    pub(super) fn root(&self) -> &Path {
        &self.0.root
    }

    /// Makes the root, durably: for `init` only.
    pub(super) fn create_root(&self) -> Result<()> {
        let root = self.root();
        let made: Vec<&Path> = root.ancestors().take_while(|folder| !folder.exists()).collect();
        fs::create_dir_all(root).map_err(|e| refusal("make folder", root, &e))?;
        for folder in made {
            sync(folder)?;
            folder.parent().map_or(Ok(()), sync)?;
        }
        Ok(())
    }

    /// Refuses a root that is not there, or that became another folder. Its device and inode.
    pub(super) fn check(&self) -> Result<Identity> {
        let root = self.root();
        let found = fs::metadata(root).map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                Error::new(Kind::Storage, format!("folder {} is not there", root.display()))
                    .remedy("mount it, or run `backstay-agent init` if the location is new")
            }
            _ => refusal("look at folder", root, &e),
        })?;
        if !found.is_dir() {
            return Err(Error::new(Kind::Storage, format!("{} is not a folder", root.display())));
        }
        let found = (found.dev(), found.ino());
        let mut identity = self.0.identity.lock().unwrap_or_else(PoisonError::into_inner);
        if identity.is_some_and(|known| known != found) {
            if !root.join("cluster").exists() {
                let what = format!("folder {} is no longer the one it was", root.display());
                return Err(Error::new(Kind::Storage, what).remedy("mount its disk again"));
            }
            self.synced().clear();
        }
        *identity = Some(found);
        Ok(found)
    }

    /// Makes the folders between the root and `file`, durably; never the root. The identity of the root in which `file`
    /// may now be written.
    pub(super) fn prepare(&self, file: &Path) -> Result<Identity> {
        let root = self.check()?;
        let Some(folder) = file.parent() else { return Ok(root) };
        if self.synced().contains(folder) {
            return Ok(root);
        }
        let below: Vec<&Path> = folder.ancestors().take_while(|f| *f != self.root()).collect();
        for folder in below.iter().rev() {
            match fs::create_dir(folder) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                    return Err(refusal("make folder", folder, &e));
                }
                _ => {}
            }
        }
        self.settle(file)?;
        self.synced().insert(folder.to_path_buf());
        Ok(root)
    }

    /// Refuses a write that was prepared in `root`, if the disk was unmounted or the folder moved while it went on: the
    /// file may lie in another place, and in a folder that the write itself has made.
    pub(super) fn confirm(&self, root: Identity) -> Result<()> {
        let path = self.root();
        let still = fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == root);
        match still {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Storage,
                format!("folder {} went away during a write", path.display()),
            )
            .remedy("mount its disk again; what was left in its place can be deleted")),
        }
    }

    /// Syncs every directory entry that leads to `file`, whoever made it.
    pub(super) fn settle(&self, file: &Path) -> Result<()> {
        let Some(folder) = file.parent() else { return Ok(()) };
        folder.ancestors().take_while(|f| f.starts_with(self.root())).try_for_each(sync)
    }

    /// Syncs the folder that `file` was deleted from, if there is one.
    pub(super) fn settle_deletion(&self, file: &Path) -> Result<()> {
        match file.parent().filter(|folder| folder.is_dir()) {
            Some(folder) => sync(folder),
            None => Ok(()),
        }
    }

    fn synced(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        self.0.synced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sync(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|e| refusal("sync folder", folder, &e))
}

fn refusal(doing: &str, path: &Path, reason: &io::Error) -> Error {
    let error = Error::new(Kind::Storage, format!("{doing} {}: {reason}", path.display()));
    match remedy(reason) {
        Some(remedy) => error.remedy(remedy),
        None => error,
    }
}

/// What to do when a file system says no.
pub(super) fn remedy(reason: &io::Error) -> Option<&'static str> {
    Some(match reason.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make room on the location's disk, or prune it"
        }
        ErrorKind::PermissionDenied => {
            "give the user that runs this program the right to read and write the folder"
        }
        ErrorKind::ReadOnlyFilesystem => "mount the location's disk read-write",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_create_root_makes_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        let disk = Disk::new(root.clone());
        assert_eq!(disk.check().unwrap_err().kind(), Kind::Storage);
        assert!(disk.prepare(&root.join("x/y/z")).is_err());
        assert!(!root.exists());
        disk.create_root().unwrap();
        disk.create_root().unwrap();
        disk.prepare(&root.join("x/y/z")).unwrap();
        assert!(root.join("x/y").is_dir());
    }

    #[test]
    fn a_write_counts_only_in_the_folder_that_it_began_in() {
        let dir = tempfile::tempdir().unwrap();
        let (root, away) = (dir.path().join("mnt"), dir.path().join("unmounted"));
        let disk = Disk::new(root.clone());
        disk.create_root().unwrap();
        let before = disk.prepare(&root.join("x/y")).unwrap();
        disk.confirm(before).unwrap();
        fs::rename(&root, &away).unwrap();
        assert_eq!(disk.confirm(before).unwrap_err().kind(), Kind::Storage);
        fs::create_dir_all(root.join("x")).unwrap();
        assert_eq!(disk.confirm(before).unwrap_err().kind(), Kind::Storage);
        fs::remove_dir_all(&root).unwrap();
        fs::rename(&away, &root).unwrap();
        disk.confirm(before).unwrap();
    }

    #[test]
    fn another_folder_in_its_place_is_believed_only_with_a_cluster_object() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("mnt");
        let disk = Disk::new(root.clone());
        disk.create_root().unwrap();
        disk.prepare(&root.join("x/y")).unwrap();
        fs::rename(&root, dir.path().join("unmounted")).unwrap();
        fs::create_dir(&root).unwrap();
        assert!(disk.check().unwrap_err().message().contains("no longer the one it was"));
        assert!(disk.prepare(&root.join("x/y")).is_err());
        fs::write(root.join("cluster"), b"").unwrap();
        disk.prepare(&root.join("x/y")).unwrap();
        assert!(root.join("x").is_dir());
    }
}
