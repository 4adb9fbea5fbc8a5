//! Who the restored files belong to, and who PostgreSQL runs as.

use backstay_common::{Context, Error, Kind, Result};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

/// A user and a group of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// True if this process may give files to others.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl Owner {
    /// Who this process runs as.
    pub fn of_process() -> Owner {
        Owner { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }

    /// Who owns `path`, or the nearest directory above it that exists.
    pub fn of_path(path: &Path) -> Result<Owner> {
        let found = path.ancestors().find_map(|above| std::fs::metadata(above).ok());
        let found = found
            .ok_or_else(|| Error::new(Kind::Local, format!("{} has no parent", path.display())))?;
        Ok(Owner { uid: found.uid(), gid: found.gid() })
    }

    /// Reads `USER[:GROUP]`, names or numbers. Without a group it is the user's own.
    pub fn parse(text: &str) -> Result<Owner> {
        let unknown = |what: &str, name: &str| {
            Error::new(Kind::Config, format!("--owner {text}: this host has no {what} {name:?}"))
                .remedy("give USER or USER:GROUP as this host knows them, such as postgres")
        };
        let (user, group) =
            text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let uid = id(&["-u", user]).or(user.parse().ok()).ok_or_else(|| unknown("user", user))?;
        let gid = match group {
            Some(group) => group_number(group).ok_or_else(|| unknown("group", group))?,
            None => id(&["-g", user]).ok_or_else(|| unknown("user", user))?,
        };
        Ok(Owner { uid, gid })
    }

    /// The owner that a restore into `dir` has: as asked, else, for root, that of the directory or its parent.
    pub fn choose(asked: Option<&str>, dir: &Path) -> Result<Owner> {
        let me = Owner::of_process();
        match asked {
            Some(text) => {
                let owner = Owner::parse(text)?;
                match is_root() || owner.uid == me.uid {
                    true => Ok(owner),
                    false => Err(Error::new(
                        Kind::Config,
                        format!("--owner {text}: only root can give files to others"),
                    )
                    .remedy("run as root, or as that user and without --owner")),
                }
            }
            None if is_root() => Owner::of_path(dir.parent().unwrap_or(dir)),
            None => Ok(me),
        }
    }

    /// Gives `path` to this owner, if this process can and need be. Links are not followed.
    pub fn take(&self, path: &Path) -> Result<()> {
        if !is_root() {
            return Ok(());
        }
        std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid)).context(format!(
            "give {} to user {}",
            path.display(),
            self.uid
        ))
    }

    /// Gives away a whole tree, links not followed.
    pub fn take_tree(&self, path: &Path) -> Result<()> {
        self.take(path)?;
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
            for entry in std::fs::read_dir(path).context(format!("read {}", path.display()))? {
                self.take_tree(&entry.context("read a directory")?.path())?;
            }
        }
        Ok(())
    }

    /// The name of the user, for what is printed; its number if it has none.
    pub fn user_name(&self) -> String {
        let output = Command::new("id").args(["-nu", &self.uid.to_string()]).output();
        let name = output.ok().filter(|o| o.status.success());
        name.map_or(self.uid.to_string(), |o| String::from_utf8_lossy(&o.stdout).trim().to_string())
    }
}

/// Asks `id`, which knows all of the host's directories of users.
fn id(arguments: &[&str]) -> Option<u32> {
    let output = Command::new("id").args(arguments).output().ok().filter(|o| o.status.success())?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

fn group_number(name: &str) -> Option<u32> {
    let output = Command::new("getent").args(["group", name]).output().ok();
    let output = output.filter(|o| o.status.success());
    let known = output
        .and_then(|o| String::from_utf8(o.stdout).ok()?.split(':').nth(2)?.trim().parse().ok());
    known.or(name.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_names_or_numbers() {
        assert_eq!(Owner::parse("root").unwrap(), Owner { uid: 0, gid: 0 });
        assert_eq!(Owner::parse("0:0").unwrap(), Owner { uid: 0, gid: 0 });
        assert_eq!(Owner::parse("root:7").unwrap().gid, 7);
        assert_eq!(Owner::parse("nobody-of-that-name").unwrap_err().kind(), Kind::Config);
    }
}
