//! `backstay keys generate`.

use backstay_common::Result;
use backstay_common::keys::{KeyProvider, file::FileProvider};
use std::path::Path;

/// What is said after a key has been made.
pub fn warning(path: &Path) -> String {
    format!(
        "Keep a copy of {} in a safe place that does not burn down with this host (a password manager, a safe, \
         another site).\nWhoever has it can read the backups. Without it nobody can, and nobody can make it again.",
        path.display()
    )
}

/// Makes a key and writes it to a new file; returns its id.
pub fn generate(path: &Path) -> Result<String> {
    let provider = FileProvider::generate();
    provider.write(path)?;
    Ok(provider.key_id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_never_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("orders.key");
        let id = generate(&path).unwrap();
        assert_eq!(FileProvider::read(&path).unwrap().key_id(), id);
        assert!(generate(&path).unwrap_err().to_string().contains("exists already"));
        assert!(warning(&path).contains("orders.key"));
    }
}
