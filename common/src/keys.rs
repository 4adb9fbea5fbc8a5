//! Data keys: made for an epoch, wrapped by a key provider, forgotten when no longer needed.
//!
//! An agent makes a new epoch whenever it starts, and every 24 hours. The epoch key itself is never stored: each
//! location holds it as `keys/<epoch>/<wrap>`, wrapped by a provider, and holds that before any
//! object that is sealed under it. Rotating what wraps adds small objects; no data is touched.

pub mod file;

use crate::cbor::{self, Fields};
use crate::id::{ClusterName, EpochId, SystemId, random_bytes};
use crate::location::Location;
use crate::name::{ObjectName, folder};
use crate::seal::{Header, ObjectKind, Sealed, plain_object};
use crate::{Context, Error, Kind, Result};
use async_trait::async_trait;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use zeroize::Zeroizing;

/// No object that holds a wrapped key is longer.
pub const WRAP_BYTES_MAX: u64 = 64 << 10;

/// 32 bytes that must never be printed or stored.
pub type SecretKey = Zeroizing<[u8; 32]>;

const OBJECT_CONTEXT: &str = "backstay 2026-11-22 v1 object keys of an epoch";
const SALT_CONTEXT: &str = "backstay 2026-11-22 v1 object salts of an epoch";
const ID_CONTEXT: &str = "backstay 2026-11-22 v1 epoch id";

/// One epoch with its key in memory.
pub struct Epoch {
    id: EpochId,
    key: SecretKey,
    object_key: SecretKey,
    salt_key: SecretKey,
}

impl std::fmt::Debug for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Epoch").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Epoch {
    /// A new epoch with a fresh key.
    pub fn generate() -> Epoch {
        Epoch::from_key(Zeroizing::new(random_bytes()))
    }

    pub fn from_key(key: SecretKey) -> Epoch {
        let derive = |context| Zeroizing::new(blake3::derive_key(context, &key[..]));
        let id = derive(ID_CONTEXT)[..16].try_into().expect("16 bytes");
        Epoch {
            id: EpochId::from_bytes(id),
            object_key: derive(OBJECT_CONTEXT),
            salt_key: derive(SALT_CONTEXT),
            key,
        }
    }

    pub fn id(&self) -> EpochId {
        self.id
    }

    pub(crate) fn object_key(&self) -> &[u8; 32] {
        &self.object_key
    }

    pub(crate) fn salt_key(&self) -> &[u8; 32] {
        &self.salt_key
    }
}

/// What a wrap is bound to: it opens nothing under another cluster, system or epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrapContext {
    pub cluster: ClusterName,
    pub system: SystemId,
    pub epoch: EpochId,
}

impl WrapContext {
    /// The bytes that a provider authenticates with the key.
    pub fn associated(&self) -> Vec<u8> {
        format!("backstay wrap v1\0{}\0{}\0{}", self.cluster, self.system, self.epoch).into_bytes()
    }
}

/// Something that holds a key-encryption key, or can use one: a file, a KMS, a customer's own.
///
/// Contract: what [`wrap`](KeyProvider::wrap) returns reveals nothing of the key and can be stored in the open;
/// [`unwrap`](KeyProvider::unwrap) gives exactly that key for an equal context and fails with [`Kind::Key`] for any
/// other; neither prints a secret. Both may be called often and at the same time.
#[async_trait]
pub trait KeyProvider: Send + Sync + std::fmt::Debug {
    /// What kind it is, as the config says: "file".
    fn kind(&self) -> &'static str;
    /// Which of its keys: stored beside the wrap, and named in errors. Not secret.
    fn key_id(&self) -> String;
    async fn wrap(&self, key: &SecretKey, context: &WrapContext) -> Result<Vec<u8>>;
    async fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<SecretKey>;
}

/// The plain section of a wrap object.
#[derive(Debug, minicbor::Encode, minicbor::Decode)]
#[cbor(map)]
struct WrapRecord {
    #[n(0)]
    provider: String,
    #[n(1)]
    key_id: String,
    #[cbor(n(2), with = "minicbor::bytes")]
    wrapped: Vec<u8>,
}

impl Fields for WrapRecord {
    const KNOWN: u64 = 3;
    const WHAT: &'static str = "a wrapped key";
}

/// The epochs of one cluster that are open in this process.
#[derive(Debug)]
pub struct Keyring {
    provider: Arc<dyn KeyProvider>,
    cluster: ClusterName,
    open: Mutex<HashMap<EpochId, Arc<Epoch>>>,
}

impl Keyring {
    pub fn new(provider: Arc<dyn KeyProvider>, cluster: ClusterName) -> Keyring {
        Keyring { provider, cluster, open: Mutex::default() }
    }

    pub fn provider(&self) -> &dyn KeyProvider {
        &*self.provider
    }

    /// A new epoch, and the object that every location must hold before anything is sealed under it.
    pub async fn new_epoch(&self, system: SystemId) -> Result<(Arc<Epoch>, Sealed)> {
        let epoch = Epoch::generate();
        let context = WrapContext { cluster: self.cluster.clone(), system, epoch: epoch.id };
        let wrapped =
            self.provider.wrap(&epoch.key, &context).await.context("wrap an epoch key")?;
        // A wrap that cannot be opened again would make every later object worthless.
        let again = self.provider.unwrap(&wrapped, &context).await.context("check a new wrap")?;
        if *again != *epoch.key {
            return Err(Error::new(
                Kind::Key,
                "the key provider gave back another key than it got",
            ));
        }
        let record = WrapRecord {
            provider: self.provider.kind().to_string(),
            key_id: self.provider.key_id(),
            wrapped,
        };
        let object = plain_object(ObjectKind::Wrap, cbor::encode(&record), |wrap| {
            ObjectName::Wrap { system, epoch: epoch.id, wrap }
        });
        Ok((self.keep(epoch), object))
    }

    /// The epoch `id`, from memory or else from the first of `locations` whose wraps can be opened. The error is of the last.
    pub async fn epoch_anywhere(
        &self,
        system: SystemId,
        id: EpochId,
        locations: &[Location],
    ) -> Result<Arc<Epoch>> {
        let mut last = Error::new(Kind::Storage, "no location can be read");
        for location in locations {
            match self.epoch(system, id, location).await {
                Ok(epoch) => return Ok(epoch),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The epoch `id`, from memory or else from the wraps that `location` holds.
    pub async fn epoch(
        &self,
        system: SystemId,
        id: EpochId,
        location: &Location,
    ) -> Result<Arc<Epoch>> {
        if let Some(epoch) = self.kept(id) {
            return Ok(epoch);
        }
        let mut refusals = Vec::new();
        for listed in location.list(&folder::epoch(system, id)).await? {
            let Some(name @ ObjectName::Wrap { .. }) = listed.name else { continue };
            // Anybody who may write to the store can put junk beside a good wrap: it is passed by.
            if listed.size > WRAP_BYTES_MAX {
                let reason = format!("{name} is too long for a wrap");
                refusals.push(Error::new(Kind::Corrupt, reason));
                continue;
            }
            let bytes = location.get(&name).await?;
            match self.open_wrap(system, id, &name, &bytes).await {
                Ok(epoch) => return Ok(self.keep(epoch)),
                Err(refusal) => refusals.push(refusal),
            }
        }
        Err(self.no_key(id, location, refusals))
    }

    async fn open_wrap(
        &self,
        system: SystemId,
        id: EpochId,
        name: &ObjectName,
        bytes: &bytes::Bytes,
    ) -> Result<Epoch> {
        let header = Header::check(bytes, name)?;
        let record: WrapRecord = cbor::decode(header.plain())?;
        let ours = (self.provider.kind(), self.provider.key_id());
        if (record.provider.as_str(), &record.key_id) != (ours.0, &ours.1) {
            let reason = format!("wrapped by {} key {}", record.provider, record.key_id);
            return Err(Error::new(Kind::Key, reason));
        }
        let context = WrapContext { cluster: self.cluster.clone(), system, epoch: id };
        let epoch = Epoch::from_key(self.provider.unwrap(&record.wrapped, &context).await?);
        match epoch.id == id {
            true => Ok(epoch),
            false => Err(Error::new(Kind::Corrupt, format!("{name} holds another epoch's key"))),
        }
    }

    fn no_key(&self, id: EpochId, location: &Location, refusals: Vec<Error>) -> Error {
        let (kind, key_id) = (self.provider.kind(), self.provider.key_id());
        let place = location.name();
        if refusals.is_empty() {
            let reason = format!("location {place} holds no wrapped key of epoch {id}");
            return Error::new(Kind::Missing, reason).remedy(
                "read from another location, or copy the folder keys/ from one that has it",
            );
        }
        let found: Vec<String> = refusals.iter().map(|e| e.message().to_string()).collect();
        Error::new(
            Kind::Key,
            format!(
                "the {kind} key {key_id} does not open epoch {id} at location {place}: {}",
                found.join("; ")
            ),
        )
        .remedy(format!("give the key that cluster {:?} was backed up with (--key-file, or [keys] in the config)", self.cluster.as_str()))
    }

    fn kept(&self, id: EpochId) -> Option<Arc<Epoch>> {
        self.open.lock().expect("no panic while held").get(&id).cloned()
    }

    fn keep(&self, epoch: Epoch) -> Arc<Epoch> {
        let epoch = Arc::new(epoch);
        self.open.lock().expect("no panic while held").insert(epoch.id, epoch.clone());
        epoch
    }
}
