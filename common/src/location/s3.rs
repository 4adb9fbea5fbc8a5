//! The S3 client of a location: one store for reading and one for writing, over the same
//! credentials.
//!
//! They differ in who watches over time. The HTTP client's read timeout runs while a request's body
//! is still being sent, so it would cut off any upload that takes longer; and the store's own
//! retries cannot tell our own earlier write from somebody else's. So the writing store has
//! neither: `put` bounds each attempt by the size of what it sends, and reads back before it tries
//! again. The reading store retries, and gives up on a connection that falls silent.

use super::LocationSettings;
use super::OBJECT_BYTES_MAX;
use crate::error::{Error, Kind, Result};
use object_store::aws::{
    AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, Checksum, S3ConditionalPut,
};
use object_store::path::Path;
use object_store::{
    BackoffConfig, Certificate, ClientConfigKey, ClientOptions, RetryConfig,
    StaticCredentialProvider,
};
use std::sync::{Arc, Once};
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Retries of one read, and how long after its start the last may begin.
const READ_RETRIES: usize = 3;
const READ_RETRY_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) struct Stores {
    pub(super) reads: AmazonS3,
    pub(super) writes: AmazonS3,
}

/// Builds both stores. Reads the CA file; asks nothing of the network.
pub(super) fn open(settings: &LocationSettings, bucket: &str, prefix: &Path) -> Result<Stores> {
    install_crypto_provider();
    let builder = builder(settings, bucket)?;
    let certificates = certificates(settings)?;
    let total = settings.request_timeout + super::transfer_time(OBJECT_BYTES_MAX);
    let reading = options(&builder, &certificates)
        .with_timeout(total)
        .with_read_timeout(settings.request_timeout / 2);
    let retries = RetryConfig {
        backoff: BackoffConfig { max_backoff: Duration::from_secs(5), ..Default::default() },
        max_retries: READ_RETRIES,
        retry_timeout: READ_RETRY_TIMEOUT,
    };
    let refused = |e| super::fault::config("open", &format!("s3://{bucket}/{prefix}"), &e);
    let reads = builder
        .clone()
        .with_client_options(reading)
        .with_retry(retries)
        .build()
        .map_err(refused)?;
    let writing = options(&builder, &certificates).with_timeout(total);
    let writes = builder
        .with_credentials(reads.credentials().clone())
        .with_client_options(writing)
        .with_retry(RetryConfig { max_retries: 0, ..Default::default() })
        .build()
        .map_err(refused)?;
    Ok(Stores { reads, writes })
}

/// TLS needs one process-wide choice of cryptography; whoever chose first is right.
fn install_crypto_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// Environment first, then what the settings say.
fn builder(settings: &LocationSettings, bucket: &str) -> Result<AmazonS3Builder> {
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch);
    if let Some(endpoint) = &settings.endpoint {
        // The more specific of the two keys would win over the settings if the environment had it.
        builder = builder
            .with_config(AmazonS3ConfigKey::S3Endpoint, endpoint)
            .with_config(AmazonS3ConfigKey::Endpoint, endpoint);
    }
    if let Some(region) = &settings.region {
        builder = builder.with_region(region);
    }
    if let Some(path_style) = settings.path_style {
        builder = builder.with_virtual_hosted_style_request(!path_style);
    }
    if settings.allow_http {
        builder = builder.with_allow_http(true);
    }
    if let Some(credential) = credential(settings)? {
        builder =
            builder.with_credentials(Arc::new(StaticCredentialProvider::new(credential)) as _);
    }
    // The store checks every body against this before it publishes it; object lock demands one as
    // well.
    if builder.get_config_value(&AmazonS3ConfigKey::Checksum).is_none() {
        builder = builder.with_checksum_algorithm(Checksum::CRC64NVME);
    }
    let plain = is_plain_http(&builder)?;
    // Inside TLS the body needs no signature of its own, and SHA-256 would cost more than the
    // encryption.
    Ok(builder.with_unsigned_payload(!plain))
}

fn credential(settings: &LocationSettings) -> Result<Option<AwsCredential>> {
    match (&settings.access_key_id, &settings.secret_access_key) {
        (None, None) => Ok(None),
        (Some(key_id), Some(secret)) => Ok(Some(AwsCredential {
            key_id: key_id.clone(),
            secret_key: secret.expose().to_string(),
            token: settings.session_token.as_ref().map(|token| token.expose().to_string()),
        })),
        (key_id, _) => {
            let (there, missing) = match key_id {
                Some(_) => ("access-key-id", "secret-access-key"),
                None => ("secret-access-key", "access-key-id"),
            };
            Err(Error::new(Kind::Config, format!("{there} is given without {missing}"))
                .remedy("give both, or neither to take them from the environment"))
        }
    }
}

/// Whether the endpoint is without TLS, which must have been asked for.
fn is_plain_http(builder: &AmazonS3Builder) -> Result<bool> {
    let value = |key| builder.get_config_value(&key).filter(|value| !value.is_empty());
    let endpoint =
        value(AmazonS3ConfigKey::S3Endpoint).or_else(|| value(AmazonS3ConfigKey::Endpoint));
    let Some(endpoint) = endpoint else { return Ok(false) };
    let url = url::Url::parse(&endpoint)
        .ok()
        .filter(|url| url.host_str().is_some() && ["http", "https"].contains(&url.scheme()))
        .ok_or_else(|| {
            Error::new(Kind::Config, "the endpoint is not an http or https URL")
                .remedy("write it as https://HOST[:PORT]")
        })?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Error::new(Kind::Config, "the endpoint holds a user name or password")
            .remedy("give access-key-id and secret-access-key instead"));
    }
    let allowed = value(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp));
    match url.scheme() == "http" {
        true if allowed.as_deref() != Some("true") => {
            Err(Error::new(Kind::Config, format!("endpoint {endpoint} is without TLS"))
                .remedy("use https, or set allow-http = true if that network may be trusted"))
        }
        plain => Ok(plain),
    }
}

/// Client options that the environment may give, then ours.
fn options(builder: &AmazonS3Builder, certificates: &[Certificate]) -> ClientOptions {
    let mut options = ClientOptions::new();
    for key in [
        ClientConfigKey::AllowHttp,
        ClientConfigKey::ProxyUrl,
        ClientConfigKey::ProxyExcludes,
        ClientConfigKey::ProxyCaCertificate,
    ] {
        if let Some(value) = builder.get_config_value(&AmazonS3ConfigKey::Client(key)) {
            options = options.with_config(key, value);
        }
    }
    for certificate in certificates {
        options = options.with_root_certificate(certificate.clone());
    }
    options.with_connect_timeout(CONNECT_TIMEOUT)
}

fn certificates(settings: &LocationSettings) -> Result<Vec<Certificate>> {
    let Some(path) = &settings.ca_file else { return Ok(Vec::new()) };
    let bad = |reason: String| {
        Error::new(Kind::Config, format!("ca-file {}: {reason}", path.display()))
            .remedy("name a file of PEM certificates")
    };
    let pem = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
    let certificates = Certificate::from_pem_bundle(&pem).map_err(|e| bad(e.to_string()))?;
    match certificates.is_empty() {
        true => Err(bad("no certificate in it".to_string())),
        false => Ok(certificates),
    }
}
