//! The passfile: `host:port:database:user:password` lines, the first match wins.

use super::{DEFAULT_SOCKET_DIRECTORY, Host, Password, Place};
use crate::{Context, Error, Kind, Result};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// A longer passfile is not one.
const PASSFILE_BYTES_MAX: u64 = 1 << 20;

/// The password for a server in the passfile at `path`; none if there is no such file or line.
///
/// libpq warns of a file that others can read, and goes on without it; here that is an error, raised only
/// when a password is needed.
pub(super) fn find(path: &Path, host: &Host, dbname: &str, user: &str) -> Result<Option<Password>> {
    let Some(text) = read(path).context(format_args!("passfile {}", path.display()))? else {
        return Ok(None);
    };
    let names = host_names(host);
    let port = host.port.to_string();
    Ok(text.lines().find_map(|line| {
        names
            .iter()
            .find_map(|name| password_in(line, [name.as_str(), port.as_str(), dbname, user]))
    }))
}

fn read(path: &Path) -> Result<Option<Zeroizing<String>>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::new(Kind::Config, error)),
    };
    let metadata = file.metadata().context("stat")?;
    if !metadata.is_file() {
        return Err(Error::new(Kind::Config, "is not a plain file"));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(Error::new(Kind::Config, "can be read by others")
            .remedy(format_args!("chmod 0600 {}", path.display())));
    }
    if metadata.len() > PASSFILE_BYTES_MAX {
        return Err(Error::new(Kind::Config, "is larger than 1 MiB"));
    }
    let mut text = Zeroizing::new(String::with_capacity(metadata.len() as usize + 1));
    file.take(PASSFILE_BYTES_MAX).read_to_string(&mut text).context("read")?;
    Ok(Some(text))
}

/// What the first field may say for this host. The usual socket directory is "localhost", as in libpq.
fn host_names(host: &Host) -> Vec<String> {
    match &host.place {
        Place::Socket(directory) => {
            let mut names = vec![directory.display().to_string()];
            if directory == Path::new(DEFAULT_SOCKET_DIRECTORY) {
                names.push("localhost".to_string());
            }
            names
        }
        Place::Network { name: Some(name), .. } => vec![name.clone()],
        Place::Network { address: Some(address), .. } => vec![address.to_string()],
        Place::Network { .. } => vec!["localhost".to_string()],
    }
}

fn password_in(line: &str, wanted: [&str; 4]) -> Option<Password> {
    if line.starts_with('#') {
        return None;
    }
    let mut rest = line;
    for wanted in wanted {
        let (field, after) = field(rest);
        if field != "*" && unescape(field) != wanted {
            return None;
        }
        rest = after?;
    }
    let password = Zeroizing::new(unescape(field(rest).0));
    (!password.is_empty()).then_some(Password(password))
}

/// Up to the first colon that no backslash precedes; and what follows it.
fn field(text: &str) -> (&str, Option<&str>) {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ':' => return (&text[..at], Some(&text[at + 1..])),
            _ => {}
        }
    }
    (text, None)
}

fn unescape(field: &str) -> String {
    let mut text = String::with_capacity(field.len());
    let mut chars = field.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => text.extend(chars.next()),
            _ => text.push(c),
        }
    }
    text
}

/// Name and home directory of the user who runs this, from /etc/passwd.
pub(super) fn account() -> Option<(String, PathBuf)> {
    let id = rustix::process::geteuid().as_raw().to_string();
    let accounts = std::fs::read_to_string("/etc/passwd").ok()?;
    accounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields[..] {
            [name, _, uid, _, _, home, ..] if uid == id => Some((name.to_string(), home.into())),
            _ => None,
        }
    })
}
