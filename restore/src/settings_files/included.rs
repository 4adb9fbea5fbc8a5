//! The main configuration file and what it includes: followed inside the restored directory, never out of it, not by a
//! symbolic link either.

use super::{AUTO, CLEARED_IN_MAIN, MAIN, SettingsFiles, text};
use crate::directory::make_directory;
use backstay_common::{Context, Result};
use std::path::{Component, Path, PathBuf};

/// As deep as PostgreSQL goes ("src/backend/utils/misc/guc-file.l").
const DEPTH_MAX: usize = 10;
const TLS_FILES: [&str; 4] = ["ssl_cert_file", "ssl_key_file", "ssl_ca_file", "ssl_crl_file"];

impl SettingsFiles<'_> {
    /// Comments out what points at the original's files, unless it is the original's own, and recovery targets, in the main
    /// file and each that it includes. Makes folders that are included and missing.
    pub(super) fn clean_config(&self, is_own: bool) -> Result<Vec<String>> {
        let mut said = Vec::new();
        let mut files = vec![PathBuf::from(MAIN)];
        let mut done = 0;
        while let Some(file) = files.get(done).cloned() {
            let before = self.read(&file)?;
            let is_off = |name: &str, value: &str| {
                let is_elsewhere = match text::is_include(name) {
                    true => self.below(&file, value).is_none(),
                    false => CLEARED_IN_MAIN.contains(&name),
                };
                (!is_own && is_elsewhere) || name.starts_with("recovery_target")
            };
            let (after, off) = text::comment_out(&before, is_off);
            if !off.is_empty() {
                self.write(&file, &after)?;
            }
            let name = file.display();
            said.extend(off.into_iter().map(|line| format!("commented out in {name}: {line}")));
            for (include, value) in after.lines().filter_map(text::include_of) {
                if include == "include_dir" {
                    self.make_included(&file, &value)?;
                }
                let mut more = self.named_by(&file, &include, &value)?;
                more.retain(|more| !files.contains(more));
                files.append(&mut more);
            }
            done += 1;
        }
        Ok(said)
    }

    /// PostgreSQL does not start without a folder that it shall include.
    fn make_included(&self, file: &Path, value: &str) -> Result<()> {
        match self.below(file, value).map(|path| self.dir.join(path)) {
            Some(folder) if !folder.exists() => make_directory(&folder, self.owner),
            _ => Ok(()),
        }
    }

    /// The value that the server will take: `postgresql.auto.conf` is read last.
    pub fn value(&self, name: &str) -> Result<Option<String>> {
        let auto = text::value_of(&self.read(AUTO)?, name);
        Ok(auto.or(text::value_of(&self.whole_config()?, name)))
    }

    /// The main file with each file that it includes in the place of the line that does.
    pub(super) fn whole_config(&self) -> Result<String> {
        self.with_included(Path::new(MAIN), 0)
    }

    fn with_included(&self, file: &Path, depth: usize) -> Result<String> {
        let mut whole = String::new();
        for line in self.read(file)?.lines() {
            whole.extend([line, "\n"]);
            if let Some((include, value)) = text::include_of(line).filter(|_| depth < DEPTH_MAX) {
                for more in self.named_by(file, &include, &value)? {
                    whole += &self.with_included(&more, depth + 1)?;
                }
            }
        }
        Ok(whole)
    }

    /// The files that a line of `file` includes, of those inside that are there.
    fn named_by(&self, file: &Path, include: &str, value: &str) -> Result<Vec<PathBuf>> {
        let Some(path) = self.below(file, value).filter(|path| self.is_inside(path)) else {
            return Ok(Vec::new());
        };
        if include != "include_dir" {
            return Ok(if self.dir.join(&path).is_file() { vec![path] } else { Vec::new() });
        }
        let folder = self.dir.join(&path);
        if !folder.exists() {
            return Ok(Vec::new());
        }
        let entries = std::fs::read_dir(&folder).context(format!("read {}", folder.display()))?;
        let names = entries.flatten().map(|entry| entry.file_name());
        let mut names: Vec<_> = names
            .filter(|name| is_read(&name.to_string_lossy()) && folder.join(name).is_file())
            .filter(|name| self.is_inside(&path.join(name)))
            .collect();
        names.sort();
        Ok(names.into_iter().map(|name| path.join(name)).collect())
    }

    /// False for what a link brings in from elsewhere: others may use it too.
    fn is_inside(&self, path: &Path) -> bool {
        let real = |path: &Path| path.canonicalize().ok();
        match (real(self.dir), real(&self.dir.join(path))) {
            (Some(dir), Some(path)) => path.starts_with(dir),
            _ => true,
        }
    }

    /// Where a path in `file` leads, from the restored directory; none if it leads out of it.
    fn below(&self, file: &Path, value: &str) -> Option<PathBuf> {
        let beside = self.dir.join(file).parent()?.join(value);
        let mut plain = PathBuf::new();
        for part in beside.components() {
            match part {
                Component::ParentDir => drop(plain.pop()),
                Component::CurDir => {}
                other => plain.push(other),
            }
        }
        plain.strip_prefix(self.dir).ok().map(Path::to_path_buf)
    }

    /// Certificates and keys that the server will want and this host does not have, in words.
    pub(super) fn missing_tls_files(&self) -> Result<Vec<String>> {
        let mut said = Vec::new();
        let is_off = |value: &String| ["off", "false", "no", "0"].contains(&value.as_str());
        if self.value("ssl")?.is_none_or(|value| is_off(&value.to_ascii_lowercase())) {
            return Ok(said);
        }
        for name in TLS_FILES {
            let path = self.value(name)?.filter(|path| Path::new(path).is_absolute());
            if let Some(path) = path.filter(|path| !Path::new(path).exists()) {
                said.push(format!(
                    "{name} is {path}, which is not on this host: the server does not start before it is there, or `ssl` is off"
                ));
            }
        }
        Ok(said)
    }
}

/// What PostgreSQL reads of an `include_dir`.
fn is_read(name: &str) -> bool {
    name.ends_with(".conf") && !name.starts_with('.')
}
