//! The provider `file`: a key-encryption key in a file, that its owner keeps safe elsewhere too.
//!
//! The file is one line of text, `backstay-key-1 <key id> <64 hex digits>`; lines that begin with `#` are
//! comments. The key id is derived from the key, so that a mistyped or damaged key is noticed.

use super::{KeyProvider, SecretKey, WrapContext};
use crate::id::{parse_hex, random_bytes};
use crate::{Context, Error, Kind, Result};
use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use async_trait::async_trait;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use zeroize::Zeroizing;

const WORD: &str = "backstay-key-1";
const ID_CONTEXT: &str = "backstay 2026-11-22 v1 key file id";
const WRAP_CONTEXT: &str = "backstay 2026-11-22 v1 key file wraps";
const SALT_BYTES: usize = 32;

/// A key-encryption key from a file.
pub struct FileProvider {
    key: SecretKey,
}

impl std::fmt::Debug for FileProvider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileProvider({})", self.key_id())
    }
}

impl FileProvider {
    pub fn generate() -> FileProvider {
        FileProvider { key: Zeroizing::new(random_bytes()) }
    }

    /// Reads a key file. Every fault is a [`Kind::Key`] that names the file and the remedy.
    pub fn read(path: &Path) -> Result<FileProvider> {
        let fault = |reason: String| {
            Error::new(Kind::Key, format!("key file {}: {reason}", path.display()))
        };
        let text = std::fs::read_to_string(path).map(Zeroizing::new).map_err(|e| {
            fault(e.to_string()).remedy(
                "give the path of the key that the backups were made with, or make one for a \
                 new cluster with `backstay keys generate --out FILE`",
            )
        })?;
        let mode = std::fs::metadata(path).map_err(|e| fault(e.to_string()))?.permissions().mode();
        if mode & 0o007 != 0 {
            return Err(fault("everybody on this host can read it".into())
                .remedy(format!("chmod 600 {}", path.display())));
        }
        FileProvider::parse(&text).map_err(|reason| {
            fault(reason.to_string())
                .remedy("take the key from where you keep its copy; this one is damaged")
        })
    }

    fn parse(text: &str) -> Result<FileProvider, &'static str> {
        let mut lines =
            text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        let line = lines.next().ok_or("it is empty")?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [WORD, id, key] = words[..] else {
            return Err("it is not a Backstay key (backstay-key-1 ID KEY)");
        };
        let key = parse_hex(key).map(Zeroizing::new).ok_or("the key is not 64 hex digits")?;
        let provider = FileProvider { key };
        match provider.key_id() == id && lines.next().is_none() {
            true => Ok(provider),
            false => Err("the key and its id do not belong together"),
        }
    }

    /// Writes a new file that only its owner can read, durably. Never overwrites.
    pub fn write(&self, path: &Path) -> Result<()> {
        let doing = || format!("write key file {}", path.display());
        let mut hex = Zeroizing::new(String::with_capacity(64));
        for byte in self.key.iter() {
            write!(hex, "{byte:02x}").expect("writing to memory");
        }
        let text = Zeroizing::new(format!(
            "# Backstay key. Whoever has it can read the backups; without it nobody can.\n\
             {WORD} {} {}\n",
            self.key_id(),
            hex.as_str()
        ));
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = file.map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::new(Kind::Config, format!("key file {} exists already", path.display()))
                    .remedy(
                        "choose another name; overwriting a key would make its backups unreadable",
                    )
            }
            _ => Error::new(Kind::Local, e).context(doing()),
        })?;
        file.write_all(text.as_bytes()).context(doing())?;
        file.sync_all().context(doing())?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(folder).and_then(|f| f.sync_all()).context(doing())
    }

    /// A fresh random salt gives every wrap a key of its own, so that the nonce can be constant.
    fn cipher(&self, salt: &[u8], context: &WrapContext) -> Aes256Gcm {
        let wrap_key = Zeroizing::new(blake3::derive_key(WRAP_CONTEXT, &self.key[..]));
        let mut hasher = blake3::Hasher::new_keyed(&wrap_key);
        hasher.update(salt);
        hasher.update(&context.associated());
        let key = Zeroizing::new(*hasher.finalize().as_bytes());
        Aes256Gcm::new((&*key).into())
    }
}

#[async_trait]
impl KeyProvider for FileProvider {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn key_id(&self) -> String {
        let id = Zeroizing::new(blake3::derive_key(ID_CONTEXT, &self.key[..]));
        id[..8].iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to memory");
            text
        })
    }

    async fn wrap(&self, key: &SecretKey, context: &WrapContext) -> Result<Vec<u8>> {
        let salt: [u8; SALT_BYTES] = random_bytes();
        let payload = Payload { msg: &key[..], aad: &context.associated() };
        let sealed = self
            .cipher(&salt, context)
            .encrypt(&Nonce::from([0; 12]), payload)
            .map_err(|_| Error::new(Kind::Bug, "AES-GCM refused 32 bytes"))?;
        Ok([&salt[..], &sealed].concat())
    }

    async fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<SecretKey> {
        let refused = || {
            let reason = format!("file key {} does not open the wrap", self.key_id());
            Error::new(Kind::Key, reason)
        };
        let (salt, sealed) = wrapped.split_at_checked(SALT_BYTES).ok_or_else(refused)?;
        let payload = Payload { msg: sealed, aad: &context.associated() };
        let plain = self.cipher(salt, context).decrypt(&Nonce::from([0; 12]), payload);
        let plain = plain.map(Zeroizing::new).map_err(|_| refused())?;
        plain[..].try_into().map(Zeroizing::new).map_err(|_| refused())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Epoch;

    fn context() -> WrapContext {
        WrapContext {
            cluster: "orders".parse().unwrap(),
            system: crate::id::SystemId::new(7),
            epoch: Epoch::generate().id(),
        }
    }

    #[tokio::test]
    async fn a_wrap_opens_only_with_its_key_and_context() {
        let provider = FileProvider::generate();
        let (key, context) = (Zeroizing::new(random_bytes()), context());
        let wrapped = provider.wrap(&key, &context).await.unwrap();
        assert_eq!(*provider.unwrap(&wrapped, &context).await.unwrap(), *key);
        assert_ne!(provider.wrap(&key, &context).await.unwrap(), wrapped, "wraps never repeat");

        let other = WrapContext { system: crate::id::SystemId::new(8), ..context.clone() };
        assert_eq!(provider.unwrap(&wrapped, &other).await.unwrap_err().kind(), Kind::Key);
        let wrong = FileProvider::generate();
        assert_eq!(wrong.unwrap(&wrapped, &context).await.unwrap_err().kind(), Kind::Key);
        for at in 0..wrapped.len() {
            let mut bent = wrapped.clone();
            bent[at] ^= 1;
            assert!(provider.unwrap(&bent, &context).await.is_err(), "byte {at}");
        }
        assert!(provider.unwrap(&wrapped[..20], &context).await.is_err());
    }

    #[test]
    fn files_read_back_and_are_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("orders.key");
        let made = FileProvider::generate();
        made.write(&path).unwrap();
        assert_eq!(FileProvider::read(&path).unwrap().key_id(), made.key_id());
        assert_eq!(made.write(&path).unwrap_err().kind(), Kind::Config);
        assert!(
            !format!("{made:?}")
                .contains(&made.key.iter().map(|b| format!("{b:02x}")).collect::<String>())
        );
    }

    #[test]
    fn faults_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("orders.key");
        assert!(FileProvider::read(&path).unwrap_err().to_string().contains("orders.key"));
        FileProvider::generate().write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let last = text.trim_end().chars().last().unwrap();
        let bent = text.trim_end().strip_suffix(last).unwrap().to_string()
            + if last == '0' { "1" } else { "0" };
        std::fs::write(&path, bent).unwrap();
        assert!(
            FileProvider::read(&path).unwrap_err().to_string().contains("do not belong together")
        );
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(FileProvider::read(&path).unwrap_err().to_string().contains("chmod 600"));
    }
}
