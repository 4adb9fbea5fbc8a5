//! A location: one object store that holds a complete copy.
//!
//! Everything that is stored goes through here, and so does everything that is read.
//!
//! ```text
//! location.rs        open, names and limits
//! location/settings  what the config says
//! location/url       the URL, taken apart
//! location/cloud     what the clients of object stores have in common: timeouts and retries
//! location/s3        S3, and its shared credentials files in location/profile
//! location/gcs       Google Cloud Storage
//! location/azure     Azure Blob Storage
//! location/connector HTTP connections: TLS, certificates, proxy
//! location/disk      what a folder needs: no root made by accident, directory entries synced
//! location/put       create-if-absent, and finding out what became of a write
//! location/get       whole objects, ranges, sizes
//! location/list      listings, deletion
//! location/probe     does the store keep the promises that the layout needs?
//! location/requests  how many there were, by kind
//! location/fault     a store's answers as kinds, reasons and remedies
//! ```
//!
//! What always holds: an object is written once, with one request, and never written over. When
//! `put` says so, the object is durable, whole, and equal to what was given, whoever wrote it. A
//! crash leaves the object there whole, or not at all; in a folder it may also leave `<name>#<n>`,
//! a copy that was not yet published and that no listing shows.

mod azure;
mod cloud;
#[cfg(any(test, feature = "testing"))]
pub mod conformance;
mod connector;
mod disk;
mod fault;
mod gcs;
mod get;
mod list;
mod probe;
mod profile;
mod put;
mod requests;
mod s3;
mod secret;
mod settings;
mod url;

pub use fault::{is_denied, is_overload, is_under_lock};
pub use list::Listed;
pub use probe::Probe;
pub use put::{Put, PutNew};
pub use requests::Requests;
pub use secret::Secret;
pub use settings::{Encryption, LocationSettings, Role, TlsMin};

use crate::error::{Context, Error, Kind, Result};
use crate::id::LocationName;
use crate::name::ObjectName;
use bytes::Bytes;
use cloud::Stores;
use disk::Disk;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The largest object that is written, and that is read in one piece, in bytes.
pub const OBJECT_BYTES_MAX: u64 = 64 << 20;

/// What each request gets at least.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// The least speed that a store is waited for, in bytes per second.
const SPEED_MIN: u64 = 1_000_000;

/// One object store that holds a complete copy. Clones share connections.
///
/// Every future here may be dropped at any time. A write that is dropped may or may not have
/// happened; `put` again finds out.
#[derive(Clone)]
pub struct Location(Arc<Inner>);

struct Inner {
    settings: LocationSettings,
    /// `None` for a folder.
    store: Option<url::Store>,
    /// Before every name: the URL's prefix, or a folder's whole path.
    prefix: Path,
    reads: Arc<dyn ObjectStore>,
    writes: Arc<dyn ObjectStore>,
    requests: Arc<requests::Counter>,
    disk: Option<Disk>,
    turns: put::Turns,
}

impl Location {
    /// Checks the settings and sets up the clients. Reads the CA file and nothing else; a location
    /// that is down opens like any other. Every fault is of kind `Config`.
    pub fn open(settings: &LocationSettings) -> Result<Location> {
        let open = || -> Result<Inner> {
            if let Some((key, kinds)) = settings.misplaced() {
                return Err(Error::new(Kind::Config, format!("{key} is for {kinds} locations"))
                    .remedy("remove it, or correct the url"));
            }
            Ok(match url::parse(&settings.url)? {
                url::Place::Folder(root) => folder(settings, root)?,
                url::Place::Bucket { store, bucket, prefix } => {
                    if let Some(class) = &settings.storage_class {
                        put::check_storage_class(store, class)?;
                    }
                    let stores = match store {
                        url::Store::S3 => s3::open(settings, &bucket)?,
                        url::Store::Google => gcs::open(settings, &bucket)?,
                        url::Store::Azure => azure::open(settings, &bucket)?,
                    };
                    Inner::new(settings, Some(store), prefix, stores, None)
                }
                #[cfg(any(test, feature = "testing"))]
                url::Place::Memory => {
                    let store = Arc::new(object_store::memory::InMemory::new());
                    let stores = Stores { reads: store.clone(), writes: store };
                    Inner::new(settings, None, Path::ROOT, stores, None)
                }
            })
        };
        let inner = open().context(format!("location {}", settings.name))?;
        Ok(Location(Arc::new(inner)))
    }

    pub fn name(&self) -> &LocationName {
        &self.0.settings.name
    }

    /// The URL of the settings. It never holds a secret: `open` refuses one that does.
    pub fn url(&self) -> &str {
        &self.0.settings.url
    }

    pub fn role(&self) -> Role {
        self.0.settings.role
    }

    /// True if acknowledgement counts it.
    pub fn is_required(&self) -> bool {
        self.0.settings.is_required()
    }

    /// True if the config declares that one agent only writes here.
    pub fn has_single_writer(&self) -> bool {
        self.0.settings.single_writer
    }

    /// What this process has asked of it so far.
    pub fn requests(&self) -> Requests {
        self.0.requests.now()
    }

    /// True for a folder, whose listings are a walk on a disk and not pages from afar.
    pub fn is_folder(&self) -> bool {
        self.0.disk.is_some()
    }

    /// For `init` only: makes a folder's root, durably. A bucket must be there already.
    pub async fn create_root(&self) -> Result<()> {
        self.on_disk(|disk| disk.create_root()).await.map(drop)
    }

    /// The `cluster` object, which `init` makes. A location without it is unavailable, and is never
    /// filled anew: its disk may just not be mounted.
    pub async fn require_cluster(&self) -> Result<Bytes> {
        self.get(&ObjectName::Cluster).await.map_err(|error| match error.kind() {
            Kind::Missing => Error::new(
                Kind::Storage,
                format!(
                    "location {}: no cluster object at {}: not mounted, wrong prefix, or never \
                     initialised",
                    self.name(),
                    self.url()
                ),
            )
            .remedy("mount it or correct its url, or run `backstay-agent init` if it is new"),
            _ => error,
        })
    }

    /// Where `path`, relative to the prefix, is in the store.
    fn at(&self, path: &str) -> Result<Path> {
        let full = match self.0.prefix.as_ref() {
            "" => path.to_string(),
            prefix => format!("{prefix}/{path}"),
        };
        Path::parse(full).map_err(|e| {
            Error::new(Kind::Bug, self.say("name", path, &format!("not a path of a store: {e}")))
        })
    }

    /// `path` relative to the prefix.
    fn relative(&self, path: &Path) -> String {
        let prefix = self.0.prefix.as_ref();
        let full = path.as_ref();
        full.strip_prefix(prefix).unwrap_or(full).trim_start_matches('/').to_string()
    }

    /// How long one request may take that moves `size` bytes.
    fn patience(&self, size: u64) -> Duration {
        self.0.settings.request_timeout + transfer_time(size)
    }

    /// Runs `work` on a folder's disk, off the reactor; nothing where there is no folder.
    async fn on_disk<T, F>(&self, work: F) -> Result<Option<T>>
    where
        T: Send + 'static,
        F: FnOnce(Disk) -> Result<T> + Send + 'static,
    {
        let Some(disk) = self.0.disk.clone() else { return Ok(None) };
        let done = tokio::task::spawn_blocking(move || work(disk))
            .await
            .map_err(|e| Error::new(Kind::Bug, format!("disk work ended early: {e}")))?;
        done.map(Some).context(format!("location {}", self.name()))
    }
}

impl Inner {
    fn new(
        settings: &LocationSettings,
        store: Option<url::Store>,
        prefix: Path,
        stores: Stores,
        disk: Option<Disk>,
    ) -> Inner {
        let Stores { reads, writes } = stores;
        let requests = Arc::default();
        Inner {
            settings: settings.clone(),
            store,
            prefix,
            reads: requests::Counted::wrap(reads, &requests),
            writes: requests::Counted::wrap(writes, &requests),
            requests,
            disk,
            turns: put::Turns::default(),
        }
    }
}

/// The store begins at `/`, so that opening neither needs the root nor makes it.
fn folder(settings: &LocationSettings, root: PathBuf) -> Result<Inner> {
    let prefix = Path::from_absolute_path(&root).map_err(|e| {
        Error::new(Kind::Config, format!("{} cannot be a location's folder: {e}", root.display()))
            .remedy("use a path of printable UTF-8 characters")
    })?;
    let store = Arc::new(LocalFileSystem::new().with_fsync(true));
    let stores = Stores { reads: store.clone(), writes: store };
    Ok(Inner::new(settings, None, prefix, stores, Some(Disk::new(root))))
}

/// How long `size` bytes may take.
fn transfer_time(size: u64) -> Duration {
    Duration::from_millis(size * 1000 / SPEED_MIN)
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Location({} at {})", self.name(), self.url())
    }
}

#[cfg(test)]
mod tests;
