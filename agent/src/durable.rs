//! Files that are there whole or not at all, also after a crash.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Creates or replaces a file. A crash leaves what was there before, and maybe `<name>.tmp`, which nobody reads. Blocks.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// Makes the entries of a folder durable. Blocks.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
