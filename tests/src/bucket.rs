//! An S3 server of our own, with faults on demand.
//!
//! ```text
//! bucket.rs          start, stop, what tests see of it
//! bucket/server      connections, TLS, and where the faults are done to requests
//! bucket/wire        a connection that can be reset
//! bucket/faults      what is to go wrong, scripted by operation, key, turn or chance
//! bucket/store       the operations of S3, checksums verified before anything is published
//! bucket/objects     what is stored: under one lock, in memory or in a folder
//! ```
//!
//! It speaks the real protocol (signatures, conditional writes, ranges, listings in pages,
//! multipart), runs on a thread of its own, and ends with the value that started it.

mod faults;
mod objects;
mod server;
mod store;
mod wire;

pub use faults::{Action, Fault, FaultId, Faults, Operation};

use anyhow::{Context, Result};
use backstay_common::location::{LocationSettings, Secret};
use bytes::Bytes;
use objects::Objects;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The bucket of a server that was told no other.
pub const BUCKET: &str = "backstay";
/// What the server wants requests signed with.
pub const ACCESS_KEY_ID: &str = "backstay";
pub const SECRET_ACCESS_KEY: &str = "backstay-test-secret";
pub const REGION: &str = "us-east-1";

/// How a server is to be started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Loopback, any free port, unless told.
    pub listen: SocketAddr,
    /// At least one; the first is the one that tests use.
    pub buckets: Vec<String>,
    /// Keep objects here instead of in memory.
    pub dir: Option<PathBuf>,
    pub tls: Option<Tls>,
    /// Speaks no newer TLS than 1.2.
    pub tls_is_old: bool,
}

/// A certificate chain and its key, in PEM; and the authority that clients are to trust.
#[derive(Clone, Debug)]
pub struct Tls {
    pub certificate: String,
    pub key: String,
    pub ca_file: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            buckets: vec![BUCKET.to_string()],
            dir: None,
            tls: None,
            tls_is_old: false,
        }
    }
}

/// A running S3 server. Dropping it ends it, and what it held in memory is gone.
#[derive(Debug)]
pub struct Bucket {
    bucket: String,
    endpoint: String,
    ca_file: Option<PathBuf>,
    objects: Arc<Objects>,
    faults: Faults,
    /// Ends the server's thread when dropped.
    _server: server::Running,
    /// The authority's certificate, if we made it.
    _certificates: Option<tempfile::TempDir>,
}

impl Bucket {
    /// Plain HTTP on a free port of loopback, objects in memory.
    pub async fn start() -> Bucket {
        Bucket::start_sync()
    }

    /// The same, for tests without a runtime.
    pub fn start_sync() -> Bucket {
        Bucket::with(Options::default()).expect("a server on loopback starts")
    }

    /// The same over TLS, with a certificate authority made for it, which `settings` names.
    pub fn start_tls() -> Bucket {
        Bucket::start_tls_with(Options::default())
    }

    /// The same, with other options besides.
    pub fn start_tls_with(options: Options) -> Bucket {
        let folder = tempfile::tempdir().expect("there is a temporary folder");
        let tls = server::certificates(folder.path()).expect("certificates are made");
        let mut bucket = Bucket::with(Options { tls: Some(tls), ..options })
            .expect("a server on loopback starts");
        bucket._certificates = Some(folder);
        bucket
    }

    /// Starts a server as told. It answers from the moment that this returns.
    pub fn with(options: Options) -> Result<Bucket> {
        let objects = Objects::open(&options.buckets, options.dir.as_deref())?;
        let (objects, faults) = (Arc::new(objects), Faults::default());
        let scheme = if options.tls.is_some() { "https" } else { "http" };
        let ca_file = options.tls.as_ref().and_then(|tls| tls.ca_file.clone());
        let server = server::Running::start(&options, objects.clone(), faults.clone())?;
        Ok(Bucket {
            bucket: options.buckets.into_iter().next().context("a server needs a bucket")?,
            endpoint: format!("{scheme}://{}", server.address()),
            ca_file,
            objects,
            faults,
            _server: server,
            _certificates: None,
        })
    }

    /// `http://127.0.0.1:PORT`
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A location of this name, under a prefix of the same name: `s3://backstay/<name>`.
    ///
    /// # Panics
    /// If `name` is not the name of a location.
    pub fn settings(&self, name: &str) -> LocationSettings {
        let location = name.parse().expect("the name of a location");
        let mut settings = LocationSettings::new(location, format!("s3://{}/{name}", self.bucket));
        settings.endpoint = Some(self.endpoint.clone());
        settings.region = Some(REGION.to_string());
        settings.access_key_id = Some(ACCESS_KEY_ID.to_string());
        settings.secret_access_key = Some(Secret::new(SECRET_ACCESS_KEY));
        settings.ca_file = self.ca_file.clone();
        settings.allow_http = self.endpoint.starts_with("http:");
        settings.request_timeout = Duration::from_secs(10);
        settings
    }

    /// What is to go wrong.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Everything stored, by key; keys begin with the location's prefix.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.objects.all(&self.bucket)
    }

    /// Takes an object away behind everybody's back; whether it was there.
    pub fn remove(&self, key: &str) -> bool {
        self.objects.remove(&self.bucket, key).expect("the bucket is there")
    }

    /// Puts other bytes in an object's place behind everybody's back.
    pub fn replace(&self, key: &str, bytes: impl Into<Bytes>) {
        let anything = objects::Condition::default();
        self.objects.put(&self.bucket, key, bytes.into(), &anything).expect("the object is stored");
    }

    /// How often each operation has been asked for, faulty answers included.
    pub fn request_counts(&self) -> BTreeMap<Operation, u64> {
        self.faults.counts()
    }
}
