//! Configuration that lives outside the data directory, as Debian keeps it.

use super::session::Source;
use super::walk::unreadable;
use backstay_common::snapshot::manifest::ConfigFile;
use backstay_common::{Error, Kind, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// All of it together; the manifest must stay small.
const BYTES_MAX: u64 = 4 << 20;
const FILES_MAX: usize = 256;

/// Reads what the server's configuration consists of, but for what the snapshot has anyway. Blocks.
///
/// The main files get the names that PostgreSQL looks for in a data directory, others keep their path below the folder of the
/// main config file. What is included from elsewhere has no place in the restored directory, and is left out.
pub fn read(source: &Source) -> Result<Vec<ConfigFile>> {
    let inside = canonical(&source.data_dir);
    let main = source.config_files.iter();
    let mut wanted: Vec<(String, PathBuf)> =
        main.map(|(name, path)| (name.to_string(), path.clone())).collect();
    let main = source.config_files.iter().find(|(name, _)| *name == "postgresql.conf");
    if let Some(folder) = main.and_then(|(_, path)| path.parent()) {
        let beside = in_folder(&folder.join("conf.d"));
        for path in source.included_files.iter().cloned().chain(beside) {
            let name = path.strip_prefix(folder).ok().and_then(Path::to_str).map(str::to_string);
            let is_main = wanted.iter().any(|(_, main)| *main == path);
            wanted.extend(name.filter(|_| !is_main).map(|name| (name, path)));
        }
    }
    wanted.retain(|(_, path)| !canonical(path).starts_with(&inside));
    wanted.sort();
    wanted.dedup_by(|a, b| a.0 == b.0);
    contents(wanted)
}

fn contents(wanted: Vec<(String, PathBuf)>) -> Result<Vec<ConfigFile>> {
    let mut files = Vec::new();
    let mut bytes = 0;
    for (name, path) in wanted {
        let content = fs::read(&path).map_err(|e| unreadable(&path, e))?;
        bytes += content.len() as u64;
        if bytes > BYTES_MAX || files.len() == FILES_MAX {
            let reason =
                format!("configuration up to {} has more than 4 MiB or 256 files", path.display());
            return Err(Error::new(Kind::Config, reason)
                .remedy("move what is no configuration out of the server's configuration folder"));
        }
        files.push(ConfigFile { name, source: path.display().to_string(), content });
    }
    Ok(files)
}

/// What PostgreSQL reads of an `include_dir`.
fn in_folder(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_config = |path: &PathBuf| {
        path.extension().is_some_and(|e| e == "conf") && !is_hidden(path) && path.is_file()
    };
    entries.map(|entry| entry.path()).filter(is_config).collect()
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."))
}

fn canonical(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}
