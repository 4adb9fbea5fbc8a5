//! The clients of a Google Cloud Storage location.
//!
//! Credentials, in the usual order: the file that the config names, the environment (`GOOGLE_APPLICATION_CREDENTIALS`
//! and `GOOGLE_SERVICE_ACCOUNT`), those of `gcloud auth application-default login`, the instance's or the workload's by
//! the metadata server.

use super::cloud::{self, Stores};
use super::connector::Connector;
use super::settings::LocationSettings;
use crate::error::{Error, Kind, Result};
use object_store::ClientConfigKey;
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use std::path::Path;

/// Builds both stores. Reads the file with the credentials; asks nothing of the network.
pub(super) fn open(settings: &LocationSettings, bucket: &str) -> Result<Stores> {
    let builder = builder(settings, bucket)?;
    let value = |key| builder.get_config_value(&key).filter(|value| !value.is_empty());
    let client = |key| value(GoogleConfigKey::Client(key));
    let connector = Connector::new(settings, &client)?;
    let allowed = client(ClientConfigKey::AllowHttp).as_deref() == Some("true");
    let endpoint = value(GoogleConfigKey::BaseUrl);
    let plain = cloud::is_plain_http(endpoint.as_deref(), allowed)?;
    let builder = builder.with_http_connector(connector);
    cloud::stores!(builder, settings, plain)
}

fn builder(settings: &LocationSettings, bucket: &str) -> Result<GoogleCloudStorageBuilder> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_config(GoogleConfigKey::BaseUrl, endpoint.trim_end_matches('/'));
    }
    if settings.allow_http {
        builder = builder.with_config(GoogleConfigKey::Client(ClientConfigKey::AllowHttp), "true");
    }
    let named = builder.get_config_value(&GoogleConfigKey::ApplicationCredentials);
    match (&settings.credentials_file, named) {
        (Some(path), _) => Ok(match kind_of(path)? {
            FileKind::ServiceAccount => builder.with_service_account_path(path.to_string_lossy()),
            FileKind::User => builder.with_application_credentials(path.to_string_lossy()),
        }),
        (None, Some(path)) => kind_of(Path::new(&path)).map(|_| builder),
        (None, None) => Ok(builder),
    }
}

enum FileKind {
    ServiceAccount,
    User,
}

/// Refuses by name what is no key of a service account, nor what `gcloud` leaves for a user.
fn kind_of(path: &Path) -> Result<FileKind> {
    let bad = |reason: String| {
        Error::new(Kind::Config, format!("credentials file {}: {reason}", path.display())).remedy(
            "name the JSON key of a service account, or run where the platform gives an identity",
        )
    };
    let text = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
    // A parse error would quote the file.
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|_| bad("it is not JSON".into()))?;
    match json["type"].as_str() {
        Some("service_account") => Ok(FileKind::ServiceAccount),
        Some("authorized_user") => Ok(FileKind::User),
        Some(other) => Err(bad(format!("credentials of type {other:?} are not supported"))),
        None => Err(bad("it has no \"type\"".into())),
    }
}
