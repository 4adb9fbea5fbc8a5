//! The clients of an S3 location.
//!
//! Credentials, in the usual order: those of the config, a profile that it names, the environment, web identity, the
//! shared files (`~/.aws/credentials`), the container's, the instance's.

use super::cloud::{self, Stores};
use super::connector::Connector;
use super::profile::Profile;
use super::settings::{Encryption, LocationSettings};
use crate::error::{Error, Kind, Result};
use object_store::aws::{
    AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, Checksum, S3ConditionalPut,
};
use object_store::{ClientConfigKey, StaticCredentialProvider};
use std::sync::Arc;

/// Builds both stores. Reads files that the settings or the environment name; asks nothing of the network.
pub(super) fn open(settings: &LocationSettings, bucket: &str) -> Result<Stores> {
    let builder = builder(settings, bucket)?;
    let value = |key| builder.get_config_value(&key).filter(|value| !value.is_empty());
    let client = |key| value(AmazonS3ConfigKey::Client(key));
    let connector = Connector::new(settings, &client)?;
    let endpoint =
        value(AmazonS3ConfigKey::S3Endpoint).or_else(|| value(AmazonS3ConfigKey::Endpoint));
    let allowed = client(ClientConfigKey::AllowHttp).as_deref() == Some("true");
    let plain = cloud::is_plain_http(endpoint.as_deref(), allowed)?;
    // Inside TLS the body needs no signature of its own, and SHA-256 would cost more than the
    // encryption.
    let builder = builder.with_unsigned_payload(!plain).with_http_connector(connector);
    cloud::stores!(builder, settings, plain)
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
    if let Some(path_style) = settings.path_style {
        builder = builder.with_virtual_hosted_style_request(!path_style);
    }
    if settings.allow_http {
        builder = builder.with_allow_http(true);
    }
    builder = with_credentials(builder, settings)?;
    if let Some(region) = &settings.region {
        builder = builder.with_region(region);
    }
    // The store checks every body against this before it publishes it; object lock demands one as
    // well.
    if builder.get_config_value(&AmazonS3ConfigKey::Checksum).is_none() {
        builder = builder.with_checksum_algorithm(Checksum::CRC64NVME);
    }
    Ok(match &settings.encryption {
        None => builder,
        Some(Encryption::Store) => builder.with_config(key("aws_server_side_encryption"), "AES256"),
        Some(Encryption::Kms(kms_key)) => {
            let builder = builder.with_config(key("aws_server_side_encryption"), "aws:kms");
            match kms_key {
                Some(kms_key) => builder.with_config(key("aws_sse_kms_key_id"), kms_key),
                None => builder,
            }
        }
    })
}

/// The library has these keys by name only.
fn key(name: &str) -> AmazonS3ConfigKey {
    name.parse().expect("a key that the library documents")
}

fn with_credentials(
    builder: AmazonS3Builder,
    settings: &LocationSettings,
) -> Result<AmazonS3Builder> {
    if let Some(credential) = credential(settings)? {
        let provider = StaticCredentialProvider::new(credential);
        return Ok(builder.with_credentials(Arc::new(provider) as _));
    }
    let env = |key: &str| std::env::var(key).ok().filter(|value| !value.is_empty());
    let is_set = |key| builder.get_config_value(&key).is_some_and(|value| !value.is_empty());
    let is_told = is_set(AmazonS3ConfigKey::AccessKeyId)
        || (is_set(AmazonS3ConfigKey::WebIdentityTokenFile) && is_set(AmazonS3ConfigKey::RoleArn));
    let profile = match (&settings.profile, is_told) {
        (Some(name), _) => Some(Profile::named(name, &env)?),
        (None, true) => None,
        (None, false) => Profile::usual(&env)?,
    };
    let Some(profile) = profile else { return Ok(builder) };
    let region = profile
        .region()
        .filter(|_| settings.profile.is_some() || !is_set(AmazonS3ConfigKey::Region));
    let builder = match region {
        Some(region) => builder.with_region(region),
        None => builder,
    };
    Ok(builder.with_credentials(Arc::new(profile) as _))
}

fn credential(settings: &LocationSettings) -> Result<Option<AwsCredential>> {
    match (&settings.access_key_id, &settings.secret_access_key) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) if settings.profile.is_some() => {
            Err(Error::new(Kind::Config, "both profile and access-key-id are given")
                .remedy("give one of them"))
        }
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
