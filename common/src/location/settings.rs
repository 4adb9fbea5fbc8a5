//! What the config says of a location.

use super::{REQUEST_TIMEOUT, Secret};
use crate::id::LocationName;
use std::path::PathBuf;
use std::time::Duration;

/// What the config says of a location. What is not given comes from the environment or the platform, as is usual for the
/// kind of store.
#[derive(Clone, Debug)]
pub struct LocationSettings {
    pub name: LocationName,
    /// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` or `file:///folder`.
    pub url: String,
    pub role: Role,
    /// One agent only ever writes here: the store need not honour create-if-absent.
    pub single_writer: bool,
    /// Another server than Amazon's, Google's or Microsoft's, as an http or https URL.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<Secret>,
    pub session_token: Option<Secret>,
    /// Of the shared credentials file (`~/.aws/credentials`).
    pub profile: Option<String>,
    pub encryption: Option<Encryption>,
    /// A Google service account's key, or application default credentials, as JSON.
    pub credentials_file: Option<PathBuf>,
    /// The Azure storage account.
    pub account: Option<String>,
    pub account_key: Option<Secret>,
    pub sas_token: Option<Secret>,
    /// The storage class, or access tier, of objects of 128 KiB and more.
    pub storage_class: Option<String>,
    /// PEM certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    pub tls_min: TlsMin,
    /// An http or https URL; it may hold a password.
    pub proxy: Option<Secret>,
    /// Whether the endpoint may be without TLS.
    pub allow_http: bool,
    /// `https://endpoint/bucket/key` if true (the default), `https://bucket.endpoint/key` if false.
    pub path_style: Option<bool>,
    /// What each request gets, besides the time for its bytes at 1 MB/s. A connection that
    /// is silent for half of it while answering is given up.
    pub request_timeout: Duration,
}

/// Whether a location counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Acknowledgement waits for it, the spool keeps WAL for it, and a snapshot is done when it has it.
    Required,
    /// It gets everything that the others get, as far as it can, and nothing ever waits for it.
    BestEffort,
}

/// The oldest TLS that is spoken. There is nothing below 1.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMin {
    Tls12,
    Tls13,
}

/// What an S3 store is asked to encrypt objects with, besides our own encryption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Keys of the store (SSE-S3).
    Store,
    /// A key of the store's KMS (SSE-KMS): this one, or the account's default.
    Kms(Option<String>),
}

impl LocationSettings {
    /// A name and a URL, and the defaults for everything else.
    pub fn new(name: LocationName, url: impl Into<String>) -> LocationSettings {
        LocationSettings {
            name,
            url: url.into(),
            role: Role::Required,
            single_writer: false,
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            profile: None,
            encryption: None,
            credentials_file: None,
            account: None,
            account_key: None,
            sas_token: None,
            storage_class: None,
            ca_file: None,
            tls_min: TlsMin::Tls12,
            proxy: None,
            allow_http: false,
            path_style: None,
            request_timeout: REQUEST_TIMEOUT,
        }
    }

    /// True if acknowledgement counts it.
    pub fn is_required(&self) -> bool {
        self.role == Role::Required
    }

    /// The first key that is set and means nothing to the URL's kind of store, and the kinds that it is for.
    pub fn misplaced(&self) -> Option<(&'static str, &'static str)> {
        const CLOUD: &str = "s3://, gs:// and az://";
        let keys = [
            ("single-writer", self.single_writer, CLOUD),
            ("endpoint", self.endpoint.is_some(), CLOUD),
            ("storage-class", self.storage_class.is_some(), CLOUD),
            ("ca-file", self.ca_file.is_some(), CLOUD),
            ("tls-min", self.tls_min != TlsMin::Tls12, CLOUD),
            ("proxy", self.proxy.is_some(), CLOUD),
            ("allow-http", self.allow_http, CLOUD),
            ("region", self.region.is_some(), "s3://"),
            ("access-key-id", self.access_key_id.is_some(), "s3://"),
            ("secret-access-key", self.secret_access_key.is_some(), "s3://"),
            ("session-token", self.session_token.is_some(), "s3://"),
            ("profile", self.profile.is_some(), "s3://"),
            ("encryption", self.encryption.is_some(), "s3://"),
            ("path-style", self.path_style.is_some(), "s3://"),
            ("credentials-file", self.credentials_file.is_some(), "gs://"),
            ("account", self.account.is_some(), "az://"),
            ("account-key", self.account_key.is_some(), "az://"),
            ("sas-token", self.sas_token.is_some(), "az://"),
        ];
        let scheme = self.url.split_once("://").map_or("", |(scheme, _)| scheme);
        let fits = |kinds: &str| kinds.contains(&format!("{scheme}://"));
        keys.into_iter().find(|(_, is_set, kinds)| *is_set && !fits(kinds)).map(|(k, _, f)| (k, f))
    }
}
