//! The agent's data keys: a fresh epoch at each start and every 24 hours.
//!
//! The wrap of an epoch is kept in the state directory, fsynced, before anything is sealed under it: objects that
//! wait in the spool for a location that is down can still be given their wrap after a restart. The key itself
//! lives in memory only.

use crate::durable;
use backstay_common::id::{EpochId, SystemId};
use backstay_common::keys::{Epoch, Keyring};
use backstay_common::name::ObjectName;
use backstay_common::{Context, Error, Kind, Result};
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// How long one data key is used.
const EPOCH_LIFE: Duration = Duration::from_secs(24 * 3600);

/// A wrap as it is stored.
#[derive(Clone, Debug)]
pub struct Wrap {
    pub name: ObjectName,
    pub bytes: Bytes,
}

/// Makes and keeps the epochs of one agent.
#[derive(Debug)]
pub struct Epochs {
    keyring: Arc<Keyring>,
    system: SystemId,
    /// `<state-dir>/keys`: one file per epoch, named `<epoch>.<wrap>`.
    folder: PathBuf,
    current: Mutex<Option<(Arc<Epoch>, Instant)>>,
    /// One wrap is written at a time.
    keeping: std::sync::Mutex<()>,
}

impl Epochs {
    pub fn new(
        keyring: Arc<Keyring>,
        system: SystemId,
        state_dir: &std::path::Path,
    ) -> Result<Epochs> {
        let folder = state_dir.join("keys");
        std::fs::create_dir_all(&folder).context(format!("create {}", folder.display()))?;
        Ok(Epochs {
            keyring,
            system,
            folder,
            current: Mutex::new(None),
            keeping: Default::default(),
        })
    }

    pub fn keyring(&self) -> &Arc<Keyring> {
        &self.keyring
    }

    /// The epoch to seal under now.
    pub async fn current(&self) -> Result<Arc<Epoch>> {
        let mut current = self.current.lock().await;
        if let Some((epoch, made)) = &*current
            && made.elapsed() < EPOCH_LIFE
        {
            return Ok(epoch.clone());
        }
        let (epoch, wrap) = self.keyring.new_epoch(self.system).await?;
        self.keep(&wrap.name, &wrap.bytes)?;
        *current = Some((epoch.clone(), Instant::now()));
        tracing::info!(epoch = %epoch.id(), "new epoch");
        Ok(epoch)
    }

    /// The wraps of an epoch that this agent made, now or before a restart.
    pub fn wraps(&self, epoch: EpochId) -> Result<Vec<Wrap>> {
        let doing = || format!("read {}", self.folder.display());
        let mut wraps = Vec::new();
        for entry in std::fs::read_dir(&self.folder).context(doing())? {
            let entry = entry.context(doing())?;
            let file = entry.file_name().to_string_lossy().into_owned();
            let Some((of, wrap)) = file.split_once('.') else { continue };
            if let (true, Ok(wrap)) = (of == epoch.to_string(), wrap.parse()) {
                let bytes = std::fs::read(entry.path()).context(doing())?.into();
                wraps.push(Wrap {
                    name: ObjectName::Wrap { system: self.system, epoch, wrap },
                    bytes,
                });
            }
        }
        match wraps.is_empty() {
            false => Ok(wraps),
            true => Err(Error::new(
                Kind::Missing,
                format!("the wrap of epoch {epoch} is not in {}", self.folder.display()),
            )),
        }
    }

    /// Keeps a wrap durably, for objects that are to be stored later.
    pub fn keep(&self, name: &ObjectName, bytes: &[u8]) -> Result<()> {
        let ObjectName::Wrap { epoch, wrap, .. } = name else {
            return Err(Error::new(Kind::Bug, format!("{name} is no wrap")));
        };
        let path = self.folder.join(format!("{epoch}.{wrap}"));
        let _alone = self.keeping.lock().expect("no panic while held");
        // One that is there may be cut off: earlier versions wrote it in place.
        if std::fs::read(&path).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        durable::write(&path, bytes).context(format!("keep {}", path.display()))
    }
}
