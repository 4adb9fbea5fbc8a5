//! PostgreSQL's programs on this host.

use backstay_common::{Error, Kind, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder with `postgres` and `pg_ctl` of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    pub dir: PathBuf,
    pub major: u32,
    /// As `postgres --version` says it.
    pub version: String,
}

impl Binaries {
    /// The programs of PostgreSQL `major`: in `asked`, else on PATH or where packages put them.
    pub fn find(major: u32, asked: Option<&Path>) -> Result<Binaries> {
        if let Some(dir) = asked {
            return Binaries::look(dir).and_then(|found| found.require(major));
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let packaged = [
            format!("/usr/lib/postgresql/{major}/bin"),
            format!("/usr/pgsql-{major}/bin"),
            format!("/opt/homebrew/opt/postgresql@{major}/bin"),
            "/usr/local/pgsql/bin".to_string(),
        ];
        let places = std::env::split_paths(&path).chain(packaged.iter().map(PathBuf::from));
        let mut others = String::new();
        // Each is asked by being run, so not longer than until one fits.
        for found in places.filter_map(|dir| Binaries::look(&dir).ok()) {
            if found.major == major {
                return Ok(found);
            }
            let start = if others.is_empty() { "; found" } else { "," };
            others += &format!("{start} {} in {}", found.version, found.dir.display());
        }
        let reason =
            format!("PostgreSQL {major}, which was backed up, is not on this host{others}");
        Err(Error::new(Kind::Postgres, reason)
            .remedy(format!("install PostgreSQL {major}, or say where it is with --pg-bin DIR")))
    }

    fn look(dir: &Path) -> Result<Binaries> {
        let program = dir.join("postgres");
        let fault = |reason: &str| {
            Error::new(Kind::Config, format!("{}: {reason}", program.display()))
                .remedy("give --pg-bin the folder that holds postgres and pg_ctl")
        };
        if !dir.join("pg_ctl").exists() {
            return Err(fault("there is no pg_ctl beside it"));
        }
        let output =
            Command::new(&program).arg("--version").output().map_err(|e| fault(&e.to_string()))?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
        let major = major_of(&text).ok_or_else(|| fault(&format!("its version is {text:?}")))?;
        let version = text.replace("postgres (PostgreSQL)", "PostgreSQL");
        Ok(Binaries { dir: dir.into(), major, version })
    }

    fn require(self, major: u32) -> Result<Binaries> {
        match self.major == major {
            true => Ok(self),
            false => Err(Error::new(
                Kind::Config,
                format!(
                    "--pg-bin {} is {}, but PostgreSQL {major} was backed up",
                    self.dir.display(),
                    self.version
                ),
            )
            .remedy(format!("give the folder of PostgreSQL {major}'s programs"))),
        }
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// "postgres (PostgreSQL) 15.18 (Debian 15.18-1)" is 15.
fn major_of(version: &str) -> Option<u32> {
    let number = version.strip_prefix("postgres (PostgreSQL) ")?;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn fake(folder: &Path, version: &str) {
        for name in ["postgres", "pg_ctl"] {
            let path = folder.join(name);
            std::fs::write(&path, format!("#!/bin/sh\necho '{version}'\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    #[test]
    fn the_major_decides() {
        assert_eq!(major_of("postgres (PostgreSQL) 15.18 (Debian 15.18-1)"), Some(15));
        assert_eq!(major_of("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major_of("psql (PostgreSQL) 15.18"), None);
    }

    #[test]
    fn another_major_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fake(folder.path(), "postgres (PostgreSQL) 14.2");
        assert_eq!(Binaries::find(14, Some(folder.path())).unwrap().version, "PostgreSQL 14.2");
        let error = Binaries::find(15, Some(folder.path())).unwrap_err();
        assert!(
            error.kind() == Kind::Config && error.to_string().contains("PostgreSQL 14.2"),
            "{error}"
        );
        let nowhere = Binaries::find(99, None).unwrap_err();
        assert!(
            nowhere.kind() == Kind::Postgres && nowhere.to_string().contains("--pg-bin"),
            "{nowhere}"
        );
        assert!(Binaries::find(15, Some(Path::new("/nowhere"))).is_err());
    }
}
