//! Which disks are this machine's own: only there does an unchanged change time mean an unchanged file.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

/// File systems whose change times are kept by this very kernel ("include/uapi/linux/magic.h"). Any other may be written to
/// from elsewhere.
const LOCAL: [u64; 8] = [
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0x2FC1_2FC1, // zfs
    0xF2F5_2010, // f2fs
    0x0102_1994, // tmpfs
    0x794C_7630, // overlayfs
    0xCA45_1A4E, // bcachefs
];

/// Devices that were asked for.
#[derive(Debug, Default)]
pub struct LocalDisks(Mutex<HashMap<u64, bool>>);

impl LocalDisks {
    /// Whether the device with this number, on which `path` is, is local.
    pub fn is_local(&self, device: u64, path: &Path) -> bool {
        let mut known = self.0.lock().expect("no panic while held");
        *known.entry(device).or_insert_with(|| {
            rustix::fs::statfs(path).is_ok_and(|found| LOCAL.contains(&(found.f_type as u64)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_disk_is_not_local() {
        let dir = tempfile::tempdir().unwrap();
        let disks = LocalDisks::default();
        assert!(disks.is_local(1, dir.path()), "{}", dir.path().display());
        assert!(!disks.is_local(2, Path::new("/proc/self/status")));
        assert!(!disks.is_local(3, Path::new("/nowhere")));
        assert!(!disks.is_local(2, dir.path()), "asked once");
    }
}
