//! What the clients of all object stores have in common: one store for reading and one for writing, over the same
//! credentials.
//!
//! They differ in who watches over time. The HTTP client's read timeout runs while a request's body
//! is still being sent, so it would cut off any upload that takes longer; and the store's own
//! retries cannot tell our own earlier write from somebody else's. So the writing store has
//! neither: `put` bounds each attempt by the size of what it sends, and reads back before it tries
//! again. The reading store retries, and gives up on a connection that falls silent.

use super::OBJECT_BYTES_MAX;
use super::settings::LocationSettings;
use crate::error::{Error, Kind, Result};
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use std::sync::Arc;
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Retries of one read, and how long after its start the last may begin.
const READ_RETRIES: usize = 3;
const READ_RETRY_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) struct Stores {
    pub(super) reads: Arc<dyn ObjectStore>,
    pub(super) writes: Arc<dyn ObjectStore>,
}

/// Builds both stores over the same credentials from one of `object_store`'s builders, which share no trait.
macro_rules! stores {
    ($builder:expr, $settings:expr, $plain:expr) => {{
        let (builder, settings, plain) = ($builder, $settings, $plain);
        let refused = |e| $crate::location::fault::config("open", &settings.url, &e);
        let reads = builder
            .clone()
            .with_client_options($crate::location::cloud::reading(settings, plain))
            .with_retry($crate::location::cloud::reading_retries())
            .build()
            .map_err(refused)?;
        let writes = builder
            .with_credentials(reads.credentials().clone())
            .with_client_options($crate::location::cloud::writing(settings, plain))
            .with_retry($crate::location::cloud::no_retries())
            .build()
            .map_err(refused)?;
        Ok($crate::location::cloud::Stores {
            reads: std::sync::Arc::new(reads),
            writes: std::sync::Arc::new(writes),
        })
    }};
}
pub(super) use stores;

pub(super) fn reading(settings: &LocationSettings, plain: bool) -> ClientOptions {
    writing(settings, plain).with_read_timeout(settings.request_timeout / 2)
}

pub(super) fn writing(settings: &LocationSettings, plain: bool) -> ClientOptions {
    let total = settings.request_timeout + super::transfer_time(OBJECT_BYTES_MAX);
    ClientOptions::new()
        .with_allow_http(plain)
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_timeout(total)
}

pub(super) fn reading_retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig { max_backoff: Duration::from_secs(5), ..Default::default() },
        max_retries: READ_RETRIES,
        retry_timeout: READ_RETRY_TIMEOUT,
    }
}

pub(super) fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..Default::default() }
}

/// Whether the endpoint is without TLS, which must have been asked for.
pub(super) fn is_plain_http(endpoint: Option<&str>, allowed: bool) -> Result<bool> {
    let Some(endpoint) = endpoint.filter(|endpoint| !endpoint.is_empty()) else { return Ok(false) };
    let url = url::Url::parse(endpoint)
        .ok()
        .filter(|url| url.host_str().is_some() && ["http", "https"].contains(&url.scheme()))
        .ok_or_else(|| {
            Error::new(Kind::Config, "the endpoint is not an http or https URL")
                .remedy("write it as https://HOST[:PORT]")
        })?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Error::new(Kind::Config, "the endpoint holds a user name or password")
            .remedy("give credentials in the keys that are for them"));
    }
    match url.scheme() == "http" {
        true if !allowed => {
            Err(Error::new(Kind::Config, format!("endpoint {endpoint} is without TLS"))
                .remedy("use https, or set allow-http = true if that network may be trusted"))
        }
        plain => Ok(plain),
    }
}
