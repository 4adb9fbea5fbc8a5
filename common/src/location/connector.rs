//! HTTP connections to stores: which TLS, whose certificates, through which proxy; and the checksum of an upload.
//!
//! The rest of a client's options (timeouts, whether plain HTTP may be) is the caller's, and comes with each request
//! for a client. Identity services of a platform, on link-local addresses, are never asked through a proxy.

use super::settings::{LocationSettings, TlsMin};
use crate::error::{Error, Kind, Result};
use async_trait::async_trait;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService,
};
use object_store::{ClientConfigKey, ClientOptions, Error as StoreError};
use reqwest::header::{HeaderName, HeaderValue};
use reqwest::{Certificate, NoProxy, Proxy, tls};
use std::path::Path;
use std::sync::Once;
use std::time::Duration;

/// Where platforms tell who one is; and this host.
const NEVER_PROXIED: &str =
    "169.254.169.254,169.254.170.2,169.254.170.23,metadata,metadata.google.internal";
const GOOGLE_HASH: HeaderName = HeaderName::from_static("x-goog-hash");

/// Travels with a write: the CRC-32C of what is sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crc32c(pub(super) u32);

/// Travels with a write of the probe: what is sent in place of what was signed, as if damaged on its way.
#[derive(Clone, Debug)]
pub(super) struct Instead(pub(super) Bytes);

/// Makes the clients of one location.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    certificates: Vec<Certificate>,
    proxy: Option<Proxy>,
    tls_min: TlsMin,
    /// Whether uploads are sent with the header by which Google's store checks them.
    google_hash: bool,
}

impl Connector {
    /// `env` gives what the environment says for a key of the clients. Reads the CA file.
    pub(super) fn new(
        settings: &LocationSettings,
        env: &dyn Fn(ClientConfigKey) -> Option<String>,
    ) -> Result<Connector> {
        install_crypto_provider();
        let mut certificates = match &settings.ca_file {
            Some(path) => certificates(path)?,
            None => Vec::new(),
        };
        if let Some(pem) = env(ClientConfigKey::ProxyCaCertificate) {
            let more = Certificate::from_pem_bundle(pem.as_bytes());
            certificates.extend(more.map_err(|e| bad_proxy(&format!("its certificate: {e}")))?);
        }
        let told = match &settings.proxy {
            Some(proxy) => Some(proxy.expose().to_string()),
            None => env(ClientConfigKey::ProxyUrl),
        };
        let usual = |names: [&str; 2]| {
            names.iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        };
        let excluded = env(ClientConfigKey::ProxyExcludes)
            .or_else(|| usual(["NO_PROXY", "no_proxy"]))
            .unwrap_or_default();
        let proxy = match (told, usual(["HTTPS_PROXY", "https_proxy"])) {
            (Some(url), _) => Some(proxy(&url, &excluded, |url| Proxy::all(url))?),
            (None, Some(url)) => Some(proxy(&url, &excluded, |url| Proxy::https(url))?),
            (None, None) => None,
        };
        let google_hash = settings.url.starts_with("gs:");
        Ok(Connector { certificates, proxy, tls_min: settings.tls_min, google_hash })
    }

    fn client(&self, options: &ClientOptions) -> reqwest::Result<reqwest::Client> {
        let value = |key| options.get_config_value(&key);
        let time = |key| -> Option<Duration> { humantime::parse_duration(&value(key)?).ok() };
        let allow_http = value(ClientConfigKey::AllowHttp).as_deref() == Some("true");
        let tls_min = match self.tls_min {
            TlsMin::Tls12 => tls::Version::TLS_1_2,
            TlsMin::Tls13 => tls::Version::TLS_1_3,
        };
        // Compression would change the lengths that objects are told by.
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("backstay/", env!("CARGO_PKG_VERSION")))
            .https_only(!allow_http)
            .http1_only()
            .no_proxy()
            .tls_version_min(tls_min)
            .tls_certs_merge(self.certificates.clone());
        if let Some(proxy) = &self.proxy {
            builder = builder.proxy(proxy.clone());
        }
        if let Some(limit) = time(ClientConfigKey::Timeout) {
            builder = builder.timeout(limit);
        }
        if let Some(limit) = time(ClientConfigKey::ConnectTimeout) {
            builder = builder.connect_timeout(limit);
        }
        if let Some(limit) = time(ClientConfigKey::ReadTimeout) {
            builder = builder.read_timeout(limit);
        }
        builder.build()
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = self
            .client(options)
            .map_err(|e| StoreError::Generic { store: "HTTP", source: Box::new(e) })?;
        Ok(HttpClient::new(Service { client, google_hash: self.google_hash }))
    }
}

#[derive(Debug)]
struct Service {
    client: reqwest::Client,
    google_hash: bool,
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if let Some(Crc32c(crc)) = request.extensions().get().copied()
            && self.google_hash
        {
            let text = format!("crc32c={}", BASE64_STANDARD.encode(crc.to_be_bytes()));
            let value = HeaderValue::try_from(text).expect("base64 is plain text");
            request.headers_mut().insert(GOOGLE_HASH, value);
        }
        if let Some(Instead(bytes)) = request.extensions().get().cloned() {
            *request.body_mut() = bytes.into();
        }
        HttpService::call(&self.client, request).await
    }
}

/// TLS needs one process-wide choice of cryptography; whoever chose first is right.
fn install_crypto_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// No message repeats the URL, which may hold a password.
fn proxy(url: &str, excluded: &str, of: fn(&str) -> reqwest::Result<Proxy>) -> Result<Proxy> {
    let is_url = url::Url::parse(url)
        .is_ok_and(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
    if !is_url {
        return Err(bad_proxy("not an http or https URL"));
    }
    let proxy = of(url).map_err(|_| bad_proxy("not the URL of a proxy"))?;
    let excluded = match excluded {
        "" => NEVER_PROXIED.to_string(),
        more => format!("{NEVER_PROXIED},{more}"),
    };
    Ok(proxy.no_proxy(NoProxy::from_string(&excluded)))
}

fn bad_proxy(reason: &str) -> Error {
    Error::new(Kind::Config, format!("proxy: {reason}")).remedy("write http://HOST:PORT")
}

fn certificates(path: &Path) -> Result<Vec<Certificate>> {
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
